"""Puts the public ``Structure`` together from what was traced and grouped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from slimcli.network import attributes, fuse
from slimcli.network.cuts import Slot
from slimcli.network.structure.exactness import UNREAD, Flow, flows
from slimcli.network.structure.groups import Grouping, Indices, RawGroup, to_slot
from slimcli.network.structure.left_alone import NOT_RUN, RECURRENT, outputs_of
from slimcli.network.structure.planes import Labels, distinct
from slimcli.network.structure.producing import MIXING
from slimcli.network.structure.record import Record
from slimcli.network.structure.structure import (
    ConvBatchNorm,
    Group,
    LayerRow,
    Site,
    Structure,
    counted,
)

NO_CHANNELS = "its outputs carry no channels"
TIED = "one tensor dimension both makes and reads these channels"
UNFOLLOWED = "its weight is computed in a way that tells nothing about its channels"


def assemble(
    model: nn.Module,
    record: Record,
    grouping: Grouping,
    norm_after: dict[str, str],
    samples: int,
    notes: tuple[str, ...],
) -> Structure:
    """The public result."""
    modules = dict(model.named_modules())
    site_norms = {key: norm for key, norm in norm_after.items() if is_site_norm(modules[norm])}
    found = flows(record, grouping, site_norms)
    groups = []
    names: dict[str, int] = {}
    duplicates = _duplicate_reasons(record, grouping)
    dims = Dims(record)
    indices: dict[Any, Indices] = {}
    for number, (raw, flow) in enumerate(zip(grouping.groups, found, strict=True)):
        group = _group(record, raw, flow, site_norms, dims, indices)
        names[group.name] = names.get(group.name, 0) + 1
        if names[group.name] > 1:
            group = replace(group, name=f"{group.name}#{names[group.name]}")
        groups.append(_with_duplicates(group, duplicates.get(number, "")))
    groups = _with_least(record, grouping, groups)
    makers: dict[str, list[Group]] = {}
    for group in groups:
        for slot in group.producers:
            makers.setdefault(slot.tensor, []).append(group)
    groups = [
        replace(group, is_linear=_is_linear(group, flow, makers, record.runs))
        for group, flow in zip(groups, found, strict=True)
    ]
    group_names = [group.name for group in groups]
    sizes = {group.name: group.size for group in groups}
    terms = counted(record.macs, grouping.group_of, group_names, sizes)
    result = Structure(
        tuple(groups),
        _layers(model, modules, record, grouping, groups),
        _pairs(modules, site_norms),
        0,
        notes,
        terms,
        samples,
    )
    return replace(result, macs=result.macs_with({}))


def is_site_norm(norm: nn.Module) -> bool:
    """Can something be put right behind this norm? Exact batch norms and registered ones."""
    registered = {*fuse.PLAIN_NORMS, *fuse.ACTIVATED_NORMS}
    return type(norm) in attributes.BatchNorm or type(norm).__name__ in registered


def _group(
    record: Record,
    raw: RawGroup,
    flow: Flow,
    norm_after: dict[str, str],
    dims: Dims,
    indices: dict[Any, Indices],
) -> Group:
    sites = tuple(
        Site("" if key.startswith("tensor:") else key, norm_after.get(key)) for key in flow.zeroed
    )
    reading = set().union(*(dims.of(r.consumer.weight_labels) for r in flow.readings))
    made = [flow.producers[key] for key in flow.zeroed]
    writing = set().union(*(dims.of(each.labels) for each in made))
    writing |= set().union(*(dims.of(labels) for each in made for labels in each.biases))
    producers, followers, consumers, counters = [], [], [], []
    by_number: dict[int, Slot] = {}
    for number, entries in raw.slots:
        slot = to_slot(record, number, entries, indices)
        by_number[number] = slot
        if slot.tensor in record.sources.counters:
            counters.append(slot)
        elif number in writing:
            producers.append(slot)
        elif number in reading:
            consumers.append(slot)
        else:
            followers.append(slot)
    both = any(number in writing and number in reading for number, _ in raw.slots)
    constants = tuple(
        (consumer.path, by_number[number])
        for consumer in flow.constant_readers
        for number in sorted(dims.of(consumer.weight_labels) & by_number.keys())
    )
    reason = raw.reason or _hopeless(raw, flow)
    zero_reason = reason or flow.reason
    return Group(
        name=_name(flow, norm_after),
        size=raw.size,
        producers=tuple(producers),
        followers=tuple(followers),
        consumers=tuple(consumers),
        sites=sites,
        frozen_reason=reason,
        exact_zero=not zero_reason,
        zero_reason=zero_reason,
        constants=() if zero_reason else constants,
        is_placeable=all(site.conv for site in sites),
        counters=tuple(counters),
        duplicate_reason=TIED if both else _not_additive(record, by_number.keys() & reading, dims),
    )


def _not_additive(record: Record, reading: Collection[int], dims: Dims) -> str:
    """Why entries of these weights can't be added up; empty if they can."""
    for labels, reason in record.not_additive:
        if not dims.of(labels).isdisjoint(reading):
            return reason
    return ""


