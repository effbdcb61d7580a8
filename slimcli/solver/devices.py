"""Lightning Fabric set up from the recipe: which devices, which precision, how many processes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy

from slimcli.errors import MissingError, Problem, RecipeError
from slimcli.solver.config import TrainingConfig


def make_fabric(training: TrainingConfig) -> Fabric:
    """A launched Fabric: beyond this line there may be several processes.

    Raises:
        MissingError: A device that this machine does not have.
        RecipeError: Keys that do not go together.
    """
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it greets on stderr
    accelerator, devices = _choose(training)
    if accelerator == "cpu" and training.precision == "16-mixed":
        raise RecipeError(
            Problem(
                "E-RECIPE-PRECISION",
                "config.precision: float16 needs a GPU, and this run is on the CPU",
                expected="32 or bf16-mixed",
                received="16-mixed",
            )
        )
    count = devices if isinstance(devices, int) else len(devices)
    settings: dict[str, Any] = {"devices": devices}
    if "TORCHELASTIC_RUN_ID" in os.environ or "SLURM_NTASKS" in os.environ:
        settings.update(_external_processes(count))
        count = settings.pop("count")
    if count > 1:
        # A branch only some batches use must not stop the run, hence find_unused_parameters.
        settings["strategy"] = DDPStrategy(find_unused_parameters=True)
    fabric = Fabric(accelerator=accelerator, precision=training.precision, **settings)
    fabric.launch()
    return fabric


def _choose(training: TrainingConfig) -> tuple[str, Any]:
    """Accelerator and devices, as Fabric wants them."""
    if training.devices == "cpu" or (not training.devices and not torch.cuda.is_available()):
        return "cpu", training.num_processes or 1
    if len(set(training.devices)) < len(training.devices):
        raise RecipeError(
            Problem(
                "E-RECIPE-DEVICES",
                "config.devices names a GPU twice",
                expected="each id once",
                received=str(list(training.devices)),
            )
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if max(training.devices, default=0) >= count:
        raise MissingError(
            Problem(
                "E-MISSING-GPU",
                "config.devices names a GPU this machine does not have",
                expected=f"ids below {count}" if count else "no id: PyTorch finds no GPU",
                received=str(list(training.devices)),
                fix="devices: cpu, or [] for what there is",
            )
        )
    return "cuda", list(training.devices) or [0]


def _external_processes(count: int) -> dict[str, Any]:
    """Under torchrun or SLURM the launcher decides how many processes there are."""
    world = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(count)))
    nodes = max(1, world // max(1, local))
    return {"devices": local, "num_nodes": nodes, "count": world}


@contextmanager
def determinism(training: TrainingConfig) -> Iterator[None]:
    """``deterministic: true`` allows only algorithms that give the same bits each time."""
    if not training.deterministic:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def describe(fabric: Fabric) -> str:
    """``cpu``, ``cuda:0 NVIDIA H100`` or ``2 processes on cpu``, for the first line of the log."""
    device = fabric.device
    name = str(device)
    if device.type == "cuda":
        name += f" {torch.cuda.get_device_name(device)}"
    return name if fabric.world_size == 1 else f"{fabric.world_size} processes, first on {name}"
