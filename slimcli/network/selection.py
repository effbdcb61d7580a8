"""Which old entries each new entry of a tensor dimension is made of, and doing it to a tensor.

Pure functions: no model, no optimizer, no files. ``surgery`` applies them to everything that has a
parameter's shape.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from operator import itemgetter

import numpy as np
import torch
from torch import Tensor

Sources = tuple[tuple[int, ...], ...]
"""For each entry that stays, in order, the old entries whose sum it is (see ``SlotCut``)."""


@functools.cache
def whole(size: int) -> Sources:
    """The selection that keeps every entry (a wide network asks for the same ones often).

    >>> whole(3)
    ((0,), (1,), (2,))
    """
    return tuple((index,) for index in range(size))


def compose(parts: Sequence[Sources], size: int) -> Sources:
    """One selection that does what several do, all given in the original indices.

    An entry that any of them drops is gone; entries that any of them adds up are added up. Where
    they are different, each must keep the original order, because two orders can't both hold.

    Args:
        parts: One or more selections of the same dimension of ``size`` entries.
        size: Entries before.

    Raises:
        ValueError: An index is out of range, nothing stays, or the selections can't be combined.

    >>> compose([((0,), (2,), (3,)), ((0,), (1,), (2,))], size=4)
    ((0,), (2,))
    >>> compose([((0, 1), (2,), (3,)), ((0,), (1,), (2,))], size=4)
    ((0, 1), (2,))
    """
    flat = [_entries(part, size) for part in parts]
    if all(part == parts[0] for part in parts[1:]):
        return parts[0]
    gone = np.zeros(size, dtype=bool)
    leader = list(range(size))
    for part, entries in zip(parts, flat, strict=True):
        _check_ordered(part, entries)
        stays = np.zeros(size, dtype=bool)
        stays[entries] = True
        gone |= ~stays
        if len(entries) > len(part):
            _join(leader, [entry for entry in part if len(entry) > 1])
    if gone.all():
        raise ValueError("the cuts together leave no entry")
    merged: dict[int, list[int]] = {}
    for index in np.flatnonzero(~gone).tolist():
        merged.setdefault(_leader_of(leader, index), []).append(index)
    return tuple(tuple(entry) for entry in merged.values())


def _join(leader: list[int], entries: Sequence[tuple[int, ...]]) -> None:
    """Union-find: all indices of an entry get the smallest one as their leader."""
    for entry in entries:
        heads = sorted({_leader_of(leader, index) for index in entry})
        for head in heads[1:]:
            leader[head] = heads[0]


def _leader_of(leader: list[int], index: int) -> int:
    while leader[index] != index:
        leader[index] = leader[leader[index]]
        index = leader[index]
    return index


def select(
    tensor: Tensor, sources: Mapping[int, Sources], dtype: torch.dtype | None = None
) -> Tensor:
    """A new tensor with the selections done, one a dimension; memory layout and device kept.

    Args:
        tensor: Any shape; not changed.
        sources: Dimension -> what stays of it.
        dtype: Of the result, in which sums are made; default: that of the tensor.

    >>> select(torch.tensor([[1.0, 2.0, 3.0]]), {1: ((0, 2), (1,))})
    tensor([[4., 2.]])
    """
    result = tensor.detach()
    dtype = dtype or tensor.dtype
    cheapest_first = sorted((max(map(len, each)), dim) for dim, each in sources.items())
    for most, dim in cheapest_first:
        result = _select_dimension(result, dim, sources[dim], most, dtype)
    result = result.to(dtype)
    if sources and _lies_in_order(tensor):
        return result
    return in_memory_order(result, tensor.dim_order())


def _lies_in_order(tensor: Tensor) -> bool:
    """Is each stride what it is in a new tensor, also those of dimensions of size one?

    >>> _lies_in_order(torch.zeros(2, 3)), _lies_in_order(torch.zeros(2, 3).T)
    (True, False)
    """
    wanted = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if stride != wanted:
            return False
        wanted *= max(size, 1)
    return True


def in_memory_order(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """A copy whose dimensions lie in memory as ``Tensor.dim_order`` says, also those of size one.

    >>> in_memory_order(torch.zeros(2, 3, 1, 1), (0, 2, 3, 1)).stride()
    (3, 1, 3, 3)
    """
    back = sorted(range(tensor.dim()), key=order.__getitem__)
    ordered = tensor.permute(tuple(order)).clone(memory_format=torch.contiguous_format)
    return ordered.permute(back)


def shape_after(shape: Sequence[int], sources: Mapping[int, Sources]) -> tuple[int, ...]:
    """The shape :func:`select` gives.

    >>> shape_after((8, 4, 3, 3), {0: ((0,), (5,))})
    (2, 4, 3, 3)
    """
    return tuple(len(sources[dim]) if dim in sources else n for dim, n in enumerate(shape))


def groups_after(sources: Sources, size: int, groups: int) -> int:
    """How many groups a dimension that is divided into equal groups has afterwards.

    Whole groups may go, and the same number of entries may go from each group that stays.

    Args:
        sources: What stays of the divided dimension.
        size: Entries before.
        groups: Groups before.

    Raises:
        ValueError: The groups that stay would have different sizes.

    >>> groups_after(((0,), (3,)), size=4, groups=4)  # depthwise: two channels stay
    2
    >>> groups_after(((0,), (2,)), size=4, groups=2)  # one of two in each group
    2
    >>> groups_after(((2,), (3,)), size=4, groups=2)  # the second group stays whole
    1
    """
    group_size = size // groups
    order = [entry[0] // group_size for entry in sources]
    counts = Counter(order)
    crosses = any(
        index // group_size != entry[0] // group_size for entry in sources for index in entry
    )
    if len(set(counts.values())) != 1 or order != sorted(order) or crosses:
        raise ValueError(
            f"{groups} groups of {group_size} would keep {sorted(counts.values())} entries; "
            "all groups that stay must keep equally many"
        )
    return len(counts)


def _select_dimension(
    tensor: Tensor, dim: int, sources: Sources, most: int, dtype: torch.dtype
) -> Tensor:
    """Sums in rounds with unique targets, so that the result doesn't depend on thread order.

    ``most`` is the length of the longest sum. The result has this dtype if it has sums, else that
    of the tensor.
    """
    first = np.fromiter(map(itemgetter(0), sources), np.int64, len(sources))
    result = tensor.index_select(dim, torch.from_numpy(first).to(tensor.device))
    result = result.to(dtype) if most > 1 else result
    for turn in range(1, most):
        targets = [place for place, entry in enumerate(sources) if len(entry) > turn]
        origins = [sources[place][turn] for place in targets]
        addend = tensor.index_select(dim, torch.tensor(origins, device=tensor.device))
        result.index_add_(dim, torch.tensor(targets, device=tensor.device), addend.to(dtype))
    return result


def _entries(part: Sources, size: int) -> np.ndarray:
    """All old entries of a selection in one row, checked."""
    flat = np.fromiter(chain.from_iterable(part), np.int64)
    if not len(flat) or () in part:
        raise ValueError("a cut must leave at least one entry, each made of at least one old entry")
    low, high = int(flat.min()), int(flat.max())
    if low < 0 or high >= size:
        wrong = low if low < 0 else high
        raise ValueError(f"index {wrong} is outside a dimension of {size} entries")
    return flat


def _check_ordered(part: Sources, flat: np.ndarray) -> None:
    heads, repeats = flat, False
    if len(flat) > len(part):
        lengths = np.fromiter(map(len, part), np.int64, len(part))
        heads = np.minimum.reduceat(flat, np.cumsum(lengths) - lengths)
        repeats = bool(np.bincount(flat).max() > 1)
    if repeats or not bool((np.diff(heads) > 0).all()):
        raise ValueError("several cuts of one dimension must each keep the original order")
