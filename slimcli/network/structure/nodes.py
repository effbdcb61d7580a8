"""How a channel's value came about, so that one can tell what a zero at its source becomes.

Nodes form a directed graph over whole calls, not over single channels. ``ZeroStates`` answers, for
a set of producers held at zero: is the value here zero, a constant (the same number at every
position), or neither?
"""

from __future__ import annotations

from collections.abc import Collection
from enum import IntEnum
from typing import NamedTuple


class State(IntEnum):
    """What is known of a removed channel's value; a larger one is worse."""

    ZERO = 0
    CONSTANT = 1
    VARYING = 2


class Kind(IntEnum):
    """What made a value."""

    FIXED = 0  # no channel of ours
    SOURCE = 1  # a parameter or buffer itself
    PRODUCER = 2  # convolution, linear layer, embedding
    AFFINE = 3  # batch normalisation and its like: zero goes to the shift
    MAP = 4  # f(x) with f(0) = 0 or not
    BORDER = 5  # something was added at the border: zero, or another value
    DEPTHWISE = 6  # a convolution of each channel with itself
    COMBINE = 7  # several tensors, position by position
    CARRY = 8  # a sum over other axes with varying weights
    JOIN = 9  # different values at different positions of one channel
    JUMP = 10  # f(x) that jumps: of a constant that was computed, rounding decides


class Node(NamedTuple):
    """One value, given by what made it and from what.

    Attributes:
        kind: What made it.
        parents: Nodes it was made from.
        flags: COMBINE: does f(0 here, anything elsewhere) = 0, per parent. DEPTHWISE: (biased,
            padded). SOURCE: (one number per channel,).
        keeps_zero: MAP, COMBINE, JUMP: f(0, ...) = 0. BORDER: the border is zero. PRODUCER: no
            other weight was added to its own.
        name: PRODUCER, DEPTHWISE: key of the producer; AFFINE: path of the norm; SOURCE: tensor.
        how: What tells two values apart that are made alike from the same: the operator with its
            numbers, or the call. Constants at different places are one only if they are equal.
    """

    kind: Kind
    parents: tuple[int, ...] = ()
    flags: tuple[bool, ...] = ()
    keeps_zero: bool = True
    name: str = ""
    how: str = ""


MADE_TO_MEASURE = Node(Kind.JOIN, name="made to measure")
"""Of a tensor of equal entries that the code makes as wide as another one is."""

ZEROS_TO_MEASURE = Node(Kind.BORDER, name="zeros made to measure")
"""The same where all entries are zero."""


class NodeTable:
    """All nodes of a trace; equal nodes are one."""

    def __init__(self) -> None:
        self.nodes: list[Node] = [Node(Kind.FIXED)]
        self._index: dict[Node, int] = {self.nodes[0]: 0}
        self._weight_like: dict[int, bool] = {}
        self._made = [False]
        self._summed = [False]
        self._roots = [0]

    def add(self, node: Node) -> int:
        """The number of a node equal to this one."""
        number = self._index.get(node)
        if number is None and node.kind == Kind.MAP and node.keeps_zero:
            parent = node.parents[0]
            number = parent if self.nodes[parent] == ZEROS_TO_MEASURE else None
        if number is None:
            number = self._index[node] = len(self.nodes)
            self.nodes.append(node)
            made = [self._made[parent] for parent in node.parents if parent]
            self._roots.append(self._roots[node.parents[0]] if node.kind == Kind.MAP else number)
            self._summed.append(self._sums(node))
            is_made = node in (MADE_TO_MEASURE, ZEROS_TO_MEASURE)
            self._made.append(is_made or (bool(made) and all(made)))
        return number

    def one_time(self) -> str:
        """For ``Node.how``: of a value that no other one is like."""
        return f"made as number {len(self.nodes)}"

    def one_of(self, numbers: Collection[int]) -> int:
        """The node of what is one of these at each position."""
        different = sorted(set(numbers))
        return different[0] if len(different) == 1 else self.add(Node(Kind.JOIN, (*different,)))

    def names_below(self, number: int) -> set[str]:
        """Of the tensors and layers that a value is computed from."""
        found, todo = {number}, [number]
        while todo:
            new = set(self.nodes[todo.pop()].parents) - found
            found |= new
            todo += new
        return {self.nodes[each].name for each in found} - {""}

    def is_made(self, number: int) -> bool:
        """Is the value computed from nothing but tensors made to measure?"""
        return self._made[number]

    def is_summed(self, number: int) -> bool:
        """Does a sum over positions go into it, whose rounding hangs on how many they are?

        A mean of equal numbers is that number, so that it has its node: where a value meets itself,
        it may be its mean.
        """
        return self._summed[number]

    def _sums(self, node: Node) -> bool:
        if node.kind == Kind.PRODUCER:
            return False
        meets_itself = False
        if node.kind == Kind.COMBINE:
            kinds = (self.nodes[each].kind for each in node.parents)
            pairs = zip(node.parents, kinds, strict=True)
            roots = [self._roots[each] for each, kind in pairs if kind > Kind.SOURCE]
            meets_itself = len(set(roots)) < len(roots)
        is_sum = node.kind == Kind.CARRY or meets_itself
        return is_sum or any(self._summed[each] for each in node.parents)

    def is_weight(self, number: int) -> bool:
        """Is the value computed from parameters and buffers alone?"""
        known = self._weight_like.get(number)
        if known is None:
            node = self.nodes[number]
            known = node.kind == Kind.SOURCE or (
                node.kind not in (Kind.FIXED, Kind.PRODUCER)
                and all(self.is_weight(parent) for parent in node.parents if parent)
                and any(node.parents)
            )
            self._weight_like[number] = known
        return known


