"""Which channels are masked next: pure arithmetic on norms and widths, no torch.

The authors sort all channels of all layers in one list and mask the smallest prefix, four more at
each update; entries they skip count against the four, so their selector can stop short of the
target for ever (their code, a3567a19). Here a *block* is the ``groups_size`` smallest channels of
one coupled group, the block with the smallest mean norm goes first, and nothing that is skipped
counts.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from slimcli.channel_units import ONE, unit_multiple, units_in

Macs = Callable[[Mapping[str, int]], int]
"""MACs of the deployed model at kept channels per group."""


@dataclass(frozen=True)
class Limits:
    """What the selector must respect.

    Attributes:
        groups_size: Channels in a block, at most.
        min_channels: Channels every group keeps.
        round_to: Widths of pruned groups are multiples of this.
        least: Group -> units it keeps in any case, where that is more than ``min_channels``.
        per_unit: Group -> channels its layers have for one of its units; one if it isn't named.
    """

    groups_size: int = 8
    min_channels: int = 8
    round_to: int = 1
    least: Mapping[str, int] = field(default_factory=dict)
    per_unit: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def multiple(self, name: str) -> int:
        """Units of a pruned group are a multiple of this.

        >>> Limits(round_to=8, per_unit={"a": (4,)}).multiple("a")
        2
        """
        return unit_multiple(self.round_to, self.per_unit.get(name, ONE))

    def minimum(self, size: int, name: str = "") -> int:
        """The fewest units a group of this size can end with.

        >>> Limits(min_channels=6, round_to=4).minimum(64), Limits(min_channels=6).minimum(4)
        (8, 4)
        >>> Limits(min_channels=6, round_to=4, least={"a": 31}).minimum(64, "a")
        32
        """
        per_unit, multiple = self.per_unit.get(name, ONE), self.multiple(name)
        least = max(units_in(self.min_channels, per_unit), self.least.get(name, 0))
        return min(size, -(-least // multiple) * multiple)

    def next_width(self, width: int, size: int, name: str = "") -> int:
        """Units after one more block; the same number if no block can go.

        >>> limits = Limits(groups_size=8, min_channels=3)
        >>> limits.next_width(16, 16), limits.next_width(8, 16), limits.next_width(3, 16)
        (8, 3, 3)
        >>> Limits(groups_size=8, min_channels=8, round_to=8).next_width(60, 60)
        56
        """
        block = max(1, self.groups_size // min(self.per_unit.get(name, ONE)))
        wanted, multiple = max(width - block, 0), self.multiple(name)
        wanted = -(-wanted // multiple) * multiple
        if wanted == width and multiple > block:
            wanted = width - multiple
        return min(width, max(wanted, self.minimum(size, name)))


@dataclass(frozen=True)
class Standing:
    """The channels of one group that are not masked.

    Attributes:
        size: Channels of the group before anything was masked.
        norms: Channel -> norm, unmasked channels only.
    """

    size: int
    norms: Mapping[int, float]


def choose(
    standings: Mapping[str, Standing], limits: Limits, blocks: int, target: float, macs: Macs
) -> dict[str, list[int]]:
    """Channels to mask now: at most ``blocks`` blocks, none once ``macs`` is at the target.

    Ties go to the group that comes first and to the smaller channel. Inside the last block masking
    stops at the channel that reaches the target, unless widths are rounded.

    Args:
        standings: Group -> its unmasked channels, in network order.
        limits: What the result respects.
        blocks: The most blocks of one update.
        target: MACs to reach.
        macs: MACs at given widths.

    Returns:
        Group -> channels, in the order they were chosen.

    >>> standings = {"a": Standing(3, {0: 1.0, 1: 0.2, 3: 0.4}), "b": Standing(1, {0: 0.5})}
    >>> choose(standings, Limits(2, 1), 1, 0, lambda widths: sum(widths.values()))
    {'a': [1, 3]}
    >>> choose(standings, Limits(2, 1), 1, 3, lambda widths: sum(widths.values()))
    {'a': [1]}
    """
    chosen: dict[str, list[int]] = {}
    ranked = {name: _ranked(standing.norms) for name, standing in standings.items()}
    widths = {name: len(standing.norms) for name, standing in standings.items()}
    for _ in range(blocks):
        if macs(widths) <= target:
            break
        block = _smallest_block(standings, ranked, widths, limits)
        if block is None:
            break
        name, channels = block
        for position, channel in enumerate(channels):
            chosen.setdefault(name, []).append(channel)
            widths[name] -= 1
            whole = limits.multiple(name) == 1 or position == len(channels) - 1
            if whole and macs(widths) <= target:
                break
    return chosen


def _ranked(norms: Mapping[int, float]) -> list[int]:
    return sorted(norms, key=lambda channel: (norms[channel], channel))


def _smallest_block(
    standings: Mapping[str, Standing],
    ranked: Mapping[str, Sequence[int]],
    widths: Mapping[str, int],
    limits: Limits,
) -> tuple[str, Sequence[int]] | None:
    """The block with the smallest mean norm, or None if every group is at its minimum."""
    best: tuple[float, str, Sequence[int]] | None = None
    for name, standing in standings.items():
        gone = len(ranked[name]) - widths[name]
        width = limits.next_width(widths[name], standing.size, name)
        channels = ranked[name][gone : gone + widths[name] - width]
        if not channels:
            continue
        mean = sum(standing.norms[channel] for channel in channels) / len(channels)
        if best is None or mean < best[0]:
            best = (mean, name, channels)
    return None if best is None else best[1:]


def minimum_widths(sizes: Mapping[str, int], limits: Limits) -> dict[str, int]:
    """The narrowest the groups can become.

    >>> minimum_widths({"a": 64, "b": 6}, Limits(min_channels=8))
    {'a': 8, 'b': 6}
    """
    return {name: limits.minimum(size, name) for name, size in sizes.items()}


def updates_needed(
    sizes: Mapping[str, int], limits: Limits, blocks: int, target: float, macs: Macs
) -> int | None:
    """Mask updates until the target is reached if the cheapest blocks go first, or None.

    Which blocks go first is known only in training. This is the slow order: groups are narrowed to
    their minimum one after the other, those first that save the fewest MACs a channel.

    Args:
        sizes: Group -> channels.
        limits: What the selector respects.
        blocks: Blocks of one update.
        target: MACs to reach.
        macs: MACs at given widths.

    >>> updates_needed({"a": 8, "b": 8}, Limits(4, 4), 1, 9, lambda w: w["a"] + w["b"])
    2
    """
    full = macs(sizes)
    lowest = minimum_widths(sizes, limits)
    if macs(lowest) > target:
        return None
    savings = {
        name: (full - macs({**sizes, name: lowest[name]})) / max(size - lowest[name], 1)
        for name, size in sizes.items()
    }
    path: list[tuple[str, int]] = []
    for name in sorted(sizes, key=lambda each: savings[each]):
        width = sizes[name]
        while (narrower := limits.next_width(width, sizes[name], name)) < width:
            path.append((name, narrower))
            width = narrower

    def reached(count: int) -> bool:
        return macs({**sizes, **dict(path[:count])}) <= target

    count = bisect_left(range(len(path) + 1), True, key=reached)
    return -(-count // blocks)
