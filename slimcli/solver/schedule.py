"""Learning rates: known before training from a dummy, set during training on the real optimizer."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau

from slimcli.compressor import GroupDefaults, Schedule
from slimcli.errors import HookError, Problem, RunError, SlimError
from slimcli.network.optimizer_state import cut_state
from slimcli.recipe.binding import RAISED, hook_failed
from slimcli.recipe.frames import is_ours
from slimcli.solver.config import TrainingConfig
from slimcli.solver.job import JobHooks

PLATEAU_WARNING = (
    "the scheduler waits for a metric (ReduceLROnPlateau): the plan counts with a constant "
    "learning rate, so budgets are upper bounds"
)


def group_defaults(training: TrainingConfig) -> GroupDefaults:
    """The rule table of optimizer groups, from the recipe's keys."""
    return GroupDefaults(
        lr=training.lr,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
        nesterov=training.nesterov,
        bias_lr_multiplier=training.bias_lr_multiplier,
        no_decay=training.no_decay,
    )


def make_optimizer(
    hooks: JobHooks, config: dict[str, Any], groups: list[dict[str, Any]]
) -> Optimizer:
    """The user's optimizer, or SGD.

    Raises:
        HookError: ``optimizer_generator`` returned something else, or an optimizer that can step
            only with a closure.
    """
    if hooks.optimizer_generator is None:
        return torch.optim.SGD(groups, lr=config["lr"])
    optimizer = hooks.optimizer_generator(config, groups)
    if not isinstance(optimizer, Optimizer):
        raise _not_a("optimizer_generator", "a torch Optimizer", optimizer, hooks)
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        # LBFGS evaluates the loss several times a step: no place for gradient rules in between.
        expected = "an optimizer whose step() needs no closure"
        raise _not_a("optimizer_generator", expected, optimizer, hooks)
    return optimizer


def make_scheduler(
    hooks: JobHooks, config: dict[str, Any], optimizer: Optimizer, schedule_steps: int
) -> Any:
    """The user's scheduler, or cosine down to zero over the whole run.

    Args:
        hooks: For ``scheduler_generator``.
        config: What the hook gets.
        optimizer: The raw optimizer.
        schedule_steps: How often the scheduler will step.

    Raises:
        HookError: ``scheduler_generator`` returned something that can't step.
    """
    if hooks.scheduler_generator is None:
        return CosineAnnealingLR(optimizer, T_max=max(1, schedule_steps))
    scheduler = hooks.scheduler_generator(config, optimizer)
    if scheduler is not None and not hasattr(scheduler, "step"):
        raise _not_a("scheduler_generator", "a scheduler with step(), or None", scheduler, hooks)
    return scheduler


def _not_a(hook: str, expected: str, received: Any, hooks: JobHooks) -> HookError:
    return HookError(
        Problem(
            "E-HOOK-RETURN",
            f"hook `{hook}` returned the wrong thing",
            hooks.where(hook),
            expected,
            f"{type(received).__name__}",
            fix="return what it makes",
        )
    )


def scheduler_steps(training: TrainingConfig, steps_per_epoch: int) -> int:
    """How often the scheduler steps in the whole run."""
    per_epoch = steps_per_epoch if training.scheduler_interval == "step" else 1
    return training.epoch * per_epoch


def plan_schedule(
    hooks: JobHooks, config: dict[str, Any], training: TrainingConfig, steps_per_epoch: int
) -> Schedule:
    """Step the real optimizer and scheduler on a dummy parameter through the whole run.

    Args:
        hooks: The user's generators.
        config: What they get.
        training: Epochs, warm-up, interval.
        steps_per_epoch: Optimizer steps in one epoch.
    """
    dummy = nn.Parameter(torch.zeros(1))
    defaults = group_defaults(training)
    group = {
        "params": [dummy],
        "names": ["dummy"],
        "lr": defaults.lr,
        "weight_decay": defaults.weight_decay,
        "momentum": defaults.momentum,
        "nesterov": defaults.nesterov,
    }
    optimizer = make_optimizer(hooks, config, [group])
    steps = scheduler_steps(training, steps_per_epoch)
    scheduler = make_scheduler(hooks, config, optimizer, steps)
    is_plateau = isinstance(scheduler, ReduceLROnPlateau)
    try:
        optimizer.step()  # torch warns when a scheduler steps before its optimizer ever did
    except RAISED as error:
        if is_ours(error) or hooks.optimizer_generator is None:
            raise
        raise hook_failed("optimizer_generator", error) from error
    with scheduler_told(hooks, training, steps_per_epoch):
        rates = _rates(optimizer, None if is_plateau else scheduler, training, steps_per_epoch)
    for step in range(min(training.warmup_steps, len(rates))):
        rates[step] *= warmup_factor(step, training.warmup_steps)
    chosen = optimizer.param_groups[0]
    return Schedule(
        epochs=training.epoch,
        steps_per_epoch=steps_per_epoch,
        learning_rates=tuple(rates),
        is_sgd=isinstance(optimizer, torch.optim.SGD),
        momentum=float(chosen.get("momentum", 0.0)),
        nesterov=bool(chosen.get("nesterov", False)),
        weight_decay=float(chosen.get("weight_decay", 0.0)),
        seed=training.seed,
        warnings=(PLATEAU_WARNING,) if is_plateau else (),
        state_misfit=_state_misfit(hooks, config, group),
    )


