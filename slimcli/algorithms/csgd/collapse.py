"""How and when the filters of a cluster meet under a schedule: planned, solved for, or refused."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from slimcli.algorithms.csgd.budget import (
    STABLE,
    STATISTICS_TOLERANCE,
    TOLERANCE,
    Dynamics,
    delayed,
    remaining,
    strength_for,
)
from slimcli.algorithms.csgd.config import CSGDConfig
from slimcli.compressor import Refusal, Schedule

STEPS_MAXIMUM = 100_000
"""How far ahead a number of epochs that would do is looked for: a second of computing."""
LATEST = 0.8
"""``prune_epoch: auto`` merges at most after this share of the epochs: the rest is fine-tuning."""


@dataclass(frozen=True)
class Start:
    """Spread of the model before training, and how fast its statistics follow.

    Attributes:
        kernel: Of the kernels; at most 1.
        vector: Of norm scales, shifts and biases; at most 1.
        statistics: Of running statistics, in standard deviations.
        momentum: Share of a batch in the running statistics; the smallest of all norms.
    """

    kernel: float
    vector: float
    statistics: float
    momentum: float

    @property
    def largest(self) -> float:
        """The largest of all."""
        return max(self.kernel, self.vector, self.statistics)


@dataclass(frozen=True)
class Collapse:
    """The answer.

    Attributes:
        epoch: Full epochs before the merge.
        step: Optimizer steps before the merge.
        strength: ``eps``, the pull on kernels.
        form: ``gradient``: the pull is part of SGD's gradient, as in the paper; ``decoupled``: it
            is applied after the step, without momentum.
        spread: Predicted spread of the parameters at the merge.
        statistics_spread: Predicted spread of the running statistics at the merge.
        wanted: The spread that is asked for.
        refusal: Why this can't work; None if it can.
        warnings: What the reader of the plan must see.
    """

    epoch: int
    step: int
    strength: float
    form: str
    spread: float = 0.0
    statistics_spread: float = 0.0
    wanted: float = TOLERANCE
    refusal: Refusal | None = None
    warnings: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Question:
    """All that a prediction needs.

    Attributes:
        rates: Learning rate of each step of the run.
        start: Spread before training.
        vector_factor: Factor on the pull of vectors.
        dynamics: How the optimizer moves.
    """

    rates: Sequence[float]
    start: Start
    vector_factor: float
    dynamics: Dynamics

    def spreads(self, strength: float, steps: int | None = None) -> tuple[list[float], list[float]]:
        """Predicted spread of the parameters and of the statistics after each step."""
        rates = self.rates[:steps]
        kernel = [abs(left) for left in remaining(rates, strength, self.dynamics)]
        slow = kernel
        if self.vector_factor != 1.0:
            force = strength * self.vector_factor
            slow = [abs(left) for left in remaining(rates, force, self.dynamics)]
        pairs = zip(kernel, slow, strict=True)
        parameters = [max(self.start.kernel * a, self.start.vector * b) for a, b in pairs]
        statistics = delayed(kernel, self.start.momentum)
        return parameters, [self.start.statistics * left for left in statistics]

    def excess(self, strength: float, steps: int) -> float:
        """Predicted spread after some steps in units of what is wanted; at most 1 is good."""
        if not steps:
            return math.inf if self.start.largest else 0.0
        parameters, statistics = self.at_merge(strength, steps)
        return max(parameters / TOLERANCE, statistics / STATISTICS_TOLERANCE)

    def at_merge(self, strength: float, steps: int) -> tuple[float, float]:
        """Predicted spread of parameters and statistics after some steps, without lucky swings."""
        if not steps:
            return max(self.start.kernel, self.start.vector), self.start.statistics
        parameters, statistics = self.spreads(strength, steps)
        last = -max(1, steps // 10)  # momentum may swing through zero just at the end
        return max(parameters[last:]), statistics[-1]

    @property
    def strongest(self) -> float:
        """The strongest pull at which filters do not overshoot."""
        return STABLE / max(self.rates)


def find_collapse(config: CSGDConfig, schedule: Schedule, start: Start) -> Collapse:
    """When filters meet and how strong the pull must be, or a refusal with what would work."""
    form = "gradient" if schedule.is_sgd else "decoupled"
    if not schedule.epochs or start.largest == 0:
        strength = 3e-3 if config.centri_strength == "auto" else config.centri_strength
        return Collapse(_given_epoch(config, schedule), 0, strength, form)
    dynamics = Dynamics(schedule.is_sgd, schedule.momentum, schedule.nesterov)
    question = Question(schedule.learning_rates, start, config.vector_factor, dynamics)
    if config.centri_strength != "auto":
        return _with_strength(config, schedule, question, form)
    return _with_auto(config, schedule, question, form)


def _given_epoch(config: CSGDConfig, schedule: Schedule) -> int:
    """The merge epoch of the recipe; auto is the latest one, at most the end of the run."""
    if config.prune_epoch == "auto":
        return max(1, int(LATEST * schedule.epochs)) if schedule.epochs else 0
    return min(config.prune_epoch, schedule.epochs)


def _with_strength(
    config: CSGDConfig, schedule: Schedule, question: Question, form: str
) -> Collapse:
    """The strength is given: find the epoch, or test the given one."""
    assert config.centri_strength != "auto"
    strength = config.centri_strength
    latest = _given_epoch(config, schedule)
    if strength > question.strongest:
        refusal = Refusal(
            f"centri_strength {strength:g} makes filters overshoot their mean: learning rate "
            f"{max(question.rates):g} allows at most {question.strongest:.3g}",
            "centri_strength",
            f"centri_strength: {question.strongest * 0.5:.3g}",
            is_for_any_model=True,
        )
        return Collapse(latest, latest * schedule.steps_per_epoch, strength, form, refusal=refusal)
    epochs = [latest] if config.prune_epoch != "auto" else range(1, latest + 1)
    parameters, statistics = question.spreads(strength)
    per_epoch = schedule.steps_per_epoch
    for epoch in epochs:
        step = epoch * per_epoch
        if (
            step
            and parameters[step - 1] <= TOLERANCE
            and (statistics[step - 1] <= STATISTICS_TOLERANCE)
        ):
            return _answer(question, Collapse(epoch, step, strength, form))
    found = _answer(question, Collapse(latest, latest * per_epoch, strength, form))
    return replace(found, refusal=_too_weak(config, schedule, question, found))


def _answer(question: Question, collapse: Collapse) -> Collapse:
    """The collapse with its predicted spreads."""
    if not collapse.step:
        start = question.start
        return replace(
            collapse, spread=max(start.kernel, start.vector), statistics_spread=start.statistics
        )
    parameters, statistics = question.spreads(collapse.strength, collapse.step)
    return replace(collapse, spread=parameters[-1], statistics_spread=statistics[-1])


def _too_weak(
    config: CSGDConfig, schedule: Schedule, question: Question, found: Collapse
) -> Refusal:
    """Says how far the filters stay apart, and what would bring them together."""
    what = (
        f"the filters do not meet: at the merge after epoch {found.epoch} "
        f"{what_misses(found.spread, found.statistics_spread)}"
    )
    excess = functools.partial(question.excess, steps=found.step)
    works = strength_for(excess, 1.0, question.strongest)
    if works is not None:
        return Refusal(what, "centri_strength", f"centri_strength: {works:g}, or auto", True)
    if config.prune_epoch != "auto":
        return Refusal(what, "prune_epoch", "prune_epoch: auto, or more epochs", True)
    return Refusal(what, "centri_strength", "centri_strength: auto, or more epochs", True)


def _more_epochs(config: CSGDConfig, schedule: Schedule, question: Question) -> str:
    """How many epochs would do, at learning rates that fall in the same way over more steps."""

    def is_enough(epochs: int) -> bool:
        if config.prune_epoch == "auto":
            longer, merge = epochs, _given_epoch(config, replace(schedule, epochs=epochs))
        else:
            longer, merge = max(epochs, schedule.epochs), epochs
        steps = longer * schedule.steps_per_epoch
        rates = [question.rates[each * len(question.rates) // steps] for each in range(steps)]
        asked = replace(question, rates=rates)
        return asked.excess(asked.strongest, merge * schedule.steps_per_epoch) <= 1

    few = schedule.epochs if config.prune_epoch == "auto" else _given_epoch(config, schedule)
    many = max(2 * few, 2)
    while many * schedule.steps_per_epoch <= STEPS_MAXIMUM and not is_enough(many):
        few, many = many, 2 * many
    if many * schedule.steps_per_epoch > STEPS_MAXIMUM:
        return "more epochs before the merge"
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if is_enough(middle) else (middle, many)
    if config.prune_epoch == "auto":
        return f"epoch: {many}"
    return f"prune_epoch: {many}" + (f" and epoch: {many}" if many > schedule.epochs else "")


def in_words(value: float) -> str:
    """A number as people write it, two digits of it.

    >>> in_words(9234.5), in_words(745.0), in_words(2.04), in_words(0.000123)
    ('9,200', '740', '2', '0.00012')
    """
    rounded = float(f"{value:.2g}")
    return f"{rounded:,.0f}" if rounded >= 10 else f"{rounded:g}"


def what_misses(
    spread: float,
    statistics: float,
    wanted: tuple[float, float] = (TOLERANCE, STATISTICS_TOLERANCE),
) -> str:
    """Which filters or running statistics are too far apart, and by how much; only those.

    Args:
        spread: Of the parameters.
        statistics: Of the running statistics.
        wanted: The largest of each that is good.

    >>> what_misses(0.0, 0.06)
    'their running statistics are 0.06 standard deviations apart, 2 times the 0.03 wanted'
    >>> what_misses(0.002, 0.0)
    'they are 0.002 of their size apart, 20 times the 0.0001 wanted'
    >>> what_misses(0.92, 120.0).split(", and ")[0]
    'they are 0.92 of their size apart, 9,200 times the 0.0001 wanted'
    """
    misses = [
        f"{who} are {in_words(value)} {unit} apart, {in_words(value / limit)} times the {limit:g} "
        "wanted"
        for who, value, unit, limit in (
            ("they", spread, "of their size", wanted[0]),
            ("their running statistics", statistics, "standard deviations", wanted[1]),
        )
        if value > limit
    ]
    return ", and ".join(misses)


def _with_auto(config: CSGDConfig, schedule: Schedule, question: Question, form: str) -> Collapse:
    """The weakest pull with which filters meet in time; decoupled if momentum is too slow."""
    epoch = _given_epoch(config, schedule)
    step = epoch * schedule.steps_per_epoch
    forms = ["gradient", "decoupled"] if form == "gradient" else ["decoupled"]
    for each in forms:
        dynamics = replace(question.dynamics, is_sgd=each == "gradient")
        asked = replace(question, dynamics=dynamics)
        excess = functools.partial(asked.excess, steps=step)
        strength = strength_for(excess, 1.0, asked.strongest)
        if strength is not None:
            warnings: tuple[str, ...] = ()
            if each != form:
                warnings = (
                    f"{step} steps are too few for a pull through momentum {schedule.momentum:g}: "
                    "filters are pulled together after each step instead",
                )
            return _answer(asked, Collapse(epoch, step, strength, each, warnings=warnings))
    found = _answer(asked, Collapse(epoch, step, asked.strongest, each))
    refusal = Refusal(
        f"no pull brings the filters together in {step} steps: "
        f"{what_misses(*asked.at_merge(asked.strongest, step))}",
        "epoch" if config.prune_epoch == "auto" else "prune_epoch",
        _more_epochs(config, schedule, asked),
        is_for_any_model=True,
    )
    return replace(found, refusal=refusal)
