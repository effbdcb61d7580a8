"""What is planned is what happens: learning rates, warm-up, schedulers of the user."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from slimcli.algorithms.csgd.config import CSGDConfig
from slimcli.algorithms.csgd.method import CSGDCompressor
from slimcli.algorithms.resrep.config import ResRepConfig
from slimcli.algorithms.resrep.method import ResRepCompressor
from slimcli.compressor import Compressor, Schedule
from slimcli.errors import RunError
from slimcli.network.example import Example
from slimcli.recipe.binding import location
from slimcli.solver.config import TrainingConfig
from slimcli.solver.schedule import PLATEAU_WARNING, plan_schedule
from slimcli.solver.stages import run
from tests.solver import toys


def rates(job: Any) -> list[float]:
    folder = run(job).folder
    lines = (folder / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    return [each["lr"] for each in events if each["event"] == "step"]


def real_rates(seen: list[float]) -> Any:
    """An optimizer that writes down the rate of each of its steps."""

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            if self.param_groups[0]["params"][0].numel() > 6:  # not one of the planner's dummies
                seen.append(self.param_groups[0]["lr"])
            return super().step(closure)

    return lambda config, params: Watched(params, lr=config["lr"])


SCHEDULERS = {
    "default": None,
    "steps": lambda config, optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2]),
    "one cycle": lambda config, optimizer: torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.2, total_steps=20
    ),
    "none": lambda config, optimizer: None,
}


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_planned_and_reported_and_real_rates_are_the_same(
    tmp_path: Path, name: str, interval: str
) -> None:
    seen: list[float] = []
    job = toys.with_hooks(
        toys.job(tmp_path, scheduler_interval=interval, warmup_steps=3),
        scheduler_generator=SCHEDULERS[name],
        optimizer_generator=real_rates(seen),
    )
    reported = rates(job)
    training = job.stages[0].training
    planned = plan_schedule(job.hooks, training.model_dump(), training, 5).learning_rates
    assert len(planned) == 15
    assert reported == pytest.approx(planned)
    assert seen == pytest.approx(planned)


def test_the_default_is_cosine_over_the_epochs() -> None:
    training = TrainingConfig(epoch=4, lr=0.1)
    schedule = plan_schedule(toys.HOOKS, training.model_dump(), training, 2)
    expected = [0.05 * (1 + math.cos(math.pi * epoch / 4)) for epoch in (0, 0, 1, 1, 2, 2, 3, 3)]
    assert schedule.learning_rates == pytest.approx(expected)
    assert (schedule.is_sgd, schedule.momentum, schedule.weight_decay) == (True, 0.9, 1e-4)


def test_a_plateau_counts_as_constant_gets_the_metric_and_is_warned_of(tmp_path: Path) -> None:
    def plateau(config: Any, optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1)

    hooks = {
        "scheduler_generator": plateau,
        "evaluate_function": lambda prediction, data: {"acc": 0.5},
    }
    job = toys.with_hooks(toys.job(tmp_path), **hooks)
    training = job.stages[0].training
    schedule = plan_schedule(job.hooks, training.model_dump(), training, 5)
    assert set(schedule.learning_rates) == {0.1}
    assert schedule.warnings == (PLATEAU_WARNING,)
    assert rates(job)[::5] == pytest.approx([0.1, 0.1, 0.01])


def test_an_adaptive_optimizer_is_not_taken_for_sgd() -> None:
    training = TrainingConfig(epoch=1)
    hooks = toys.with_hooks(
        toys.job(Path()), optimizer_generator=lambda config, params: torch.optim.Adam(params)
    ).hooks
    assert not plan_schedule(hooks, training.model_dump(), training, 1).is_sgd


class RowSums(torch.optim.Optimizer):
    """Keeps a number a row of each parameter."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for each in group["params"]:
                if each.grad is not None:
                    rows = each.grad.reshape(len(each), -1)
                    self.state[each]["row"] = rows.square().sum(1)


def test_state_that_cannot_follow_a_cut_is_known_before_training(tmp_path: Path) -> None:
    def planned(optimizer: Any) -> Schedule:
        job = toys.with_hooks(toys.job(tmp_path), optimizer_generator=optimizer)
        stage = job.stages[0]
        return plan_schedule(job.hooks, stage.hook_config(), stage.training, 5)

    rows = planned(lambda config, params: RowSums(params, config["lr"]))
    assert "row has shape (2,), the parameter (2, 3)" in rows.state_misfit
    assert planned(lambda config, params: torch.optim.AdamW(params)).state_misfit == ""
    assert planned(lambda config, params: torch.optim.Adafactor(params)).state_misfit == ""
    assert planned(None).state_misfit == ""


