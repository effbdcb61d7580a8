"""How close filters of one cluster get under a schedule: the collapse budget. Pure arithmetic.

A difference inside a cluster feels no loss gradient, only decay ``eta`` and pull ``eps``, so what
is left of it after any number of steps is known before training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

TOLERANCE = 1e-4
"""The spread that the plan asks for at the merge, relative to the size of what is merged."""

LIMIT = 1e-3
"""The measured spread of parameters above which the merge is refused."""

STATISTICS_TOLERANCE = 0.03
"""The spread of running statistics that the plan asks for, in standard deviations.

They follow the filters with a delay of about ``1 / momentum`` steps.
"""

STATISTICS_LIMIT = 0.2
"""The measured spread of running statistics above which the merge is refused.

Wider than the tolerance: the deviations they are measured in get smaller as filters meet.
"""

STABLE = 1.0
"""Largest ``lr * (eta + eps)``: beyond it filters overshoot their mean at every step."""


@dataclass(frozen=True)
class Dynamics:
    """How the optimizer turns a pull into movement.

    Attributes:
        is_sgd: SGD: the pull is part of the gradient. Otherwise it is applied after the step.
        momentum: Momentum of SGD.
        nesterov: Whether it is Nesterov's.
    """

    is_sgd: bool
    momentum: float
    nesterov: bool


def remaining(rates: Iterable[float], force: float, dynamics: Dynamics) -> list[float]:
    """What is left of a difference of 1 after each step.

    Args:
        rates: Learning rate of each step.
        force: ``eta + eps`` for SGD, ``eps`` for the decoupled pull.
        dynamics: How the optimizer moves.

    >>> plain = Dynamics(is_sgd=True, momentum=0.0, nesterov=False)
    >>> remaining([0.1, 0.1], 1.0, plain)
    [0.9, 0.81]
    """
    momentum = dynamics.momentum if dynamics.is_sgd else 0.0
    difference, velocity = 1.0, 0.0
    left = []
    for rate in rates:
        gradient = force * difference
        velocity = momentum * velocity + gradient
        move = gradient + momentum * velocity if dynamics.nesterov else velocity
        difference -= rate * (move if dynamics.is_sgd else gradient)
        left.append(difference)
    return left


def delayed(left: Sequence[float], momentum: float) -> list[float]:
    """What running averages of something have left of a difference of 1 after each step.

    Args:
        left: The difference itself after each step.
        momentum: Share of the newest value in the average.

    >>> delayed([0.5, 0.0], 0.5)
    [0.75, 0.375]
    """
    average = 1.0
    averages = []
    for value in left:
        average = (1 - momentum) * average + momentum * value
        averages.append(average)
    return averages


def strength_for(
    predicted: Callable[[float], float], tolerance: float, largest: float
) -> float | None:
    """The weakest pull with which the predicted distance is within the tolerance.

    Args:
        predicted: Pull -> distance at the merge.
        tolerance: Distance that is wanted.
        largest: The strongest pull that is stable.

    Returns:
        The pull, three digits, rounded up; None if even the strongest is too weak.

    >>> strength_for(lambda pull: math.exp(-100 * pull), 1e-4, 1.0)
    0.0922
    """
    if predicted(largest) > tolerance:
        return None
    low, high = largest * 1e-9, largest
    for _ in range(60):
        middle = math.sqrt(low * high)
        if predicted(middle) > tolerance:
            low = middle
        else:
            high = middle
    return min(_rounded_up(high), largest)


def _rounded_up(value: float) -> float:
    """Three digits, never less than the value."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.3g}")
