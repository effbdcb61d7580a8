"""What the analysis found: groups of channels that live and die together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, compress
from typing import Any

import numpy as np

from slimcli.network.cuts import Constant, Cut, Slot, SlotCut
from slimcli.network.selection import Sources, whole
from slimcli.network.structure.planes import are_all
from slimcli.network.structure.record import MacTerm


@dataclass(frozen=True)
class Site:
    """Where a channel is made zero.

    Attributes:
        conv: Path of the producing module (conv, transposed conv, linear layer, embedding); empty
            if the weight is used without calling a module.
        norm: Path of the norm that alone reads all its output; None: the place is behind the conv.
    """

    conv: str
    norm: str | None = None


@dataclass(frozen=True)
class ConvBatchNorm:
    """A conv (or linear layer) and the norm that can be folded into it."""

    conv: str
    norm: str


@dataclass(frozen=True)
class LayerRow:
    """One mixing layer, for tables.

    Attributes:
        name: Module path (or tensor name where no module is called).
        type: Class name.
        channels: Outputs.
        group: Name of the group its outputs belong to, the first of several; empty for none.
        frozen_reason: Empty if (some of) its outputs can be pruned.
        parts: (name of a group, outputs in it) for every group; a depthwise conv behind a
            concatenation has outputs in several.
    """

    name: str
    type: str
    channels: int
    group: str
    frozen_reason: str
    parts: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Group:
    """Channels coupled over several tensors; channel ``i`` is entry ``i`` of every slot's indices.

    Attributes:
        name: Path of the norm or conv of the first site.
        size: Channels.
        producers: Output dimensions of the weights and biases that make the values.
        followers: All on the way: norms, depthwise convs, scales, the gate side of a product.
        consumers: Input dimensions that read the values.
        counters: Attributes of layers without tensors that say how many channels there are.
        sites: Where a channel is made zero; in a sum everywhere, in a product on one side.
        frozen_reason: Why it can be cut in no way; empty if it can.
        exact_zero: Removing a channel that is zero at every site changes nothing.
        zero_reason: Why not.
        exact_duplicate: Merging channels equal in every producer and follower changes nothing.
        duplicate_reason: Why not.
        constants: (path, slot) of consumers that a zero channel reaches as a constant; their bias
            takes it up.
        is_linear: One producer and one consumer, both dense.
        is_placeable: Every site is a module, so that something can be put behind it.
        least: So many channels must stay: with fewer, the code does something else.
    """

    name: str
    size: int
    producers: tuple[Slot, ...]
    followers: tuple[Slot, ...]
    consumers: tuple[Slot, ...]
    sites: tuple[Site, ...]
    frozen_reason: str = ""
    exact_zero: bool = True
    zero_reason: str = ""
    exact_duplicate: bool = True
    duplicate_reason: str = ""
    constants: tuple[tuple[str, Slot], ...] = ()
    is_linear: bool = False
    is_placeable: bool = True
    counters: tuple[Slot, ...] = ()
    least: int = 1

    @property
    def is_prunable(self) -> bool:
        """Can channels be removed: zero ones, equal ones, or both?"""
        return not self.frozen_reason

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All slots."""
        return self.producers + self.followers + self.consumers + self.counters

    def cut(self, keep: Sequence[int]) -> Cut:
        """Drops every channel that is not in ``keep``.

        Raises:
            ValueError: ``keep`` has fewer than ``least`` channels, an unknown one or one twice.

        >>> slot = Slot("conv.weight", 0, ((0,), (1,), (2,)))
        >>> Group("conv", 3, (slot,), (), (), ()).cut([2, 0]).slots[0].sources
        ((0,), (2,))
        """
        return self._made(sorted(keep), ())

    def merge(self, clusters: Sequence[Sequence[int]]) -> Cut:
        """Keeps the lowest channel of each cluster; consumers get the sum over the cluster.

        Channels in no cluster are dropped; those that stay keep their order.

        Raises:
            ValueError: Fewer than ``least`` clusters, an unknown channel, or one named twice.

        >>> out = Slot("a.weight", 0, ((0,), (1,), (2,)))
        >>> read = Slot("b.weight", 1, ((0, 1), (2, 3), (4, 5)))
        >>> cut = Group("a", 3, (out,), (), (read,), ()).merge([[0, 2], [1]])
        >>> [each.sources for each in cut.slots]
        [((0,), (1,)), ((0, 4), (1, 5), (2,), (3,))]
        """
        ordered = sorted(sorted(cluster) for cluster in clusters if cluster)
        firsts = [cluster[0] for cluster in ordered]
        return self._made(firsts, [cluster for cluster in ordered if len(cluster) > 1])

    def _made(self, firsts: Sequence[int], clusters: Sequence[Sequence[int]]) -> Cut:
        """``firsts`` stay, in order; consumers sum over ``clusters``, which begin with some."""
        channels = [*firsts, *chain.from_iterable(cluster[1:] for cluster in clusters)]
        _check_channels(channels, self.size)
        if len(firsts) < self.least:
            raise ValueError(f"{self.name} must keep {self.least} channels at least")
        known: dict[Any, Sources] = {}
        slots = [_summed(slot, firsts, (), known) for slot in self.producers + self.followers]
        slots += [_summed(slot, firsts, clusters, known) for slot in self.consumers]
        slots += [_summed(slot, firsts, (), known) for slot in self.counters]
        gone = sorted(set(range(self.size)) - set(channels)) if self.constants else []
        constants = tuple(
            Constant(path, tuple(sorted(i for c in gone for i in slot.indices[c])))
            for path, slot in self.constants
            if gone
        )
        return Cut(self.name, self.size, len(firsts), tuple(slots), constants)


