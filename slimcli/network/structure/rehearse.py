"""Which channels of a group a trial cut removes, and what makes them removable."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from slimcli.network.cuts import Cut
from slimcli.network.structure.edits import Edit, equals, zeros
from slimcli.network.structure.structure import Group


def kept_count(size: int, random: torch.Generator) -> int:
    """How many of so many channels a trial keeps: a quarter to three quarters, an odd number.

    Exactly half would fit too much code: two widths that must be equal are halved alike, and half
    of a number of heads is a number of heads.

    >>> kept_count(64, torch.Generator().manual_seed(0)) % 2
    1
    """
    low, high = max(1, size // 4), 3 * size // 4
    drawn = int(torch.randint(low, high + 1, (), generator=random)) | 1
    return min(drawn, size - 1)


def rehearse(
    model: nn.Module, group: Group, order: Sequence[int], keep: int, merging: bool = False
) -> tuple[Cut, list[Edit]]:
    """The cut of a group's channels, and what must be done first to make it exact.

    Args:
        model: Holds the tensors; not changed.
        group: Can be cut.
        order: All its channels; the first ones stay, the others become zero, or, where only
            merging is exact, equal to one that stays.
        keep: So many stay.
        merging: Where both are exact, half of those that go become equal and half zero.
    """
    stays, goes = order[:keep], order[keep:]
    merged = len(goes)
    edits: list[Edit] = []
    if group.exact_zero:
        merged = len(goes) // 2 if merging and group.exact_duplicate else 0
        edits += zeros(model, group, goes[merged:])
    clusters = [[stays[i], *goes[i:merged:keep]] for i in range(keep)]
    clusters = sorted(map(sorted, clusters))
    edits += equals(model, group, clusters)
    return group.merge(clusters), edits
