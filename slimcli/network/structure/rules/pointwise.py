"""Operators that work position by position, and concatenation: labels of all operands merge."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimcli.network.nested import tensors_in
from slimcli.network.structure.memory import are_zeros
from slimcli.network.structure.nodes import ZEROS_TO_MEASURE, Kind, Node
from slimcli.network.structure.planes import (
    LABEL_MASK,
    SHIFT,
    active_axes,
    are_all,
    broadcast,
    entries,
    first_of,
    labels_of,
    pack,
    with_leading_axes,
)
from slimcli.network.structure.producing import note_united, weights_only
from slimcli.network.structure.record import Record
from slimcli.network.structure.trace import Op, Planes, Rule

Operand = tuple[int, Tensor]
"""Number of a tensor among the arguments, and one of its planes."""

_PROBES: dict[Any, bool] = {}


def map_nodes(plane: Tensor, function: Callable[[int], int]) -> Tensor:
    """The plane with every node replaced (0 stays 0)."""
    flat = plane.reshape(-1).numpy()
    nodes = flat >> SHIFT
    first = int(nodes[0])
    if first and are_all(nodes == first):  # so that all have a label
        return torch.from_numpy(flat + ((function(first) - first) << SHIFT)).view(plane.shape)
    unique, inverse = np.unique(nodes, return_inverse=True)
    new = np.array([function(int(node)) if node else 0 for node in unique], dtype=np.int64)
    packed = (flat & LABEL_MASK) + (new[inverse] << SHIFT)
    return torch.from_numpy(packed).view(plane.shape)


def through(
    op: Op, plane: Tensor, kind: Kind, *, keeps_zero: bool = True, name: str = "", how: str = ""
) -> Tensor:
    """The plane behind something of this kind that acts on each value by itself."""
    add = op.record.table.add
    return map_nodes(
        plane, lambda n: add(Node(kind, (n,), keeps_zero=keeps_zero, name=name, how=how))
    )


def mapped(op: Op, plane: Tensor, *, keeps_zero: bool) -> Tensor:
    """The plane behind a function of each value: what it makes of a constant is another one."""
    return through(op, plane, Kind.MAP, keeps_zero=keeps_zero, how=how_made(op))


def combine_nodes(planes: Sequence[Tensor], function: Callable[[tuple[int, ...]], int]) -> Tensor:
    """Nodes of a value made from several, each packed plane of the same shape."""
    rows = [plane.numpy().reshape(-1) >> SHIFT for plane in planes]
    firsts = tuple(int(row[0]) for row in rows)
    if all(are_all(row == first) for row, first in zip(rows, firsts, strict=True)):
        return torch.full(planes[0].shape, function(firsts), dtype=torch.int64)
    unique, inverse = np.unique(np.stack(rows), axis=1, return_inverse=True)
    new = [function(tuple(int(node) for node in column)) for column in unique.T]
    result = np.array(new, dtype=np.int64)[inverse.reshape(-1)]
    return torch.from_numpy(result).view(planes[0].shape)


def pointwise(op: Op) -> Sequence[Planes]:
    """Any pointwise operator."""
    output = next(tensors_in(op.output), None)
    if output is None:
        return []
    return [merged(op, op.tensors(), output.dim())]


def merged(op: Op, tensors: Sequence[Tensor], dims: int) -> Planes:
    """Merges the planes of all operands, broadcast to ``dims`` axes."""
    operands = [
        (index, with_leading_axes(plane, dims))
        for index, tensor in enumerate(tensors)
        for plane in op.planes(tensor)
    ]
    joined = [_merge_group(op, tensors, group) for group in _sharing_axes(operands)]
    return tuple(plane for plane in joined if plane is not None)


def _sharing_axes(operands: Sequence[Operand]) -> list[list[Operand]]:
    """Operands in groups: those of one group share axes, with each other or over others."""
    groups: list[list[Operand]] = []
    for operand in operands:
        near = [group for group in groups if _axes(group) & _axes([operand])]
        others = [group for group in groups if not _axes(group) & _axes([operand])]
        groups = [*others, [*itertools.chain(*near), operand]]
    return groups


def _axes(group: Sequence[Operand]) -> set[int]:
    """Along which any of these tells channels apart."""
    return {axis for _, plane in group for axis in active_axes(plane)}


def _merge_group(op: Op, tensors: Sequence[Tensor], group: list[Operand]) -> Tensor | None:
    axes = _axes(group)
    made = op.record.table.is_made
    if len(group) > 1:
        group = sorted(group, key=lambda each: made(first_of(each[1]) >> SHIFT))
    planes = [plane for _, plane in group]
    dims = planes[0].dim()
    have = {index for index, _ in group}
    for index, tensor in enumerate(tensors):
        if index in have:
            continue
        sizes = (1,) * (dims - tensor.dim()) + _own_sizes(tensor)
        if any(sizes[axis] > 1 for axis in axes):
            op.freeze_planes(planes, "channels meet a tensor of fixed size")
            return None
    _note_weights(op, tensors, group)
    if len(planes) == 1 and len(tensors) == 1:
        keeps_zero = probe(op, [0], tensors)
        if jumps(op):
            return _jumped(op, planes[0], keeps_zero)
        return mapped(op, planes[0], keeps_zero=keeps_zero)
    wide = [plane.contiguous() for plane in broadcast(planes)]
    note_united(op, wide)
    for other in wide[1:]:
        op.record.tie(wide[0], other, "channels meet fixed values")
    own = [place for place, plane in enumerate(wide) if not _is_filler(op.record, plane)]
    own = own or list(range(len(wide)))
    nodes = _combined(op, tensors, [group[each][0] for each in own], [wide[each] for each in own])
    return pack(labels_of(wide[0]), nodes)


def _is_filler(record: Record, plane: Tensor) -> bool:
    """Has it channels only in so far as it is as wide as they are? Any value, but not a zero."""
    node = first_of(plane) >> SHIFT
    return record.table.is_made(node) and not are_zeros(record.table, [plane])


def jumps(op: Op) -> bool:
    """Does its result jump, so that rounding decides it where a constant was computed?"""
    rounds = op.name == "div" and op.kwargs.get("rounding_mode") is not None
    return rounds or op.name in _JUMPING


def cast(op: Op) -> Sequence[Planes]:
    """Another dtype or device; whole numbers and truth values jump."""
    output, planes = op.output, op.planes(op.args[0])
    if output.is_floating_point() or output.is_complex() or not op.args[0].is_floating_point():
        return [planes]
    return [tuple(_jumped(op, plane, keeps_zero=True) for plane in planes)]


def _jumped(op: Op, plane: Tensor, keeps_zero: bool) -> Tensor:
    table, how = op.record.table, how_made(op)

    def node_of(node: int) -> int:
        kind = Kind.JUMP if table.is_summed(node) else Kind.MAP
        return table.add(Node(kind, (node,), keeps_zero=keeps_zero, how=how))

    return map_nodes(plane, node_of)


def _note_weights(op: Op, tensors: Sequence[Tensor], group: list[Operand]) -> None:
    """Remembers weights computed by f where f(a + b) is not f(a) + f(b)."""
    is_weight = weights_only(op)
    if all(is_weight(plane) for _, plane in group):
        places = sorted({index for index, _ in group})
        if not _is_additive(op, places, tensors):
            reason = f"{op.name} of a weight is no sum over merged channels"
            op.record.not_additive += [(entries(labels_of(plane)), reason) for _, plane in group]


def _is_additive(op: Op, places: Sequence[int], tensors: Sequence[Tensor]) -> bool:
    key = ("additive", _signature(op), tuple(places), tuple(each.dtype for each in tensors))
    if key not in _PROBES:
        a = torch.tensor([0.7, -1.3, 2.1, 0.4], dtype=torch.float64)
        b = torch.tensor([0.2, 0.9, -1.6, 1.1], dtype=torch.float64)
        tried = [_evaluated(op, places, inner, a) for inner in (a, b, a + b)]
        found = [each.double() for each in tried if each is not None and each.is_floating_point()]
        is_sum = len(found) == 3 and bool(torch.isclose(found[0] + found[1], found[2]).all())
        _PROBES[key] = is_sum
    return _PROBES[key]


def _own_sizes(tensor: Tensor) -> tuple[int, ...]:
    """The shape, with 1 where one entry was expanded (``expand_as`` follows whatever is cut)."""
    if tensor.layout != torch.strided:
        return tuple(tensor.shape)
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return tuple(1 if stride == 0 else size for size, stride in pairs)


def _combined(op: Op, tensors: Sequence[Tensor], places: list[int], planes: list[Tensor]) -> Tensor:
    """Nodes of the result: what zeros in one operand, or in all of them, do."""
    keeps_zero = probe(op, places, tensors)
    absorbs = tuple(probe(op, [place], tensors) for place in places)
    others = len(tensors) > len(set(places))
    table, how = op.record.table, how_made(op)

    def node_of(parents: tuple[int, ...]) -> int:
        if others and not keeps_zero:
            parents, flags = (*parents, _anything(op.record)), (*absorbs, False)
            return table.add(Node(Kind.COMBINE, parents, flags, keeps_zero))
        combined = table.add(Node(Kind.COMBINE, parents, absorbs, keeps_zero, how=how))
        if jumps(op):  # of a constant with its own mean, rounding decides
            return table.add(Node(Kind.BORDER, (combined,)))
        # An operand without channels: any value, so that all but a zero varies with it.
        return table.add(Node(Kind.BORDER, (combined,))) if others else combined

    return combine_nodes(planes, node_of)


def _anything(record: Record) -> int:
    """A value that may be anything."""
    return record.table.add(Node(Kind.SOURCE, flags=(False,)))


def probe(op: Op, zeros: Sequence[int], tensors: Sequence[Tensor]) -> bool:
    """Is the result zero if these operands are zero and the others anything? Found by trying.

    Operands that the user's code made of zeros are zero in any case. What can't be tried is not.
    """
    blank = [place for place, each in enumerate(tensors) if op.tracer.is_blank(each)]
    zeros = sorted({*zeros, *blank})
    dtypes = tuple(tensor.dtype for tensor in tensors)
    key = (_signature(op), tuple(zeros), dtypes)
    if key not in _PROBES:
        values = torch.tensor([0.7, -1.3, 2.1, 0.4], dtype=torch.float64)
        result = _evaluated(op, zeros, torch.zeros_like(values), values)
        _PROBES[key] = result is not None and not bool(result.any())
    return _PROBES[key]


def how_made(op: Op) -> str:
    """The operator with its numbers; in place or not is the same."""
    return f"{op.name}{_signature(op)[1]}"


def _signature(op: Op) -> tuple[str, str]:
    """The operator with its arguments that are no tensors."""
    if op.signature is not None:
        return op.signature
    scalars = repr([a for a in op.args if not isinstance(a, (Tensor, list, tuple))])
    scalars += repr(
        {k: v for k, v in op.kwargs.items() if not isinstance(v, (Tensor, torch.Generator))}
    )
    op.signature = op.func.name(), scalars
    return op.signature


def _evaluated(op: Op, places: Sequence[int], inner: Tensor, outer: Tensor) -> Tensor | None:
    """The result with one value in these operands and another in the others; None if it fails."""
    position = itertools.count()

    def replaced(value: Any) -> Any:
        if isinstance(value, Tensor):
            return _as(value.dtype, inner if next(position) in places else outer)
        if isinstance(value, (tuple, list)):
            return type(value)(replaced(each) for each in value)
        return value

    args = replaced(op.args)
    kwargs = {key: replaced(value) for key, value in op.kwargs.items() if key != "device"}
    try:
        return next(tensors_in(op.func(*args, **kwargs)))
    except (RuntimeError, TypeError, ValueError, StopIteration):
        return None


def _as(dtype: torch.dtype, values: Tensor) -> Tensor:
    """Numbers of a dtype: a mask that holds for all of them would hide what lies behind it."""
    if dtype == torch.bool:
        return values > 0
    return values * (1 - 0.6j) if dtype.is_complex else values.to(dtype)


def copied(op: Op) -> Sequence[Planes]:
    """``copy_``: the target takes the labels of the source, broadcast; it is as wide as before."""
    target, source = op.args[0], op.args[1]
    planes = tuple(with_leading_axes(plane, target.dim()) for plane in op.planes(source))
    sizes = (1,) * (target.dim() - source.dim()) + tuple(source.shape)
    for place in op.planes(target):
        if any(sizes[axis] > 1 for axis in active_axes(place)):
            near = [each for each in planes if set(active_axes(each)) & set(active_axes(place))]
            for each in near or [place.new_zeros((1,) * place.dim())]:
                op.record.tie(
                    place, each, "channels are overwritten by a tensor of fixed size", is_room=True
                )
    return [planes]


def bordered(op: Op, planes: Planes, is_zero: bool) -> Planes:
    """Something was added at the border."""
    return tuple(through(op, plane, Kind.BORDER, keeps_zero=is_zero) for plane in planes)


def arbitrary(op: Op, planes: Planes) -> Planes:
    """Values of which nothing is known where the channel is zero, like places of a maximum."""
    return bordered(op, planes, is_zero=False)


def filled(op: Op) -> Sequence[Planes]:
    """A tensor filled with values that don't come from channels keeps the labels it had."""
    value = op.arg(1, "value", None) if op.name == "fill" else None
    is_zero = op.tracer.is_blank(value) if isinstance(value, Tensor) else value == 0
    if is_zero or op.name == "zero":
        table = op.record.table

        def node_of(node: int) -> int:
            is_made = table.is_made(node)
            return table.add(ZEROS_TO_MEASURE if is_made else Node(Kind.BORDER, (node,)))

        return [tuple(map_nodes(plane, node_of) for plane in op.planes(op.args[0]))]
    node = _anything(op.record)
    return [tuple(map_nodes(plane, lambda _: node) for plane in op.planes(op.args[0]))]


