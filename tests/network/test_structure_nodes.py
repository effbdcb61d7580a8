"""Which producers must be zero: let go of one at a time, as if all had been judged anew."""

from __future__ import annotations

import random

import pytest

from slimcli.network.structure.nodes import Kind, Node, NodeTable, ZeroStates

DENSE = [f"conv{number}" for number in range(4)]
DEPTHWISE = [f"depthwise{number}" for number in range(3)]
PRODUCERS = DENSE + DEPTHWISE


def drawn(seed: int) -> tuple[NodeTable, list[tuple[int, ...]]]:
    """A random graph over the producers, and what is read of it."""
    pick = random.Random(seed)
    table = NodeTable()
    values = [table.add(Node(Kind.PRODUCER, name=name)) for name in DENSE]
    for name in DEPTHWISE:
        padded = pick.random() < 0.5
        node = Node(Kind.DEPTHWISE, (pick.choice(values),), (True, padded), name=name)
        values.append(table.add(node))
    for number in range(12):
        parents = tuple(pick.sample(values, 2))
        keeps_zero = pick.random() < 0.7
        node = pick.choice(
            [
                Node(Kind.COMBINE, parents, (False, False)),
                Node(Kind.COMBINE, parents, (True, True)),
                Node(Kind.MAP, parents[:1], keeps_zero=keeps_zero),
                Node(Kind.AFFINE, parents[:1], name=f"norm{number}"),
                Node(Kind.BORDER, parents[:1], keeps_zero=keeps_zero),
            ]
        )
        values.append(table.add(node))
    return table, [tuple(pick.sample(values, pick.choice([1, 2]))) for _ in range(4)]


def worst(table: NodeTable, zeroed: list[str], readings: list[tuple[int, ...]]) -> list[int]:
    states = ZeroStates(table, zeroed, {})
    return [max(map(states.of, nodes)) for nodes in readings]


@pytest.mark.parametrize("last_first", [True, False])
def test_a_producer_is_let_go_when_no_reading_gets_worse(last_first: bool) -> None:
    let_go = kept = 0
    for seed in range(300):
        table, readings = drawn(seed)
        states, zeroed = ZeroStates(table, PRODUCERS, {}), list(PRODUCERS)
        for name in sorted(PRODUCERS, reverse=last_first):
            fewer = [each for each in zeroed if each != name]
            is_free = worst(table, fewer, readings) == worst(table, PRODUCERS, readings)
            assert states.let_go(name, readings) == is_free
            zeroed = fewer if is_free else zeroed
            assert [max(map(states.of, nodes)) for nodes in readings] == worst(
                table, zeroed, readings
            )
            let_go, kept = let_go + is_free, kept + (not is_free)
    assert min(let_go, kept) > 200  # both were seen, and often
