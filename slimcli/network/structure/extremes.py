"""Tries the fewest channels, all but one and multiples, where the code asks how many there are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np

from slimcli.network.structure.assumptions import Pool, Search
from slimcli.network.structure.comparison import Failure
from slimcli.network.structure.groups import Grouping
from slimcli.network.structure.guilty import failing
from slimcli.network.structure.planes import Labels
from slimcli.network.structure.record import Least
from slimcli.network.structure.structure import Group, Structure
from slimcli.network.structure.trial import Trial

MOST_WIDTHS = 8
"""So many of the network's widths are tried, those that most groups have."""

FEW_CHANNELS = 8
"""Of so many channels every number is tried, of more the fewest that pass are searched for."""

IN_A_ROW = 9
"""So many numbers in a row are tried above the fewest."""


def asked_groups(search: Search, structure: Structure, grouping: Grouping) -> list[Group]:
    """Groups of whose width the code asks.

    ``if x.shape[1] * 0.25 > 2`` may turn out otherwise for few channels, or for all but one, and
    no trial of a random number shows it.
    """
    pool = Pool(search.record, structure, grouping)
    return pool.touching(search.record.asked.values())


def extremes(asked: Sequence[Group], groups: Sequence[Group]) -> list[dict[str, int]]:
    """How many channels stay in each of the trials that are needed.

    As few of all as may be while those that are not asked are whole, then of every second group
    while the others lose a single one, or none if that makes the fewest: a number may be made of
    two widths, by a sum or by a fraction.

    Args:
        asked: Groups of whose width the code asks.
        groups: All.
    """
    names = {group.name for group in asked}
    whole = {group.name: group.size for group in groups if group.name not in names}
    turns = (None, 0, 1) if len(asked) > 1 else (None, 0)
    return [
        {
            group.name: _most(group) if place % 2 == turn else group.least
            for place, group in enumerate(asked)
        }
        | (whole if turn is None else {})
        for turn in turns
    ]


def _most(group: Group) -> int:
    return group.size - 1 if group.size - 1 > group.least else group.size


def levels(structure: Structure, names: Collection[str]) -> list[dict[str, int]]:
    """Trials in which the groups of these names are as wide as each other, and as another group."""
    asked = [group for group in structure.groups if group.name in names]
    sizes = Counter(group.size for group in structure.groups)
    widths = [size for size, _ in sizes.most_common(MOST_WIDTHS)]
    if len(asked) > 1:
        widths += [max(1, min(group.size for group in asked) // 2)]
    found = []
    for width in dict.fromkeys(widths):
        counts = {g.name: max(width, g.least) for g in asked if max(width, g.least) < g.size}
        if counts and counts not in found:
            found.append(counts)
    return found


def without_multiples(
    search: Search, structure: Structure, grouping: Grouping, trial: Trial
) -> tuple[Structure, Grouping]:
    """Tries multiples where the code asks for a remainder of a width: ``x.shape[1] % 16 == 0``."""
    record, pool, known = search.record, Pool(search.record, structure, grouping), len(search.bans)
    for group in pool.touching(labels for labels, _ in record.divisors):
        labels = pool.labels(group)
        for each, divisor in record.divisors:
            count = (group.size - 1) // divisor * divisor
            if count >= group.least and np.isin(each, labels).any():
                failure = trial.exactly([group], {group.name: count})
                if failure is not None:
                    search.ban(labels, f"where {divisor} divides its width {failure}")
    return search.structure() if len(search.bans) > known else (structure, grouping)


def without_bad_extremes(
    search: Search,
    structure: Structure,
    grouping: Grouping,
    trial: Trial,
    asked: Sequence[Group],
) -> tuple[Structure, Grouping]:
    """Says how many channels must stay where few are too few; freezes what breaks otherwise."""
    record, pool = search.record, Pool(search.record, structure, grouping)
    known, judged = (len(search.bans), len(record.least)), set[str]()
    for counts in extremes(asked, pool.groups):
        open_ones = [group for group in asked if group.name not in judged]
        together = trial.exactly(pool.groups, counts) if open_ones else None
        if together is None:
            continue
        found = failing(trial, open_ones, counts)
        for group, failure, is_alone in found or [(each, together, False) for each in open_ones]:
            judged.add(group.name)
            labels = pool.labels(group)
            is_narrow = is_alone and counts[group.name] == group.least
            if not (is_narrow and _notes_fewest(search, trial, group, labels, failure)):
                search.ban(labels, str(failure))
    is_same = known == (len(search.bans), len(record.least))
    return (structure, grouping) if is_same else search.structure()


def is_only_narrow(
    search: Search, pool: Pool, trial: Trial, group: Group, failure: Failure
) -> bool:
    """Does a group of whose width the code asks fail for few channels only? Then so many stay.

    Found out once: who fails with more than that fails for another reason.
    """
    labels = pool.labels(group)
    is_asked = any(each.name == group.name for each in pool.touching(search.record.asked.values()))
    is_known = any(np.isin(each.labels, labels).any() for each in search.record.least)
    if not is_asked or is_known or group.size - 1 <= group.least:
        return False
    if trial.exactly([group], {group.name: group.size - 1}) is not None:
        return False
    return _notes_fewest(search, trial, group, labels, failure)


def _notes_fewest(
    search: Search, trial: Trial, group: Group, labels: Labels, failure: Failure
) -> bool:
    """Notes how many channels must stay, if there is such a number."""
    fewest = _fewest(trial, group)
    if fewest is None:
        return False
    dim = search.record.sources.dim_of(int(labels[0]))  # one of its tensors stands for all
    labels = labels[labels < dim.first + dim.size]
    line = failure.line or f"a comparison: {failure}"
    search.record.least.append(Least(labels, fewest * len(labels) // group.size, line))
    return True


def _fewest(trial: Trial, group: Group) -> int | None:
    """The fewest channels that pass alone, as all more do; None where some of those fail.

    Of many channels not every number is tried, but as many in a row, above the fewest and below
    all, as a remainder needs to come again.
    """

    def fails(count: int) -> bool:
        return trial.exactly([group], {group.name: count}) is not None

    low, high = group.least, group.size
    if high <= FEW_CHANNELS:
        return max(filter(fails, range(low, high)), default=low - 1) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fails(middle) else (low, middle)
    above = {*range(high + 1, high + IN_A_ROW), *range(group.size - IN_A_ROW, group.size)}
    return None if any(fails(each) for each in sorted(above) if high < each < group.size) else high
