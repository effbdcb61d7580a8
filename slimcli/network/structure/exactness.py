"""Where a channel must be made zero, and whether the zero survives to its readers.

Only the sites are zero. The shift of a norm further on (behind the sum of a residual stream) is not
zeroed with them, because no algorithm does so: the constant that it makes of a zero is taken up by
a bias or ends the matter. Equal channels need none of this, they stay equal to their readers.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from slimcli.network.structure.groups import Grouping
from slimcli.network.structure.nodes import State, ZeroStates
from slimcli.network.structure.planes import LABEL_MASK, SHIFT, Labels, distinct, entries
from slimcli.network.structure.record import Consumer, Producer, Record

NO_BIAS = "that no bias can take up"
UNREAD = "nothing reads it"


@dataclass
class Reading:
    """One consumer of a group, with the nodes it reads there."""

    consumer: Consumer
    nodes: tuple[int, ...]


@dataclass
class Flow:
    """How values flow through one group.

    Attributes:
        producers: Key -> producer, in network order.
        depthwise: The same for depthwise convs on the way: spare places to make a zero.
        readings: Consumers.
        zeroed: Keys that must be zero.
        reason: Why no zero survives; empty if one does.
        constant_readers: Paths where a constant arrives.
    """

    producers: dict[str, Producer] = field(default_factory=dict)
    depthwise: dict[str, Producer] = field(default_factory=dict)
    readings: list[Reading] = field(default_factory=list)
    zeroed: list[str] = field(default_factory=list)
    reason: str = ""
    constant_readers: list[Consumer] = field(default_factory=list)


def flows(record: Record, grouping: Grouping, norm_after: dict[str, str]) -> list[Flow]:
    """One flow for each group."""
    found = [Flow() for _ in grouping.groups]
    for producer in record.producers:
        for number in _numbers(grouping, producer.labels):
            known = found[number].producers.setdefault(producer.key, producer)
            if not producer.is_plain and known.is_plain:
                found[number].producers[producer.key] = producer
    for producer in record.depthwise:
        for number in _numbers(grouping, producer.labels):
            found[number].depthwise.setdefault(producer.key, producer)
    _add_readings(record, grouping, found)
    for raw, flow in zip(grouping.groups, found, strict=True):
        _choose_sites(record, flow, norm_after, is_frozen=bool(raw.reason))
    _look_at_borders(record, grouping, norm_after, found)
    _refuse_fickle(record, grouping, found)
    return found


def _refuse_fickle(record: Record, grouping: Grouping, found: list[Flow]) -> None:
    """What a trial on another batch found."""
    for labels, why in record.fickle:
        for flow in (found[number] for number in _numbers(grouping, labels)):
            if flow.constant_readers:
                _refuse_constants(flow, why)
            elif not flow.reason:
                flow.reason = f"a removed channel may not stay zero: {why}"


def _look_at_borders(
    record: Record, grouping: Grouping, norm_after: dict[str, str], found: list[Flow]
) -> None:
    """Where images of some sizes may be padded, no constant may be in them."""
    for plane, line in record.remainders:
        for number, nodes in _by_group(grouping, entries(plane)).items():
            flow = found[number]
            if not flow.constant_readers or flow.reason:
                continue
            states = ZeroStates(record.table, flow.zeroed, norm_after)
            if any(states.of(node) == State.CONSTANT for node in nodes):
                # a border of zeros, once there is one, is not the constant that a bias took up
                _refuse_constants(flow, f"images of other sizes may be padded at {line}")


def _refuse_constants(flow: Flow, why: str) -> None:
    path = flow.constant_readers[0].path
    flow.reason = f"a removed channel would arrive at {path} as a constant, and {why}"
    flow.constant_readers = []


def _add_readings(record: Record, grouping: Grouping, found: list[Flow]) -> None:
    for consumer in record.consumers:
        for number, nodes in _by_group(grouping, consumer.arrivals).items():
            found[number].readings.append(Reading(consumer, tuple(sorted(nodes))))


def _by_group(grouping: Grouping, packed: Labels) -> dict[int, set[int]]:
    """Number of a group -> the nodes that its channels have among these entries."""
    by_group: dict[int, set[int]] = defaultdict(set)
    groups = grouping.group_of[packed & LABEL_MASK]
    for pair in distinct((packed & ~LABEL_MASK) | (groups + 1)).tolist():
        number = (pair & LABEL_MASK) - 1
        if number >= 0:
            by_group[number].add(pair >> SHIFT)
    return by_group


def _numbers(grouping: Grouping, labels: np.ndarray) -> list[int]:
    numbers = distinct(grouping.group_of[labels]).tolist()
    return [number for number in numbers if number >= 0]


def _choose_sites(record: Record, flow: Flow, norm_after: dict[str, str], is_frozen: bool) -> None:
    """Dense producers if they do; depthwise convs behind them if that saves a group or a gate."""
    flow.zeroed = _needed(record, flow, list(flow.producers), norm_after)
    if is_frozen:
        return
    _judge(record, flow, norm_after)
    if not flow.depthwise or (not flow.reason and len(flow.zeroed) == 1):
        return
    other = Flow({**flow.producers, **flow.depthwise}, {}, flow.readings)
    ordered = sorted(other.producers, key=lambda key: other.producers[key].order)
    other.zeroed = _needed(record, other, ordered, norm_after)
    _judge(record, other, norm_after)
    if not other.reason and (flow.reason or len(other.zeroed) < len(flow.zeroed)):
        flow.producers = {key: other.producers[key] for key in ordered}
        flow.zeroed, flow.reason = other.zeroed, ""
        flow.constant_readers = other.constant_readers


def _needed(record: Record, flow: Flow, keys: list[str], norm_after: dict[str, str]) -> list[str]:
    """Drops producers, last first, whose zero changes nothing for any reader (gates)."""
    if len(keys) < 2:
        return keys
    states = ZeroStates(record.table, keys, norm_after)
    readings = [reading.nodes for reading in flow.readings]
    for key in reversed(keys):
        if len(keys) > 1 and states.let_go(key, readings):
            keys = [each for each in keys if each != key]
    return keys


def _states(record: Record, flow: Flow, keys: list[str], norm_after: dict[str, str]) -> list[State]:
    states = ZeroStates(record.table, keys, norm_after)
    return [max(states.of(node) for node in reading.nodes) for reading in flow.readings]


def _judge(record: Record, flow: Flow, norm_after: dict[str, str]) -> None:
    states = _states(record, flow, flow.zeroed, norm_after)
    flow.reason, flow.constant_readers = "", []
    if not states:
        flow.reason = UNREAD
        return
    for reading, state in zip(flow.readings, states, strict=True):
        consumer = reading.consumer
        name = consumer.path or "a sum over channels"
        if state == State.VARYING:
            flow.reason = f"a removed channel would not be zero where {name} reads it"
            return
        if state == State.CONSTANT:
            if not consumer.takes_constants or not consumer.is_plain:
                flow.reason = f"a removed channel would arrive at {name} as a constant {NO_BIAS}"
                return
            if _is_reused(flow, consumer.path, record.runs):
                flow.reason = f"a removed channel would arrive at {name} as different constants"
                return
            if all(consumer.path != other.path for other in flow.constant_readers):
                flow.constant_readers.append(consumer)


def _is_reused(flow: Flow, path: str, runs: int) -> bool:
    """Does one layer read values of different origin? One call in each run is one use."""
    origins = [reading.nodes for reading in flow.readings if reading.consumer.path == path]
    return len(origins) > runs and len(set(origins)) > 1
