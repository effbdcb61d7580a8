"""What C-SGD will do to a model under a schedule: which channels, when, and whether they meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from slimcli.algorithms.csgd import clustering
from slimcli.algorithms.csgd.amounts import (
    fixed_ratios,
    lowest_widths,
    nothing_removed,
    removal_notes,
    width_function,
    widths_of,
)
from slimcli.algorithms.csgd.clustering import Clusters
from slimcli.algorithms.csgd.collapse import Collapse, Start, find_collapse
from slimcli.algorithms.csgd.config import CSGDConfig
from slimcli.algorithms.csgd.selection import explain_nothing, find_groups
from slimcli.algorithms.csgd.ties import Tie, distance, distance_in
from slimcli.compressor import Goal, Plan, Refusal, Schedule
from slimcli.network.cuts import Slot
from slimcli.network.example import Example
from slimcli.network.fuse import norm_as_scale
from slimcli.network.structure import Group, Structure, analyze
from slimcli.pruning_plans import layer_plans, state_refusals


@dataclass(frozen=True)
class Analysis:
    """What the plan hands to ``prepare``.

    Attributes:
        structure: The coupled groups of the model.
        groups: The groups that are clustered, in network order.
        clusters: Group name -> clusters of its channels.
        collapse: How and when the filters meet.
    """

    structure: Structure
    groups: tuple[Group, ...]
    clusters: dict[str, Clusters]
    collapse: Collapse


def make_plan(config: CSGDConfig, model: nn.Module, example: Example, schedule: Schedule) -> Plan:
    """The plan; ``model`` is not changed."""
    structure = analyze(model, example)
    groups, reasons = find_groups(config, model, structure)
    sizes = {group.name: group.size for group in groups}
    fixed = fixed_ratios(config, structure, groups, reasons)
    lowest = lowest_widths(width_function(config, structure), sizes, fixed)
    plan = Plan(
        targets=list(sizes),
        macs=structure.macs,
        params=sum(parameter.numel() for parameter in model.parameters()),
        reachable_macs=structure.macs_with(lowest),
        notes=list(structure.notes),
        warnings=list(schedule.warnings),
        refusals=state_refusals(schedule) if groups else [],
    )
    features = {group.name: group_features(model, structure, group) for group in groups}
    clusters: dict[str, Clusters] = {}
    if not groups:
        explain_nothing(config, model, structure, reasons, plan)
    elif schedule.epochs == 0:
        clusters = {name: clustering.duplicates(each) for name, each in features.items()}
        plan.notes.append("epoch: 0 merges only filters that are equal already")
    else:
        widths = widths_of(config, structure, features, fixed, plan)
        clusters = {
            name: clustering.cluster(
                features[name], widths[name], config.cluster_method, schedule.seed
            )
            for name in widths
        }
    kept = {name: len(each) for name, each in clusters.items()}
    plan.layers = layer_plans(structure, kept, reasons)
    if kept:
        plan.goal = _goal(config, structure, kept)
        plan.notes += removal_notes(sizes, kept)
        _require_removal(config, structure, kept, fixed, schedule, plan)
    collapse = _collapse(config, model, schedule, plan, groups, clusters)
    plan.private = Analysis(structure, tuple(groups), clusters, collapse)
    return plan


def _goal(config: CSGDConfig, structure: Structure, kept: Mapping[str, int]) -> Goal:
    """The MACs the recipe allows: those of its ``prune_rate``, or of the widths it gives."""
    if config.prune_rate is not None:
        return Goal("macs", (1 - config.prune_rate) * structure.macs)
    return Goal("macs", float(structure.macs_with(kept)))


def _require_removal(
    config: CSGDConfig,
    structure: Structure,
    kept: Mapping[str, int],
    fixed: Mapping[str, float],
    schedule: Schedule,
    plan: Plan,
) -> None:
    """Refuses a plan that can't remove what it should; warns where nothing has to go."""
    sizes = {name: structure.group(name).size for name in kept}
    macs = structure.macs_with(kept)
    if schedule.epochs == 0 and plan.goal is not None and macs > plan.goal.target:
        what = (
            f"prune_rate {config.prune_rate:g} is out of reach: epoch: 0 merges only filters that "
            f"are equal already, {macs:,} of {structure.macs:,} MACs are left"
        )
        plan.refusals.append(Refusal(what, "prune_rate", "epoch: 1 or more"))
    elif kept == sizes and schedule.epochs == 0:
        plan.warnings.append("no filter is removed: no two filters are equal")
    elif kept == sizes and config.prune_rate is None:  # a rate out of reach was refused above
        refusal = nothing_removed(config, structure, sizes, fixed)
        if refusal is None:
            plan.warnings.append("no filter is removed: this trains without compressing")
        else:
            plan.refusals.append(refusal)


