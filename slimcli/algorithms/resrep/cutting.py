"""Cuts of coupled groups while some channels are gone already and compactors stand in between."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import nn

from slimcli.algorithms.resrep.targets import Place, Target
from slimcli.network.cuts import Cut, Slot, SlotCut

Removed = Mapping[tuple[str, int], Sequence[int]]
"""(tensor, dimension) -> entries that are gone, ascending, numbered before anything was cut."""


def compactor_slots(target: Target) -> list[Slot]:
    """The rows of the compactors of a group."""
    return [
        Slot(place.weight, 0, rows) for place, rows in zip(target.places, target.rows, strict=True)
    ]


def removed_entries(kept: Iterable[tuple[Target, Sequence[int]]]) -> Removed:
    """What is gone from each tensor dimension, given the channels each group still has."""
    removed: dict[tuple[str, int], set[int]] = {}
    for target, channels in kept:
        gone = set(range(target.group.size)) - set(channels)
        if not gone:
            continue
        for slot in (*target.group.slots, *compactor_slots(target)):
            entries = removed.setdefault((slot.tensor, slot.dim), set())
            for channel in gone:
                entries.update(slot.indices[channel])
    return {key: sorted(entries) for key, entries in removed.items()}


def present_rows(place: Place, removed: Removed) -> list[int]:
    """Rows of a compactor that are still there.

    >>> present_rows(Place("bn", "conv", "bn", False, False, None, 4),
    ...              {("bn.compactor.weight", 0): [1]})
    [0, 2, 3]
    """
    gone = set(removed.get((place.weight, 0), ()))
    return [row for row in range(place.size) if row not in gone]


def translated(slot: SlotCut, removed: Removed) -> SlotCut:
    """A cut numbered before anything was cut, in the numbers of the model as it is.

    >>> slot = SlotCut("conv.weight", 0, ((0,), (3,)))
    >>> translated(slot, {("conv.weight", 0): [1]}).sources
    ((0,), (2,))
    """
    gone = removed.get((slot.tensor, slot.dim), ())
    lost = set(gone)
    sources = tuple(
        tuple(entry - bisect_left(gone, entry) for entry in each if entry not in lost)
        for each in slot.sources
    )
    return SlotCut(slot.tensor, slot.dim, tuple(each for each in sources if each))


def cut_in_training(
    target: Target, kept: Sequence[int], keep: Sequence[int], removed: Removed
) -> Cut:
    """Removes channels from compactors and from all that comes behind them.

    Layers in front of a full matrix stay whole: its surviving rows still mix all their channels.
    In front of a diagonal one they are cut too.

    Args:
        target: The group.
        kept: Channels the model has now.
        keep: Those that stay; numbers before anything was cut, like all here.
        removed: What is gone from each tensor.
    """
    upstream = _upstream(target)
    cut = target.group.cut(list(keep))
    slots = [slot for slot in cut.slots if (slot.tensor, slot.dim) not in upstream]
    gone = set(range(target.group.size)) - set(keep)
    for slot, place in zip(compactor_slots(target), target.places, strict=True):
        lost = {row for channel in gone for row in slot.indices[channel]}
        left = tuple((row,) for row in range(place.size) if row not in lost)
        slots.append(SlotCut(slot.tensor, 0, left))
    return Cut(
        target.name, len(kept), len(keep), tuple(translated(slot, removed) for slot in slots)
    )


def cut_when_folded(
    target: Target,
    kept: Sequence[int],
    keep: Sequence[int],
    removed: Removed,
    exists: Callable[[str], bool],
) -> Cut:
    """Removes channels from a model whose compactors and norms are folded.

    Args:
        target: The group.
        kept: Channels the model has now.
        keep: Those that stay.
        removed: What is gone from each tensor.
        exists: Whether the folded model has a tensor of this name.
    """
    cut = target.group.cut(list(keep))
    slots = tuple(translated(slot, removed) for slot in cut.slots if exists(slot.tensor))
    return Cut(target.name, len(kept), len(keep), slots, cut.constants)


def _upstream(target: Target) -> set[tuple[str, int]]:
    """Slots in front of a full compactor: its conv's outputs and its norm."""
    dense = [place for place in target.places if not place.is_diagonal]
    convs = {place.conv for place in dense}
    norms = {place.norm for place in dense}
    found = {
        (slot.tensor, slot.dim)
        for slot in target.group.producers
        if slot.tensor.rpartition(".")[0] in convs
    }
    found |= {
        (slot.tensor, slot.dim)
        for slot in target.group.slots
        if slot.tensor.rpartition(".")[0] in norms
    }
    return found


def can_shrink_in_training(model: nn.Module, targets: Sequence[Target]) -> set[str]:
    """Groups whose zero channels may go at once: no constant is involved.

    A layer that will take up constants must keep its input numbering until the end, so groups
    that share its inputs wait too.
    """
    waiting: set[tuple[str, int]] = set()
    for target in targets:
        for path, slot in target.group.constants:
            waiting.add((slot.tensor, slot.dim))
            if getattr(model.get_submodule(path), "groups", 1) != 1:
                waiting.add((slot.tensor, 1 - slot.dim))
    return {
        target.name
        for target in targets
        if not target.group.constants
        and waiting.isdisjoint((slot.tensor, slot.dim) for slot in target.group.slots)
    }
