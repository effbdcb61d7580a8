"""Stopping anywhere and going on equals the uninterrupted run, bit for bit."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slimcli.algorithms.finetune.method import FinetuneCompressor
from slimcli.artifacts import atomic, checkpoint
from slimcli.errors import Interrupted, RunError, Terminated
from slimcli.solver.job import Job
from slimcli.solver.stages import run
from tests.solver import toys

STEPS_PER_EPOCH = 5
TIMES = ("t", "seconds", "folder", "path", "resumed")
UNIMPORTANT = ("run_start", "run_end", "saved", "interrupted", "artifact")


def interrupt(number: int = signal.SIGINT) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def stopped_and_resumed(job: Job, step: int) -> Path:
    """Run until a signal comes in the given training step, then resume to the end."""
    stopping = toys.at_step(toys.PLANNER_CALLS + step, interrupt())
    with pytest.raises(Interrupted):
        run(toys.with_hooks(job, calculate_loss_function=stopping))
    (folder,) = (
        each
        for each in (Path(job.stages[0].training.save_dir) / "toy").iterdir()
        if not each.is_symlink()
    )
    return run(replace(job, resume=folder)).folder


def same(a: Any, b: Any, path: str = "") -> list[str]:
    """Places where two nested states differ in any bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = dict.fromkeys((*a, *b))
        return [each for key in keys for each in same(a.get(key), b.get(key), f"{path}.{key}")]
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return [] if a.shape == b.shape and torch.equal(a, b) else [path]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [each for index, (x, y) in pairs for each in same(x, y, f"{path}[{index}]")]
    return [] if a == b else [path]


def states(folder: Path) -> dict[str, Any]:
    found = {}
    for name in ("last", "best"):
        content = checkpoint.load(folder / "checkpoints" / f"{name}.pt")
        for key in ("events_bytes", "record"):
            del content[key]
        found[name] = content
    return found


