"""``slim bench``: how long one batch takes, form by form, measured in turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from slimcli import console
from slimcli.cli.arguments import existing

if TYPE_CHECKING:
    from slimcli.cli.finished import FinishedRun

WARM_UP = 3


@click.command(name="bench")
@click.argument(
    "target",
    metavar="RUN|FILE",
    type=click.Path(path_type=Path),
    callback=existing("a run folder, model.onnx or model.engine"),
)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--repeats", type=click.IntRange(min=3), default=50, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: as torch.")
@click.option(
    "--run",
    "run_path",
    type=click.Path(path_type=Path),
    callback=existing("a run folder"),
    help="The run whose data and hooks to use, for a file that lies elsewhere.",
)
def command(
    target: Path, batch: int, repeats: int, threads: int | None, run_path: Path | None
) -> None:
    """Measure the latency of one batch through the predict function.

    A run is measured as the model it started from and in every form it left; the forms take turns,
    so that a busy machine slows all of them alike.

    \b
    Examples:
      slim bench checkpoints/digits/latest --batch 32
      slim bench checkpoints/digits/latest/artifacts/model.engine --json
    """
    import torch

    from slimcli.cli import finished
    from slimcli.cli.eval import run_around

    if threads:
        torch.set_num_threads(threads)
    target = target.absolute()  # the hooks, imported below, may change the current folder
    if target.is_file():
        run = finished.open_finished(run_path or run_around(target))
        models = {target.name: finished.load_file(target)}
    else:
        run = finished.open_finished(run_path or target)
        models = _models(run)
    data = sized_batch(run, batch)
    seconds = in_turns({name: _call(run, model, data) for name, model in models.items()}, repeats)
    rows = {name: statistics(values, batch) for name, values in seconds.items()}
    device = str(run.fabric.device)
    measured = {"batch": batch, "repeats": repeats, "forms": rows, "device": device}
    if not target.is_file():
        _store(run.folder.path, measured)
    if console.settings().json:
        console.document({"version": 1, **measured})
        return
    console.table(
        ("form", "median ms", "p99 ms", "samples/s"),
        [
            (name, f"{row['median_ms']:.3f}", f"{row['p99_ms']:.3f}", f"{row['per_second']:.0f}")
            for name, row in rows.items()
        ],
    )
    console.say(f"batch {batch} on {device}, {repeats} repeats in turns")


def _store(folder: Path, measured: dict[str, Any]) -> None:
    """For the report; a folder that can't be written takes nothing from what was measured."""
    from slimcli.artifacts import latency
    from slimcli.cli import full_disk
    from slimcli.cli.report import refresh
    from slimcli.errors import SlimError

    try:
        with full_disk.repeat("slim bench"):
            latency.note(folder, measured)
    except SlimError as error:
        console.warn(f"not in the report: {error}")
    else:
        refresh(folder)


def _models(run: FinishedRun) -> dict[str, Any]:
    """The user's own model, and every form there is."""
    from slimcli.artifacts.tensorrt import machine
    from slimcli.cli.finished import FORMS, load_file

    models: dict[str, Any] = {"original": run.fresh_model().to(run.fabric.device).eval()}
    models["deploy"] = run.deployed()
    for form, name in FORMS.items():
        path = run.folder.artifacts / name
        if path.is_file() and (form != "trt" or machine.gpu() is not None):
            models[form] = load_file(path)
    return models


def sized_batch(run: FinishedRun, samples: int) -> Any:
    """A validation batch cut, or repeated, to this many samples."""
    import torch

    from slimcli.artifacts import nested

    batch = run.validation_batches(1)[0]
    tensors = [tensor for _, tensor in nested.describe(batch)[1]]
    size = tensors[0].shape[0]

    def resize(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.ndim or tensor.shape[0] != size:
            return tensor
        return torch.cat([tensor] * -(-samples // size))[:samples].contiguous()

    return nested.substitute(batch, iter([resize(each) for each in tensors]))


def _call(run: FinishedRun, model: Any, data: Any) -> Callable[[], None]:
    import torch

    def call() -> None:
        with torch.no_grad():
            run.predict(model, data)
        if run.fabric.device.type == "cuda":
            torch.cuda.synchronize()

    return call


def in_turns(calls: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, one round after the other.

    >>> {name: len(each) for name, each in in_turns({"a": lambda: None}, 5).items()}
    {'a': 5}
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(WARM_UP + repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def statistics(seconds: list[float], samples: int) -> dict[str, float]:
    """Median and p99 in milliseconds, and samples a second at the median.

    >>> statistics([0.001, 0.002, 0.003], 4)
    {'median_ms': 2.0, 'p99_ms': 3.0, 'per_second': 2000.0}
    """
    ordered = sorted(seconds)
    p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    middle = median(ordered)
    return {"median_ms": middle * 1e3, "p99_ms": p99 * 1e3, "per_second": samples / middle}