@dataclass(frozen=True)
class Structure:
    """Everything the analysis found about a model.

    Attributes:
        groups: In network order, frozen ones included.
        layers: In network order.
        conv_batch_norms: Pairs that can be folded.
        macs: Multiply-accumulates of one sample.
        notes: What could not be looked at, in words.
        mac_terms: One for each operator: a scale, and factors that it is multiplied with. A factor
            is (entries outside all groups, name of a group -> entries for each of its channels).
        samples: In the batch that was counted.
    """

    groups: tuple[Group, ...]
    layers: tuple[LayerRow, ...]
    conv_batch_norms: tuple[ConvBatchNorm, ...]
    macs: int
    notes: tuple[str, ...] = ()
    mac_terms: tuple[tuple[int, tuple[tuple[int, dict[str, int]], ...]], ...] = ()
    samples: int = 1

    def macs_with(self, widths: Mapping[str, int]) -> int:
        """Multiply-accumulates of one sample if groups keep this many channels.

        Args:
            widths: Group name -> channels that stay; groups not named keep all.

        Raises:
            KeyError: There is no such group.
        """
        sizes = {group.name: group.size for group in self.groups}
        for name, width in widths.items():
            if not 0 <= width <= sizes[name]:
                raise ValueError(f"{name} has {sizes[name]} channels, it cannot keep {width}")
        total = 0
        for scale, factors in self.mac_terms:
            for fixed, counts in factors:
                scale *= fixed + sum(
                    each * widths.get(name, sizes[name]) for name, each in counts.items()
                )
            total += scale
        return total // self.samples

    def outputs_with(self, layer: LayerRow, widths: Mapping[str, int]) -> int:
        """Outputs of a layer if groups keep this many channels; groups not named keep all."""
        gone = 0
        for name, count in layer.parts:
            size = self.group(name).size
            gone += count // size * (size - widths.get(name, size))
        return layer.channels - gone

    def group(self, name: str) -> Group:
        """The group of this name.

        Raises:
            KeyError: There is none.
        """
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(name)


def _check_channels(channels: Sequence[int], size: int) -> None:
    if not channels:
        raise ValueError("at least one channel must stay")
    if len(set(channels)) != len(channels):
        raise ValueError("a channel is named twice")
    if min(channels) < 0 or max(channels) >= size:
        raise ValueError(f"channels must be in 0..{size - 1}")


def _summed(
    slot: Slot,
    firsts: Sequence[int],
    clusters: Sequence[Sequence[int]],
    known: dict[Any, Sources],
) -> SlotCut:
    """Entries outside the group stay; entry k of a first channel sums entry k of its cluster.

    What is worked out for one slot serves all that have the same indices.
    """
    key = id(slot.indices), slot.size, bool(clusters)
    if key not in known:
        size = slot.size or max(map(max, slot.indices)) + 1
        known[key] = _sums(slot.indices, size, firsts, clusters)
    return SlotCut(slot.tensor, slot.dim, known[key])


def _sums(
    indices: Sequence[tuple[int, ...]],
    size: int,
    firsts: Sequence[int],
    clusters: Sequence[Sequence[int]],
) -> Sources:
    sources = list(whole(size))
    stays = bytearray(b"\1" * size)
    for index in chain.from_iterable(indices):
        stays[index] = 0
    for index in chain.from_iterable(map(indices.__getitem__, firsts)):
        stays[index] = 1
    for cluster in clusters:
        for column in zip(*(indices[channel] for channel in cluster), strict=True):
            sources[column[0]] = tuple(column)
    return tuple(compress(sources, stays))


def label_counts(
    labels: np.ndarray, group_of: np.ndarray, names: Sequence[str]
) -> tuple[int, dict[str, int]]:
    """Entries outside all groups, and entries per group."""
    groups = group_of[labels]
    if not len(groups):
        return 0, {}
    if are_all(groups == groups[0]):  # nearly always
        number, size = int(groups[0]), len(groups)
        return (size, {}) if number < 0 else (0, {names[number]: size})
    unique, counts = np.unique(groups, return_counts=True)
    found = {names[g]: int(n) for g, n in zip(unique, counts, strict=True) if g >= 0}
    return int((groups < 0).sum()), found


def counted(
    terms: Sequence[MacTerm], group_of: np.ndarray, names: Sequence[str], sizes: Mapping[str, int]
) -> tuple[tuple[int, tuple[tuple[int, dict[str, int]], ...]], ...]:
    """MAC terms in widths of groups: scale x (fixed + entries per channel x width) x ..."""
    result = []
    for term in terms:
        factors = []
        for labels in term.factors:
            fixed, found = label_counts(labels, group_of, names)
            # What is not spread over the channels of a group (one of them, repeated) stays.
            fixed += sum(n % sizes[name] for name, n in found.items())
            factors.append((fixed, {name: n // sizes[name] for name, n in found.items()}))
        result.append((term.scale, tuple(factors)))
    return tuple(result)
