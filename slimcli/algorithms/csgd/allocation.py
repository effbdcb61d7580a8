"""How much goes from each layer so that the whole reaches a share of MACs. Pure functions.

A layer's *merge costs* say how much of its filters' energy is lost with each further merge (Ward's
criterion: the growth of the squared distances to the cluster means). The planner merges, over all
layers, whatever costs least for the MACs it saves, until enough MACs are gone: at the end every
layer pays about the same for the last MAC it gave.

Differs from the paper: it takes the widths from the user, one fraction for all layers of a kind.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slimcli.algorithms.csgd.clustering import compact


@dataclass(frozen=True)
class Choices:
    """Sets of fractions from the mildest to the hardest; each next one removes at least as much.

    Attributes:
        count: How many sets there are.
        at: Number of a set -> group -> fraction of its channels that goes.
    """

    count: int
    at: Callable[[int], dict[str, float]]


def first_enough(count: int, is_enough: Callable[[int], bool]) -> int:
    """The first number from 0 that is enough, or the last if none is.

    >>> first_enough(10, lambda number: number >= 4), first_enough(3, lambda number: False)
    (4, 2)
    """
    return bisect.bisect_left(range(count - 1), True, key=is_enough)


def uniform(sizes: Mapping[str, int]) -> Choices:
    """One fraction for all groups.

    >>> uniform({"a": 2, "b": 4}).at(1)
    {'a': 0.5, 'b': 0.5}
    """
    fractions = sorted({gone / size for size in sizes.values() for gone in range(1, size)}) or [0.0]
    return Choices(len(fractions), lambda number: dict.fromkeys(sizes, fractions[number]))


def per_layer(costs: Mapping[str, Sequence[float]], saved: Mapping[str, int]) -> Choices:
    """All merges that cost at most so much for a MAC, for every price in turn.

    Args:
        costs: Group -> cost of each further merge, ascending.
        saved: Group -> MACs that go with one channel of the whole network.

    >>> found = per_layer({"alike": [0.0, 0.1], "varied": [0.4, 0.5]}, {"alike": 1, "varied": 2})
    >>> found.count, found.at(1), found.at(3)
    (4, {'alike': 0.6666666666666666, 'varied': 0.0}, {'alike': 0.6666666666666666, \
'varied': 0.6666666666666666})
    """
    prices = {name: [cost / max(1, saved[name]) for cost in each] for name, each in costs.items()}
    levels = sorted({price for each in prices.values() for price in each}) or [0.0]

    def at(number: int) -> dict[str, float]:
        return {
            name: bisect.bisect_right(each, levels[number]) / (len(each) + 1)
            for name, each in prices.items()
        }

    return Choices(len(levels), at)


def merge_costs(features: NDArray[np.float64]) -> list[float]:
    """Cost of each further merge of two clusters, as a share of the energy of all filters.

    Args:
        features: (channels, numbers), at least two channels.

    Returns:
        One cost less than there are channels, ascending.

    >>> [round(cost, 4) for cost in merge_costs(np.array([[1.0], [1.0], [3.0]]))]
    [0.0, 0.2424]
    """
    from sklearn.cluster import ward_tree

    *_, distances = ward_tree(compact(features), return_distance=True)
    energy = float(np.square(features).sum())
    # Ward's distance of two clusters is the root of twice what their merge adds to the spread.
    growth = np.maximum.accumulate(np.square(distances) / 2)
    return [float(each / energy) if energy else 0.0 for each in growth]
