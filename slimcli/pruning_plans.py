"""What all pruning algorithms say alike in their plans: rows of layers, optimizers that misfit."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

from slimcli.compressor import LayerPlan, Refusal, Schedule
from slimcli.errors import Problem, RecipeError
from slimcli.network.structure import Group, Structure

LISTED = 12
"""Names that a message lists at most."""


def layer_plans(
    structure: Structure, kept: Mapping[str, int], reasons: Mapping[str, str]
) -> list[LayerPlan]:
    """One row a layer.

    Args:
        structure: What was found in the model.
        kept: Groups that are cut -> the fewest channels that stay.
        reasons: Groups that were selected and can't be cut -> why.
    """
    rows = []
    for layer in structure.layers:
        lowest = structure.outputs_with(layer, kept)
        reason = layer.frozen_reason or reasons.get(layer.group, "") or "not selected"
        if any(name in kept for name, _ in layer.parts):
            reason = ""
        rows.append(LayerPlan(layer.name, layer.type, layer.channels, lowest, layer.group, reason))
    return rows


def state_refusals(schedule: Schedule) -> list[Refusal]:
    """For algorithms that cut tensors while training: can the optimizer's state follow?"""
    if not schedule.state_misfit or not schedule.epochs:
        return []
    fix = "hooks.optimizer_generator: an optimizer whose state has the parameter's shape"
    return [Refusal(schedule.state_misfit, fix=fix, is_for_any_model=True)]


def refuse_patterns(structure: Structure, names: Sequence[str] | None) -> None:
    """``prune_module_names`` takes no patterns and no parents of layers, which ``skip`` does.

    Args:
        structure: All groups.
        names: What the recipe says.

    Raises:
        RecipeError: With the names that were meant, ready to be written down.
    """
    problems = []
    for name in names or ():
        glob = name.removeprefix("self.")
        is_pattern = any(each in glob for each in "*?[")
        if not is_pattern and any(glob in _paths(group) for group in structure.groups):
            continue
        below = glob if is_pattern else f"{glob}.*"
        groups = [group for group in structure.groups if group.is_prunable]
        hit = [each for each in groups if any(fnmatch.fnmatchcase(p, below) for p in _paths(each))]
        # Layers elsewhere that are coupled to one that is meant are named only if all are like it.
        whole = [each for each in hit if all(fnmatch.fnmatchcase(p, below) for p in _written(each))]
        meant = [path for group in whole or hit for path in _written(group)]
        if is_pattern or meant:
            problems.append(_no_pattern(name, is_pattern, list(dict.fromkeys(meant))))
    if problems:
        raise RecipeError(*problems)


def _paths(group: Group) -> set[str]:
    """Every path that means the group."""
    slots = (*group.producers, *group.followers)
    return {group.name, *(slot.tensor.rpartition(".")[0] for slot in slots)}


def _written(group: Group) -> list[str]:
    """What has to be written for the whole group."""
    return [site.norm or site.conv or group.name for site in group.sites] or [group.name]


def _no_pattern(name: str, is_pattern: bool, meant: Sequence[str]) -> Problem:
    listed = ", ".join(meant[:LISTED])
    more = f" and {len(meant) - LISTED} more: slim inspect RECIPE" if meant[LISTED:] else ""
    fix = f"prune_module_names: [{listed}]{more}" if meant else ""
    return Problem(
        "E-STRUCTURE-NAME",
        "prune_module_names takes no patterns"
        if is_pattern
        else f"{name} is no layer but has some",
        "config.prune_module_names",
        expected="the paths of convs or norms, as in model.named_modules()",
        received=name,
        fix=fix or "slim inspect RECIPE lists the layers",
    )
