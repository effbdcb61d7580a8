"""Channels made removable at once, as training makes them removable slowly: zero, or equal.

The trial cut and the tests use it; algorithms never do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from slimcli.network.cuts import Cut
from slimcli.network.structure.structure import Group, zero_channels


def rehearse(model: nn.Module, group: Group, order: Sequence[int], merging: bool = False) -> Cut:
    """Makes half of a group's channels removable, in place, and returns the cut that removes them.

    Args:
        model: Changed in place.
        group: Can be cut.
        order: All its channels; the first half stays, the others become zero, or, where only
            merging is exact, equal to one that stays.
        merging: Where both are exact, half of those that go become equal and half zero.
    """
    keep = max(1, group.size // 2)
    stays, goes = order[:keep], order[keep:]
    merged = len(goes)
    if group.exact_zero:
        merged = len(goes) // 2 if merging and group.exact_duplicate else 0
        zero_channels(model, group, goes[merged:])
    clusters = [[stays[i], *goes[i:merged:keep]] for i in range(keep)]
    clusters = sorted(map(sorted, clusters))
    equalize_channels(model, group, clusters)
    return group.merge(clusters)


def equalize_channels(model: nn.Module, group: Group, clusters: Sequence[Sequence[int]]) -> None:
    """Gives all channels of each cluster the numbers of its first one, in place."""
    pairs = [(first, other) for first, *others in clusters for other in others]
    if not pairs:
        return
    with torch.no_grad():
        for slot in dict.fromkeys(group.producers + group.followers):
            path, _, local = slot.tensor.rpartition(".")
            tensor = getattr(model.get_submodule(path), local)
            firsts = [index for first, _ in pairs for index in slot.indices[first]]
            others = [index for _, other in pairs for index in slot.indices[other]]
            origins = torch.tensor(firsts, device=tensor.device)
            targets = torch.tensor(others, device=tensor.device)
            tensor.index_copy_(slot.dim, targets, tensor.index_select(slot.dim, origins))
