"""What a trace finds out: which labels belong together, which are frozen and why, who reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from slimcli.network.structure import user_line
from slimcli.network.structure.nodes import NodeTable
from slimcli.network.structure.planes import (
    LABEL_MASK,
    Labels,
    are_all,
    broadcast,
    distinct,
    entries,
    labels_of,
)
from slimcli.network.structure.sources import Sources


@dataclass(frozen=True)
class Split:
    """A place where an axis with channels is divided into blocks of equal size.

    Which blocks shrink is decided by the user's Python: either every block loses the same offsets,
    or whole blocks go. Each hypothesis is a list of label pairs that must then stay together.
    """

    line: str
    size: int
    offset_pairs: tuple[Labels, Labels]
    block_pairs: tuple[Labels, Labels]

    @property
    def is_square(self) -> bool:
        """Are there as many blocks as each is long?"""
        return len(self.offset_pairs[0]) == self.size**2 > 1


@dataclass(frozen=True)
class Consumer:
    """One mixing op's reading side.

    Attributes:
        order: Position in the trace.
        path: Module path, or empty if no module of a known type was called for it.
        arrivals: Unique packed (label, node) entries that are read.
        weight_labels: Labels of the weight's reading dimension; empty if there is no weight.
        pairs: (arriving label, weight label) in index order, shape (2, n).
        takes_constants: Can a constant input be taken up by a bias?
        is_plain: One group, so that it counts as a plain consumer.
    """

    order: int
    path: str
    arrivals: Labels
    weight_labels: Labels
    pairs: Labels
    takes_constants: bool
    is_plain: bool


@dataclass(frozen=True)
class Producer:
    """One mixing op's writing side.

    Attributes:
        order: Position in the trace.
        key: Module path, or ``tensor:NAME`` if the op was not called through a module.
        labels: Labels of the outputs.
        is_plain: One group.
        biases: Labels of what is added to the outputs by the same operator.
    """

    order: int
    key: str
    labels: Labels
    is_plain: bool
    biases: tuple[Labels, ...] = ()


@dataclass(frozen=True)
class MacTerm:
    """Multiply-accumulates of one op: ``scale`` x the kept entries of each factor."""

    scale: int
    factors: tuple[Labels, ...]


@dataclass(frozen=True)
class Least:
    """A width that must not fall below a number: the code would do something else.

    Attributes:
        labels: Of all that is counted.
        width: The fewest entries.
        line: Where the code asks.
    """

    labels: Labels
    width: int
    line: str


@dataclass
class Hands:
    """What the forward of a module has in its hands.

    That is what it is called with, and what goes into and comes out of the modules it calls.

    Attributes:
        planes: Of every tensor with channels.
        plain_sizes: Sizes that the channels of the other tensors may have.
    """

    planes: list[tuple[Tensor, ...]] = field(default_factory=list)
    plain_sizes: set[int] = field(default_factory=set)


@dataclass
class Record:
    """Everything the traces (eval mode, and train mode) found, in the terms of one set of labels.

    Attributes:
        runs: How many there were.
        static_calls: Mixing modules entered before the first operator whose result depends on the
            order of values (sorting, suppression of boxes); None if there is none.
        hands: Path of every module that ran -> what its forward had in its hands.
        reads: (path of the module that ran, the user's line) where Python got a tensor's value.
        remainders: (plane of a tensor, the user's line) where the size of an image is divided:
            images that leave a remainder may be padded.
        least: Widths below which the code does something else.
        asked: Labels of widths that the code asks for, and may make numbers of.
        divisors: Labels of widths whose remainder the code asks for, and what it divides by.
        escaped: Labels of widths that the code turned into plain numbers, keys or text.
        counts_sizes: Numbers are made of sizes, or of how many entries a tensor has.
        writes: It writes into parameters, their gradients, or arrays of them.
        written: Names of the parameters and buffers that operators write.
        asks_sizes: The code asks for sizes of tensors, whatever it does with them.
        fickle: Labels of groups whose constants are others for another batch, and how that showed.
        unseen: Paths of layers that did not run.
        turns: Channels are flipped, or told from pixels that lay beside them.
        leaves: The numbers of a tensor are read by other means than operators.
        not_additive: Labels of weights that are computed by a function that is no sum of its parts,
            and its name: where such a weight reads equal channels, they can't be merged.
    """

    sources: Sources
    table: NodeTable = field(default_factory=NodeTable)
    edges: list[tuple[Labels, Labels]] = field(default_factory=list)
    frozen: list[tuple[Labels, int]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    splits: list[Split] = field(default_factory=list)
    consumers: list[Consumer] = field(default_factory=list)
    producers: list[Producer] = field(default_factory=list)
    depthwise: list[Producer] = field(default_factory=list)
    lines: list[tuple[str, Labels]] = field(default_factory=list)
    macs: list[MacTerm] = field(default_factory=list)
    no_duplicates: list[tuple[Labels, str]] = field(default_factory=list)
    not_additive: list[tuple[Labels, str]] = field(default_factory=list)
    layers: dict[str, Labels] = field(default_factory=dict)
    rule_errors: list[str] = field(default_factory=list)
    static_calls: int | None = None
    hands: dict[str, Hands] = field(default_factory=dict)
    reads: list[tuple[str, str]] = field(default_factory=list)
    remainders: list[tuple[Tensor, str]] = field(default_factory=list)
    least: list[Least] = field(default_factory=list)
    asked: dict[tuple[int, ...], Labels] = field(default_factory=dict)
    divisors: list[tuple[Labels, int]] = field(default_factory=list)
    escaped: list[Labels] = field(default_factory=list)
    counts_sizes: bool = False
    asks_sizes: bool = False
    writes: bool = False
    written: set[str] = field(default_factory=set)
    fickle: list[tuple[Labels, str]] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    turns: bool = False
    leaves: bool = False
    order: int = 0
    runs: int = 0

    @property
    def may_reorder(self) -> bool:
        """Does the code divide or turn an axis with channels, so that a cut may change their order?

        Where it never does, they arrive in the order in which they are made, whatever their number.
        """
        return bool(self.splits) or self.turns

    def join(self, left: Tensor, right: Tensor) -> None:
        """These entries (packed or labels, broadcastable) are the same channels."""
        self.join_labels(*_rows(left, right))

    def join_labels(self, a: Labels, b: Labels) -> None:
        """The same for flat label arrays, which nobody may change afterwards."""
        different = a != b
        if np.count_nonzero(different):
            different &= (a != 0) & (b != 0)
            is_all = are_all(different)
            self.edges.append((a, b) if is_all else (a[different], b[different]))

    def tie(self, left: Tensor, right: Tensor, reason: str, *, is_room: bool = False) -> None:
        """Joins; where only one side has a label, it is frozen, and the user's line is told.

        Args:
            left: A plane.
            right: Another one, broadcastable with it.
            reason: Why.
            is_room: The left one is only room for the right one, which is free where there are no
                labels.
        """
        self.tie_labels(*_rows(left, right), reason, is_room=is_room)

    def tie_labels(self, a: Labels, b: Labels, reason: str, *, is_room: bool = False) -> None:
        """The same for flat label arrays, which nobody may change afterwards."""
        self.join_labels(a, b)
        if are_all(a) and are_all(b):
            return
        alone = a[b == 0] if is_room else np.concatenate([a[b == 0], b[a == 0]])
        if alone.any():
            line = user_line.current()
            self.freeze_labels(alone, f"{reason} at {line}" if line else reason)

    def freeze(self, planes: Sequence[Tensor], reason: str) -> None:
        """No channel in these planes may be cut."""
        for plane in planes:
            self.freeze_labels(labels_of(plane).reshape(-1).numpy(), reason)

    def freeze_labels(self, labels: Labels, reason: str) -> None:
        """The same for a flat array of labels."""
        labels = distinct(labels)
        labels = labels[labels != 0]
        if len(labels):
            if not self.reasons or self.reasons[-1] != reason:
                self.reasons.append(reason)
            self.frozen.append((labels, len(self.reasons) - 1))

    def refuse_duplicates(self, planes: Sequence[Tensor], reason: str) -> None:
        """Merging equal channels here would change the result."""
        for plane in planes:
            self.no_duplicates.append((entries(labels_of(plane)), reason))

    def ask(self, labels: Labels) -> None:
        """The code asks how many these are."""
        if len(labels):
            self.asked.setdefault((int(labels[0]), int(labels[-1]), len(labels)), labels)

    def tell(self, labels: Labels) -> None:
        """The same; what becomes of the number can't be heard."""
        if len(labels):
            self.ask(labels)
            self.escaped.append(labels)

    def next_order(self) -> int:
        """A position for the next mixing op."""
        self.order += 1
        return self.order

    def axis_labels(self, planes: Sequence[Tensor], axis: int, size: int) -> Labels:
        """Labels along an axis in index order, the first of each where they vary; 0 for none."""
        for plane in planes:
            if plane.shape[axis] > 1:
                first = plane.movedim(axis, 0).reshape(size, -1)[:, 0]
                return first.numpy() & LABEL_MASK
        return np.zeros(size, dtype=np.int64)

    def axis_factors(self, planes: Sequence[Tensor], axis: int, size: int) -> tuple[Labels, ...]:
        """Labels whose numbers multiplied are the entries of an axis: two where two lie along it.

        ``einsum`` lays two dimensions of a weight along one axis, one of them inside the other.
        """
        along = [plane for plane in planes if plane.shape[axis] > 1]
        if len(along) == 2:
            first, second = (self.axis_labels([plane], axis, size) for plane in along)
            for outer, inner in ((first, second), (second, first)):
                run = int((outer != outer[0]).argmax()) or size
                if size % run:
                    continue
                rows, columns = outer.reshape(-1, run), inner.reshape(-1, run)
                if (rows == rows[:, :1]).all() and (columns == columns[:1]).all():
                    return rows[:, 0], columns[0]
        return (self.axis_labels(planes, axis, size),)

    def leading_factors(
        self, planes: Sequence[Tensor], sizes: Sequence[int]
    ) -> tuple[int, tuple[Labels, ...]]:
        """Of the first axes: how many entries without channels there are, and labels of others.

        Of channels that lie along two axes (heads), the other axis tells how many there are.
        """
        rest: int = 1
        factors: tuple[Labels, ...] = ()
        for axis, size in enumerate(sizes):
            alone = [plane for plane in planes if plane.numel() == plane.shape[axis] > 1]
            if alone:
                factors += self.axis_factors(alone, axis, size)
            else:
                rest *= size
        return rest, factors


def _rows(left: Tensor, right: Tensor) -> tuple[Labels, Labels]:
    """The labels of two planes, broadcast to one shape, as flat arrays."""
    left, right = broadcast([left, right])
    a, b = left.numpy() & LABEL_MASK, right.numpy() & LABEL_MASK
    return a.reshape(-1), b.reshape(-1)
