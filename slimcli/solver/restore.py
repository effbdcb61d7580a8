"""A trainer brought to where a checkpoint was made; its model already has the stored weights."""

from __future__ import annotations

from typing import Any

import torch

from slimcli.errors import Problem, RecipeError
from slimcli.solver.loop import Trainer
from slimcli.solver.optimizers import group_options, load_optimizer_state
from slimcli.solver.randomness import set_rng_state
from slimcli.solver.schedule import BATCH_KEYS, schedule_keys
from slimcli.solver.state import load_position


def restore(trainer: Trainer, stored: dict[str, Any]) -> None:
    """Optimizer, scheduler, position, hooks and generators as they were.

    Args:
        trainer: Freshly made.
        stored: The checkpoint.

    Raises:
        RunError: The optimizer is not the one that was stored.
        RecipeError: In the middle of an epoch the batches can't change.
    """
    around = trainer.around
    trainer.position, trainer.best = load_position(stored)
    options = group_options(trainer.optimizer)
    load_optimizer_state(trainer.optimizer, trainer.subject.model, stored["optimizer"])
    if stored["schedule"] != schedule_keys(trainer.training):
        _reschedule(trainer, stored["schedule"], options)
    elif trainer.rates.scheduler is not None:
        trainer.rates.scheduler.load_state_dict(stored["scheduler"])
    trainer.averages.load_state_dict(stored["averages"])
    around.fabric.strategy.precision.load_state_dict(stored["scaler"])
    for name, hook in around.hooks.stateful().items():
        hook.load_state_dict(stored["hooks"][name])
    set_rng_state(stored["rng"])
    for text in differences(stored):
        around.events.emit("notice", text=text, level="warning")


def differences(stored: dict[str, Any]) -> list[str]:
    """Why the rest of the run may differ in its last bits from one that never stopped."""
    now = {"torch": str(torch.__version__), "threads": torch.get_num_threads()}
    return [
        f"resumed with {name} {value}, stopped with {stored[name]}: the same up to rounding only"
        for name, value in now.items()
        if stored[name] != value
    ]


def _reschedule(trainer: Trainer, before: dict[str, Any], options: list[dict[str, Any]]) -> None:
    """Settings of the schedule were changed on purpose: the new one counts, from here on."""
    training, position = trainer.training, trainer.position
    now = schedule_keys(training)
    if position.batch and any(before[key] != now[key] for key in BATCH_KEYS):
        raise RecipeError(
            Problem(
                "E-RESUME-BATCHES",
                "the size of batches can change only between two epochs",
                received=f"a checkpoint in epoch {position.epoch + 1}, batch {position.batch}",
                fix="resume without the change and stop at an epoch's end",
            )
        )
    position.step = position.epoch * trainer.around.schedule.steps_per_epoch + (
        position.batch // training.accumulate_grad_batches
    )
    position.is_finished = position.is_finished and position.epoch >= training.epoch
    for group, fresh in zip(trainer.optimizer.param_groups, options, strict=True):
        group.update(fresh)
    trainer.rates.fast_forward(position.epoch, position.step)
    rate = trainer.progress().learning_rate
    text = f"the schedule was changed: the learning rate goes on at {rate:.4g}"
    trainer.around.events.emit("notice", text=text, level="note")
