"""Tries the fewest channels, all but one and multiples, where the code asks how many there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from slimcli.network.structure.assumptions import Pool, Search
from slimcli.network.structure.comparison import Failure
from slimcli.network.structure.groups import Grouping
from slimcli.network.structure.planes import Labels
from slimcli.network.structure.record import Least
from slimcli.network.structure.structure import Group, Structure
from slimcli.network.structure.trial import Trial

FEW_CHANNELS = 8
"""Of so many channels every number is tried, of more the fewest that pass are searched for."""


def asked_groups(search: Search, structure: Structure, grouping: Grouping) -> list[Group]:
    """Groups of whose width the code asks.

    ``if x.shape[1] * 0.25 > 2`` may turn out otherwise for few channels, or for all but one, and
    no trial of a random number shows it.
    """
    pool = Pool(search.record, structure, grouping)
    return pool.touching(search.record.asked.values())


def extremes(asked: Sequence[Group]) -> list[dict[str, int]]:
    """How many channels stay in each of the trials that are needed.

    As few of all as may be, then of every second group while the others lose a single one, or none
    if that makes the fewest: a number may be made of two widths, by a sum or by a fraction.
    """
    turns = (None, 0, 1) if len(asked) > 1 else (None, 0)
    return [
        {
            group.name: _most(group) if place % 2 == turn else group.least
            for place, group in enumerate(asked)
        }
        for turn in turns
    ]


def _most(group: Group) -> int:
    return group.size - 1 if group.size - 1 > group.least else group.size


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
    for counts in extremes(asked):
        open_ones = [group for group in asked if group.name not in judged]
        counts = {group.name: counts[group.name] for group in open_ones}
        together = trial.exactly(pool.groups, counts) if counts else None
        if together is None:
            continue
        found = _failing(trial, open_ones, counts)
        for group, failure, is_alone in found or [(each, together, False) for each in open_ones]:
            judged.add(group.name)
            labels = pool.labels(group)
            if is_alone and counts[group.name] == group.least:
                _note_fewest(search, trial, group, labels, failure)
            else:
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
    _note_fewest(search, trial, group, labels, failure)
    return True


def _note_fewest(
    search: Search, trial: Trial, group: Group, labels: Labels, failure: Failure
) -> None:
    dim = search.record.sources.dim_of(int(labels[0]))  # one of its tensors stands for all
    labels = labels[labels < dim.first + dim.size]
    width = _fewest(trial, group) * len(labels) // group.size
    line = failure.line or f"a comparison: {failure}"
    search.record.least.append(Least(labels, width, line))


def _failing(
    trial: Trial, groups: Sequence[Group], counts: Mapping[str, int]
) -> list[tuple[Group, Failure, bool]]:
    """Those that fail with so many channels while the others are whole; alone, or together."""
    failure = trial.exactly(groups, counts)
    if failure is None:
        return []
    if len(groups) == 1:
        return [(groups[0], failure, True)]
    middle = len(groups) // 2
    found = [*_failing(trial, groups[:middle], counts), *_failing(trial, groups[middle:], counts)]
    return found or [(group, failure, False) for group in groups]


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
