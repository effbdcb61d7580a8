"""How many channels each group keeps: one fraction for all, the planner's, or the user's own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from slimcli.algorithms.csgd.config import CSGDConfig
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


def _width(config: CSGDConfig, size: int, fraction: float) -> int:
    """Channels a group of this size keeps."""
    return channels_kept(size, fraction, config.min_channels, config.round_to or 1)


def lowest_widths(
    config: CSGDConfig, sizes: Mapping[str, int], fixed: Mapping[str, float]
) -> dict[str, int]:
    """The fewest channels each group can keep."""
    return {name: _width(config, size, fixed.get(name, 1.0)) for name, size in sizes.items()}


def widths_of(
    config: CSGDConfig,
    structure: Structure,
    sizes: Mapping[str, int],
    fixed: Mapping[str, float],
    plan: Plan,
) -> dict[str, int]:
    """Channels each group keeps; refuses a prune_rate that is out of reach."""

    def at(fraction: float) -> dict[str, int]:
        return {
            name: _width(config, size, fixed.get(name, fraction)) for name, size in sizes.items()
        }

    if config.cluster_percent is not None:
        return at(config.cluster_percent)
    assert config.prune_rate is not None
    target = (1 - config.prune_rate) * structure.macs
    free = [size for name, size in sizes.items() if name not in fixed]
    fractions = sorted({removed / size for size in free for removed in range(1, size)}) or [0.0]
    low, high = 0, len(fractions) - 1
    while low < high:  # the first fraction that is enough
        middle = (low + high) // 2
        enough = structure.macs_with(at(fractions[middle])) <= target
        low, high = (low, middle) if enough else (middle + 1, high)
    widths = at(fractions[low])
    reached = structure.macs_with(widths)
    if reached > target:
        plan.refusals.append(_out_of_reach(config, structure.macs, reached, bool(fixed)))
    if free:
        plan.settings["cluster_percent"] = round(fractions[low], 4)
    return widths


def _out_of_reach(config: CSGDConfig, macs: int, reached: int, has_fixed: bool) -> Refusal:
    possible = math.floor((1 - reached / macs) * 1000) / 1000
    what = (
        f"prune_rate {config.prune_rate} is out of reach: with every selected layer at its "
        f"smallest, {reached:,} of {macs:,} MACs are left"
    )
    fix = f"prune_rate: {possible}, or auto_find_module_strategy: all_conv"
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
