"""What ResRep will do to a model under a schedule, computed before training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from slimcli.algorithms.resrep import budget
from slimcli.algorithms.resrep.config import ResRepConfig
from slimcli.algorithms.resrep.pacing import Pace, base_strength, distances, find_pace
from slimcli.algorithms.resrep.selection import Limits, minimum_widths, updates_needed
from slimcli.algorithms.resrep.targets import Target, find_targets
from slimcli.channel_units import channels_per_unit
from slimcli.compressor import Goal, Plan, Refusal, Schedule
from slimcli.network.example import Example
from slimcli.network.structure import Structure, analyze
from slimcli.network.widths import LEFT_ALONE, by_reason, fits, kept, ratios_of, reasons_by_name
from slimcli.pruning_plans import layer_plans, state_refusals


@dataclass(frozen=True)
class Analysis:
    """What :meth:`plan` learnt and :meth:`prepare` needs.

    Attributes:
        structure: The coupled groups of the model.
        targets: The groups that get compactors, in network order.
        pace: When masks come; None if nothing is to be masked.
        target_macs: MACs to reach.
        limits: What the selector respects.
    """

    structure: Structure
    targets: tuple[Target, ...]
    pace: Pace | None
    target_macs: float
    limits: Limits

    @property
    def sizes(self) -> dict[str, int]:
        """Channels of each target before anything is cut."""
        return {target.name: target.group.size for target in self.targets}


def limits_of(
    config: ResRepConfig,
    structure: Structure,
    targets: Sequence[Target],
    reasons: Mapping[str, str],
) -> Limits:
    """The limits of the selector.

    Raises:
        RecipeError: A pattern of ``prune_ratios`` fits no target, or two contradict each other.
    """
    groups = {target.name: target.group for target in targets}
    rest = [group for group in structure.groups if group.name not in groups]
    ratios = ratios_of(config.prune_ratios, list(groups.values()), reasons_by_name(rest, reasons))
    least = {
        name: max(group.least, kept(group.size, ratios[name]) if name in ratios else 1)
        for name, group in groups.items()
        if name in ratios or group.least > 1
    }
    per_unit = channels_per_unit(structure)
    return Limits(config.groups_size, config.min_channels, config.round_to or 1, least, per_unit)


def make_plan(config: ResRepConfig, model: nn.Module, example: Example, schedule: Schedule) -> Plan:
    """The plan; ``model`` is not changed."""
    structure = analyze(model, example)
    targets, reasons = find_targets(
        model,
        structure,
        config.auto_find_module_strategy,
        config.prune_module_names,
        config.skip,
    )
    sizes = {target.name: target.group.size for target in targets}
    limits = limits_of(config, structure, targets, reasons)
    lowest = minimum_widths(sizes, limits)
    plan = Plan(
        targets=list(sizes),
        layers=layer_plans(structure, lowest, reasons),
        macs=structure.macs,
        params=sum(parameter.numel() for parameter in model.parameters()),
        reachable_macs=structure.macs_with(lowest),
        notes=list(structure.notes),
        warnings=list(schedule.warnings),
        refusals=state_refusals(schedule) if targets and config.prune_rate else [],
    )
    plan.notes += [
        f"{name}: prune_ratios removes at most {sizes[name] - lowest[name]} of {sizes[name]} "
        f"channels, keeps {lowest[name]} or more"
        for name in limits.least
    ]
    target_macs = (1 - config.prune_rate) * structure.macs if targets else float(structure.macs)
    pace = None
    if any(place.norm for target in targets for place in target.places) and (
        config.auto_find_module_strategy.endswith("conv")
    ):
        plan.notes.append(
            "compactors sit behind the norm of a conv that has one: in front of it the norm would "
            "undo the shrinking that tells which channels matter"
        )
    if targets:
        plan.goal = Goal("macs", target_macs)
        pace = _pace(config, schedule, plan, (sizes, limits), structure)
    elif _is_switched_off(config) or config.prune_rate == 0:
        plan.warnings.append("no layer is selected: this trains without compressing")
    else:
        plan.refusals.append(_nothing_to_prune(config, model, structure, reasons))
    plan.private = Analysis(structure, tuple(targets), pace, target_macs, limits)
    return plan


def _is_switched_off(config: ResRepConfig) -> bool:
    """The user said in the recipe that nothing is to be pruned."""
    return config.prune_module_names == () or "*" in config.skip


def _pace(
    config: ResRepConfig,
    schedule: Schedule,
    plan: Plan,
    bounds: tuple[Mapping[str, int], Limits],
    structure: Structure,
) -> Pace | None:
    """Finds the pace and writes budget and refusals into the plan."""
    if config.prune_rate == 0:
        return None
    target_macs = (1 - config.prune_rate) * structure.macs
    sizes, limits = bounds
    updates = updates_needed(sizes, limits, config.prune_groups, target_macs, structure.macs_with)
    if updates is None:
        plan.refusals.append(_out_of_reach(config, sizes, limits, structure))
        return None
    found = find_pace(config, schedule, updates)
    if isinstance(found, Refusal):
        plan.refusals.append(found)
        return None
    _describe(config, schedule, plan, found)
    return found


def _describe(config: ResRepConfig, schedule: Schedule, plan: Plan, pace: Pace) -> None:
    """Writes what ``auto`` came out as, and the shrink budget."""
    if config.lasso_decay == "auto":
        strength = masked_strength(config, schedule, pace, pace.last, 1.0)
        distance = budget.MARGIN / strength
        plan.settings["lasso_decay"] = base_strength(config)
        plan.settings["lasso_decay of masked rows"] = float(f"{strength:.3g}")
    else:
        strength = config.lasso_decay
        distance = distances(config, schedule)[pace.last]
    if config.prune_interval == "auto":
        steps = (pace.last - pace.first) / max(pace.updates, 1)
        plan.settings["prune_interval"] = float(f"{steps:.3g}")
    plan.budget = {
        "shrink_needed": budget.MARGIN,
        "shrink_available": strength * distance,
        "mask_updates": pace.updates,
        "first_mask_step": pace.first,
        "last_mask_step": pace.last,
        "zero_step": pace.zero,
        "steps": schedule.steps,
    }


def masked_strength(
    config: ResRepConfig, schedule: Schedule, pace: Pace, step: int, norm: float
) -> float:
    """Lasso strength that takes a row masked after ``step`` to zero by its deadline.

    Args:
        config: Keys of the algorithm.
        schedule: Every learning rate of the run.
        pace: When masks come.
        step: Number of the step just made.
        norm: Norm of the row now.
    """
    base = base_strength(config)
    if config.lasso_decay != "auto":
        return base
    rates = schedule.learning_rates[step + 1 : pace.deadline(step)]
    reach = budget.reach(rates, config.compactor_momentum)
    needed = budget.strength_needed(reach[0], norm)
    return max(base, needed) if math.isfinite(needed) else base


def _nothing_to_prune(
    config: ResRepConfig, model: nn.Module, structure: Structure, reasons: Mapping[str, str]
) -> Refusal:
    """No group is left: what keeps the groups, the commonest reason first, and what would help."""
    told = by_reason(
        {
            group.name: reasons.get(group.name) or group.frozen_reason or "not selected"
            for group in structure.groups
        }
    )
    how = "prune_module_names" if config.prune_module_names else config.auto_find_module_strategy
    what = f"nothing to prune with {how} ({told or 'the model has no layer'})"
    helps = []
    skipped = [name for name, reason in reasons.items() if reason == LEFT_ALONE]
    if skipped:
        helps.append(("skip", "a narrower skip"))
    helps += [
        ("auto_find_module_strategy", f"auto_find_module_strategy: {strategy}")
        for strategy in _helpful_strategies(config, model, structure)
    ]
    if not helps:
        fix = "slim inspect RECIPE shows what freezes each group; prune_rate: 0 only trains"
        return Refusal(what, "prune_rate", fix)
    return Refusal(what, helps[0][0], ", or ".join(fix for _, fix in helps))


def _helpful_strategies(config: ResRepConfig, model: nn.Module, structure: Structure) -> list[str]:
    """The strategy that takes coupled groups too, where it leaves something to prune."""
    if not config.auto_find_module_strategy.startswith("linear"):
        return []
    wider = config.auto_find_module_strategy.replace("linear", "all")
    targets, _ = find_targets(model, structure, wider, None, ())
    is_free = [not any(fits(each, target.group) for each in config.skip) for target in targets]
    return [wider] if any(is_free) else []


def _groups(count: int) -> str:
    return "the only prunable group holds" if count == 1 else f"the {count} prunable groups hold"


def _out_of_reach(
    config: ResRepConfig, sizes: Mapping[str, int], limits: Limits, structure: Structure
) -> Refusal:
    """The target lies below what the limits allow; the values that would work."""

    def removable(min_channels: int, round_to: int = limits.round_to) -> float:
        fewer = replace(limits, min_channels=min_channels, round_to=round_to)
        return 1 - structure.macs_with(minimum_widths(sizes, fewer)) / structure.macs

    most = removable(config.min_channels)
    rounded = f" and round_to {limits.round_to}" if limits.round_to > 1 else ""
    what = (
        f"prune_rate {config.prune_rate:g} is out of reach: at min_channels {config.min_channels}"
        f"{rounded} {_groups(len(sizes))} at most {most:.1%} of the MACs"
    )
    fixes = [f"prune_rate: {math.floor(most * 100) / 100:g}"] if most >= 0.01 else []
    counts = range(config.min_channels - 1, 0, -1)
    fewer = next((count for count in counts if removable(count) >= config.prune_rate), 0)
    if fewer:
        fixes.append(f"min_channels: {fewer}")
    divisors = (n for n in range(limits.round_to - 1, 0, -1) if limits.round_to % n == 0)
    finer = next((n for n in divisors if removable(config.min_channels, n) >= config.prune_rate), 0)
    if finer:
        fixes.append(f"round_to: {finer}")
    if config.auto_find_module_strategy.startswith("linear"):
        wider = config.auto_find_module_strategy.replace("linear", "all")
        fixes.append(f"auto_find_module_strategy: {wider}")
    if config.prune_ratios:
        fixes.append("larger fractions in prune_ratios")
    if not fixes:
        fixes.append("smaller min_channels and round_to")
    return Refusal(what, "prune_rate", ", or ".join(fixes))
