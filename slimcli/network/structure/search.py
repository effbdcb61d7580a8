"""Finds the largest set of groups that passes the trial cut together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from slimcli.network.example import Example
from slimcli.network.structure.assumptions import Pool, Search, prunable
from slimcli.network.structure.comparison import Failure
from slimcli.network.structure.draws import kept_counts
from slimcli.network.structure.extremes import (
    asked_groups,
    extremes,
    is_only_narrow,
    levels,
    without_bad_extremes,
    without_multiples,
)
from slimcli.network.structure.groups import Choice, Grouping, first_choices
from slimcli.network.structure.guilty import failing, find_bad
from slimcli.network.structure.left_alone import other_ways
from slimcli.network.structure.structure import Group, Structure
from slimcli.network.structure.traced import Traced
from slimcli.network.structure.trial import Trial

FEW = 4
"""So many groups at one line of code are tried alone before they are blamed for what it raises."""

PATIENCE = 20
"""After so many rounds of one line of code each, every group is tried."""

MAX_ROUNDS = 60
"""Each round freezes something or changes a choice; after so many all is refused."""


def try_cuts(model: nn.Module, example: Example, traced: Traced, samples: int) -> Structure:
    """The structure in which all prunable groups passed the trial cut together."""
    search = Search(model, traced, samples, first_choices(traced.record))
    structure, grouping = search.structure()
    if not any(group.is_prunable for group in structure.groups):
        return structure
    trial = Trial(model, example, traced)
    asked = asked_groups(search, structure, grouping)
    seen = _first_failure(search, prunable(structure), asked, trial)
    known = search.learned
    if seen is not None:
        failure: Failure | None = seen
        if asked or not seen.module:  # few channels, or the merging, may be what fails
            failure = _fails(search, trial, prunable(structure))
        structure, grouping = _without_bad_cuts(search, structure, grouping, trial, failure)
        structure, grouping = _without_bad_merges(search, structure, grouping, trial)
    structure, grouping = _without_equal_widths(search, structure, grouping, trial)
    if seen is not None:
        structure, grouping = _left_of_extremes(search, structure, grouping, trial)
        if search.learned == known:
            structure, grouping = _frozen(search, structure, grouping, seen)
    structure, grouping = without_multiples(search, structure, grouping, trial)
    ways = other_ways(traced.record) if prunable(structure) else []
    return replace(structure, notes=(*structure.notes, *trial.notes, *ways))


def _without_bad_cuts(
    search: Search, structure: Structure, grouping: Grouping, trial: Trial, failure: Failure | None
) -> tuple[Structure, Grouping]:
    """Learns from failures until all that is left can be cut; ``failure`` is the first one."""
    unexplained: Failure | None = None
    for number in range(MAX_ROUNDS):
        if failure is None:
            break
        known = search.learned
        _learn(search, structure, grouping, trial, failure, thoroughly=number >= PATIENCE)
        unexplained = failure if search.learned == known else None
        structure, grouping = search.structure()
        groups = prunable(structure)
        failure = _fails(search, trial, groups) if groups else None
    if failure is not None:
        everything = np.arange(1, search.record.sources.count)
        why = f"no set of cuts worked in {MAX_ROUNDS} trials, the last one: {failure}"
        search.bans.append((everything, why))
        return search.structure()
    if unexplained is not None:
        return _frozen(search, structure, grouping, unexplained)
    return structure, grouping


def _left_of_extremes(
    search: Search, structure: Structure, grouping: Grouping, trial: Trial
) -> tuple[Structure, Grouping]:
    """Tries again what extremes leave: some may have passed only with those that went."""
    known = search.learned
    asked = asked_groups(search, structure, grouping)
    structure, grouping = without_bad_extremes(search, structure, grouping, trial, asked)
    if search.learned == known or not prunable(structure):
        return structure, grouping
    failure = _fails(search, trial, prunable(structure))
    return _without_bad_cuts(search, structure, grouping, trial, failure)


def _frozen(
    search: Search, structure: Structure, grouping: Grouping, failure: Failure
) -> tuple[Structure, Grouping]:
    """A trial failed, and nobody was found whose fault it is: a later one that passes is luck."""
    pool = Pool(search.record, structure, grouping)
    for group in pool.groups:
        search.ban(pool.labels(group), str(failure))
    return search.structure()


def _fails(search: Search, trial: Trial, groups: Sequence[Group]) -> Failure | None:
    """Tries more than one choice of channels: one that fits may be luck.

    Code that says ``x[:, :8]`` works as long as the first of two blocks stays.
    """
    failure = trial.attempt(groups, thorough=True)
    if failure is not None:
        return failure
    if _may_fit_by_luck(search):
        return trial.opposite(groups)
    return trial.attempt(groups, thorough=True)


def _without_bad_merges(
    search: Search, structure: Structure, grouping: Grouping, trial: Trial
) -> tuple[Structure, Grouping]:
    """Refuses to merge what can only be cut; cuts alone have passed."""
    for last in (False, True):
        groups = prunable(structure)
        failure = trial.attempt(groups, thorough=True, merging=True) if groups else None
        merged = [group for group in groups if group.exact_zero and group.exact_duplicate]
        if failure is None:
            return structure, grouping
        if not merged:
            break
        bad = find_bad(trial, merged, failure, merging=True) if not last else []
        pool = Pool(search.record, structure, grouping)
        for group, reason in bad or [(group, failure) for group in merged]:
            refused = f"equal channels were merged for trial: {reason.what}"
            search.record.no_duplicates.append((pool.labels(group), refused))
        structure, grouping = search.structure()
    return _without_bad_only_merges(search, structure, grouping, trial)


def _without_bad_only_merges(
    search: Search, structure: Structure, grouping: Grouping, trial: Trial
) -> tuple[Structure, Grouping]:
    """Freezes what can only be merged, if a trial of everything that is left fails yet.

    Little of a narrow network may get through, so that the guilty pass when they are tried alone.
    """
    groups = prunable(structure)
    failure = trial.attempt(groups, thorough=True, merging=True) if groups else None
    if failure is None:
        return structure, grouping
    pool = Pool(search.record, structure, grouping)
    only_merged = [group for group in groups if not group.exact_zero]
    for group in only_merged or groups:
        search.ban(pool.labels(group), str(failure))
    structure, grouping = search.structure()
    return _without_bad_only_merges(search, structure, grouping, trial)


def _first_failure(
    search: Search, groups: Sequence[Group], asked: Sequence[Group], trial: Trial
) -> Failure | None:
    """Tries everything as it was traced, and more often where once shows too little."""
    failure = trial.attempt(groups, thorough=True, merging=True)
    if asked or trial.merged_all(groups):
        for counts in extremes(asked, groups) if asked else [{}]:
            failure = failure or trial.exactly(groups, counts)
    if failure is None and _may_fit_by_luck(search):
        failure = trial.opposite(groups)
    return failure


def _may_fit_by_luck(search: Search) -> bool:
    """Does one choice of channels tell too little of what happens to blocks?

    Of as many blocks as each is long either side may be the one that is cut; where one channel of a
    block stays, the order is the same whichever it was.
    """
    splits = search.record.splits
    is_luck = any(split.is_square and 1 in kept_counts(split.size) for split in splits)
    return is_luck or Choice.BLOCKS in search.choices


def _without_equal_widths(
    search: Search, structure: Structure, grouping: Grouping, trial: Trial
) -> tuple[Structure, Grouping]:
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
    pool = Pool(search.record, structure, grouping)
    for counts in levels(structure, names):
        asked = [group for group in groups if group.name in counts]
        found = failing(trial, asked, counts)
        for group, failure, is_alone in found:
            reason = f"its width is read as a number and must not meet another one: {failure.what}"
            if not (is_alone and is_only_narrow(search, pool, trial, group, failure)):
                search.ban(pool.labels(group), reason)
        if found:  # each time a group less, or a number of channels that must stay
            return _without_equal_widths(search, *search.structure(), trial)
    return structure, grouping


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
        bad = find_bad(trial, pool.groups, failure) or [(group, failure) for group in pool.groups]
        for group, reason in bad:
            if reason.is_other_batch and group.exact_zero:
                search.record.fickle.append((pool.labels(group), f"{why}: {reason.what}"))
            else:
                search.ban(pool.labels(group), str(reason))
        return
    at_line = pool.at_lines({failure.line}) if failure.line and not thoroughly else []
    if 1 < len(at_line) <= FEW:  # one line may do several things, or only raise what others did
        at_line = [g for g in at_line if trial.attempt([g]) is not None]
    for group in at_line:
        search.blame(pool.labels(group), failure, failure.line)
    if at_line:
        return
    near = failure.module if not thoroughly else ""
    bad = _near_module(pool, trial, near) if near else []
    for group, reason in bad or find_bad(trial, pool.groups, failure):
        if reason.is_no_constant and group.exact_zero:
            search.record.fickle.append((pool.labels(group), reason.what))
        elif not is_only_narrow(search, pool, trial, group, reason):
            search.blame(pool.labels(group), reason, "")


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
