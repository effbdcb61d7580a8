"""What a person wants to know of each coupled group: who is in it, what it costs, what may be done.

Everything is read from a :class:`Structure`; no model is run and no algorithm is known here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from slimcli.network.cuts import Slot
from slimcli.network.structure import STRATEGIES, Group, Structure, select_groups


@dataclass(frozen=True)
class GroupFacts:
    """One coupled group.

    Attributes:
        name: Name of the group.
        channels: Channels today.
        producers: Modules whose outputs the channels are.
        followers: Modules on the way that go with them: norms, depthwise convs, gates.
        consumers: Modules that read them.
        macs_per_channel: Multiply-accumulates of one sample that the first channel less saves.
        is_prunable: Whether channels can be removed.
        frozen_reason: Why not, with the user's source line.
        strategies: Strategies that select the group.
        is_zero_removal_exact: Removing channels that are zero changes no output.
        zero_reason: Why not.
        is_duplicate_merging_exact: Merging channels that are equal changes no output.
        duplicate_reason: Why not.
        constants: Consumers whose bias takes up the constant that a zero channel becomes.
        channels_least: So many must stay, because the user's code does something else with fewer.
    """

    name: str
    channels: int
    producers: tuple[str, ...]
    followers: tuple[str, ...]
    consumers: tuple[str, ...]
    macs_per_channel: int
    is_prunable: bool
    frozen_reason: str
    strategies: tuple[str, ...]
    is_zero_removal_exact: bool
    zero_reason: str
    is_duplicate_merging_exact: bool
    duplicate_reason: str
    constants: tuple[str, ...]
    channels_least: int


def facts_of(structure: Structure) -> list[GroupFacts]:
    """All groups, frozen ones included, in network order."""
    chosen = {
        strategy: {group.name for group in select_groups(structure, strategy)}
        for strategy in STRATEGIES
    }
    return [
        _facts(structure, group, tuple(each for each in STRATEGIES if group.name in chosen[each]))
        for group in structure.groups
    ]


def _facts(structure: Structure, group: Group, strategies: tuple[str, ...]) -> GroupFacts:
    fewer = structure.macs_with({group.name: group.size - 1})
    is_prunable = group.is_prunable
    return GroupFacts(
        name=group.name,
        channels=group.size,
        producers=_modules(group.producers),
        followers=_modules(group.followers),
        consumers=_modules(group.consumers),
        macs_per_channel=structure.macs - fewer,
        is_prunable=is_prunable,
        frozen_reason=group.frozen_reason,
        strategies=strategies,
        is_zero_removal_exact=is_prunable and group.exact_zero,
        zero_reason="" if group.exact_zero else group.zero_reason,
        is_duplicate_merging_exact=is_prunable and group.exact_duplicate,
        duplicate_reason="" if group.exact_duplicate else group.duplicate_reason,
        constants=tuple(dict.fromkeys(path for path, _ in group.constants)),
        channels_least=group.least,
    )


def _modules(slots: Iterable[Slot]) -> tuple[str, ...]:
    """Paths of the modules that hold the tensors; a bare parameter of the model stands for itself.

    >>> _modules([Slot("conv.weight", 0, ()), Slot("conv.bias", 0, ()), Slot("scale", 0, ())])
    ('conv', 'scale')
    """
    names = (slot.tensor.rpartition(".")[0] or slot.tensor for slot in slots)
    return tuple(dict.fromkeys(names))