def _hopeless(raw: RawGroup, flow: Flow) -> str:
    """Why neither zero nor equal channels can go."""
    if not flow.readings:
        return UNREAD
    if raw.size > 1:
        return ""
    most = max((entries.shape[1] for _, entries in raw.slots), default=1)
    return "it has one channel" if most == 1 else "its channels can only go all together"


def _name(flow: Flow, norm_after: dict[str, str]) -> str:
    key = flow.zeroed[0]
    return norm_after.get(key) or key.removeprefix("tensor:")


class Dims:
    """Which source dimensions arrays of labels belong to; each array is looked at once."""

    def __init__(self, record: Record) -> None:
        self._starts = np.array([each.first for each in record.sources.dims])
        self._known: dict[int, frozenset[int]] = {}

    def of(self, labels: Labels) -> frozenset[int]:
        """Numbers of the dimensions. The array must live as long as this object."""
        known = self._known.get(id(labels))
        if known is None:
            used = labels[labels != 0]
            numbers = np.searchsorted(self._starts, used, side="right") - 1
            known = self._known[id(labels)] = frozenset(distinct(numbers).tolist())
        return known


def _duplicate_reasons(record: Record, grouping: Grouping) -> dict[int, str]:
    found: dict[int, str] = {}
    for labels, reason in record.no_duplicates:
        for number in distinct(grouping.group_of[labels]).tolist():
            found.setdefault(number, reason)
    return found


