"""Where tensors lie in memory, and planes of those that share it, one of which was written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slimcli.network.structure.nodes import ZEROS_TO_MEASURE, Kind, Node, NodeTable
from slimcli.network.structure.planes import active_axes, labels_of, nodes_of, pack


def memory_of(tensor: Tensor) -> int | None:
    """Where its numbers lie; None for sparse and nested tensors and for what ``vmap`` wraps.

    >>> x = torch.zeros(3)
    >>> memory_of(x) == memory_of(x[1:]), memory_of(x.to_sparse())
    (True, None)
    """
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (NotImplementedError, RuntimeError):
        return None


def lies_like(left: Tensor, right: Tensor) -> bool:
    """Are they the same entries of the same memory, in the same order?"""
    places = [(each.shape, each.stride(), each.storage_offset()) for each in (left, right)]
    return places[0] == places[1] and memory_of(left) == memory_of(right)


def seen_from(plane: Tensor, tensor: Tensor, other: Tensor) -> Tensor | None:
    """The plane of a tensor as one of another tensor that shares its memory.

    None where not the whole of each axis with channels is an axis of the other tensor.

    >>> canvas = torch.zeros(2, 3, 8, 8)
    >>> seen_from(torch.arange(3).view(3, 1, 1), canvas[0, :, 2:6, 2:6], canvas).shape
    torch.Size([1, 3, 1, 1])
    """
    places = {
        stride: axis
        for axis, (size, stride) in enumerate(zip(other.shape, other.stride(), strict=True))
        if size > 1
    }
    axes: dict[int, int] = {}
    for axis in active_axes(plane):
        place = places.get(tensor.stride(axis))
        if place is None or other.shape[place] != plane.shape[axis]:
            return None
        axes[place] = axis
    moved = plane.squeeze().permute([active_axes(plane).index(axes[each]) for each in sorted(axes)])
    return moved.reshape([plane.shape[axes[n]] if n in axes else 1 for n in range(other.dim())])


def has_gaps(planes: Sequence[Tensor], tensor: Tensor, others: Sequence[Tensor]) -> bool:
    """Is there room between the channels, in the memory of the largest of the other tensors?

    >>> canvas = torch.zeros(2, 6, 4)
    >>> has_gaps([torch.arange(3).view(1, 3, 1)], canvas[:, 0::2], [canvas])
    True
    >>> has_gaps([torch.arange(3).view(1, 3, 1)], canvas[:, :3], [canvas])
    False
    """
    known = max(others, key=Tensor.numel).stride()
    return any(tensor.stride(axis) not in known for p in planes for axis in active_axes(p))


def are_zeros(table: NodeTable, planes: Sequence[Tensor]) -> bool:
    """Are there no channels but those of zeros that were made as wide as others?"""
    zeros = table.add(ZEROS_TO_MEASURE)
    return all(bool(((nodes_of(each) == 0) | (nodes_of(each) == zeros)).all()) for each in planes)


def bordered(table: NodeTable, plane: Tensor) -> Tensor:
    """The plane of channels that have zeros around them."""
    unique, inverse = torch.unique(nodes_of(plane), return_inverse=True)
    new = [table.add(Node(Kind.BORDER, (node,))) if node else 0 for node in unique.tolist()]
    return pack(labels_of(plane), torch.tensor(new)[inverse])


def joined(table: NodeTable, plane: Tensor) -> Tensor:
    """The plane without axes along which values differ, but not the channels."""
    labels = labels_of(plane)
    for axis in active_axes(plane):
        if bool((labels == labels.narrow(axis, 0, 1)).all()):
            labels = labels.narrow(axis, 0, 1)
            plane = pack(labels, _along(axis, nodes_of(plane), table))
    return plane


def _along(axis: int, nodes: Tensor, table: NodeTable) -> Tensor:
    """One node for all that lie along an axis."""
    rows, inverse = torch.unique(nodes.movedim(axis, -1).flatten(0, -2), dim=0, return_inverse=True)
    new = [table.one_of(row) for row in rows.tolist()]
    shape = [1 if each == axis else size for each, size in enumerate(nodes.shape)]
    return torch.tensor(new)[inverse].reshape(shape)
