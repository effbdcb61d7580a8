"""What all stages of a run share: devices, data sets, folder, events, the record of results."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

import slimcli
from slimcli.artifacts import atomic, deploy, process, run_folder, summary
from slimcli.artifacts.events import EventLog
from slimcli.artifacts.run_folder import RunFolder
from slimcli.errors import SlimError
from slimcli.solver.data import Sharding
from slimcli.solver.datasets import Data, build_data, generate_datasets
from slimcli.solver.devices import describe
from slimcli.solver.evaluation import Evaluator
from slimcli.solver.interrupts import Signals
from slimcli.solver.job import Job, StageJob
from slimcli.solver.planner import fresh_model
from slimcli.solver.starting_weights import start_weights
from slimcli.solver.step import move_batch


@dataclass
class Run:
    """A run in progress.

    Attributes:
        job: What was asked for.
        fabric: Devices and processes; each stage has its own precision.
        datasets: What the user's hook returned, called once.
        folder: The run folder, in every process.
        events: Where everything is reported; silent beside the first process.
        signals: Ctrl-C and SIGTERM.
        record: The content of summary.json so far.
        started: When this process began, in seconds of the monotonic clock.
        saves: Checkpoints written so far; the first one is read back.
    """

    job: Job
    fabric: Fabric
    datasets: tuple[Any, ...]
    folder: RunFolder
    events: EventLog
    signals: Signals
    record: dict[str, Any]
    started: float = field(default_factory=time.monotonic)
    saves: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return bool(self.fabric.is_global_zero)

    @property
    def seed(self) -> int:
        """The run's seed: that of its first stage."""
        return self.job.stages[0].training.seed

    def seconds(self) -> float:
        """Wall-clock time of the run, parts before a resume included."""
        return float(self.record["seconds_before"]) + time.monotonic() - self.started

    def evaluator(self, stage: StageJob) -> Evaluator:
        """The user's metric on this run's device."""

        def move(data: Any) -> Any:
            return move_batch(self.fabric, data, stage.training.channels_last)

        return Evaluator(self.job.hooks, move, self.check_stop, self.note)

    def note(self, text: str) -> None:
        """A warning that is read with the result: in the log, in summary.json, in the report."""
        if text not in self.record["notes"]:
            self.events.emit("notice", text=text, level="warning")
            self.record["notes"].append(text)

    def shown(self, path: Path) -> str:
        """A path as a user reads it, who is where the command was started."""
        return run_folder.shown(path, self.job.started_in)

    def check_stop(self) -> None:
        """Raise where a signal came to any process."""
        if self.fabric.world_size > 1:
            received = torch.tensor(self.signals.received, device=self.fabric.device)
            largest = self.fabric.all_reduce(received, reduce_op="max")
            self.signals.received = int(largest.item()) if isinstance(largest, Tensor) else 0
        self.signals.check()

    def start_model(self, index: int) -> nn.Module:
        """What stage ``index`` starts from: the user's model, or what the stage before left."""
        model = fresh_model(self.job.hooks, self.seed)
        if index == 0:
            model = start_weights(self.job, model)
        else:
            before = self.job.stages[index - 1].name
            model = deploy.load_deploy(self.folder.handover(before), model)
        model.to(self.fabric.device)
        if self.fabric.world_size > 1:
            with torch.no_grad():
                for tensor in (*model.parameters(), *model.buffers()):
                    tensor.copy_(self.fabric.broadcast(tensor))
        return model

    def data(self, stage: StageJob, model: nn.Module) -> Data:
        """The sources of a stage."""
        sharding = Sharding(self.fabric.global_rank, self.fabric.world_size)
        return build_data(
            self.datasets, self.job.hooks, stage.training, model, sharding, self._distribute
        )

    def _distribute(self, loader: Any) -> Any:
        if self.fabric.world_size == 1:
            return loader
        return self.fabric.setup_dataloaders(loader, move_to_device=False)

    def write_summary(self, status: str, exit_code: int | None) -> None:
        """Bring summary.json up to date; at the end of a run also draw the report."""
        self.record.update(status=status, exit_code=exit_code, seconds=round(self.seconds(), 3))
        if self.is_main:
            shown = {name: self.record[name] for name in summary.FIELDS}
            summary.write(self.folder.summary, shown)
            if exit_code is not None:
                self._report()

    def _report(self) -> None:
        """report.html and card.md; a fault in drawing them must not change how the run ended."""
        from slimcli.report.write import write_report

        try:
            write_report(self.folder.path)
        except Exception as error:
            text = f"no report: {type(error).__name__}: {error}; try slim report"
            self.events.emit("notice", level="warning", text=text)


def begin(job: Job, fabric: Fabric, signals: Signals, stored: dict[str, Any] | None) -> Run:
    """Data and folder of a new run, or of one that goes on from ``stored``."""
    datasets = generate_datasets(job.hooks, job.stages[0].training.seed)
    if fabric.world_size > 1:
        fabric.barrier()  # no folder is left of a run that has no data in one of its processes
    folder = _folder(job, fabric)
    is_main = fabric.is_global_zero
    if job.resume is None and is_main:
        _write_origin(job, folder, environment(fabric))
    if is_main:
        process.claim(folder.path)
    length = stored["events_bytes"] if stored else 0
    events = EventLog(folder.path if is_main else None, job.listeners, length, job.started_in)
    record = stored["record"] if stored else _record(job)
    record["seconds_before"] = record["seconds"]
    record["environment"] = environment(fabric)
    record["changes"] = [_as_first_written(each, record["changes"]) for each in job.changes]
    run = Run(job, fabric, datasets, folder, events, signals, record)
    events.emit(
        "run_start",
        folder=str(folder.path),
        version=slimcli.__version__,
        seed=run.seed,
        device=describe(fabric),
        stages=[stage.name for stage in job.stages],
        resumed=stored is not None,
    )
    return run


def _as_first_written(change: dict[str, Any], before: list[dict[str, Any]]) -> dict[str, Any]:
    """A change that the run already had keeps where it was first written."""
    same = ("key", "default", "value")
    return next((b for b in before if all(b[key] == change[key] for key in same)), change)


def _write_origin(job: Job, folder: RunFolder, machine: dict[str, Any]) -> None:
    """Where the run comes from; a folder that can't even hold that is taken away again."""
    try:
        recipe = job.recipe(folder.path)
        run_folder.write_origin(folder, recipe, job.recipe_source, job.code, job.started_in)
        atomic.write_text(folder.path / "env.json", json.dumps(machine, indent=2) + "\n")
    except (SlimError, OSError):
        run_folder.discard(folder)
        raise


def _folder(job: Job, fabric: Fabric) -> RunFolder:
    """Made by the first process, known to all."""
    if job.resume is not None:
        return run_folder.open_run(job.resume)
    path = None
    if fabric.is_global_zero:
        save_dir = job.started_in / job.stages[0].training.save_dir
        path = str(run_folder.create(save_dir, job.task_name, job.name).path)
    if fabric.world_size > 1:
        path = fabric.broadcast(path)
    assert path is not None
    return RunFolder(Path(path))


def _record(job: Job) -> dict[str, Any]:
    last = job.stages[-1]
    return summary.empty(job.task_name, last.algorithm, job.stages[0].training.seed)


def environment(fabric: Fabric) -> dict[str, Any]:
    """What bits depend on: versions, device, threads."""
    return {
        "slim": slimcli.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": describe(fabric),
        "processes": fabric.world_size,
        "threads": torch.get_num_threads(),
    }
