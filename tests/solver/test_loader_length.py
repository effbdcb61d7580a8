"""Training loaders that give fewer or more batches than their length says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader, IterableDataset

from slimcli.errors import RunError
from slimcli.solver.job import Job, RunResult
from slimcli.solver.schedule import plan_schedule
from slimcli.solver.stages import run
from tests.solver import toys
from tests.solver.test_resume import same, states, stopped_and_resumed
from tests.solver.test_schedule import real_rates

REAL = 5  # batches of 8 in an epoch of 40 samples


class Stream(IterableDataset[Any]):
    """40 samples, and a length that says something else."""

    def __init__(self, claimed: int) -> None:
        self.claimed = claimed
        self.samples = toys.images(toys.SAMPLES, 1)

    def __iter__(self) -> Any:
        return iter(self.samples)

    def __len__(self) -> int:
        return self.claimed


def lying(folder: Path, claimed_batches: int, seen: list[float] | None = None, **keys: Any) -> Job:
    return toys.with_hooks(
        toys.job(folder, **keys),
        dataset_generator=lambda: (Stream(8 * claimed_batches), toys.images(20, 2)),
        optimizer_generator=real_rates([] if seen is None else seen),
    )


def trained(
    folder: Path, claimed_batches: int, seen: list[float] | None = None, **keys: Any
) -> RunResult:
    return run(lying(folder, claimed_batches, seen, **keys))


def events(result: RunResult, name: str) -> list[dict[str, Any]]:
    lines = (result.folder / "events.jsonl").read_text().splitlines()
    return [each for each in map(json.loads, lines) if each["event"] == name]


def planned_rates(claimed_batches: int, **keys: Any) -> list[list[float]]:
    """The plan's learning rates, a list for each epoch."""
    training = toys.job(Path(), **keys).stages[0].training
    rates = plan_schedule(toys.HOOKS, training.model_dump(), training, claimed_batches)
    per_epoch = claimed_batches
    return [list(rates.learning_rates[e * per_epoch : (e + 1) * per_epoch]) for e in range(3)]


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("claimed", [3, 8])
def test_each_epoch_starts_at_its_planned_rate_and_the_reported_rate_is_the_optimizers(
    tmp_path: Path, claimed: int, interval: str
) -> None:
    seen: list[float] = []
    result = trained(tmp_path, claimed, seen, scheduler_interval=interval, warmup_steps=2)
    reported = [each["lr"] for each in events(result, "step")]
    taken = min(claimed, REAL)
    plan = planned_rates(claimed, scheduler_interval=interval, warmup_steps=2)
    expected = [rate for epoch in plan for rate in epoch[:taken]]
    assert len(reported) == 3 * taken
    assert reported == pytest.approx(expected)
    assert seen == pytest.approx(expected)
    ends = [each["lr"] for each in events(result, "epoch_end")]
    assert ends == pytest.approx([epoch[taken - 1] for epoch in plan])


@pytest.mark.parametrize(
    ("claimed", "said"),
    [
        (8, "gave 5 batches in epoch 1 and its length says 8: 3 planned batches an epoch are miss"),
        (3, "gave more batches in epoch 1 than the 3 its length says: those from number 4 on are"),
    ],
)
def test_a_wrong_length_is_told_once_in_the_log_the_summary_and_the_report(
    tmp_path: Path, claimed: int, said: str
) -> None:
    result = trained(tmp_path, claimed)
    warnings = [each["text"] for each in events(result, "notice") if each["level"] == "warning"]
    (text,) = [each for each in warnings if "training loader" in each]
    assert said in text
    assert result.summary["notes"].count(text) == 1
    assert said in (result.folder / "log.txt").read_text()
    assert said in (result.folder / "report.html").read_text()


@pytest.mark.parametrize("keys", [{}, {"accumulate_grad_batches": 2}])
def test_a_right_length_is_not_told(tmp_path: Path, keys: dict[str, Any]) -> None:
    result = trained(tmp_path, REAL, **keys)
    assert [each for each in result.summary["notes"] if "training loader" in each] == []
    assert len(events(result, "step")) == 3 * -(-REAL // keys.get("accumulate_grad_batches", 1))


def test_fewer_steps_that_were_asked_for_are_not_told(tmp_path: Path) -> None:
    result = run(replace(lying(tmp_path, REAL), max_steps=2))
    assert len(events(result, "step")) == 6
    assert [each for each in result.summary["notes"] if "training loader" in each] == []


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_going_on_after_a_stop_equals_the_run_that_never_stopped(
    tmp_path: Path, interval: str
) -> None:
    keys = {"scheduler_interval": interval}
    straight = run(lying(tmp_path / "a", 8, **keys)).folder
    resumed = stopped_and_resumed(lying(tmp_path / "b", 8, **keys), 7)
    assert same(states(straight), states(resumed)) == []
    notes = json.loads((resumed / "summary.json").read_text())["notes"]
    assert len([each for each in notes if "training loader gave 5" in each]) == 1


def test_a_loader_that_is_used_up_after_its_first_epoch_is_an_error(tmp_path: Path) -> None:
    class Once(Stream):
        def __iter__(self) -> Any:
            return self.left

    def sets() -> Any:
        stream = Once(toys.SAMPLES)
        stream.left = iter(toys.images(3 * toys.SAMPLES, 1))  # the planner looks at some, too
        return DataLoader(stream, 8), toys.images(20, 2)

    with pytest.raises(RunError, match="gave no batch in epoch") as caught:
        run(toys.with_hooks(toys.job(tmp_path, epoch=5), dataset_generator=sets))
    (problem,) = caught.value.problems
    assert problem.code == "E-DATA-EMPTY"
    assert problem.expected == "the 5 batches its length says"
