"""How many channels a layer keeps where the user says so by name: patterns, fractions, multiples.

Plain arithmetic and names; no torch. A pattern is a shell glob (``layer4.*``) and is held against
the name of a coupled group and the paths of the layers that make its channels, with or without a
leading ``self.``.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from slimcli.errors import Problem, RecipeError

if TYPE_CHECKING:
    from slimcli.network.structure import Group

EVERYTHING = "*"
LEFT_ALONE = "left alone by skip"


def kept(size: int, fraction: float, minimum: int = 1, round_to: int = 1) -> int:
    """Channels that stay of ``size`` if ``fraction`` of them goes, rounded down.

    Args:
        size: Channels today.
        fraction: Share that goes, from 0 up to 1.
        minimum: Channels that stay in any case.
        round_to: What stays is a multiple of this, or all.

    >>> kept(64, 0.25), kept(10, 0.99, minimum=4), kept(3, 0.5, minimum=8)
    (48, 4, 3)
    >>> kept(64, 0.3, round_to=8), kept(20, 0.1, round_to=16), kept(64, 0.0, round_to=48)
    (48, 20, 64)
    """
    removed = int(fraction * size + 1e-9)  # 0.29 * 100 is 28.999999999999996
    least = max(size - removed, minimum, 1)
    return min(size, -(-least // round_to) * round_to)


def names_of(group: Group) -> tuple[str, ...]:
    """Every name a pattern can mean the group by."""
    paths = [path for site in group.sites for path in (site.conv, site.norm) if path]
    return tuple(dict.fromkeys((group.name, *paths)))


def fits(pattern: str, group: Group) -> bool:
    """Whether the pattern means the group or one of its layers."""
    glob = pattern.removeprefix("self.")
    return any(fnmatch.fnmatchcase(name, glob) for name in names_of(group))


def skipped(patterns: Sequence[str], selected: Sequence[Group]) -> set[str]:
    """Names of the selected groups that are to be left alone.

    Args:
        patterns: What ``skip`` says; ``*`` need not fit anything.
        selected: Groups that would be pruned.

    Raises:
        RecipeError: A pattern fits none of them.
    """
    unused = [
        pattern
        for pattern in patterns
        if pattern != EVERYTHING and not any(fits(pattern, group) for group in selected)
    ]
    if unused:
        raise RecipeError(*(_skips_nothing(pattern, selected) for pattern in unused))
    return {group.name for group in selected if any(fits(each, group) for each in patterns)}


def ratios_of(
    patterns: Mapping[str, float], targets: Sequence[Group], others: Mapping[str, str]
) -> dict[str, float]:
    """The fraction of each target that a pattern fits; targets that none fits are not in it.

    Args:
        patterns: What ``prune_ratios`` says.
        targets: Groups that are pruned.
        others: Layers or groups that are not, with the reason.

    Raises:
        RecipeError: A pattern fits no target, or two patterns give one target different fractions.
    """
    problems = [
        _fits_no_target(pattern, targets, others)
        for pattern in patterns
        if not any(fits(pattern, group) for group in targets)
    ]
    found = {}
    for group in targets:
        said = {pattern: value for pattern, value in patterns.items() if fits(pattern, group)}
        if len(set(said.values())) > 1:
            problems.append(_contradiction(group, said))
        elif said:
            found[group.name] = next(iter(said.values()))
    if problems:
        raise RecipeError(*problems)
    return found


def reasons_by_name(groups: Iterable[Group], reasons: Mapping[str, str]) -> dict[str, str]:
    """Every name of the groups that are not pruned, with the reason.

    Args:
        groups: All groups of the model.
        reasons: Group -> why it is not pruned, where it is selected; the others are frozen, or the
            strategy does not select them.
    """
    found = {}
    for group in groups:
        reason = reasons.get(group.name) or group.frozen_reason or "it is not selected"
        found.update(dict.fromkeys(names_of(group), reason))
    return found


def _skips_nothing(pattern: str, selected: Sequence[Group]) -> Problem:
    known = ", ".join(group.name for group in selected[:8])
    return Problem(
        "E-RECIPE-SKIP",
        f"no layer that would be pruned is called {pattern}",
        "config.skip",
        expected=f"names or patterns such as {known}"
        if known
        else "a network with prunable layers",
        received=pattern,
        fix=_nearest(pattern, selected) or "slim inspect RECIPE lists the layers",
    )


def _fits_no_target(pattern: str, targets: Sequence[Group], others: Mapping[str, str]) -> Problem:
    glob = pattern.removeprefix("self.")
    meant = {name: others[name] for name in others if fnmatch.fnmatchcase(name, glob)}
    what = f"no layer that is pruned is called {pattern}"
    if meant:
        told = "; ".join(f"{name}: {reason}" for name, reason in list(meant.items())[:3])
        what = f"{pattern} fits only layers that are not pruned ({told})"
    return Problem(
        "E-RECIPE-PRUNE-RATIOS",
        what,
        "config.prune_ratios",
        expected="names or patterns of layers that are pruned",
        received=pattern,
        fix=_nearest(pattern, targets) or "slim inspect RECIPE lists the layers",
    )


def _contradiction(group: Group, said: Mapping[str, float]) -> Problem:
    told = ", ".join(f"{pattern}: {value:g}" for pattern, value in said.items())
    return Problem(
        "E-RECIPE-PRUNE-RATIOS",
        f"{group.name} gets different fractions from {told}",
        "config.prune_ratios",
        expected="one fraction a group of coupled layers",
        fix="make the patterns narrower, or the fractions equal",
    )


def _nearest(pattern: str, groups: Sequence[Group]) -> str:
    """``did you mean layer1.0.bn1?`` for the names nearest to what was written."""
    names = list(dict.fromkeys(name for group in groups for name in names_of(group)))
    close = difflib.get_close_matches(pattern.removeprefix("self."), names, n=3, cutoff=0.4)
    return f"did you mean {', '.join(close)}?" if close else ""


def by_reason(reasons: Mapping[str, str]) -> str:
    """Each reason once, with how many groups it holds for and some of their names.

    >>> by_reason({"a": "left alone by skip", "b": "an output", "c": "left alone by skip"})
    '2 left alone by skip (a, c); 1 an output (b)'
    """
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    ordered = sorted(names.items(), key=lambda each: -len(each[1]))
    return "; ".join(
        f"{len(each)} {reason} ({', '.join(each[:3])}{', ...' if each[3:] else ''})"
        for reason, each in ordered
    )