def _with_least(record: Record, grouping: Grouping, groups: list[Group]) -> list[Group]:
    """Groups that say how many channels must stay; frozen ones where that is all of them.

    Where several groups share a width, each keeps its share of what must stay.
    """
    groups = list(groups)
    for each in record.least:
        numbers, counts = np.unique(grouping.group_of[each.labels], return_counts=True)
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            if number < 0:
                continue
            group = groups[number]
            share = -(-each.width * count // len(each.labels))
            least = max(group.least, -(-share * group.size // count))
            if least >= group.size and not group.frozen_reason:
                reason = f"its width must not fall below {each.width} at {each.line}"
                group = replace(group, frozen_reason=reason, zero_reason=reason, exact_zero=False)
                group = replace(group, exact_duplicate=False, duplicate_reason=reason)
            groups[number] = replace(group, least=min(least, group.size))
    return groups


def _with_duplicates(group: Group, reason: str) -> Group:
    reason = group.frozen_reason or reason or group.duplicate_reason
    frozen = group.frozen_reason or (group.zero_reason if reason else "")
    return replace(group, exact_duplicate=not reason, duplicate_reason=reason, frozen_reason=frozen)


def _is_linear(group: Group, flow: Flow, makers: dict[str, list[Group]], runs: int) -> bool:
    """One dense value producer and one dense value reader; the way to a gate doesn't count."""
    if group.frozen_reason or len(group.sites) != 1 or not group.is_placeable:
        return False
    if not all(flow.producers[key].is_plain for key in flow.zeroed):
        return False
    gates = {slot.tensor for slot in group.followers}
    readers = {r.consumer.path: r.consumer for r in flow.readings}
    if any(not path or path.startswith("tensor:") for path in readers):
        return False
    values = [c for path, c in readers.items() if not _feeds_only(path, gates, makers, set())]
    calls = [r for r in flow.readings if r.consumer.path in {c.path for c in values}]
    return len(values) == 1 and values[0].is_plain and len(calls) <= runs


def _feeds_only(path: str, gates: set[str], makers: dict[str, list[Group]], seen: set[str]) -> bool:
    """Does all that this layer puts out end in the weights of gates?"""
    if f"{path}.weight" in gates:
        return True
    if path in seen:
        return False
    mine = makers.get(f"{path}.weight", [])
    if not mine:
        return False
    readers = {slot.tensor for g in mine for slot in g.consumers}
    return bool(readers) and all(
        tensor in gates or _feeds_only(tensor.rpartition(".")[0], gates, makers, seen | {path})
        for tensor in readers
    )


def _layers(
    model: nn.Module,
    modules: dict[str, nn.Module],
    record: Record,
    grouping: Grouping,
    groups: list[Group],
) -> tuple[LayerRow, ...]:
    rows: dict[str, LayerRow] = {}
    for key, labels in record.layers.items():
        path = key.removeprefix("tensor:")
        numbers, counts = np.unique(grouping.group_of[labels], return_counts=True)
        outputs = {groups[n].name: int(c) for n, c in zip(numbers, counts, strict=True) if n >= 0}
        mine = [groups[n] for n in numbers.tolist() if n >= 0]
        mine = sorted(mine, key=lambda group: bool(group.frozen_reason))
        unknown = NO_CHANNELS if labels.any() else UNFOLLOWED
        name, reason = (mine[0].name, mine[0].frozen_reason) if mine else ("", unknown)
        path, channels = _shown(path, len(labels), modules)
        kind = type(modules[path]).__name__ if path in modules else "tensor"
        parts = tuple(outputs.items())
        rows.setdefault(path, LayerRow(path, kind, channels, name, reason, parts))
    for path in record.unseen:
        kind = type(modules[path]).__name__ if path in modules else "tensor"
        if path in modules and not isinstance(modules[path], MIXING):
            continue
        rows[path] = LayerRow(path, kind, outputs_of(model, path), "", NOT_RUN)
    return tuple(rows.values())


def _shown(path: str, channels: int, modules: dict[str, nn.Module]) -> tuple[str, int]:
    """The weights inside a recurrent layer are shown as that layer."""
    owner = modules.get(path.rpartition(".")[0])
    if path in modules or not isinstance(owner, RECURRENT):
        return path, channels
    return path.rpartition(".")[0], int(owner.hidden_size)


def _pairs(modules: dict[str, nn.Module], norm_after: dict[str, str]) -> tuple[ConvBatchNorm, ...]:
    found = []
    uses = Counter(
        id(parameter)
        for module in modules.values()
        for parameter in module.parameters(recurse=False)
    )
    for conv, norm in norm_after.items():
        if conv.startswith("tensor:"):
            continue
        layers = modules[conv], modules[norm]
        if any(uses[id(each)] > 1 for each in layers[0].parameters(recurse=False)):
            continue  # a tied weight: the norm behind one of its convs is not that of the other
        if any(map(fuse.has_hooks, layers)):
            continue  # they would read other numbers, or be gone with the norm
        if not fuse.why_not_foldable(*layers):
            found.append(ConvBatchNorm(conv, norm))
    return tuple(found)
