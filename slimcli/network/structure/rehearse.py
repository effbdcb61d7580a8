"""Channels made removable at once, as training makes them removable slowly: zero, or equal.

The trial cut and the tests use it; algorithms never do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from slimcli.network.cuts import Cut
from slimcli.network.structure.structure import Group, zero_channels


def rehearse(model: nn.Module, group: Group, order: Sequence[int]) -> Cut:
    """Makes half of a group's channels removable, in place, and returns the cut that removes them.

    Args:
        model: Changed in place.
        group: Can be cut; its channels become zero, or, where only merging is exact, equal.
        order: All its channels; where zero ones go, the first half stays.
    """
    keep = max(1, group.size // 2)
    if group.exact_zero:
        zero_channels(model, group, order[keep:])
        return group.cut(order[:keep])
    clusters = sorted(sorted(order[start::keep]) for start in range(keep))
    equalize_channels(model, group, clusters)
    return group.merge(clusters)


def equalize_channels(model: nn.Module, group: Group, clusters: Sequence[Sequence[int]]) -> None:
    """Gives all channels of each cluster the numbers of its first one, in place."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for slot in dict.fromkeys(group.producers + group.followers):
            entries = tensors[slot.tensor].movedim(slot.dim, 0)
            for first, *others in clusters:
                for other in others:
                    entries[list(slot.indices[other])] = entries[list(slot.indices[first])].clone()