def events(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [
        {key: value for key, value in each.items() if key not in TIMES}
        for each in found
        if each["event"] not in UNIMPORTANT
    ]


@pytest.mark.parametrize("step", [3, STEPS_PER_EPOCH, 7, 13], ids="step_{}".format)
@pytest.mark.parametrize("compressor", [FinetuneCompressor, toys.Cutter])
def test_stop_and_resume_equals_a_straight_run(
    tmp_path: Path, compressor: type[Any], step: int
) -> None:
    """In the middle of an epoch, at its end, before and after a cut that changes shapes."""
    straight = run(toys.job(tmp_path / "straight", compressor)).folder
    resumed = stopped_and_resumed(toys.job(tmp_path / "stopped", compressor), step)
    assert same(states(straight), states(resumed)) == []
    assert events(straight) == events(resumed)


@pytest.mark.parametrize(
    "keys",
    [
        {"accumulate_grad_batches": 2},
        {"scheduler_interval": "step", "warmup_steps": 8},
        {"nesterov": True, "bias_lr_multiplier": 2.0, "no_decay": ("norm",)},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_resuming_holds_with_other_settings(tmp_path: Path, keys: dict[str, Any]) -> None:
    straight = run(toys.job(tmp_path / "straight", **keys)).folder
    resumed = stopped_and_resumed(toys.job(tmp_path / "stopped", **keys), 7)
    assert same(states(straight), states(resumed)) == []


@pytest.mark.parametrize(
    "make",
    [
        lambda config, params: torch.optim.AdamW(params, lr=1e-3),
        lambda config, params: torch.optim.SGD([p for g in params for p in g["params"]], lr=0.1),
    ],
    ids=["adamw", "flat sgd"],
)
def test_resuming_holds_with_other_optimizers(tmp_path: Path, make: Any) -> None:
    def scheduler(config: Any, optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])

    def with_optimizer(folder: Path) -> Job:
        return toys.with_hooks(
            toys.job(folder, toys.Cutter), optimizer_generator=make, scheduler_generator=scheduler
        )

    straight = run(with_optimizer(tmp_path / "straight")).folder
    resumed = stopped_and_resumed(with_optimizer(tmp_path / "stopped"), 7)
    assert same(states(straight), states(resumed)) == []


def test_a_users_loader_is_replayed(tmp_path: Path) -> None:
    def loaders() -> Any:
        train, validation = toys.datasets()
        loader = torch.utils.data.DataLoader(train, batch_size=8, shuffle=True)
        return loader, torch.utils.data.DataLoader(validation, batch_size=8)

    def job(folder: Path) -> Job:
        return toys.with_hooks(toys.job(folder), dataset_generator=loaders)

    straight = run(job(tmp_path / "straight")).folder
    resumed = stopped_and_resumed(job(tmp_path / "stopped"), 7)
    assert same(states(straight), states(resumed)) == []


def test_a_longer_schedule_continues_on_its_own_curve(tmp_path: Path) -> None:
    job = toys.job(tmp_path, epoch=2)
    folder = run(job).folder
    longer = toys.job(tmp_path, epoch=4).stages
    run(replace(job, stages=longer, resume=folder))
    rates = [each["lr"] for each in events(folder) if each["event"] == "epoch_end"]
    cosine = [0.1 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in (2, 3)]
    assert rates[2:] == pytest.approx(cosine)
    assert checkpoint.load(folder / "checkpoints" / "last.pt")["position"]["epoch"] == 4


def test_the_state_of_a_hook_survives(tmp_path: Path) -> None:
    class Smoothed:
        """A loss with a running mean."""

        def __init__(self) -> None:
            self.mean = torch.zeros(())

        def __call__(self, prediction: Tensor, data: Any) -> Tensor:
            value = toys.loss(prediction, data)
            self.mean = 0.9 * self.mean + 0.1 * value.detach()
            return value + 0.1 * (value - self.mean) ** 2

        def state_dict(self) -> dict[str, Any]:
            return {"mean": self.mean}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.mean = state["mean"]

    class Stopping(Smoothed):
        calls = 0

        def __call__(self, prediction: Tensor, data: Any) -> Tensor:
            self.calls += 1
            if self.calls == toys.PLANNER_CALLS + 7:
                interrupt()()
            return super().__call__(prediction, data)

    straight = run(
        toys.with_hooks(toys.job(tmp_path / "a"), calculate_loss_function=Smoothed())
    ).folder
    job = toys.job(tmp_path / "b")
    with pytest.raises(Interrupted):
        run(toys.with_hooks(job, calculate_loss_function=Stopping()))
    folder = (tmp_path / "b" / "toy" / "latest").resolve()
    resumed = run(
        replace(toys.with_hooks(job, calculate_loss_function=Smoothed()), resume=folder)
    ).folder
    assert same(states(straight), states(resumed)) == []


def test_sigterm_has_its_own_exit_code_and_names_the_command(tmp_path: Path) -> None:
    stopping = toys.at_step(toys.PLANNER_CALLS + 2, interrupt(signal.SIGTERM))
    with pytest.raises(Terminated) as caught:
        run(toys.with_hooks(toys.job(tmp_path), calculate_loss_function=stopping))
    assert caught.value.exit_code == 143
    assert "slim resume" in str(caught.value)
    summary = json.loads((tmp_path / "toy" / "latest" / "summary.json").read_text())
    assert (summary["status"], summary["exit_code"]) == ("interrupted", 143)


def test_another_number_of_threads_is_said(tmp_path: Path) -> None:
    folder = stopped_and_resumed(toys.job(tmp_path), 7)
    assert not [each for each in events(folder) if each["event"] == "notice"]
    path = folder / "checkpoints" / "last.pt"
    stored = checkpoint.load(path)
    checkpoint.save(path, {**stored, "threads": 999})
    run(replace(toys.job(tmp_path), resume=folder))
    assert "resumed with threads" in (folder / "log.txt").read_text()


def test_a_second_signal_stops_without_saving(tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    stopping = toys.at_step(toys.PLANNER_CALLS + 7, twice)
    with pytest.raises(Interrupted) as caught:
        run(toys.with_hooks(toys.job(tmp_path), calculate_loss_function=stopping))
    assert caught.value.exit_code == 130
    stored = checkpoint.load(tmp_path / "toy" / "latest" / "checkpoints" / "last.pt")
    assert stored["position"]["step"] == STEPS_PER_EPOCH


def test_stages_resume_in_the_second_stage(tmp_path: Path) -> None:
    def staged(folder: Path) -> Job:
        job = toys.job(folder, epoch=2)
        second = toys.job(folder, toys.Cutter, epoch=2).stages[0]
        return replace(job, stages=(*job.stages, replace(second, name="2-toy")))

    straight = run(staged(tmp_path / "straight")).folder
    job = staged(tmp_path / "stopped")
    stopping = toys.at_step(
        2 * toys.PLANNER_CALLS + 2 * STEPS_PER_EPOCH + STEPS_PER_EPOCH + 2, interrupt()
    )
    with pytest.raises(Interrupted):
        run(toys.with_hooks(job, calculate_loss_function=stopping))
    folder = (tmp_path / "stopped" / "toy" / "latest").resolve()
    stored = checkpoint.load(folder / "checkpoints" / "last.pt")
    assert (stored["stage"], stored["position"]["epoch"]) == (1, 1)
    resumed = run(replace(job, resume=folder)).folder
    assert same(states(straight), states(resumed)) == []
    summaries = [json.loads((each / "summary.json").read_text()) for each in (straight, resumed)]
    assert summaries[0]["final"]["metrics"] == summaries[1]["final"]["metrics"]
    assert summaries[0]["stages"] == summaries[1]["stages"]


def test_a_full_disk_keeps_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, written = os.replace, [0]

    def failing(source: Any, target: Any) -> None:
        if str(target).endswith("last.pt"):
            written[0] += 1
            if written[0] == 3:
                raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(atomic.os, "replace", failing)
    with pytest.raises(RunError, match="no space left"):
        run(toys.job(tmp_path))
    folder = tmp_path / "toy" / "latest" / "checkpoints"
    assert checkpoint.load(folder / "last.pt")["position"]["epoch"] == 1
    assert sorted(each.name for each in folder.iterdir()) == ["best.pt", "last.pt"]


def test_state_that_cannot_be_stored_is_an_error_before_the_first_step(tmp_path: Path) -> None:
    class Pickled(toys.Cutter):
        def state_dict(self) -> dict[str, Any]:
            return {"layer": torch.nn.Linear(1, 1)}

    with pytest.raises(RunError, match=r"compressor\.layer can't be stored"):
        run(toys.job(tmp_path, Pickled))


def test_another_model_is_refused(tmp_path: Path) -> None:
    job = toys.job(tmp_path)
    stopping = toys.at_step(toys.PLANNER_CALLS + 2, interrupt())
    with pytest.raises(Interrupted):
        run(toys.with_hooks(job, calculate_loss_function=stopping))
    folder = (tmp_path / "toy" / "latest").resolve()
    other = toys.with_hooks(
        replace(job, resume=folder),
        build_model=lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 3)),
    )
    with pytest.raises(RunError, match="does not fit the model"):
        run(other)
