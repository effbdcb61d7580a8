"""How far a row can shrink before training ends: pure arithmetic, no torch.

A masked row feels one force only, the lasso: a vector of constant length ``strength`` that points
to zero. With momentum ``m`` its speed grows from rest to ``lr * strength / (1 - m)`` a step. The
distance it can travel is the budget; a row of norm ``r`` needs a budget of ``r``.

The authors' code (DingXiaoH/ResRep, a3567a19) has no such rule: its schedules are long enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

MARGIN = 1.2
"""A row must be able to travel this many times its norm: what momentum still pulls outwards when
it is masked, and a norm that grew a little above 1, fit in."""

CATCHING_UP = 1.05
"""The same for a masked row under way: its motion is known, the learning rates to come are not."""


def reach(learning_rates: Sequence[float], momentum: float) -> list[float]:
    """Distance a row at rest travels under a pull of strength 1 from each step to the end.

    With velocity ``v <- m v + 1`` from ``v = 0``, step k (from 1) moves ``lr (1 - m^k) / (1 - m)``;
    the sums for all starts come from one pass backwards.

    Args:
        learning_rates: Learning rate of each step.
        momentum: Momentum of the compactors, below 1.

    Returns:
        One distance a step, and a last one of 0 for "after the end".

    >>> reach([1.0, 1.0], 0.5)  # 1 and then 1.5, or the second step alone
    [2.5, 1.0, 0.0]
    """
    distances = [0.0]
    full = lag = 0.0
    for rate in reversed(learning_rates):
        full += rate
        lag = momentum * (rate + lag)
        distances.append((full - lag) / (1 - momentum))
    distances.reverse()
    return distances


def coast(learning_rates: Sequence[float], momentum: float) -> float:
    """Distance a row of velocity 1 travels in these steps without any pull.

    >>> coast([1.0, 1.0], 0.5)
    0.75
    """
    return sum(rate * momentum**step for step, rate in enumerate(learning_rates, 1))


def last_start(distances: Sequence[float], strength: float, norm: float = 1.0) -> int | None:
    """The last step at which a row can be masked and still reach zero, or None.

    >>> last_start([3.0, 2.0, 1.0, 0.0], strength=1.0)
    1
    >>> last_start([3.0, 2.0, 1.0, 0.0], strength=0.1) is None
    True
    """
    for step in range(len(distances) - 1, -1, -1):
        if strength * distances[step] >= MARGIN * norm:
            return step
    return None


def strength_needed(distance: float, norm: float = 1.0) -> float:
    """The lasso strength that takes a row of this norm to zero over this unit-strength distance.

    >>> strength_needed(600.0)
    0.002
    """
    return MARGIN * norm / distance if distance > 0 else math.inf


def strength_to_catch_up(norm: float, velocity: float, distance: float, coasting: float) -> float:
    """The strength from now on that takes a row which already moves to zero in time.

    Args:
        norm: Its norm now.
        velocity: Its velocity, at learning rate 1.
        distance: Reach at strength 1 of a row at rest.
        coasting: What velocity 1 travels without a pull.

    >>> strength_to_catch_up(norm=1.0, velocity=0.2, distance=10.0, coasting=1.0)
    0.085
    """
    return (CATCHING_UP * norm - velocity * coasting) / distance


def rounded_up(value: float, digits: int = 2) -> float:
    """The next number with few digits, for a value a reader shall type.

    >>> rounded_up(0.0012341)
    0.0013
    """
    if not math.isfinite(value) or value <= 0:
        return value
    unit = 10.0 ** (math.floor(math.log10(value)) - digits + 1)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.{digits}g}")
