"""What is assumed about the user's code, and the groups that follow from it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from slimcli.network.structure.assemble import assemble
from slimcli.network.structure.comparison import Failure
from slimcli.network.structure.groups import Choice, Grouping, build
from slimcli.network.structure.planes import Labels, distinct
from slimcli.network.structure.record import Record
from slimcli.network.structure.structure import Group, Structure
from slimcli.network.structure.traced import Traced


@dataclass
class Search:
    """What is assumed about the user's code, until a trial says otherwise.

    Attributes:
        choices: For every split, what happens to its blocks.
        bans: Labels a trial froze, with reasons.
        doubts: Labels whose choice was changed, and why.
    """

    model: nn.Module
    traced: Traced
    samples: int
    choices: list[Choice] = field(default_factory=list)
    bans: list[tuple[Labels, str]] = field(default_factory=list)
    doubts: list[tuple[Labels, str]] = field(default_factory=list)

    @property
    def record(self) -> Record:
        """What was traced."""
        return self.traced.record

    @property
    def learned(self) -> tuple[object, ...]:
        """Another one whenever a trial taught something."""
        record = self.record
        refused = len(self.bans), len(record.no_duplicates), len(record.fickle)
        return (*refused, len(record.least), *self.choices)

    def structure(self) -> tuple[Structure, Grouping]:
        """Groups under the present assumptions."""
        grouping = build(self.record, self.choices, self.bans)
        known = len(self.bans)
        for labels, reason in self.doubts:
            numbers = distinct(grouping.group_of[labels])
            if all(grouping.groups[n].size == 1 for n in numbers if n >= 0):
                self.ban(labels, reason)
        self.doubts = []
        if len(self.bans) > known:
            grouping = build(self.record, self.choices, self.bans)
        found = assemble(
            self.model,
            self.record,
            grouping,
            self.traced.norm_after,
            self.samples,
            self.traced.notes,
        )
        return found, grouping

    def ban(self, labels: Labels, reason: str) -> None:
        """Freezes these channels; splits of nothing else are as they were at first."""
        self.bans.append((labels, reason))
        for number, split in enumerate(self.record.splits):
            if np.isin(split.offset_pairs[0], [0, *labels]).all():
                self.choices[number] = Choice.OFFSETS

    def blame(self, labels: Labels, failure: Failure, line: str) -> None:
        """Tries whole blocks where these channels are split (at this line); else freezes them."""
        wanted = np.zeros(self.record.sources.count, dtype=bool)
        wanted[labels] = True
        here = [
            number
            for number, split in enumerate(self.record.splits)
            if (not line or split.line == line)
            and wanted[split.offset_pairs[0]].any()
            and _differs(self.record, number)
        ]
        open_splits = [number for number in here if self.choices[number] == Choice.OFFSETS]
        if not open_splits or len(open_splits) < len(here):
            self.ban(labels, self._reason(failure, here))
            return
        self.doubts.append((labels, self._reason(failure, here)))
        smallest = min(self.record.splits[number].size for number in open_splits)
        for number in open_splits:  # the innermost division first: heads, not q, k, v
            if self.record.splits[number].size == smallest:
                self.choices[number] = Choice.BLOCKS

    def _reason(self, failure: Failure, splits: Sequence[int]) -> str:
        """The failure, and where its channels are divided if that is another line."""
        lines = dict.fromkeys(self.record.splits[number].line for number in splits)
        others = [line for line in lines if line != failure.line]
        return f"{failure} (divided at {others[0]})" if others else str(failure)


def _differs(record: Record, number: int) -> bool:
    split = record.splits[number]
    return not np.array_equal(split.offset_pairs[1], split.block_pairs[1])


def prunable(structure: Structure) -> list[Group]:
    """The groups that can be cut, or merged, or both."""
    return [group for group in structure.groups if group.is_prunable]


@dataclass
class Pool:
    """The prunable groups of a structure, found by what they touch."""

    record: Record
    structure: Structure
    grouping: Grouping

    @property
    def groups(self) -> list[Group]:
        """All of them."""
        return prunable(self.structure)

    def labels(self, group: Group) -> Labels:
        """All labels of a group."""
        names = [each.name for each in self.structure.groups]
        return np.flatnonzero(self.grouping.group_of == names.index(group.name))

    def touching(self, labels: Iterable[Labels]) -> list[Group]:
        """Groups some of whose channels are among these."""
        found = {int(n) for each in labels for n in distinct(self.grouping.group_of[each])}
        numbered = enumerate(self.structure.groups)
        return [group for number, group in numbered if number in found and group.is_prunable]

    def at_lines(self, lines: set[str]) -> list[Group]:
        """Groups whose channels pass a reshape or split in one of these lines."""
        return self.touching(labels for where, labels in self.record.lines if where in lines)

    def split_lines(self, group: Group) -> set[str]:
        """Lines that divide this group's channels."""
        wanted = np.zeros(self.record.sources.count, dtype=bool)
        wanted[self.labels(group)] = True
        return {s.line for s in self.record.splits if wanted[s.offset_pairs[0]].any()}