def like(op: Op) -> Sequence[Planes]:
    """``ones_like`` and ``new_empty`` follow the tensor they are made from.

    Axes of size one count as left out: dropout of whole channels draws ``(N, C, 1, 1)`` numbers.
    """
    source, output = op.args[0], op.output
    if not isinstance(output, Tensor) or output.dim() != source.dim():
        return []
    if any(size not in (1, old) for size, old in zip(output.shape, source.shape, strict=True)):
        return []
    planes = tuple(
        plane
        for plane in op.planes(source)
        if all(output.shape[axis] > 1 for axis in active_axes(plane))
    )
    is_zero = op.name in ("zeros_like", "new_zeros")
    node = op.record.table.add(ZEROS_TO_MEASURE) if is_zero else _anything(op.record)
    return [tuple(map_nodes(plane, lambda _: node) for plane in planes)]


def masked(op: Op) -> Sequence[Planes]:
    """Dropout: zero stays zero; the mask follows."""
    planes = op.planes(op.args[0])
    return [planes, planes]


_JUMPS = """
eq ne lt le gt ge sign sgn signbit floor ceil trunc round frac heaviside remainder fmod floor_divide
logical_not logical_and logical_or logical_xor threshold hardshrink atan2 angle bucketize
"""
_JUMPING = frozenset(_JUMPS.split())
"""Of a constant less its own mean, rounding decides what they give."""

_POINTWISE = """
hardswish _prelu_kernel gelu silu mish selu celu elu where masked_fill lerp addcmul addcdiv
hardtanh leaky_relu rrelu rrelu_with_noise softplus softshrink hardshrink threshold clamp clip
clamp_min clamp_max bernoulli fmod remainder maximum minimum nan_to_num logit polar complex real
imag isnan isinf log_sigmoid_forward fake_quantize_per_tensor_affine
"""
_FILLED = """
fill zero normal uniform random exponential
"""
_LIKE = """
empty_like zeros_like ones_like full_like rand_like randn_like new_empty new_zeros new_ones new_full
new_empty_strided
"""

RULES: dict[str, Rule] = {
    "pointwise": pointwise,
    **dict.fromkeys(_POINTWISE.split(), pointwise),
    "copy": copied,
    "_to_copy": cast,
    **dict.fromkeys(_LIKE.split(), like),
    **dict.fromkeys(_FILLED.split(), filled),
    "native_dropout": masked,
}
