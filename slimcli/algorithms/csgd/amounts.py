"""How many channels each group keeps: one fraction for all, the planner's, or the user's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from slimcli.algorithms.csgd.allocation import (
    Choices,
    first_enough,
    merge_costs,
    per_layer,
    uniform,
)
from slimcli.algorithms.csgd.config import CSGDConfig
from slimcli.channel_units import ONE, channels_per_unit, unit_multiple, units_in
from slimcli.compressor import Plan, Refusal
from slimcli.network.structure import Group, Structure
from slimcli.network.widths import kept as channels_kept
from slimcli.network.widths import ratios_of, reasons_by_name


def fixed_ratios(
    config: CSGDConfig, structure: Structure, groups: Sequence[Group], reasons: Mapping[str, str]
) -> dict[str, float]:
    """Group -> the fraction that ``prune_ratios`` gives it.

    Raises:
        RecipeError: A pattern fits no group that is clustered, or two contradict each other.
    """
    chosen = {group.name for group in groups}
    rest = [group for group in structure.groups if group.name not in chosen]
    return ratios_of(config.prune_ratios, groups, reasons_by_name(rest, reasons))


Width = Callable[[str, int, float], int]
"""Name and size of a group, fraction that goes -> units that stay."""


def width_function(config: CSGDConfig, structure: Structure) -> Width:
    """What stays of a group, ``min_channels`` and ``round_to`` being about channels of layers."""
    per_unit = channels_per_unit(structure)
    in_any_case = {group.name: group.least for group in structure.groups}

    def width(name: str, size: int, fraction: float) -> int:
        counts = per_unit.get(name, ONE)
        least = max(units_in(config.min_channels, counts), in_any_case.get(name, 1))
        return channels_kept(size, fraction, least, unit_multiple(config.round_to or 1, counts))

    return width


def lowest_widths(
    width: Width, sizes: Mapping[str, int], fixed: Mapping[str, float]
) -> dict[str, int]:
    """The fewest units each group can keep."""
    return {name: width(name, size, fixed.get(name, 1.0)) for name, size in sizes.items()}


def widths_of(
    config: CSGDConfig,
    structure: Structure,
    features: Mapping[str, NDArray[np.float64]],
    fixed: Mapping[str, float],
    plan: Plan,
) -> dict[str, int]:
    """Channels each group keeps; refuses a prune_rate that is out of reach.

    Args:
        config: How much goes.
        structure: The coupled groups of the model.
        features: Group -> what its channels are compared by, (channels, numbers).
        fixed: Group -> the fraction that ``prune_ratios`` gives it.
        plan: Gets the fractions that were found, or the refusal.
    """
    sizes = {name: len(rows) for name, rows in features.items()}
    width = width_function(config, structure)

    def at(fractions: Mapping[str, float]) -> dict[str, int]:
        return {
            name: width(name, size, fixed.get(name, fractions.get(name, 0.0)))
            for name, size in sizes.items()
        }

    if config.cluster_percent is not None:
        return at(dict.fromkeys(sizes, config.cluster_percent))
    assert config.prune_rate is not None
    target = (1 - config.prune_rate) * structure.macs
    free = {name: rows for name, rows in features.items() if name not in fixed}
    choices = _choices(config, structure, free)
    chosen = first_enough(
        choices.count, lambda number: structure.macs_with(at(choices.at(number))) <= target
    )
    fractions = choices.at(chosen)
    widths = at(fractions)
    reached = structure.macs_with(widths)
    if reached > target:
        plan.refusals.append(_out_of_reach(config, structure.macs, reached, bool(fixed)))
    if free:
        low, high = min(fractions.values()), max(fractions.values())
        plan.settings["cluster_percent"] = (
            round(low, 4) if low == high else f"{low:.3g} to {high:.3g}, per layer"
        )
    return widths


def _choices(
    config: CSGDConfig, structure: Structure, free: Mapping[str, NDArray[np.float64]]
) -> Choices:
    """The sets of fractions that the planner may choose from, mildest first."""
    sizes = {name: len(rows) for name, rows in free.items()}
    if config.allocation == "uniform":
        return uniform(sizes)
    saved = {
        name: structure.macs - structure.macs_with({name: size - 1}) for name, size in sizes.items()
    }
    return per_layer({name: merge_costs(rows) for name, rows in free.items()}, saved)


def _out_of_reach(config: CSGDConfig, macs: int, reached: int, has_fixed: bool) -> Refusal:
    possible = math.floor((1 - reached / macs) * 1000) / 1000
    what = (
        f"prune_rate {config.prune_rate} is out of reach: with every selected layer at its "
        f"smallest, {reached:,} of {macs:,} MACs are left"
    )
    fix = f"prune_rate: {possible}"
    if config.prune_module_names is None and config.auto_find_module_strategy == "linear_conv":
        fix += ", or auto_find_module_strategy: all_conv"
    if config.min_channels > 1:
        fix += ", or a smaller min_channels"
    if (config.round_to or 1) > 1:
        fix += ", or a smaller round_to"
    return Refusal(what, "prune_rate", f"{fix}, or less in prune_ratios" if has_fixed else fix)


def removal_notes(sizes: Mapping[str, int], kept: Mapping[str, int]) -> list[str]:
    """One sentence a layer, so that nobody misreads what the fraction means.

    >>> removal_notes({"conv1": 64}, {"conv1": 48})
    ['conv1: 0.25 removes 16 of 64 filters, keeps 48']
    """
    return [
        f"{name}: {round((size - kept[name]) / size, 3):g} removes {size - kept[name]} of {size} "
        f"filters, keeps {kept[name]}"
        for name, size in sizes.items()
    ]


def removes_nothing(config: CSGDConfig, sizes: Mapping[str, int]) -> str:
    """What to tell where rounding, or a fraction of 0, leaves every layer whole.

    >>> removes_nothing(CSGDConfig(cluster_percent=0.01), {"conv1": 8, "conv2": 16})
    'no filter is removed: cluster_percent 0.01 of 16 filters is less than one'
    """
    start = "no filter is removed"
    if config.cluster_percent:
        widest = max(sizes.values())
        if config.cluster_percent * widest < 1:
            return (
                f"{start}: cluster_percent {config.cluster_percent:g} of {widest} filters is less "
                "than one"
            )
        return f"{start}: min_channels and round_to keep every layer as it is"
    return f"{start}: this trains without compressing"
