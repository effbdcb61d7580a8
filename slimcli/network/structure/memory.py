"""Where tensors lie in memory, and planes of those that share it, one of which was written."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from slimcli.network.structure.nodes import ZEROS_TO_MEASURE, Kind, Node, NodeTable
from slimcli.network.structure.planes import (
    LABEL_MASK,
    SHIFT,
    active_axes,
    labels_of,
    nodes_of,
    pack,
    squeeze_equal,
)


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


class Aliases:
    """Tensors that share memory, for writes into one of them."""

    def __init__(self) -> None:
        self._known: dict[int, list[weakref.ref[Tensor]]] = {}

    def note(self, inputs: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Remembers which results of an operator are views of its inputs."""
        for result in results:
            memory = memory_of(result)
            if memory is None:
                continue
            for tensor in inputs:
                if tensor is not result and memory_of(tensor) == memory:
                    known = self._known.setdefault(memory, [])
                    known += [weakref.ref(tensor), weakref.ref(result)]

    def of(self, tensor: Tensor) -> list[Tensor]:
        """Others that are alive and share the memory of this one."""
        memory = memory_of(tensor)
        living: dict[int, Tensor] = {}
        for reference in self._known.get(memory, ()) if memory is not None else ():
            other = reference()
            if other is not None and memory_of(other) == memory:
                living[id(other)] = other
        living.pop(id(tensor), None)
        return list(living.values())


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


def whole_labels(tensor: Tensor, other: Tensor, planes: Sequence[Tensor]) -> set[int]:
    """Labels of another tensor's planes all of whose numbers a tensor holds; they share memory.

    >>> canvas = torch.zeros(2, 3, 4)
    >>> plane = torch.tensor([7, 8, 9]).view(1, 3, 1)
    >>> [sorted(whole_labels(part, canvas, [plane])) for part in (canvas, canvas[:, :2], canvas[0])]
    [[7, 8, 9], [7, 8], []]
    """
    if tensor.element_size() != other.element_size():
        return set()
    memory = torch.zeros(other.untyped_storage().nbytes() // other.element_size(), dtype=torch.bool)
    memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
    held = memory.as_strided(other.shape, other.stride(), other.storage_offset())
    found: set[int] = set()
    lost: set[int] = set()
    for plane in planes:
        rest = tuple(axis for axis in range(other.dim()) if plane.shape[axis] == 1)
        is_whole = held.all(dim=rest, keepdim=True) if rest else held
        found |= set(labels_of(plane).flatten().tolist())
        lost |= set(labels_of(plane)[~is_whole].flatten().tolist())
    return found - lost


def same_channels(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Do planes tell the same channels, whatever became of them?"""
    labels = [[labels_of(each) for each in planes] for planes in (left, right)]
    return len(left) == len(right) and all(map(torch.equal, *labels))


def rewritten(
    table: NodeTable,
    old: Sequence[Tensor],
    new: Sequence[Tensor],
    others: Sequence[Tensor],
    whole: Collection[int],
) -> tuple[Tensor, ...]:
    """Planes of a tensor whose numbers were replaced where another one lies in its memory.

    Args:
        table: Of the nodes.
        old: Planes of the other tensor before it was written.
        new: The same channels afterwards.
        others: Planes of the tensor.
        whole: Labels all of whose numbers were replaced, not some of them.
    """
    labels = np.unique(np.concatenate([labels_of(plane).numpy().ravel() for plane in new]))
    became: dict[int, set[int]] = {}
    for before, after in zip(old, new, strict=True):
        pairs = np.stack([before.numpy().ravel() >> SHIFT, after.numpy().ravel() >> SHIFT])
        for was, now in np.unique(pairs, axis=1).T.tolist():
            became.setdefault(was, set()).add(now)
    every = set().union(*became.values())

    def node_of(node: int, is_whole: bool) -> int:
        known = became.get(node, every | {node})
        return table.one_of(known if is_whole else known | {node})

    result = []
    for plane in others:
        flat = plane.numpy().ravel()
        label, node = flat & LABEL_MASK, flat >> SHIFT
        is_touched = np.isin(label, labels) & (label != 0)
        is_whole = np.isin(label, list(whole))
        for each, flag in itertools.product(np.unique(node[is_touched]).tolist(), (True, False)):
            here = is_touched & (flat >> SHIFT == each) & (is_whole == flag)
            node = np.where(here, node_of(each, flag), node) if here.any() else node
        result.append(torch.from_numpy(label + (node << SHIFT)).view(plane.shape))
    return tuple(result)


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


def written_through(
    table: NodeTable,
    tensor: Tensor,
    others: Sequence[Tensor],
    planes_of: Callable[[Tensor], Sequence[Tensor]],
) -> list[tuple[Tensor, ...]]:
    """Planes of the others in whose memory channels of one kind were written.

    Args:
        table: Of the nodes.
        tensor: It was written.
        others: They share its memory.
        planes_of: Of each of them; one at most.
    """
    numel = tensor.untyped_storage().nbytes() // tensor.element_size()
    memory = torch.zeros(numel, dtype=torch.int64)
    for each in [*sorted(others, key=lambda other: -other.numel()), tensor]:
        planes = planes_of(each)
        place = memory.as_strided(each.shape, each.stride(), each.storage_offset())
        if planes:
            place.copy_(planes[0].expand(each.shape))
        elif each is tensor:
            place.zero_()
    painted: list[tuple[Tensor, ...]] = []
    for other in others:
        view = memory.as_strided(other.shape, other.stride(), other.storage_offset())
        plane = joined(table, squeeze_equal(view.clone()))
        painted.append((plane,) if plane.numel() > 1 and bool(plane.any()) else ())
    return painted
