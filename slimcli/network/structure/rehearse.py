"""What a trial does to a group before its channels are removed, and the cut itself."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from slimcli.network.cuts import Cut
from slimcli.network.structure.edits import Edit, equals, zeros
from slimcli.network.structure.structure import Group


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
        merged = (len(goes) + 1) // 2 if merging and group.exact_duplicate else 0
        edits += zeros(model, group, goes[merged:])
    clusters = [[stays[i], *goes[i:merged:keep]] for i in range(keep)]
    clusters = sorted(map(sorted, clusters))
    edits += equals(model, group, clusters)
    return group.merge(clusters), edits


def goes_alone(group: Group, keep: int) -> bool:
    """Do so few channels go, where so many stay, that, if they are merged, none is zeroed?"""
    return group.exact_zero and group.exact_duplicate and group.size - keep < 2
