"""From label pairs to groups of channels: connected components, gathered by what they touch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from scipy.sparse import coo_matrix  # type: ignore[import-untyped]
from scipy.sparse.csgraph import connected_components  # type: ignore[import-untyped]

from slimcli.network.cuts import Slot
from slimcli.network.structure.planes import Labels, distinct
from slimcli.network.structure.record import Record


class Choice(Enum):
    """What happens to blocks of an axis that is divided."""

    OFFSETS = 0
    BLOCKS = 1


@dataclass
class RawGroup:
    """Channels with the same slots and the same fate; not yet looked at for zeros.

    Attributes:
        slots: (index into ``sources.dims``, entries per channel as a matrix (size, k)).
        size: Channels.
        reason: Why it is frozen, or empty.
    """

    slots: list[tuple[int, Labels]]
    size: int
    reason: str


@dataclass
class Grouping:
    """All groups and, for every label, the number of its group (-1: none)."""

    groups: list[RawGroup]
    group_of: Labels


def build(
    record: Record, choices: Sequence[Choice], bans: Iterable[tuple[Labels, str]]
) -> Grouping:
    """Groups under a choice for every split.

    Args:
        record: What was traced.
        choices: One for each of ``record.splits``.
        bans: More labels to freeze, with reasons (what a trial cut found).
    """
    component = components(record, choices)
    reasons, reason_of = _frozen_components(record, component, bans)
    wanted = np.zeros(int(component.max()) + 1, dtype=bool)
    for producer in record.producers:
        wanted[component[producer.labels]] = True
    wanted[component[0]] = False  # no channel
    slot_of = _slot_of_label(record)
    return _gather(record, component, wanted, slot_of, reason_of, reasons)


def components(record: Record, choices: Sequence[Choice]) -> Labels:
    """Number of the component of every label."""
    pairs = list(record.edges)
    for split, choice in zip(record.splits, choices, strict=True):
        pairs.append(split.offset_pairs if choice == Choice.OFFSETS else split.block_pairs)
    count = record.sources.count
    left = np.concatenate([pair[0] for pair in pairs] or [np.zeros(0, np.int64)])
    right = np.concatenate([pair[1] for pair in pairs] or [np.zeros(0, np.int64)])
    both = (left != 0) & (right != 0)
    left, right = left[both], right[both]
    graph = coo_matrix((np.ones(len(left), np.int8), (left, right)), shape=(count, count))
    numbers: Labels = connected_components(graph, directed=False)[1].astype(np.int64)
    return numbers


def first_choices(record: Record) -> list[Choice]:
    """Equal offsets, except where that would leave a single channel and whole blocks would not."""
    choices = [Choice.OFFSETS] * len(record.splits)
    if not choices:
        return choices
    component = components(record, choices)
    collapsed = [
        number
        for number, split in enumerate(record.splits)
        if _count(component, split.offset_pairs[0]) == 1
    ]
    if not collapsed:
        return choices
    for number in collapsed:
        choices[number] = Choice.BLOCKS
    component = components(record, choices)
    for number in collapsed:
        if _count(component, record.splits[number].offset_pairs[0]) == 1:
            choices[number] = Choice.OFFSETS
    return choices


def _count(component: Labels, labels: Labels) -> int:
    return len(distinct(component[labels[labels != 0]]))


def _frozen_components(
    record: Record, component: Labels, bans: Iterable[tuple[Labels, str]]
) -> tuple[list[str], Labels]:
    """Reasons, and for each component the number of its first one (-1: not frozen)."""
    reasons = list(record.reasons)
    frozen = list(record.frozen)
    for labels, reason in bans:
        reasons.append(reason)
        frozen.append((labels, len(reasons) - 1))
    none = len(reasons)
    first = np.full(int(component.max()) + 1, none, dtype=np.int64)
    for labels, number in frozen:
        np.minimum.at(first, component[labels], number)
    numbers = {reason: number for number, reason in reversed(list(enumerate(reasons)))}
    equal = np.array([*(numbers[reason] for reason in reasons), -1], dtype=np.int64)
    return reasons, equal[first]


def _slot_of_label(record: Record) -> Labels:
    sizes = [1, *(each.size for each in record.sources.dims)]
    return np.repeat(np.arange(-1, len(sizes) - 1, dtype=np.int64), sizes)


def _gather(
    record: Record,
    component: Labels,
    wanted: np.ndarray,
    slot_of: Labels,
    reason_of: Labels,
    reasons: Sequence[str],
) -> Grouping:
    """Components with equal slots and equal reasons become one group."""
    group_of = np.full(record.sources.count, -1, dtype=np.int64)
    if not wanted.any():
        return Grouping([], group_of)
    labels, head = _by_channel(np.flatnonzero(wanted[component]), component)
    starts = np.flatnonzero(np.diff(head, prepend=-1))
    ids = np.random.default_rng(0).integers(1, 2**62, size=len(record.sources.dims), dtype=np.int64)
    with np.errstate(over="ignore"):
        signature = np.add.reduceat(ids[slot_of[labels]], starts)
    signature = signature ^ (reason_of[component[labels[starts]]] * 1_000_003)
    _, which = np.unique(signature, return_inverse=True)
    counts = np.diff(starts, append=len(labels))
    group_of[labels] = np.repeat(which, counts)
    order = _network_order(record, group_of, int(which.max()) + 1)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    group_of[labels] = rank[group_of[labels]]
    by_slot = np.argsort(group_of[labels] * len(ids) + slot_of[labels], kind="stable")
    sizes = np.bincount(rank[which])
    groups = _raw_groups(
        record, labels[by_slot], sizes, component, group_of, slot_of, reason_of, reasons
    )
    return Grouping(groups, group_of)


def _by_channel(labels: Labels, component: Labels) -> tuple[Labels, Labels]:
    """Labels (ascending) sorted by the smallest of their component, and that smallest one."""
    smallest = np.zeros(int(component.max()) + 1, dtype=np.int64)
    smallest[component[labels[::-1]]] = labels[::-1]  # the last one written stays
    head = smallest[component[labels]]
    order = np.argsort(head, kind="stable")
    return labels[order], head[order]


def _network_order(record: Record, group_of: Labels, count: int) -> Labels:
    first = np.full(count, np.iinfo(np.int64).max)
    for producer in record.producers:
        groups = distinct(group_of[producer.labels])
        groups = groups[groups >= 0]
        first[groups] = np.minimum(first[groups], producer.order)
    return np.argsort(first, kind="stable")


def _raw_groups(
    record: Record,
    labels: Labels,
    sizes: Labels,
    component: Labels,
    group_of: Labels,
    slot_of: Labels,
    reason_of: Labels,
    reasons: Sequence[str],
) -> list[RawGroup]:
    """Groups of so many channels; labels come by group, by slot in it, by channel in that."""
    firsts = np.array([each.first for each in record.sources.dims])
    group, slot = group_of[labels], slot_of[labels]
    entries = labels - firsts[slot]
    changes = (group[1:] != group[:-1]) | (slot[1:] != slot[:-1])
    bounds = [0, *(np.flatnonzero(changes) + 1).tolist(), len(labels)]
    groups = [RawGroup([], size, "") for size in sizes.tolist()]
    for start, end in itertools.pairwise(bounds):
        mine = groups[int(group[start])]
        if not mine.slots:
            number = int(reason_of[component[labels[start]]])
            mine.reason = reasons[number] if number >= 0 else ""
        mine.slots.append((int(slot[start]), entries[start:end].reshape(mine.size, -1)))
    return groups


Indices = tuple[tuple[int, ...], ...]


def to_slot(record: Record, number: int, entries: Labels, known: dict[Any, Indices]) -> Slot:
    """A slot from a matrix of entries (channels, entries per channel).

    Equal indices are one object over all slots that share ``known``, so that what is worked out
    for one of them serves all.
    """
    dim = record.sources.dims[number]
    key = entries.shape, entries.tobytes()
    indices = known.get(key)
    if indices is None:
        indices = known[key] = tuple(map(tuple, entries.tolist()))
    return Slot(dim.tensor, dim.dim, indices, dim.size)
