"""Channels that are tied to their cluster: means, pull, contraction and spread of one tensor.

Everything is a scatter mean over the channels that have company, O(channels) memory: no averaging
matrix, nothing that lives on a fixed device. A tie holds names and numbers, never a parameter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slimcli.algorithms.csgd.clustering import labels_of
from slimcli.network.cuts import Slot


class Tie:
    """One dimension of one tensor whose channels form clusters.

    Args:
        slot: Where the channels are.
        clusters: Channels of each cluster.
        is_vector: Whether the tensor is a norm's vector or a bias.

    Attributes:
        tensor: Name of the parameter or buffer.
        is_vector: As given.
    """

    def __init__(self, slot: Slot, clusters: Sequence[Sequence[int]], is_vector: bool) -> None:
        self.tensor = slot.tensor
        self.is_vector = is_vector
        self._dim = slot.dim
        labels = labels_of(clusters)
        sizes = [len(members) for members in clusters]
        crowded = [channel for channel, label in enumerate(labels) if sizes[label] > 1]
        width = len(slot.indices[0]) if slot.indices else 1
        numbers = {label: n for n, label in enumerate(sorted({labels[c] for c in crowded}))}
        self.count = len(numbers) * width
        """Cluster means to make: one an entry of a channel."""
        # Entry j of one channel is averaged with entry j of the others of its cluster.
        self._entries = torch.tensor(
            [slot.indices[channel][j] for channel in crowded for j in range(width)],
            dtype=torch.long,
        )
        self._labels = torch.tensor(
            [numbers[labels[channel]] * width + j for channel in crowded for j in range(width)],
            dtype=torch.long,
        )
        self._shares = 1.0 / torch.bincount(self._labels, minlength=self.count).double()

    def gather(self, values: Tensor) -> Tensor:
        """The entries that have company, (entries, rest), a copy."""
        self._move_to(values.device)
        rows = values if self._dim == 0 else values.movedim(self._dim, 0)
        return (
            rows.index_select(0, self._entries).flatten(1)
            if rows.dim() > 1
            else (rows.index_select(0, self._entries).unsqueeze(1))
        )

    def means(self, gathered: Tensor) -> Tensor:
        """Each entry replaced by the mean of its cluster; (entries, rest) in and out."""
        sums = gathered.new_zeros(self.count, gathered.shape[1])
        sums.index_add_(0, self._labels, gathered)
        sums.mul_(self._shares.to(sums.dtype).unsqueeze(1))
        return sums.index_select(0, self._labels)

    def scatter(self, values: Tensor, gathered: Tensor) -> None:
        """Writes entries back in place."""
        rows = values if self._dim == 0 else values.movedim(self._dim, 0)
        rows.index_copy_(0, self._entries, gathered.reshape(-1, *rows.shape[1:]))

    def _move_to(self, device: torch.device) -> None:
        if self._entries.device != device:
            self._entries = self._entries.to(device)
            self._labels = self._labels.to(device)
            self._shares = self._shares.to(device)


def centripetal_gradient(tie: Tie, gradient: Tensor, values: Tensor, strength: float) -> None:
    """``G <- M G + eps (W - M W)`` in place, with M the mean over each cluster (arXiv 1904.03837).

    Weight decay is not part of it: ``eta W`` is added once for the whole tensor.

    Args:
        tie: Which channels are tied.
        gradient: Gradient of the loss, the shape of ``values``.
        values: The parameter.
        strength: ``eps``.
    """
    if not tie.count:
        return
    own = tie.gather(values)
    pulled = tie.means(tie.gather(gradient).sub_(own, alpha=strength))
    tie.scatter(gradient, pulled.add_(own, alpha=strength))


def gather_at_means(tie: Tie, values: Tensor) -> Tensor:
    """Sets every channel to the mean of its cluster, in place.

    An optimizer that steps from here moves all members of a cluster alike, whatever it makes of
    gradients, and of weight decay in them.

    Returns:
        What the tied entries were, (entries, rest), for :func:`spread_again`.
    """
    own = tie.gather(values)
    if tie.count:
        tie.scatter(values, tie.means(own))
    return own


def spread_again(tie: Tie, values: Tensor, own: Tensor, fraction: float) -> None:
    """Gives channels at their mean back their old distances from it, a fraction closer; in place.

    Args:
        tie: Which channels are tied.
        values: The parameter, equal within each cluster.
        own: What :func:`gather_at_means` returned.
        fraction: Part of the way to the mean; 1 leaves all at the mean.
    """
    if tie.count:
        apart = own - tie.means(own)
        tie.scatter(values, tie.gather(values).add_(apart, alpha=1.0 - fraction))


def project(tie: Tie, values: Tensor) -> None:
    """Sets every channel to the mean of its cluster, in place, bit for bit equal in a cluster."""
    if tie.count:
        wide = tie.means(tie.gather(values).double())
        tie.scatter(values, wide.to(values.dtype))


def distance(tie: Tie, values: Tensor, size: float | None = None) -> float:
    """How far tied channels are from their cluster's mean, in the Euclidean norm.

    Args:
        tie: Which channels are tied.
        values: The parameter.
        size: What the distance is relative to; default: the norm of the tied channels themselves,
            so that the result is at most 1.
    """
    if not tie.count:
        return 0.0
    own = tie.gather(values.detach().double())
    size = own.norm().item() if size is None else size
    apart = (own - tie.means(own)).norm().item()
    return float(apart / size if size else apart)


def size_of(tie: Tie, values: Tensor) -> float:
    """The Euclidean norm of the tied channels."""
    return float(tie.gather(values.detach().double()).norm()) if tie.count else 0.0


def distance_in(tie: Tie, values: Tensor, unit: Tensor) -> float:
    """Root mean square of the distances to the cluster's mean, each in the unit of its channel.

    Args:
        tie: Which channels are tied.
        values: The buffer.
        unit: One unit for each value.
    """
    if not tie.count:
        return 0.0
    own = tie.gather(values.detach().double())
    apart = (own - tie.means(own)) / tie.gather(unit.detach().double())
    return float(apart.square().mean().sqrt())
