"""Finds the groups whose fault it is that a trial failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from slimcli.network.structure.comparison import Failure
from slimcli.network.structure.structure import Group
from slimcli.network.structure.trial import Trial

Found = list[tuple[Group, Failure]]


def find_bad(
    trial: Trial, groups: Sequence[Group], failure: Failure, *, merging: bool = False
) -> Found:
    """The groups that fail, by halving; ``failure`` is what all of them together gave.

    The same channels go as then: of others, all might pass.
    """
    with trial.repeated():
        return _halved(trial, groups, failure, merging)


def _halved(trial: Trial, groups: Sequence[Group], failure: Failure, merging: bool) -> Found:
    if len(groups) == 1:
        return [(groups[0], failure)]
    middle = len(groups) // 2
    found: Found = []
    for half in (groups[:middle], groups[middle:]):
        problem = trial.attempt(half, merging=merging)
        if problem is not None:
            found += _halved(trial, half, problem, merging)
    return found or _interacting(trial, groups, merging)


def _interacting(trial: Trial, groups: Sequence[Group], merging: bool) -> Found:
    """Both halves pass alone: adds groups one at a time and drops those that break it."""
    good: list[Group] = []
    found: Found = []
    for group in groups:
        problem = trial.attempt([*good, group], merging=merging)
        if problem is None:
            good.append(group)
        else:
            found.append((group, problem))
    return found


def failing(
    trial: Trial, groups: Sequence[Group], counts: Mapping[str, int]
) -> list[tuple[Group, Failure, bool]]:
    """Those that fail with so many channels while the others are whole; alone, or together."""
    failure = trial.exactly(groups, counts)
    if failure is None:
        return []
    if len(groups) == 1:
        return [(groups[0], failure, True)]
    middle = len(groups) // 2
    found = [*failing(trial, groups[:middle], counts), *failing(trial, groups[middle:], counts)]
    return found or [(group, failure, False) for group in groups]
