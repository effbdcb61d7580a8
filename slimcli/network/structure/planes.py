"""Label planes: which channel every index of a tensor belongs to, without storing it per index.

A plane belongs to one tensor and has as many axes; along an axis that carries no channels its size
is 1. An entry packs a *label* (which entry of which parameter dimension the channel comes from, 0 =
none) in the low 32 bits and a *node* (how its value came about, see ``nodes.py``) in the high bits,
so that an operation that moves data is executed once and moves both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Labels = np.ndarray[tuple[int, ...], np.dtype[np.int64]]

NONE: Labels = np.zeros(0, np.int64)
SHIFT = 32
LABEL_MASK = (1 << SHIFT) - 1


def labels_of(plane: Tensor) -> Tensor:
    """The labels of a packed plane, same shape."""
    return plane & LABEL_MASK


def nodes_of(plane: Tensor) -> Tensor:
    """The nodes of a packed plane, same shape."""
    return plane >> SHIFT


def pack(labels: Tensor, nodes: Tensor | int) -> Tensor:
    """Labels and nodes in one tensor; entries without a label get no node either.

    >>> pack(torch.tensor([0, 7]), 2).tolist() == [0, 7 + (2 << 32)]
    True
    """
    flat = labels.numpy()
    packed = flat + ((nodes.numpy() if isinstance(nodes, Tensor) else nodes) << SHIFT)
    return torch.from_numpy(packed if are_all(flat) else np.where(flat == 0, 0, packed))


def active_axes(plane: Tensor) -> tuple[int, ...]:
    """The axes along which the channel changes.

    >>> active_axes(torch.zeros(1, 8, 1, 1))
    (1,)
    """
    return tuple(axis for axis, size in enumerate(plane.shape) if size > 1)


def squeeze_expanded(plane: Tensor) -> Tensor:
    """The plane with every stride-0 axis brought back to size 1."""
    for axis, (size, stride) in enumerate(zip(plane.shape, plane.stride(), strict=True)):
        if size > 1 and stride == 0:
            plane = plane.narrow(axis, 0, 1)
    return plane


def squeeze_equal(plane: Tensor) -> Tensor:
    """The plane with every axis of equal entries brought back to size 1 (looks at the values)."""
    plane = squeeze_expanded(plane)
    for axis in active_axes(plane):
        first = plane.narrow(axis, 0, 1)
        if bool((plane == first).all()):
            plane = first
    return plane


def is_useful(plane: Tensor) -> bool:
    """Does the plane still tell channels apart?"""
    return plane.numel() > 1


def move(plane: Tensor, shape: Sequence[int], function: Callable[[Tensor], Tensor]) -> Tensor:
    """Execute a data movement on a plane of a tensor of this shape."""
    moved = function(plane.expand(tuple(shape)))
    return squeeze_expanded(moved)


def broadcast(planes: Sequence[Tensor]) -> list[Tensor]:
    """Planes expanded to one shape."""
    if all(plane.shape == planes[0].shape for plane in planes):
        return list(planes)
    shape = np.broadcast_shapes(*(tuple(plane.shape) for plane in planes))
    return [plane.expand(shape) for plane in planes]


def with_leading_axes(plane: Tensor, dims: int) -> Tensor:
    """The plane of the tensor where it is broadcast to as many axes."""
    return plane.reshape([1] * (dims - plane.dim()) + list(plane.shape))


def first_of(plane: Tensor) -> int:
    """Its first entry, packed.

    >>> first_of(torch.tensor([[5], [6]]))
    5
    """
    return int(plane.numpy().item(0))


def are_all(flags: np.ndarray) -> bool:
    """Is none of them false, or zero? ``flags.all()`` takes three times as long.

    >>> are_all(np.array([True, False])), are_all(np.array([2, 1]))
    (False, True)
    """
    return bool(np.count_nonzero(flags) == flags.size)


def entries(plane: Tensor) -> Labels:
    """All different entries, sorted."""
    return distinct(plane.reshape(-1).numpy())


def distinct(values: Labels) -> Labels:
    """All different values, sorted; most arrays of labels are so already, or of one value.

    >>> distinct(np.array([3, 1, 3])).tolist()
    [1, 3]
    """
    if are_all(values[1:] > values[:-1]):
        return values
    if are_all(values == values[0]):
        return values[:1]
    return np.unique(values)


def axis_entries(plane: Tensor, axis: int) -> Tensor:
    """The plane as a matrix: one row an index of ``axis``, all that occurs there in its columns.

    >>> axis_entries(torch.arange(6).view(1, 3, 2), 1).tolist()
    [[0, 1], [2, 3], [4, 5]]
    """
    return plane.movedim(axis, 0).reshape(plane.shape[axis], -1)


def segments(old: Sequence[int], new: Sequence[int]) -> list[tuple[range, range]]:
    """The smallest runs of dimensions with equal products, as a view regroups them.

    Returns:
        Pairs (old dimensions, new dimensions).

    >>> segments((2, 8, 4, 4), (2, 2, 4, 16))
    [(range(0, 1), range(0, 1)), (range(1, 2), range(1, 3)), (range(2, 4), range(3, 4))]
    """
    found = []
    i = j = 0
    while i < len(old) or j < len(new):
        start_i, start_j = i, j
        left = right = 1
        if i < len(old):
            left, i = old[i], i + 1
        if j < len(new):
            right, j = new[j], j + 1
        while left != right:
            if left < right and i < len(old):
                left, i = left * old[i], i + 1
            elif left > right and j < len(new):
                right, j = right * new[j], j + 1
            else:
                raise ValueError("shapes of different size")
        found.append((range(start_i, i), range(start_j, j)))
    return found


def view(plane: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """The plane of ``tensor.view(new)``; only dimensions that carry labels are filled in."""
    expand_to, shape_new = list(plane.shape), [1] * len(new)
    for before, after in segments(old, new):
        if any(plane.shape[axis] > 1 for axis in before):
            for axis in before:
                expand_to[axis] = old[axis]
            for axis in after:
                shape_new[axis] = new[axis]
    return plane.expand(expand_to).reshape(shape_new)


def split_blocks(
    plane: Tensor, old: Sequence[int], new: Sequence[int]
) -> list[tuple[int, int | None]]:
    """Where a view cuts an axis that carries labels into blocks.

    Returns:
        (axis, entries in a block) for each cut; None where the cut falls inside an entry.

    >>> split_blocks(torch.zeros(1, 8, 1), (2, 8, 9), (2, 2, 4, 9))
    [(1, 4)]
    """
    found: list[tuple[int, int | None]] = []
    for before, after in segments(old, new):
        boundaries, product = set(), 1
        for axis in reversed(after):
            product *= new[axis]
            boundaries.add(product)
        inner = 1
        for axis in reversed(before):
            outer = inner * old[axis]
            if plane.shape[axis] > 1:
                inside = sorted(b for b in boundaries if inner < b < outer)
                found += [(axis, b // inner if b % inner == 0 else None) for b in inside]
            inner = outer
    return found