@pytest.mark.parametrize(
    "compressor",
    [ResRepCompressor(ResRepConfig()), CSGDCompressor(CSGDConfig(cluster_percent=0.5))],
    ids=["resrep", "csgd"],
)
def test_pruning_is_refused_then(compressor: Compressor) -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten())
    )
    example = Example(torch.rand(2, 3, 8, 8), lambda net, batch: net(batch))
    schedule = Schedule(40, 10, (0.1,) * 400, state_misfit="its state is odd")
    plan = compressor.plan(model, example, schedule)
    assert [refusal.what for refusal in plan.refusals].count("its state is odd") == 1


def test_what_the_users_optimizer_raises_is_told_as_its_own(tmp_path: Path) -> None:
    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise ValueError("no step today")

    def broken(config: Any, params: Any) -> torch.optim.Optimizer:
        return Broken(params, lr=config["lr"])

    with pytest.raises(RunError, match="hook `optimizer_generator` failed: ValueError"):
        run(toys.with_hooks(toys.job(tmp_path), optimizer_generator=broken))


def one_cycle(config: Any, optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=4)


def three_rates(config: Any, optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: [1, 0.5, 0.1][epoch])


class Giving(torch.optim.lr_scheduler.LRScheduler):
    """Steps as often as the planner asks, and once more it exits."""

    made = 0

    def __init__(self, optimizer: Any) -> None:
        type(self).made += 1
        self.is_planners = self.made == 1
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        if not self.is_planners and self.last_epoch == 2:
            raise SystemExit(0)
        return [group["lr"] for group in self.optimizer.param_groups]


@pytest.mark.parametrize(
    ("scheduler", "interval", "needed"),
    [
        (one_cycle, "step", "a scheduler of 15 steps, 3 epochs x 5 steps"),
        (three_rates, "step", "a scheduler of 15 steps, 3 epochs x 5 steps"),
        (three_rates, "epoch", "a scheduler of 3 steps, one an epoch"),
    ],
)
def test_a_scheduler_that_ends_too_early_is_told_by_the_plan_with_the_steps_it_needs(
    tmp_path: Path, scheduler: Any, interval: str, needed: str
) -> None:
    where = {"scheduler_generator": location(scheduler)}
    job = toys.with_hooks(toys.job(tmp_path), scheduler_generator=scheduler, locations=where)
    training = TrainingConfig(epoch=3, lr=0.1, scheduler_interval=interval)
    with pytest.raises(RunError) as caught:
        plan_schedule(job.hooks, training.model_dump(), training, 5)
    (problem,) = caught.value.problems
    assert problem.code == "E-HOOK-FAILED"
    assert problem.what.startswith("hook `scheduler_generator` failed: ")
    assert problem.expected == needed
    assert f"config.scheduler_interval, which is {interval}" in problem.fix
    file, line = problem.where.rsplit(":", 1)
    assert file.endswith("test_schedule.py")
    first = scheduler.__code__.co_firstlineno
    assert int(line) == (first if scheduler is one_cycle else first + 1)


def test_a_scheduler_that_fails_in_training_is_told_as_well(tmp_path: Path) -> None:
    Giving.made = 0
    job = toys.with_hooks(
        toys.job(tmp_path), scheduler_generator=lambda config, optimizer: Giving(optimizer)
    )
    with pytest.raises(RunError) as caught:
        run(job)
    (problem,) = caught.value.problems
    assert problem.what == "hook `scheduler_generator` failed: SystemExit: 0"
    assert "get_lr" in caught.value.user_frames[-1]


def test_a_plateau_that_fails_on_the_metric_is_told_as_well(tmp_path: Path) -> None:
    class Strict(torch.optim.lr_scheduler.ReduceLROnPlateau):
        def step(self, metrics: Any, epoch: Any = None) -> None:
            raise ValueError(f"no use for {type(metrics).__name__}")

    job = toys.with_hooks(
        toys.job(tmp_path), scheduler_generator=lambda config, optimizer: Strict(optimizer)
    )
    with pytest.raises(RunError, match="`scheduler_generator` failed: ValueError: no use for fl"):
        run(job)
