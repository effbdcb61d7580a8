"""Where the quantizers of activations go: decided for each tensor, not for each module.

A tensor gets one quantizer if a quantized layer reads it, or if it is the skip input of a residual
addition whose other input comes straight from a convolution (that one fuses with the addition and
stays float). All its readers share the quantizer. So there is none between a convolution, its
batch norm and its activation, one after a concatenation, and one on the output of a global pool
(rules P1 to P8 for explicit quantization in TensorRT).

How a quantizer is put on a tensor without replacing the user's class: a tensor that enters or
leaves a module is changed by a hook of that module; that keeps every class, name and method and
needs no symbolic tracing. Only a tensor that one forward function both makes and adds itself
(``h = relu(...); h = h + conv(h)``) needs that function rewritten (:mod:`.rewrite`); where torch.fx
cannot follow it, that skip stays float and the plan says so: slower in TensorRT, equally exact. A
hook stands only where the same tensor passes at every call of the module, so nothing counts calls
at run time; a layer that is called several times and has no such place gets one range for all.
What the example batch does not call in eval mode stays float.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from slimcli.network.example import Example
from slimcli.network.quantize.layers import Layer, heavy_layers, input_path
from slimcli.network.quantize.norms import NormBehind, norms_behind
from slimcli.network.quantize.record import Call, Op, Path, Record, record_forward
from slimcli.network.quantize.rewrite import Rewriter

COMMUTING = frozenset(
    [
        "max_pool1d",
        "max_pool2d",
        "max_pool3d",
        "flatten",
        "view",
        "reshape",
        "permute",
        "transpose",
        "contiguous",
        "squeeze",
        "unsqueeze",
        "getitem",
        "chunk",
        "split",
    ]
)
"""Ops that only move or select values: what was on the int8 grid stays on it."""
FUSES_WITH_CONVOLUTION = frozenset(("batch_norm", "dropout", "dropout2d", "stochastic_depth"))


@dataclass(frozen=True)
class Point:
    """A place where a tensor can be changed.

    Attributes:
        kind: ``input`` or ``output`` of a module, or ``value``: a node of its traced forward.
        module: Path of the module.
        path: Place of the tensor in the arguments or the result; for ``value`` the node's name.
    """

    kind: Literal["input", "output", "value"]
    module: str
    path: Path


@dataclass(frozen=True)
class Activation:
    """One quantizer of an activation.

    Attributes:
        layer: The layer that the quantizer becomes a child of.
        role: ``input`` or ``residual``; the child is called ``<role>_quantizer``.
        points: Where it acts; more than one only if no single place reaches all readers.
        readers: Layers and additions that read the quantized tensor, for the plan.
        is_data: Whether it quantizes what is fed in: no parameter had a part in the tensor.
    """

    layer: str
    role: Literal["input", "residual"]
    points: tuple[Point, ...]
    readers: tuple[str, ...]
    is_data: bool = False


@dataclass(frozen=True)
class Placement:
    """What is quantized in one network.

    Attributes:
        layers: All convolution and linear layers.
        activations: The quantizers of activations, in the order in which they run.
        notes: What a reader of the plan should know.
        norms: Batch norms that read the output of a quantized layer.
    """

    layers: tuple[Layer, ...]
    activations: tuple[Activation, ...]
    notes: tuple[str, ...] = ()
    norms: tuple[NormBehind, ...] = ()

    @property
    def quantized(self) -> tuple[str, ...]:
        """Names of the layers that become int8."""
        return tuple(layer.name for layer in self.layers if not layer.reason)


@dataclass(frozen=True)
class _Need:
    """One reader of a tensor that must be quantized.

    Attributes:
        time: When it reads.
        layer: The reading layer; for an addition the convolution it fuses with.
        is_residual: Whether it is an addition.
        direct: Whether the tensor itself is the layer's argument.
    """

    time: int
    layer: str
    is_residual: bool = False
    direct: bool = True


@dataclass
class _Places:
    """Every module boundary a tensor crosses."""

    at: dict[Point, list[int]] = field(default_factory=dict)
    inputs: dict[int, list[tuple[Point, Call]]] = field(default_factory=dict)
    outputs: dict[int, list[tuple[Point, Call]]] = field(default_factory=dict)

    @staticmethod
    def of(record: Record) -> _Places:
        """All boundaries in a record."""
        places = _Places()
        for call in record.calls:
            for path, value in call.inputs.items():
                point = Point("input", call.module, path)
                places.at.setdefault(point, []).append(value)
                places.inputs.setdefault(value, []).append((point, call))
            for path, value in call.outputs.items():
                point = Point("output", call.module, path)
                places.at.setdefault(point, []).append(value)
                places.outputs.setdefault(value, []).append((point, call))
        return places

    def only(self, point: Point) -> bool:
        """Whether the same tensor passes at every call."""
        return len(set(self.at[point])) == 1


def place(model: nn.Module, example: Example, skip: Sequence[str] = ()) -> Placement:
    """Decides what to quantize; ``model`` is put in eval mode and gets and loses hooks.

    Hand in a copy.

    Raises:
        RecipeError: An entry of ``skip`` matches nothing.
    """
    record = record_forward(model, example)
    layers = heavy_layers(model, record, skip)
    needs = _needs(record, layers)
    placer = _Placer(record, Rewriter(model, record, example))
    chosen = placer.choose(needs)
    norms = norms_behind(model, record, layers)
    return Placement(tuple(layers), tuple(chosen), tuple(dict.fromkeys(placer.notes)), norms)


def _needs(record: Record, layers: Sequence[Layer]) -> dict[int, list[_Need]]:
    """Value -> its readers that want it quantized, in the order of values."""
    quantized = {layer.name: layer for layer in layers if not layer.reason}
    needs: dict[int, list[_Need]] = {}
    for call in record.calls:
        if call.module in quantized:
            path = input_path(call)
            assert path is not None
            needs.setdefault(call.inputs[path], []).append(_Need(call.start, call.module))
    convolutions = {name for name, layer in quantized.items() if "Linear" not in layer.type}
    for op, value, layer in _residuals(record, convolutions):
        needs.setdefault(value, []).append(_Need(op.time, layer, is_residual=True))
    return _through_commuting(record, needs)


def _residuals(record: Record, convolutions: set[str]) -> Iterable[tuple[Op, int, str]]:
    """Each residual addition with its skip input and the convolution it fuses with (rule P4)."""
    producers, consumers, depths = record.producers(), record.consumers(), _depths(record)

    def source(value: int) -> str:
        while len(consumers[value]) == 1 and value in producers:
            op = producers[value]
            if op.weight.rpartition(".")[0] in convolutions:
                return op.weight.rpartition(".")[0]
            if op.name not in FUSES_WITH_CONVOLUTION:
                break
            value = op.inputs[0]
        return ""

    for op in record.ops:
        if op.name.rstrip("_") not in ("add", "iadd", "radd") or len(op.inputs) != 2:
            continue
        if record.stored & set(op.inputs) or len(set(op.shapes)) != 1:
            continue
        left, right = op.inputs
        main, other = source(left), source(right)
        if main and (not other or depths[left] >= depths[right]):
            yield op, right, main
        elif other:
            yield op, left, other


def _depths(record: Record) -> dict[int, int]:
    """Value -> the most weighted ops on a way to it."""
    depths: dict[int, int] = {}
    for op in record.ops:
        deepest = max((depths.get(value, 0) for value in op.inputs), default=0)
        depths.update(dict.fromkeys(op.outputs, deepest + bool(op.weight)))
    return {value: depths.get(value, 0) for op in record.ops for value in (*op.inputs, *op.outputs)}


def _through_commuting(record: Record, needs: Mapping[int, list[_Need]]) -> dict[int, list[_Need]]:
    """Readers of a pooled or reshaped quantized tensor read that tensor (rule P7)."""
    producers = record.producers()
    moved: dict[int, list[_Need]] = {}
    for value in sorted(needs):
        target, readers = value, needs[value]
        op = producers.get(value)
        if op is not None and op.name in COMMUTING and op.inputs and op.inputs[0] in moved:
            target = op.inputs[0]
            readers = [_Need(op.time, each.layer, each.is_residual, False) for each in readers]
        moved.setdefault(target, []).extend(readers)
    return moved


class _Placer:
    """Finds the points of each tensor."""

    def __init__(self, record: Record, rewriter: Rewriter) -> None:
        self.record, self.rewriter = record, rewriter
        self.places = _Places.of(record)
        self.producers = record.producers()
        self.data = record.data()
        self.notes: list[str] = []

    def choose(self, needs: Mapping[int, Sequence[_Need]]) -> list[Activation]:
        """One quantizer a value; a layer that no place of its own serves has one for all calls."""
        shared: dict[str, Point] = {}
        while True:
            found, unserved = self._attempt(needs, shared)
            if not unserved:
                break
            shared.update(unserved)
        for layer, point in shared.items():
            found.append(Activation(layer, "input", (point,), (layer,)))
            self.notes.append(f"{layer} is called several times: one input range for all calls")
        return found

    def _attempt(
        self, needs: Mapping[int, Sequence[_Need]], shared: Mapping[str, Point]
    ) -> tuple[list[Activation], dict[str, Point]]:
        found: list[Activation] = []
        unserved: dict[str, Point] = {}
        for value, readers in needs.items():
            left = [each for each in readers if each.is_residual or each.layer not in shared]
            if not left:
                continue
            points, missed = self._points(value, left)
            for need in missed:
                if need.is_residual:
                    self.notes.append(
                        f"the skip input of the addition after {need.layer} stays float: "
                        f"{self.rewriter.reason or 'it passes no module boundary'}"
                    )
                else:
                    call = next(each for each in self.record.calls if each.module == need.layer)
                    path = input_path(call)
                    assert path is not None
                    unserved[need.layer] = Point("input", need.layer, path)
            reached = [each for each in left if each not in missed]
            if reached:
                found.append(_activation(points, reached, value in self.data))
        return found, unserved

    def _points(
        self, value: int, readers: Sequence[_Need]
    ) -> tuple[tuple[Point, ...], list[_Need]]:
        """Points that together reach the readers, and the readers that none reaches."""
        inputs = [each for each in self.places.inputs.get(value, []) if self.places.only(each[0])]
        inputs.sort(key=lambda each: each[1].stop - each[1].start)
        if len(readers) == 1 and not readers[0].is_residual and readers[0].direct:
            own = [point for point, _ in inputs if point.module == readers[0].layer]
            if own:
                return (own[0],), []
        after = self._output(value, readers)
        if after is not None:
            return (after,), []
        for point, call in inputs:
            if all(_covers(call, need) for need in readers):
                return (point,), []
        points, missed = _cover(inputs, readers)
        inside = self._inside(value) if missed else None
        return (points, missed) if inside is None else ((inside,), [])

    def _inside(self, value: int) -> Point | None:
        """The node of a forward that computes the value, or that calls the module that does."""
        if value not in self.producers:
            return None
        op = self.producers[value]
        node = self.rewriter.node(op)
        if node:
            return Point("value", op.module, (node,))
        made = [each for each in self.places.outputs.get(value, []) if not each[0].path]
        for _, call in sorted(made, key=lambda each: each[1].start, reverse=True):
            if call.start < op.time < call.stop:
                parent, node = self.rewriter.child_node(call)
                if node:
                    return Point("value", parent, (node,))
        return None

    def _output(self, value: int, readers: Sequence[_Need]) -> Point | None:
        """The innermost module that makes the value and ends before its first reader."""
        made = self.producers.get(value)
        fitting = [
            (call.start, point)
            for point, call in self.places.outputs.get(value, [])
            if made is not None
            and call.start < made.time < call.stop < min(need.time for need in readers)
            and self.places.only(point)
        ]
        return max(fitting, key=lambda each: each[0])[1] if fitting else None


def _covers(call: Call, need: _Need) -> bool:
    return call.start <= need.time <= call.stop


def _cover(
    inputs: Sequence[tuple[Point, Call]], readers: Sequence[_Need]
) -> tuple[tuple[Point, ...], list[_Need]]:
    """Few module inputs, none inside another, that reach as many readers as possible."""
    chosen: dict[Point, Call] = {}
    missed = []
    for need in sorted(readers, key=lambda each: not each.is_residual):
        if any(_covers(call, need) for call in chosen.values()):
            continue
        entry = next((each for each in inputs if _covers(each[1], need)), None)
        if entry is None:
            missed.append(need)
            continue
        point, around = entry
        inner = [
            each
            for each, call in chosen.items()
            if around.start <= call.start and call.stop <= around.stop
        ]
        for each in inner:
            del chosen[each]
        chosen[point] = around
    return tuple(chosen), missed


def _activation(points: tuple[Point, ...], readers: Sequence[_Need], is_data: bool) -> Activation:
    """The quantizer of one tensor; it lives in the first layer that reads it."""
    layers = [need for need in readers if not need.is_residual]
    home = layers[0] if layers else readers[0]
    names = tuple(f"+ {need.layer}" if need.is_residual else need.layer for need in readers)
    return Activation(home.layer, "input" if layers else "residual", points, names, is_data)
