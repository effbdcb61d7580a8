"""A group's smallest removable unit may be several channels of a layer: one of each conv group.

Recipes speak of channels (``min_channels``, ``round_to``); plans count units. Pure arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slimcli.network.structure import Structure

ONE = (1,)
"""Channels of a unit where every layer has one."""


def channels_per_unit(structure: Structure) -> dict[str, tuple[int, ...]]:
    """Group -> the different numbers of channels that its layers have for one of its units."""
    sizes = {group.name: group.size for group in structure.groups}
    found: dict[str, set[int]] = {}
    for layer in structure.layers:
        for name, outputs in layer.parts:
            found.setdefault(name, set()).add(max(1, outputs // sizes[name]))
    return {name: tuple(sorted(counts)) for name, counts in found.items()}


def units_in(channels: int, per_unit: Sequence[int] = ONE) -> int:
    """The fewest units that are at least so many channels of every layer.

    >>> units_in(8), units_in(8, (32,)), units_in(9, (2, 4))
    (8, 1, 5)
    """
    return -(-channels // min(per_unit))


def unit_multiple(round_to: int, per_unit: Sequence[int] = ONE) -> int:
    """Units must be a multiple of this if channels of every layer are to be one of ``round_to``.

    >>> unit_multiple(8), unit_multiple(8, (32,)), unit_multiple(8, (2, 4)), unit_multiple(6, (4,))
    (8, 1, 4, 3)
    """
    return math.lcm(*(round_to // math.gcd(round_to, count) for count in per_unit))
