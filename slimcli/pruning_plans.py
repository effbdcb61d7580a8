"""What all pruning algorithms say alike in their plans: rows of layers, optimizers that misfit."""

from __future__ import annotations

from collections.abc import Mapping

from slimcli.compressor import LayerPlan, Refusal, Schedule
from slimcli.network.structure import Structure


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
