"""The order of calls of the contract, written plainly: what the contract tests train with."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slimcli.compressor import (
    AlgorithmInfo,
    Compressor,
    GroupDefaults,
    Plan,
    Progress,
    Schedule,
)
from slimcli.network import surgery
from slimcli.network.example import Example

STEPS_PER_EPOCH = 12


def predict(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Any:
    return model(batch[0])


def images(seed: int, shape: tuple[int, ...], classes: int = 4) -> tuple[Tensor, Tensor]:
    """A batch whose classes can be told apart, in float64."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (shape[0],), generator=generator)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return noise + labels.view(-1, 1, 1, 1) * 0.5, labels


@dataclass
class Run:
    """A finished little training with all that the tests want to look at."""

    compressor: Compressor
    model: nn.Module
    plan: Plan
    optimizer: torch.optim.Optimizer
    batches: list[tuple[Tensor, Tensor]]
    losses: list[float] = field(default_factory=list)
    may_save: list[bool] = field(default_factory=list)


def schedule_of(epochs: int, lr: float) -> Schedule:
    steps = epochs * STEPS_PER_EPOCH
    rates = tuple(
        lr * 0.5 * (1 + math.cos(math.pi * step / max(steps, 1))) for step in range(steps)
    )
    return Schedule(epochs=epochs, steps_per_epoch=STEPS_PER_EPOCH, learning_rates=rates)


def begin(
    info: AlgorithmInfo,
    config: dict[str, Any],
    model: nn.Module,
    shape: tuple[int, ...],
    epochs: int,
    device: str = "cpu",
) -> Run:
    """Plan and prepare; nothing is trained yet."""
    compressor = info.load()(info.config(**config))
    model = model.to(device)
    drawn = [images(seed, shape) for seed in range(STEPS_PER_EPOCH)]
    batches = [(pictures.to(device), labels.to(device)) for pictures, labels in drawn]
    example = Example(batch=batches[0], predict=predict)
    schedule = schedule_of(epochs, 0.05)
    plan = compressor.plan(model, example, schedule)
    assert plan.refusals == [], plan.refusals
    model = compressor.prepare(model, example, plan)
    compressor.calibrate(model, [Example(batch=batch, predict=predict) for batch in batches])
    groups = compressor.param_groups(model, GroupDefaults(lr=0.05))
    optimizer = torch.optim.SGD(groups, lr=0.05)
    return Run(compressor, model, plan, optimizer, batches)


def train(run: Run, epochs: int, watch: Callable[[Run], None] = lambda run: None) -> None:
    """Train in place, calling ``watch`` after every epoch."""
    schedule = schedule_of(epochs, 0.05)
    step = 0
    for epoch in range(epochs):
        progress = Progress(epoch, step, schedule.learning_rates[step], schedule)
        cut(run, run.compressor.before_epoch(run.model, progress))
        run.model.train()
        for images_, labels in run.batches:
            rate = schedule.learning_rates[step]
            for group in run.optimizer.param_groups:
                group["lr"] = rate
            progress = Progress(epoch, step, rate, schedule)
            run.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(run.model(images_), labels)
            loss.backward()
            run.compressor.after_backward(run.model, progress)
            run.optimizer.step()
            run.compressor.after_step(run.model, progress, False)
            run.losses.append(loss.item())
            step += 1
        if epoch == epochs - 1:
            cut(run, run.compressor.finish(run.model, progress))
        run.may_save.append(run.compressor.may_save(run.model, progress))
        watch(run)


def cut(run: Run, cuts: list[Any]) -> None:
    if cuts:
        surgery.apply(run.model, cuts, optimizer=run.optimizer)
        run.compressor.after_cut(run.model, cuts)


def outputs(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Eval-mode outputs of a copy, so that looking changes nothing."""
    copied = copy.deepcopy(model).eval()
    with torch.no_grad():
        return torch.cat([predict(copied, batch) for batch in batches[:3]])
