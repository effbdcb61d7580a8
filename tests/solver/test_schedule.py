"""What is planned is what happens: learning rates, warm-up, schedulers of the user."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

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
            if self.param_groups[0]["params"][0].numel() > 1:  # not the planner's dummy
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
