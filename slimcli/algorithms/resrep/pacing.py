"""When channels are masked and by when they are zero; refuses what does not fit. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from slimcli.algorithms.resrep import budget
from slimcli.algorithms.resrep.config import ResRepConfig
from slimcli.compressor import Refusal, Schedule

BASE_STRENGTH = 1e-4
"""Lasso strength with ``lasso_decay: auto`` on channels that are not masked: the paper's."""

MASKING_SHARE = 0.4
"""``prune_interval: auto`` masks in this share of the steps after warm-up. The authors' ResNet-50
run needed a quarter; the rest is for forgetting."""

ZERO_SHARE = 0.8
"""``lasso_decay: auto`` wants every masked row at zero after this share of the steps after warm-up:
the last fifth trains the network that will be deployed."""

FEWEST_STEPS = 10
"""Steps an ``auto`` strength needs at least between the last mask and the end."""


@dataclass(frozen=True)
class Pace:
    """Optimizer steps, counted over the run from 0.

    Attributes:
        first: The end of warm-up; nothing is masked before.
        last: The last update of the masks.
        zero: When the last masked row has reached zero.
        interval: Steps between updates; None: whenever the MACs are above the line that falls
            from the full network at ``first`` to the target at ``last``.
        updates: Mask updates that were counted on.
    """

    first: int
    last: int
    zero: int
    interval: int | None
    updates: int

    def is_due(self, step: int, updates_done: int, gone: float) -> bool:
        """Whether the masks are updated after this step.

        Args:
            step: Number of the step just made.
            updates_done: Updates of the masks so far.
            gone: Share of the MACs to be removed that masked channels account for.

        >>> pace = Pace(first=10, last=20, zero=40, interval=None, updates=5)
        >>> pace.is_due(9, 0, 0.0), pace.is_due(14, 0, 0.3), pace.is_due(14, 0, 0.5)
        (False, True, False)
        >>> Pace(10, 20, 40, interval=5, updates=2).is_due(14, 0, 0.0)
        True
        """
        if self.interval is not None:
            return step + 1 >= self.first + (updates_done + 1) * self.interval
        line = (step + 1 - self.first) / max(self.last - self.first, 1)
        return gone < min(line, 1.0)

    def deadline(self, step: int) -> int:
        """The step by which a row masked after ``step`` shall be zero.

        >>> Pace(first=10, last=20, zero=40, interval=None, updates=5).deadline(15)
        35
        """
        return max(min(step + self.zero - self.last, self.zero), step + 1)


def base_strength(config: ResRepConfig) -> float:
    """Lasso strength of channels that are not masked."""
    return BASE_STRENGTH if config.lasso_decay == "auto" else config.lasso_decay


