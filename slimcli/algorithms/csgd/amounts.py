"""How many channels each group keeps: one fraction for all, the planner's, or the user's own."""

from __future__ import annotations

import bisect
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
    fixes = [f"prune_rate: {possible}"] if possible else []
    if config.prune_module_names is None and config.auto_find_module_strategy == "linear_conv":
        fixes.append("auto_find_module_strategy: all_conv")
    if config.min_channels > 1:
        fixes.append("a smaller min_channels")
    if (config.round_to or 1) > 1:
        fixes.append("a smaller round_to")
    if has_fixed:
        fixes.append("less in prune_ratios")
    return Refusal(what, "prune_rate", ", or ".join(fixes))


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


def nothing_removed(
    config: CSGDConfig,
    structure: Structure,
    sizes: Mapping[str, int],
    fixed: Mapping[str, float],
) -> Refusal | None:
    """Filters are to go and none does: small fractions, or min_channels and round_to keep all.

    Args:
        config: What was asked for.
        structure: The coupled groups of the model.
        sizes: Groups that are clustered -> their units.
        fixed: Group -> the fraction that ``prune_ratios`` gives it.

    Returns:
        Why, with values that would work; None where the recipe asks for nothing.
    """
    shares = {name: fixed.get(name, config.cluster_percent or 0.0) for name in sizes}
    if not any(shares.values()):
        return None
    start = "no filter is removed"

    def removes(**keys: int) -> bool:
        width = width_function(config.model_copy(update=keys), structure)
        return any(width(name, size, shares[name]) < size for name, size in sizes.items())

    if not removes(min_channels=1, round_to=1):
        name = max(sizes, key=lambda each: shares[each] * sizes[each])
        key = "prune_ratios" if name in fixed else "cluster_percent"
        wanted = math.ceil(10_000 / sizes[name]) / 10_000
        what = f"{start}: {key} {shares[name]:g} of {sizes[name]} filters is less than one"
        return Refusal(what, key, f"{key}: {'...: ' if name in fixed else ''}{wanted:g}")
    limits = {"min_channels": config.min_channels, "round_to": config.round_to or 1}
    told = [f"{key} {value}" for key, value in limits.items() if value > 1]
    what = f"{start}: {' and '.join(told)} {'keep' if told[1:] else 'keeps'} every layer as it is"
    works = {key: _largest(value, key, removes) for key, value in limits.items()}
    fixes = [f"{key}: {value}" for key, value in works.items() if value]
    key = fixes[0].partition(":")[0] if fixes else "min_channels"
    return Refusal(what, key, ", or ".join(fixes) or "smaller min_channels and round_to")


def _largest(today: int, key: str, removes: Callable[..., bool]) -> int:
    """The largest value below today's with which something is removed; 0 if there is none."""
    if not removes(**{key: 1}):
        return 0
    if key == "min_channels":
        return bisect.bisect_left(range(1, today), True, key=lambda n: not removes(min_channels=n))
    divisors = (value for value in range(today // 2, 0, -1) if today % value == 0)
    return next((value for value in divisors if removes(round_to=value)), 0)
