"""Which coupled groups are clustered, and why the others are not."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from slimcli.algorithms.csgd.config import CSGDConfig
from slimcli.compressor import Plan, Refusal
from slimcli.network.structure import Group, Structure, select_groups
from slimcli.network.widths import LEFT_ALONE, by_reason, skipped
from slimcli.pruning_plans import refuse_patterns

NOT_TRAINED = "is not trained (requires_grad is False)"


def find_groups(
    config: CSGDConfig, model: nn.Module, structure: Structure
) -> tuple[list[Group], dict[str, str]]:
    """Groups to cluster, and why other selected groups can't be (group name -> reason)."""
    names = config.prune_module_names
    if names is not None and not names:
        return [], {}
    refuse_patterns(structure, names)
    chosen = select_groups(structure, config.auto_find_module_strategy, names)
    alone = skipped(config.skip, chosen)
    groups, reasons = [], {}
    for group in chosen:
        reason = LEFT_ALONE if group.name in alone else why_not(group, model)
        if reason:
            reasons[group.name] = reason
        else:
            groups.append(group)
    return groups, reasons


def why_not(group: Group, model: nn.Module) -> str:
    """Why the channels of a group can't be clustered and merged; empty if they can."""
    if group.frozen_reason:
        return group.frozen_reason
    if not group.exact_duplicate:
        return group.duplicate_reason or "merging duplicates would not be exact"
    frozen = {name for name, each in model.named_parameters() if not each.requires_grad}
    untrained = sorted(frozen & {slot.tensor for slot in (*group.producers, *group.followers)})
    if untrained:
        return f"{untrained[0]} {NOT_TRAINED}"
    return "it has a single channel" if group.size < 2 else ""


def explain_nothing(
    config: CSGDConfig,
    model: nn.Module,
    structure: Structure,
    selected: Mapping[str, str],
    plan: Plan,
) -> None:
    """Nothing is clustered: wanted by the recipe, or a reason to stop.

    Args:
        config: What was asked for.
        model: Not changed.
        structure: All groups.
        selected: Groups that were selected -> why they can't be clustered.
        plan: Gets the warning or the refusal.
    """
    is_switched_off = config.prune_module_names == () or "*" in config.skip
    if is_switched_off or config.cluster_percent == 0:
        plan.warnings.append("no layer is selected: this trains without compressing")
        return
    left_out = (
        f"not taken by {config.auto_find_module_strategy}"
        if config.prune_module_names is None
        else "not in prune_module_names"
    )
    reasons = {
        group.name: selected.get(group.name) or why_not(group, model) or left_out
        for group in structure.groups
    }
    told = by_reason(reasons)
    key, fix = _what_helps(config, set(reasons.values()), left_out)
    plan.refusals.append(
        Refusal(
            "no layer can be clustered: " + (told or "the network has no coupled channels"),
            key,
            f"{fix}, or prune_module_names: [] to only train",
        )
    )


def _what_helps(config: CSGDConfig, reasons: set[str], left_out: str) -> tuple[str, str]:
    """The key to change and its value, for what stands in the way of a group that could be cut."""
    if left_out in reasons and config.prune_module_names is not None:
        return "prune_module_names", "other names in prune_module_names"
    if left_out in reasons:
        return "auto_find_module_strategy", "auto_find_module_strategy: all_conv"
    if LEFT_ALONE in reasons:
        return "skip", "fewer patterns in skip"
    if any(reason.endswith(NOT_TRAINED) for reason in reasons):
        return "", "requires_grad_(True) on those parameters in your model hook"
    return "", "resrep, which removes channels where they can't be merged"