class ZeroStates:
    """States of nodes while the named producers are held at zero.

    Args:
        table: The nodes.
        zeroed: Keys of the producers, or names of the tensors, that are zero.
        norm_after: For a producer's key, the norm behind which its zero is made.
    """

    def __init__(
        self, table: NodeTable, zeroed: Collection[str], norm_after: dict[str, str]
    ) -> None:
        self._nodes = table.nodes
        self._zeroed = set(zeroed)
        self._norm_after = norm_after
        self._known: dict[int, State] = {}

    def of(self, number: int) -> State:
        """The state of one node (parents first, without recursion: graphs are deep)."""
        todo = [number]
        while todo:
            current = todo[-1]
            missing = [p for p in self._nodes[current].parents if p not in self._known]
            if current not in self._known and missing:
                todo += missing
                continue
            self._known.setdefault(current, self._evaluate(self._nodes[current]))
            todo.pop()
        return self._known[number]

    def let_go(self, name: str, readings: Collection[Collection[int]]) -> bool:
        """From now on this producer is not zero, if no reading gets worse by that.

        Args:
            name: One of those that are zero.
            readings: Nodes of what is read together; the worst counts.

        Returns:
            Whether it was let go.
        """
        before = [max(map(self.of, nodes)) for nodes in readings]
        known = self._known
        touched: set[int] = set()
        for number in known:  # parents first
            node = self._nodes[number]
            if node.name == name or not touched.isdisjoint(node.parents):
                touched.add(number)
        self._zeroed.discard(name)
        self._known = {number: known[number] for number in known if number not in touched}
        for nodes, worst in zip(readings, before, strict=True):
            if not touched.isdisjoint(nodes) and max(map(self.of, nodes)) != worst:
                self._zeroed.add(name)
                self._known = known
                return False
        return True

    def _evaluate(self, node: Node) -> State:
        states = [self._known[parent] for parent in node.parents]
        if node == ZEROS_TO_MEASURE:
            return State.ZERO
        if node.kind == Kind.SOURCE:
            if node.name and node.name in self._zeroed:
                return State.ZERO
            return State.CONSTANT if node.flags[0] else State.VARYING
        if node.name in self._zeroed and node.kind in (Kind.PRODUCER, Kind.DEPTHWISE):
            return State.ZERO if node.keeps_zero else State.VARYING
        if node.kind == Kind.COMBINE:
            return self._combine(node, states)
        return self._unary(node, states) if states else State.VARYING

    def _combine(self, node: Node, states: list[State]) -> State:
        pairs = zip(states, node.flags, strict=True)
        if any(state == State.ZERO and absorbs for state, absorbs in pairs):
            return State.ZERO
        if max(states) == State.ZERO:
            return State.ZERO if node.keeps_zero else State.CONSTANT
        return max(states)

    def _unary(self, node: Node, states: list[State]) -> State:
        state = max(states)
        zero = state == State.ZERO
        if node.kind == Kind.AFFINE:
            parent = self._nodes[node.parents[0]]
            at_site = self._norm_after.get(parent.name, "") == node.name != ""
            is_zeroed = parent.name in self._zeroed and parent.kind != Kind.AFFINE
            return State.ZERO if at_site and is_zeroed else max(state, State.CONSTANT)
        if node.kind == Kind.MAP:
            return state if node.keeps_zero else max(state, State.CONSTANT)
        if node.kind == Kind.JUMP:
            zeros = State.ZERO if node.keeps_zero else State.CONSTANT
            return zeros if zero else State.VARYING
        if node.kind == Kind.DEPTHWISE:
            biased, padded = node.flags
            if zero:
                return State.CONSTANT if biased else State.ZERO
            return State.VARYING if padded else state
        if node.kind == Kind.BORDER and zero and not node.keeps_zero:
            return State.VARYING
        return State.ZERO if zero else State.VARYING  # BORDER, CARRY, JOIN
