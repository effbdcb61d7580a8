"""Which groups a strategy takes, and which ones a user names."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from slimcli.errors import Problem, RecipeError
from slimcli.network.structure.structure import Group, Site, Structure

KEY = "config.prune_module_names"
STRATEGIES = ("linear_bn", "all_bn", "linear_conv", "all_conv")


def select_groups(
    structure: Structure, strategy: str, names: Sequence[str] | None = None
) -> list[Group]:
    """Groups chosen by a strategy, or by name.

    Args:
        structure: All groups.
        strategy: ``linear_bn``, ``linear_conv`` (one producer, one consumer) or ``all_bn``,
            ``all_conv`` (every group that can be cut).
        names: Module paths, with or without a leading ``self.``; the strategy is then ignored.

    Raises:
        RecipeError: A name matches nothing, can't be cut, or names only a part of a group.
    """
    if names is not None:
        return _named(structure, names)
    if strategy not in STRATEGIES:
        raise RecipeError(
            Problem(
                "E-STRUCTURE-STRATEGY",
                f"unknown strategy {strategy}",
                expected=", ".join(STRATEGIES),
                received=strategy,
                fix=_nearest(strategy, STRATEGIES),
            )
        )
    candidates = [g for g in structure.groups if g.is_prunable and g.is_placeable]
    return [g for g in candidates if g.is_linear or strategy.startswith("all")]


def _named(structure: Structure, names: Sequence[str]) -> list[Group]:
    wanted = [name.removeprefix("self.") for name in names]
    problems = []
    found: dict[str, set[str]] = {}
    known = _known_names(structure)
    for name in wanted:
        groups = known.get(name)
        if groups is None:
            problems.append(_unknown(name, known))
        for group in groups or ():
            found.setdefault(group.name, set()).add(name)
    chosen = [group for group in structure.groups if group.name in found]
    for group in chosen:
        problem = _why_not(group, found[group.name])
        problems += [problem] if problem else []
    if problems:
        raise RecipeError(*problems)
    return chosen


def _known_names(structure: Structure) -> dict[str, list[Group]]:
    """Every module path that belongs to a group, with its groups, prunable ones if there are."""
    known: dict[str, list[Group]] = {}
    for group in structure.groups:
        tensors = {slot.tensor for slot in (*group.producers, *group.followers)}
        for path in {group.name, *(tensor.rpartition(".")[0] for tensor in tensors)}:
            known.setdefault(path, []).append(group)
    return {path: [g for g in groups if g.is_prunable] or groups for path, groups in known.items()}


def _why_not(group: Group, names: set[str]) -> Problem | None:
    if group.frozen_reason:
        return Problem(
            "E-STRUCTURE-FROZEN",
            f"{min(names)} can't be pruned: {group.frozen_reason}",
            KEY,
            fix="take it out of prune_module_names",
        )
    if group.name in names:
        names = names | {
            name for site in group.sites[:1] for name in (site.conv, site.norm) if name
        }
    missing = [site for site in group.sites if not _names_of(site, group) & names]
    if not missing:
        return None
    everything = ", ".join(site.norm or site.conv or group.name for site in group.sites)
    on_the_way = len(missing) == len(group.sites)
    what = (
        f"{min(names)} has no channels of its own: it follows {everything}"
        if on_the_way
        else f"{min(names)} splits a coupled group of {len(group.sites)} layers"
    )
    return Problem(
        "E-STRUCTURE-COUPLED",
        what,
        KEY,
        expected=f"all of {everything}, or none",
        received=", ".join(sorted(names)),
        fix=f"name all of {everything}",
    )


def _names_of(site: Site, group: Group) -> set[str]:
    """What a place can be called; a bare parameter has the name of its group only."""
    return {name for name in (site.conv, site.norm) if name} or {group.name}


def _unknown(name: str, known: dict[str, list[Group]]) -> Problem:
    nearest = _nearest(name, list(known))
    return Problem(
        "E-STRUCTURE-NAME",
        f"no layer with channels is called {name}",
        KEY,
        expected="the path of a conv or norm, as in model.named_modules()",
        received=name,
        fix=f"did you mean {nearest}?" if nearest else "slim inspect RECIPE lists the layers",
    )


def _nearest(name: str, candidates: Sequence[str]) -> str:
    return ", ".join(difflib.get_close_matches(name, candidates, n=3, cutoff=0.4))