def tied_slots(model: nn.Module, group: Group) -> list[tuple[Slot, str]]:
    """Every slot whose channels must become equal, and what it holds.

    Returns:
        Slots with ``kernel``, ``vector`` (a norm's or a bias) or ``statistics`` (a buffer).
    """
    parameters = dict(model.named_parameters())
    kinds = []
    for slot in dict.fromkeys((*group.producers, *group.followers)):
        if slot.tensor not in parameters:
            kinds.append((slot, "statistics"))
        else:
            is_vector = parameters[slot.tensor].dim() == 1
            kinds.append((slot, "vector" if is_vector else "kernel"))
    return kinds


def group_features(model: nn.Module, structure: Structure, group: Group) -> NDArray[np.float64]:
    """What k-means sees of each channel: all its kernels, scaled by the norms behind them.

    Returns:
        (channels, numbers): one row a channel, all layers of the group side by side.
    """
    norm_of = {pair.conv: pair.norm for pair in structure.conv_batch_norms}
    norm_of |= {site.conv: site.norm for site in group.sites if site.norm}
    parts = []
    for slot, kind in tied_slots(model, group):
        if kind != "kernel":
            continue
        weight = model.get_parameter(slot.tensor).detach().double().cpu()
        rows = weight.movedim(slot.dim, 0).flatten(1)
        scale = _scale_behind(model, norm_of.get(slot.tensor.rpartition(".")[0], ""), len(rows))
        if scale is not None:
            rows = rows * scale.unsqueeze(1)
        entries = [entry for channel in slot.indices for entry in channel]
        parts.append(rows[entries].reshape(group.size, -1).numpy())
    features: NDArray[np.float64] = np.concatenate(parts, axis=1)
    return features


def _scale_behind(model: nn.Module, norm: str, rows: int) -> Tensor | None:
    """``gamma / sigma`` of a norm that has one entry a row."""
    if not norm:
        return None
    module = model.get_submodule(norm)
    if getattr(module, "running_var", None) is None:
        return None
    scale = norm_as_scale(module)[0].cpu()
    return scale if len(scale) == rows else None


def _collapse(
    config: CSGDConfig,
    model: nn.Module,
    schedule: Schedule,
    plan: Plan,
    groups: Sequence[Group],
    clusters: Mapping[str, Clusters],
) -> Collapse:
    """Finds how and when filters meet, and writes budget and refusals into the plan."""
    start = _start(model, groups, clusters)
    collapse = find_collapse(config, schedule, start)
    if start.largest > 0 and schedule.epochs:
        plan.budget = {
            "spread_now": start.largest,
            "spread_at_merge": collapse.spread,
            "statistics_spread_at_merge": collapse.statistics_spread,
            "spread_wanted": collapse.wanted,
            "merge_step": collapse.step,
        }
        plan.settings |= {
            "prune_epoch": collapse.epoch,
            "centri_strength": collapse.strength,
            "pull": collapse.form,
        }
        if collapse.refusal is not None:
            plan.refusals.append(collapse.refusal)
        plan.warnings += collapse.warnings
    return collapse


def _start(model: nn.Module, groups: Sequence[Group], clusters: Mapping[str, Clusters]) -> Start:
    """The spread of the model as it is: kernels, vectors and statistics."""
    largest = {"kernel": 0.0, "vector": 0.0, "statistics": 0.0}
    momentum = 1.0
    for group in groups:
        for slot, kind in tied_slots(model, group):
            tie = Tie(slot, clusters[group.name], is_vector=False)
            if kind == "statistics":
                spread = statistics_distance(model, tie)
                owner = model.get_submodule(slot.tensor.rpartition(".")[0])
                own = getattr(owner, "momentum", None)
                momentum = min(momentum, own if isinstance(own, float) else 0.1)
            else:
                spread = distance(tie, model.get_parameter(slot.tensor))
            largest[kind] = max(largest[kind], spread)
    return Start(largest["kernel"], largest["vector"], largest["statistics"], momentum)


def statistics_distance(model: nn.Module, tie: Tie) -> float:
    """Spread of running statistics: means in standard deviations, variances in variances."""
    owner = model.get_submodule(tie.tensor.rpartition(".")[0])
    variance = getattr(owner, "running_var", None)
    values = model.get_buffer(tie.tensor)
    if not isinstance(variance, Tensor) or variance.shape != values.shape:
        return distance(tie, values)
    epsilon = float(getattr(owner, "eps", 1e-5))
    unit = variance.double() + epsilon
    return distance_in(tie, values, unit if values is variance else unit.sqrt())
