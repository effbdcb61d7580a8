"""Which channels a trial cut keeps: drawn so that nothing fits by luck."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch

from slimcli.network.structure.structure import Group

REDRAWN = 20
"""So often a choice of channels is drawn anew, to be another one than that of the group before."""

FEW = 3
"""Of fewer numbers of channels to keep, two groups have the same one soon."""

ALL_SIZES = 0
"""Stands for groups of any size."""

Selection = tuple[list[int], int]
"""All channels of a group in some order, and how many of the first ones stay."""


def kept_counts(size: int, least: int = 1) -> list[int]:
    """How many of so many channels a trial may keep: a quarter to three quarters, an odd number.

    At least ``least``, which is less than ``size``.

    Exactly half would fit too much code: two widths that must be equal are halved alike, and half
    of a number of heads is a number of heads. Two go if that can be, so that one of them can be
    merged and one zeroed.

    >>> kept_counts(16), kept_counts(4), kept_counts(8, least=4)
    ([5, 7, 9, 11, 13], [1], [4, 5])
    """
    low, high = max(1, size // 4), 3 * size // 4
    return sorted({max(least, 1, min(n | 1, (size - 3) | 1)) for n in range(low, high + 1)})


class Draws:
    """Choices of channels, and the last one of each group.

    Args:
        random: What they are drawn from.
    """

    def __init__(self, random: torch.Generator) -> None:
        self._random = random
        self._last: dict[str, Selection] = {}
        self._turn: int | None = None
        self._repeats = False
        self._level: dict[str, int] = {}

    def kept(self, group: Group) -> int:
        """How many channels of a group stayed the last time."""
        return self._last[group.name][1]

    @contextlib.contextmanager
    def turned(self, turn: int) -> Iterator[None]:
        """Meanwhile the last choices come again, those of some groups the other way round.

        Args:
            turn: 0 or 1; every group is turned round in one of them.
        """
        self._turn = turn
        try:
            yield
        finally:
            self._turn = None

    @contextlib.contextmanager
    def repeated(self) -> Iterator[None]:
        """Meanwhile the last choices come again."""
        known, self._repeats = self._repeats, True
        try:
            yield
        finally:
            self._repeats = known

    @contextlib.contextmanager
    def exactly(self, counts: Mapping[str, int]) -> Iterator[None]:
        """Meanwhile the groups of these names keep so many channels."""
        self._level = dict(counts)
        try:
            yield
        finally:
            self._level = {}

    def of(self, groups: Sequence[Group]) -> Iterator[Selection]:
        """A choice for each group.

        Groups keep different numbers of channels, those of one size above all, as long as there are
        any: two widths that must be equal must not be so by luck. No two of one size in a row keep
        the same channels, nor, where the last attempt is turned round, two others nearby: heads of
        queries and of values.
        """
        alike: dict[int, int] = {}
        kept: dict[int, set[int]] = {}
        counts: dict[int, Counter[int]] = defaultdict(Counter)
        for group in groups:
            size = group.size
            place = alike[size] = alike.get(size, -1) + 1
            choice = self._again(group, place)
            choice = choice or self._drawn(group, kept.get(size, set()), counts)
            kept[size] = set(choice[0][: choice[1]])
            counts[size][choice[1]] += 1
            counts[ALL_SIZES][choice[1]] += 1
            yield choice

    def _again(self, group: Group, place: int) -> Selection | None:
        """The last choice, or its opposite, if that is what is wanted now."""
        last = self._last.get(group.name)
        if last is None or len(last[0]) != group.size:
            return None
        if self._turn is None:
            return last if self._repeats else None
        if (place >> 1) % 2 != self._turn:
            return last
        return last[0][::-1], max(group.least, group.size - last[1])

    def _any(self, counts: Sequence[int]) -> int:
        """One of these numbers."""
        return counts[int(torch.randint(len(counts), (), generator=self._random))]

    def _count(self, group: Group, taken: Mapping[int, Counter[int]]) -> int:
        """How many stay: if possible no number that is taken, nor the one of the last time.

        Where there are few, even ones are taken too, but for a half; of four channels all but one.
        A single channel that stays, again and again, would be broadcast over those of others.
        """
        counts, here, size = kept_counts(group.size, group.least), taken[group.size], group.size
        order, last = self._last.get(group.name, ((), 0))
        if len(counts) < FEW and len(order) == size:
            here = here + Counter([last])
        if len(counts) < FEW and all(here[each] for each in counts):
            more = range(max(group.least, size // 4, 1), size - 1)
            counts = sorted({*counts, *(each for each in more if 2 * each != size)})
            counts = sorted({*counts, size - 1}) if len(counts) == 1 else counts
        uses = {each: (here[each], taken[ALL_SIZES][each]) for each in counts}
        return self._any([each for each in counts if uses[each] == min(uses.values())])

    def _drawn(
        self, group: Group, unlike: set[int], taken: Mapping[int, Counter[int]]
    ) -> Selection:
        """A random choice, if possible of other channels than these, and of another number."""
        keep = self._level.get(group.name) or self._count(group, taken)
        order: list[int] = []
        for _ in range(REDRAWN):
            order = torch.randperm(group.size, generator=self._random).tolist()
            if set(order[:keep]) != unlike:
                break
        self._last[group.name] = order, keep
        return order, keep