def find_pace(config: ResRepConfig, schedule: Schedule, updates: int) -> Pace | Refusal:
    """When masks are set under this schedule, or why that can't work and the value that does.

    Args:
        config: Keys of the algorithm.
        schedule: Every learning rate of the run.
        updates: Mask updates until the target, see :func:`selection.updates_needed`.
    """
    first = config.warmup_epoch * schedule.steps_per_epoch
    if first >= schedule.steps:
        return _no_step_after_warmup(config, schedule, updates)
    soonest = first + updates * (1 if config.prune_interval == "auto" else config.prune_interval)
    limit = _last_mask(config, schedule, first)
    if soonest > limit:
        return _too_late(config, schedule, updates, soonest, limit)
    free = schedule.steps - first
    last, interval = soonest, None
    if config.prune_interval == "auto":
        last = min(limit, max(soonest, first + round(MASKING_SHARE * free)))
    else:
        interval = config.prune_interval
    zero = schedule.steps
    if config.lasso_decay == "auto":
        zero = max(first + round(ZERO_SHARE * free), last + (schedule.steps - last) // 2)
    return Pace(first, last, zero, interval, updates)


def _last_mask(config: ResRepConfig, schedule: Schedule, first: int) -> int:
    """The last step at which a channel may be masked; -1 if there is none."""
    if config.lasso_decay == "auto":
        reserve = max(FEWEST_STEPS, math.ceil((1 - ZERO_SHARE) * (schedule.steps - first)))
        alive = sum(rate > 0 for rate in schedule.learning_rates)
        return min(schedule.steps, alive) - reserve
    found = budget.last_start(distances(config, schedule), config.lasso_decay)
    return -1 if found is None else found


def distances(config: ResRepConfig, schedule: Schedule) -> list[float]:
    """Reach of a lasso of strength 1 from each step to the end of the run."""
    return budget.reach(schedule.learning_rates, config.compactor_momentum)


def _no_step_after_warmup(config: ResRepConfig, schedule: Schedule, updates: int) -> Refusal:
    what = (
        f"warmup_epoch {config.warmup_epoch} leaves none of the {schedule.epochs} epochs to "
        f"choose channels and take them to zero"
    )
    if schedule.epochs == 0:
        fix = f"epoch: {_epochs_needed(config, schedule, updates)}, or prune_rate: 0 to fold only"
        return Refusal(what, "epoch", fix)
    for warmup in range(schedule.epochs - 1, -1, -1):
        trial = config.model_copy(update={"warmup_epoch": warmup})
        if isinstance(find_pace(trial, schedule, updates), Pace):
            return Refusal(what, "warmup_epoch", f"warmup_epoch: {warmup}")
    fix = f"epoch: {_epochs_needed(config, schedule, updates)}"
    return Refusal(what, "epoch", fix + _and_auto(config, "lasso_decay"))


def _too_late(
    config: ResRepConfig, schedule: Schedule, updates: int, soonest: int, limit: int
) -> Refusal:
    """The last mask leaves its rows too little time."""
    if config.lasso_decay == "auto":
        what = (
            f"{updates} mask updates end at step {soonest} of {schedule.steps}; rows need the time "
            f"after step {max(limit, 0)} to reach zero"
        )
        return Refusal(what, *_faster(config, schedule, updates))
    reach = distances(config, schedule)
    left = reach[soonest] if soonest < len(reach) else 0.0
    what = (
        f"lasso_decay {config.lasso_decay:g} can shrink a row by {config.lasso_decay * left:.3g} "
        f"after the last of {updates} mask updates (step {soonest} of {schedule.steps}); a row of "
        f"norm 1 needs {budget.MARGIN}"
    )
    strength = budget.rounded_up(budget.strength_needed(left))
    if strength <= 1:
        return Refusal(what, "lasso_decay", f"lasso_decay: {strength:g}, or lasso_decay: auto")
    trial = config.model_copy(update={"lasso_decay": "auto"})
    if isinstance(find_pace(trial, schedule, updates), Pace):
        return Refusal(what, "lasso_decay", "lasso_decay: auto")
    key, fix = _faster(config, schedule, updates)
    return Refusal(what, key, f"{fix} and lasso_decay: auto")


def _faster(config: ResRepConfig, schedule: Schedule, updates: int) -> tuple[str, str]:
    """The key and value that make the masks come early enough for an ``auto`` strength."""
    auto = config.model_copy(update={"lasso_decay": "auto"})
    limit = _last_mask(auto, schedule, config.warmup_epoch * schedule.steps_per_epoch)
    free = limit - config.warmup_epoch * schedule.steps_per_epoch
    if config.prune_interval != "auto" and free >= updates:
        return "prune_interval", f"prune_interval: {free // updates}"
    if free >= 1:
        blocks = -(-updates * config.prune_groups // free)
        return "prune_groups", f"prune_groups: {blocks}{_and_auto(config, 'prune_interval')}"
    return "epoch", f"epoch: {_epochs_needed(config, schedule, updates)}"


def _and_auto(config: ResRepConfig, key: str) -> str:
    """What else must be written, if it is not written yet."""
    return "" if getattr(config, key) == "auto" else f" and {key}: auto"


def _epochs_needed(config: ResRepConfig, schedule: Schedule, updates: int) -> int:
    """The fewest epochs in which an ``auto`` strength works."""
    interval = 1 if config.prune_interval == "auto" else config.prune_interval
    per_epoch = max(schedule.steps_per_epoch, 1)
    needed = max(FEWEST_STEPS, updates * interval)
    steps = max(needed + FEWEST_STEPS, math.ceil(needed / ZERO_SHARE) + 1)
    return config.warmup_epoch + -(-steps // per_epoch)
