"""Finds the largest set of groups that passes the trial cut together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import nn

from slimcli.network.example import Example
from slimcli.network.structure.assemble import assemble
from slimcli.network.structure.comparison import Failure
from slimcli.network.structure.groups import Choice, Grouping, build, first_choices
from slimcli.network.structure.left_alone import other_ways
from slimcli.network.structure.planes import Labels, distinct
from slimcli.network.structure.record import Least, Record
from slimcli.network.structure.rehearse import goes_alone
from slimcli.network.structure.structure import Group, Structure
from slimcli.network.structure.traced import Traced
from slimcli.network.structure.trial import Trial

FEW = 4
"""So many groups at one line of code are tried alone before they are blamed for what it raises."""

PATIENCE = 20
"""After so many rounds of one line of code each, every group is tried."""

MAX_ROUNDS = 60
"""Each round freezes something or changes a choice; after so many all is refused."""

FEW_CHANNELS = 16
"""Of so many channels every number is tried, of more the fewest that pass are searched for."""


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


def try_cuts(model: nn.Module, example: Example, traced: Traced, samples: int) -> Structure:
    """The structure in which all prunable groups passed the trial cut together."""
    search = Search(model, traced, samples, first_choices(traced.record))
    structure, grouping = search.structure()
    if not any(group.is_prunable for group in structure.groups):
        return structure
    trial = Trial(model, example, traced)
    failure = trial.attempt(prunable(structure), thorough=True, merging=True)
    if failure is None and any(map(goes_alone, prunable(structure))):
        failure = trial.attempt(prunable(structure))
    if failure is None and Choice.BLOCKS in search.choices:
        failure = trial.opposite(prunable(structure))
    if failure is not None:
        structure, grouping = _without_bad_cuts(search, structure, grouping, trial, failure)
        structure = _without_bad_merges(search, structure, grouping, trial)
    structure, grouping = _without_other_branches(search, structure, grouping, trial)
    structure = _without_equal_widths(search, structure, grouping, trial)
    ways = other_ways(traced.record) if prunable(structure) else []
    return replace(structure, notes=(*structure.notes, *trial.notes, *ways))


def prunable(structure: Structure) -> list[Group]:
    """The groups that can be cut, or merged, or both."""
    return [group for group in structure.groups if group.is_prunable]


def _without_bad_cuts(
    search: Search, structure: Structure, grouping: Grouping, trial: Trial, failure: Failure | None
) -> tuple[Structure, Grouping]:
    """Learns from failures until all that is left can be cut; ``failure`` is the first one."""
    if failure is not None and not failure.module:  # it did not raise: it may be the merging
        failure = _fails(search, trial, prunable(structure))
    for number in range(MAX_ROUNDS):
        if failure is None:
            return structure, grouping
        _learn(search, structure, grouping, trial, failure, thoroughly=number >= PATIENCE)
        structure, grouping = search.structure()
        groups = prunable(structure)
        failure = _fails(search, trial, groups) if groups else None
    if failure is not None:
        everything = np.arange(1, search.record.sources.count)
        search.bans.append((everything, f"no set of cuts worked in {MAX_ROUNDS} trials"))
    return search.structure()


def _fails(search: Search, trial: Trial, groups: Sequence[Group]) -> Failure | None:
    """Tries more than one choice of channels: one that fits may be luck.

    Code that says ``x[:, :8]`` works as long as the first of two blocks stays.
    """
    failure = trial.attempt(groups, thorough=True)
    if failure is not None:
        return failure
    if Choice.BLOCKS in search.choices:
        return trial.opposite(groups)
    return trial.attempt(groups, thorough=True)


def _without_bad_merges(
    search: Search, structure: Structure, grouping: Grouping, trial: Trial
) -> Structure:
    """Refuses to merge what can only be cut; cuts alone have passed."""
    for last in (False, True):
        groups = prunable(structure)
        failure = trial.attempt(groups, thorough=True, merging=True) if groups else None
        merged = [group for group in groups if group.exact_zero and group.exact_duplicate]
        if failure is None or not merged:
            break
        bad = trial.find_bad(merged, failure, merging=True) if not last else []
        pool = Pool(search.record, structure, grouping)
        for group, reason in bad or [(group, failure) for group in merged]:
            refused = f"equal channels were merged for trial: {reason.what}"
            search.record.no_duplicates.append((pool.labels(group), refused))
        structure, grouping = search.structure()
    return structure


def _without_other_branches(
    search: Search, structure: Structure, grouping: Grouping, trial: Trial
) -> tuple[Structure, Grouping]:
    """Tries the fewest channels wherever the code asks how many there are.

    ``if x.shape[1] * 0.25 > 2`` may turn out otherwise for few channels, ``if x.shape[1] % 16 ==
    0`` for a multiple of 16, and no trial of a random number shows it.
    """
    record, pool = search.record, Pool(search.record, structure, grouping)
    known = len(search.bans), len(record.least)
    for group in pool.touching(labels for labels, _ in record.divisors):
        labels = pool.labels(group)
        for each, divisor in record.divisors:
            count = (group.size - 1) // divisor * divisor
            if count >= group.least and np.isin(each, labels).any():
                failure = trial.exactly([group], {group.name: count})
                if failure is not None:
                    search.ban(labels, f"where {divisor} divides its width {failure}")
    asked = pool.touching([*record.asked.values(), *(labels for labels, _ in record.divisors)])
    for few, many in ((asked[::2], asked[1::2]), (asked[1::2], asked[::2])):
        _try_extremes(search, pool, few, many, trial)
    is_same = known == (len(search.bans), len(record.least))
    return (structure, grouping) if is_same else search.structure()


def _try_extremes(
    search: Search, pool: Pool, few: Sequence[Group], many: Sequence[Group], trial: Trial
) -> None:
    """Keeps as few channels of these groups as may be, and of those all but one."""
    counts = {
        **{each.name: each.least for each in few},
        **{each.name: each.size - 1 for each in many},
    }
    together = trial.exactly(pool.groups, counts) if counts else None
    if together is None:
        return
    alone = {g.name: trial.exactly([g], {g.name: counts[g.name]}) for g in (*few, *many)}
    for group in (*few, *many):
        labels, failure = pool.labels(group), alone[group.name]
        if failure is not None and group in few:
            width = _fewest(trial, group) * len(labels) // group.size
            least = Least(labels, width, failure.line or f"a comparison: {failure}")
            search.record.least.append(least)
        elif failure is not None or not any(alone.values()):
            search.ban(labels, str(failure or together))


def _fewest(trial: Trial, group: Group) -> int:
    """The fewest channels that pass alone, as all more do; of many, if more do where fewer do."""

    def fails(count: int) -> bool:
        return trial.exactly([group], {group.name: count}) is not None

    low, high = group.least, group.size
    if high <= FEW_CHANNELS:
        return max(filter(fails, range(low, high)), default=low - 1) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fails(middle) else (low, middle)
    return high


def _without_equal_widths(
    search: Search, structure: Structure, grouping: Grouping, trial: Trial
) -> Structure:
    """Freezes widths that the code turned into numbers, if it matters that two are equal.

    ``if int(x.shape[1]) == int(y.shape[1])`` can't be heard, and random widths hardly ever meet.
    """
    sources = search.record.sources
    read = {sources.dim_of(int(labels.max())) for labels in search.record.escaped}
    places = {(dim.tensor, dim.dim) for dim in read}
    groups = prunable(structure)
    names = {
        group.name
        for group in groups
        if any((slot.tensor, slot.dim) in places for slot in group.slots)
    }
    if len(names) < 2:
        return structure
    failure = trial.level(groups, names)
    if failure is None:
        return structure
    pool = Pool(search.record, structure, grouping)
    for group in groups:
        if group.name in names:
            reason = f"its width is read as a number and must not meet another one: {failure.what}"
            search.ban(pool.labels(group), reason)
    return search.structure()[0]


def _learn(
    search: Search,
    structure: Structure,
    grouping: Grouping,
    trial: Trial,
    failure: Failure,
    thoroughly: bool,
) -> None:
    """Draws the consequence from a failed trial of all groups."""
    pool = Pool(search.record, structure, grouping)
    if failure.is_other_batch:
        why = "on another batch, of other sizes and values, it is another one"
        bad = trial.find_bad(pool.groups, failure) or [(group, failure) for group in pool.groups]
        for group, reason in bad:
            if reason.is_other_batch and group.exact_zero:
                search.record.fickle.append((pool.labels(group), f"{why}: {reason.what}"))
            else:
                search.ban(pool.labels(group), str(reason))
        return
    at_line = pool.at_lines({failure.line}) if failure.line and not thoroughly else []
    if 1 < len(at_line) <= FEW:  # one line may do several things
        at_line = [g for g in at_line if trial.attempt([g]) is not None] or at_line
    for group in at_line:
        search.blame(pool.labels(group), failure, failure.line)
    if at_line:
        return
    near = failure.module if not thoroughly else ""
    bad = _near_module(pool, trial, near) if near else []
    for group, reason in bad or trial.find_bad(pool.groups, failure):
        search.blame(pool.labels(group), reason, "")


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


def _near_module(pool: Pool, trial: Trial, path: str) -> list[tuple[Group, Failure]]:
    """Groups that touch the module where it raised, and fail alone, too.

    With them go all that are divided in the same lines of code: one fixed number breaks every block
    of a kind. Each is tried alone, so that none is frozen for another's sake.
    """
    near = [g for g in pool.groups if any(s.tensor.startswith(f"{path}.") for s in g.slots)]
    lines = {line for group in near for line in pool.split_lines(group)}
    names = {group.name for group in near}
    others = [group for group in pool.at_lines(lines) if group.name not in names]
    found = []
    for groups in (near, others):
        for group in groups:
            failure = trial.attempt([group])
            if failure is not None:
                found.append((group, failure))
        if not found:
            break
    return found