def _rates(
    optimizer: Optimizer, scheduler: Any, training: TrainingConfig, steps_per_epoch: int
) -> list[float]:
    """The rate of each step of the whole run, found by stepping the scheduler through it."""
    rates: list[float] = []
    for _ in range(training.epoch):
        if training.scheduler_interval == "epoch" or scheduler is None:
            rates += [_rate(optimizer)] * steps_per_epoch
            if scheduler is not None:
                scheduler.step()
        else:
            for _ in range(steps_per_epoch):
                rates.append(_rate(optimizer))
                scheduler.step()
    return rates


@contextmanager
def scheduler_told(
    hooks: JobHooks, training: TrainingConfig, steps_per_epoch: int
) -> Iterator[None]:
    """Inside, an error of the user's scheduler is told as one, with the steps it has to last for.

    Raises:
        RunError: The scheduler raised; most often it was made for a shorter run.
    """
    try:
        yield
    except SlimError:
        raise
    except RAISED as error:
        if hooks.scheduler_generator is None:
            raise
        failed = hook_failed("scheduler_generator", error, hooks.where("scheduler_generator"))
        epochs, interval = training.epoch, training.scheduler_interval
        needed = scheduler_steps(training, steps_per_epoch)
        counts = {"step": f"{epochs} epochs x {steps_per_epoch} steps", "epoch": "one an epoch"}
        problem = replace(
            failed.problems[0],
            expected=f"a scheduler of {needed} steps, {counts[interval]}",
            fix=f"make it for {needed} steps (the function of a LambdaLR is asked for 0 to "
            f"{needed}), or change config.scheduler_interval, which is {interval}",
        )
        raise RunError(problem, user_frames=failed.user_frames) from error


def _state_misfit(hooks: JobHooks, config: dict[str, Any], group: dict[str, Any]) -> str:
    """Why the state of the user's optimizer can't follow a cut: one step on a matrix tells."""
    if hooks.optimizer_generator is None:
        return ""
    matrix = nn.Parameter(torch.zeros(2, 3))
    matrix.grad = torch.full_like(matrix, 1e-3)
    optimizer = make_optimizer(hooks, config, [{**group, "params": [matrix]}])
    try:
        optimizer.step()
    except Exception:  # the user's code, which may want more than one matrix: no verdict
        return ""
    try:
        cut_state(optimizer, matrix, {}, "a weight")
    except RunError as error:
        return error.problems[0].what
    return ""


def _rate(optimizer: Optimizer) -> float:
    rate = optimizer.param_groups[0]["lr"]
    return float(rate.item() if isinstance(rate, Tensor) else rate)


def warmup_factor(step: int, warmup_steps: int) -> float:
    """Linear from ``1 / warmup_steps`` at step 0 to 1.

    >>> [warmup_factor(step, 4) for step in (0, 1, 3, 9)]
    [0.25, 0.5, 1.0, 1.0]
    """
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


SCHEDULE_KEYS = (
    *("epoch", "lr", "momentum", "weight_decay", "nesterov", "no_decay", "bias_lr_multiplier"),
    *("batch_size", "accumulate_grad_batches", "scheduler_interval", "warmup_steps"),
)
BATCH_KEYS = ("batch_size", "accumulate_grad_batches")


def schedule_keys(training: TrainingConfig) -> dict[str, Any]:
    """The settings a schedule is made of, as plain values for the checkpoint."""
    return training.model_dump(mode="json", include=set(SCHEDULE_KEYS))


class LearningRates:
    """The scheduler on the real optimizer, with warm-up on top.

    Args:
        optimizer: The raw optimizer.
        scheduler: The scheduler, or None.
        training: Interval, warm-up, metric.
        told: Around each of the scheduler's steps, tells what it raises.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        scheduler: Any,
        training: TrainingConfig,
        told: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.training = training
        self.told = told
        self.is_plateau = isinstance(scheduler, ReduceLROnPlateau)

    @contextmanager
    def warmed_up(self, step: int) -> Iterator[None]:
        """During the optimizer's step the rates are smaller; the scheduler never sees that."""
        factor = warmup_factor(step, self.training.warmup_steps)
        if factor == 1.0:
            yield
            return
        before = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] * factor
        try:
            yield
        finally:
            for group, rate in zip(self.optimizer.param_groups, before, strict=True):
                group["lr"] = rate

    def after_step(self) -> None:
        """The scheduler's step, where it steps with the optimizer."""
        if self.training.scheduler_interval == "step" and self.scheduler and not self.is_plateau:
            self._step()

    def after_epoch(self, metric: float) -> None:
        """The scheduler's step, where it steps with the epoch; a plateau gets the metric."""
        if self.is_plateau:
            with self.told():
                self.scheduler.step(metric)
        elif self.training.scheduler_interval == "epoch" and self.scheduler:
            self._step()

    def leave_out(self, steps: int) -> None:
        """The scheduler's steps of an epoch that was planned longer than it was."""
        if self.training.scheduler_interval == "step" and self.scheduler and not self.is_plateau:
            for _ in range(steps):
                self._step()

    def _step(self) -> None:
        with warnings.catch_warnings(), self.told():
            # Under a gradient scaler the first optimizer step may have been skipped.
            warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*optimizer.step.*")
            self.scheduler.step()

    def fast_forward(self, epochs: int, steps: int) -> None:
        """Bring a fresh scheduler to where training is; a plateau begins anew."""
        if self.scheduler is None or self.is_plateau:
            return
        count = steps if self.training.scheduler_interval == "step" else epochs
        for _ in range(count):
            self._step()

    def current(self, step: int, planned: float | None) -> float:
        """The rate of a parameter with multiplier 1, at this step."""
        if planned is not None and not self.is_plateau:
            return planned
        return _rate(self.optimizer) * warmup_factor(step, self.training.warmup_steps)
