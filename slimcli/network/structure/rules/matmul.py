"""Matrix products: linear layers, attention, embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimcli.network.nested import tensors_in
from slimcli.network.structure.nodes import Kind, Node
from slimcli.network.structure.planes import (
    active_axes,
    broadcast,
    labels_of,
    pack,
    with_leading_axes,
)
from slimcli.network.structure.producing import (
    SEVERAL_KINDS,
    add_consumer,
    add_producer,
    add_sum,
    bias_behind,
    caller,
    is_made,
    note_unfollowed,
    of_activations,
    takes_up,
    weights_only,
)
from slimcli.network.structure.record import MacTerm
from slimcli.network.structure.rules.conv import FIXED_INPUT, FIXED_WEIGHT
from slimcli.network.structure.rules.norm import one_of_each
from slimcli.network.structure.rules.pointwise import combine_nodes, map_nodes, pointwise, through
from slimcli.network.structure.trace import NO_PLANES, Op, Planes, Rule


def product(op: Op) -> Sequence[Planes]:
    """``mm`` and ``bmm``."""
    return [multiply(op, op.args[0], op.args[1], op.output)]


def added_product(op: Op) -> Sequence[Planes]:
    """``addmm`` and ``baddbmm``: the added tensor is a bias if it has only the columns' labels."""
    bias, left, right = op.args[:3]
    planes = multiply(op, left, right, op.output, bias)
    if not isinstance(bias, Tensor) or (op.kwargs.get("beta", 1) == 0):
        return [planes]
    return [_with_bias(op, bias, planes)]


def sparse_product(op: Op) -> Sequence[Planes]:
    """``torch.sparse.mm``: a sparse matrix from the left, whose sum with zeros counts nothing."""
    added, left, right = op.args[:3]
    planes = multiply(op, left, right, op.output)
    return [planes if op.arg(3, "beta", 1) == 0 else _with_bias(op, added, planes)]


def _with_bias(op: Op, bias: Tensor, planes: Planes) -> Planes:
    add = op.record.table.add
    anything = add(Node(Kind.SOURCE, flags=(False,)))

    def shifted(node: int) -> int:
        return add(Node(Kind.COMBINE, (node, anything), (False, False)))

    is_weight = weights_only(op)
    result: Planes = NO_PLANES
    known = op.planes(bias)
    for plane in planes:
        axes = {axis for axis, size in enumerate(plane.shape) if size > 1}
        lead = plane.dim() - bias.dim()
        match = [
            each for each in known if {a + lead for a, n in enumerate(each.shape) if n > 1} & axes
        ]
        if match:
            other = match[0].reshape([1] * lead + list(match[0].shape))
            op.record.tie(plane, other, FIXED_WEIGHT)
            result += (plane if is_weight(other) else _sum_of(op, plane, other),)
        elif any(bias.shape[axis - lead] > 1 for axis in axes if axis >= lead):
            op.freeze_planes([plane], "channels meet a tensor of fixed size")
        else:
            result += (map_nodes(plane, shifted),)
    alone = [p for p in known if not any(_overlap(p, plane) for plane in planes)]
    op.freeze_planes(alone, FIXED_WEIGHT)
    return result


def _sum_of(op: Op, plane: Tensor, other: Tensor) -> Tensor:
    """A product is added to other channels: both must be zero."""
    add, how = op.record.table.add, op.record.table.one_time()
    nodes = combine_nodes(
        [each.contiguous() for each in broadcast([plane, other])],
        lambda parents: add(Node(Kind.COMBINE, parents, (False, False), how=how)),
    )
    return pack(labels_of(plane), nodes)


def _overlap(bias: Tensor, plane: Tensor) -> bool:
    lead = plane.dim() - bias.dim()
    return any(n > 1 and plane.shape[a + lead] > 1 for a, n in enumerate(bias.shape))


def linear(op: Op) -> Sequence[Planes]:
    """``aten::linear`` where it is not taken apart."""
    tensor, weight, bias = op.args[0], op.args[1], op.arg(2, "bias")
    flat = _Transposed(op, weight)
    planes = multiply(op, tensor, flat, op.output, bias)
    return [_with_bias(op, bias, planes) if bias is not None else planes]


def added(op: Op) -> Sequence[Planes]:
    """``add``, also of a bias behind the product of its layer."""
    found = bias_behind(op)
    return pointwise(op) if found is None else found


class _Transposed:
    """A weight seen as its transpose: shape and planes, no data."""

    def __init__(self, op: Op, weight: Tensor) -> None:
        self.weight = weight
        self.shape = torch.Size(reversed(weight.shape))
        self.planes = tuple(plane.t() for plane in op.planes(weight))


def multiply(op: Op, left: Any, right: Any, output: Tensor, bias: Any = None) -> Planes:
    """(..., m, k) x (..., k, n): ends labels along k, passes those along m and n."""
    left_planes = op.planes(left)
    right_planes = right.planes if isinstance(right, _Transposed) else op.planes(right)
    weight = right.weight if isinstance(right, _Transposed) else right
    dims = output.dim()
    a = [with_leading_axes(plane, dims) for plane in left_planes]
    b = [with_leading_axes(plane, dims) for plane in right_planes]
    if any(is_made(op, plane) for plane in [*a, *b]):
        op.freeze_planes([*a, *b], "a product with a tensor made as wide as another one")
        return NO_PLANES
    is_weight = weights_only(op)
    a_weight = bool(a) and all(is_weight(plane) for plane in a)
    b_weight = bool(b) and all(is_weight(plane) for plane in b)
    if a_weight and b_weight and not caller(op, weight, b[0]).startswith("tensor:"):
        a_weight = False  # a layer is called on a buffer or a parameter: to it that is an input
    arrivals = [plane for plane in a if plane.shape[-1] > 1]
    readers = [plane for plane in b if plane.shape[-2] > 1]
    _count(op, left.shape, right.shape, a, b)
    if b_weight or not a_weight:
        _contract(op, arrivals, [p.transpose(-1, -2) for p in readers], (left, weight), b_weight)
    else:
        _contract(op, [p.transpose(-1, -2) for p in readers], arrivals, (weight, left), True)
    if not b:
        note_unfollowed(op, output.shape[-1])
    rows = [p for p in a if p.shape[-1] == 1]
    columns = [p for p in b if p.shape[-2] == 1]
    right_side = _leaving(op, columns, weight if b_weight and not a_weight else None, -1, bias)
    left_side = _leaving(op, rows, left if a_weight and not b_weight else None, -2, None)
    return _settle(op, right_side, left_side)


def _settle(op: Op, right_side: Planes, left_side: Planes) -> Planes:
    """Planes from both sides that share an axis (batch, heads) are one.

    Those of one side go on side by side: ``einsum`` lays two dimensions of a weight along one axis.
    """
    result = right_side
    for plane in left_side:
        axes = active_axes(plane)
        shared = [each for each in right_side if set(active_axes(each)) & set(axes)]
        is_free = all(any(each is other for other in result) for each in shared)
        is_alike = len(shared) == 1 and active_axes(shared[0]) == axes
        result = tuple(each for each in result if all(each is not other for other in shared))
        if not shared:
            result += (plane,)
        elif is_free and is_alike and axes[-1] < plane.dim() - 2:
            result += (_side_by_side(op, shared[0], plane),)
        else:
            op.freeze_planes([*shared, plane], "channels on both sides of a product share an axis")
    return result


def _side_by_side(op: Op, left: Tensor, right: Tensor) -> Tensor:
    """A product for each channel by itself: one zero side suffices."""
    op.record.tie(left, right, "channels meet fixed values")
    add = op.record.table.add
    nodes = combine_nodes(
        [each.contiguous() for each in broadcast([left, right])],
        lambda parents: add(
            Node(Kind.CARRY, (add(Node(Kind.COMBINE, parents, (True, True))),)),
        ),
    )
    return pack(labels_of(left), nodes)


def _contract(
    op: Op,
    arrivals: list[Tensor],
    readers: list[Tensor],
    factors: tuple[Tensor, Tensor],
    is_weight: bool,
) -> None:
    """Both sides with k as their last axis; a weight's side reads, two activations just meet.

    Args:
        op: Multiplies.
        arrivals: Planes of what is read.
        readers: Planes of what reads.
        factors: The tensors themselves, in this order.
        is_weight: Does a weight read?
    """
    if not arrivals or not readers:
        op.freeze_planes(readers, FIXED_INPUT)
        op.freeze_planes(arrivals, FIXED_WEIGHT)
        return
    arrivals = of_activations(op, arrivals)
    if len(arrivals) > 1 or len(readers) > 1:
        op.freeze_planes([*arrivals, *readers], SEVERAL_KINDS)
        return
    left, right = _one_row(op, arrivals[0]), _one_row(op, readers[0])
    op.record.tie(left, right, FIXED_INPUT)
    pairs = torch.stack([each.reshape(-1) for each in broadcast([left, right])])
    if is_weight:
        path = caller(op, factors[1], readers[0])
        absorbs = takes_up(op, path, readers[0], factors[0])
        add_consumer(
            op, path, left, labels_of(pairs).numpy(), takes_constants=absorbs, is_plain=True
        )
        return
    _meet(op, left, right, "two activations are multiplied and summed over them", absorbs=True)


def _one_row(op: Op, plane: Tensor) -> Tensor:
    """Joins what differs along the row axis."""
    if plane.shape[-2] == 1:
        return plane
    first = plane.narrow(-2, 0, 1)
    rows = plane.transpose(-1, -2).reshape(-1, plane.shape[-2])
    return one_of_each(op.record, rows).view(first.shape)


def _meet(op: Op, left: Tensor, right: Tensor, reason: str, *, absorbs: bool) -> None:
    """Two activations are combined and summed over channels.

    Args:
        op: Where.
        left: Its channels.
        right: The same ones.
        reason: Why equal channels can't be merged.
        absorbs: One zero side suffices.
    """
    wide = [each.contiguous() for each in broadcast([left, right])]
    add, flags = op.record.table.add, (absorbs, absorbs)
    nodes = combine_nodes(wide, lambda parents: add(Node(Kind.COMBINE, parents, flags)))
    add_sum(op, pack(labels_of(wide[0]), nodes))
    op.record.refuse_duplicates([left, right], reason)


def distances(op: Op) -> Sequence[Planes]:
    """``cdist``: a sum over channels of what both sides differ by, so both must be zero."""
    sides: list[Tensor] = []
    for tensor in op.args[:2]:
        planes = op.planes(tensor)
        across = [plane for plane in planes if plane.numel() == plane.shape[-1]]
        others = [plane for plane in planes if plane.numel() != plane.shape[-1]]
        op.freeze_planes(others, "distances between channels")
        sides += [plane.reshape(-1) for plane in across[:1]]
        op.freeze_planes(across[1:], SEVERAL_KINDS)
    if len(sides) == 2:
        left, right = sides
        op.record.tie(left, right, FIXED_INPUT)
        _meet(op, left, right, "distances are measured over them", absorbs=False)
    elif sides:
        op.freeze_planes(sides, FIXED_INPUT)
    return []


def _leaving(op: Op, planes: list[Tensor], weight: Tensor | None, axis: int, bias: Any) -> Planes:
    """Planes of the result: fresh values if the other dimension is a weight's, else carried."""
    result: Planes = NO_PLANES
    for plane in planes:
        if weight is not None and plane.numel() == plane.shape[axis]:
            labels = labels_of(plane)
            key = caller(op, weight, plane)
            node = add_producer(op, key, labels, weight=plane, is_plain=True, bias=bias)
            op.tracer.calls.produced(op.output, key)
            result += (pack(labels, node),)
        else:
            result += (through(op, plane, Kind.CARRY),)
    return result


def _count(
    op: Op, left: Sequence[int], right: Sequence[int], a: list[Tensor], b: list[Tensor]
) -> None:
    """``m * k * n`` for each matrix pair; factors are the labels along all of them."""
    sizes = np.broadcast_shapes(tuple(left[:-2]), tuple(right[:-2]))
    batch, factors = op.record.leading_factors([*a, *b], sizes)
    rows, inner, columns = left[-2] if len(left) > 1 else 1, left[-1], right[-1]
    axis = op.record.axis_factors
    factors += axis(a, -2, rows) + axis(b, -1, columns)
    factors += axis(a, -1, inner) if any(p.shape[-1] > 1 for p in a) else axis(b, -2, inner)
    op.record.macs.append(MacTerm(batch, factors))


def attention(op: Op) -> Sequence[Planes]:
    """Fused attention: the value's channels pass; query and key must keep theirs.

    Where the user's code gives the scale, no number depends on the size of a head, and the channels
    of query and key meet as in any product.
    """
    query, key, value = op.args[:3]
    reason = "attention scales by the size of a head"
    if op.kwargs.get("scale") is None:
        op.freeze([query, key], reason)
    else:
        tokens = [p for each in (query, key) for p in op.planes(each) if p.shape[-2] > 1]
        op.freeze_planes(tokens, "attention over an axis with channels")
        left, right = ([p for p in op.planes(each) if p.shape[-1] > 1] for each in (query, key))
        _contract(op, left, right, (query, key), False)
    op.freeze(
        [t for t in op.tensors() if all(t is not each for each in (query, key, value))], reason
    )
    _count_attention(op, query, key, value)
    kept: Planes = NO_PLANES
    for plane in op.planes(value):
        if plane.shape[-2] > 1:
            op.freeze_planes([plane], "attention over an axis with channels")
        else:
            kept += (through(op, plane, Kind.CARRY),)
    return [kept]


def _count_attention(op: Op, query: Tensor, key: Tensor, value: Tensor) -> None:
    for tensor in (query, value):
        planes = op.planes(tensor)
        batch, factors = op.record.leading_factors(planes, query.shape[:-2])
        factors += op.record.axis_factors(planes, -1, tensor.shape[-1])
        op.record.macs.append(MacTerm(batch * query.shape[-2] * key.shape[-2], factors))


def embedding(op: Op) -> Sequence[Planes]:
    """Rows of a table, or sums of them: its last dimension produces channels.

    Of a table that is no weight they are picked, as by any index: channels along its rows stay.
    """
    weight, index = op.args[0], op.args[1]
    op.freeze([index], "channels are used as an index")
    op.freeze(op.tensors()[2:], "channels weigh the rows of a table")
    planes = op.planes(weight)
    op.freeze_planes([p for p in planes if p.shape[0] > 1], "channels are picked by index")
    output = next(tensors_in(op.output))
    is_weight = weights_only(op)
    for plane in (p for p in planes if p.shape[0] == 1):
        plane = plane.reshape([1] * (output.dim() - 1) + [-1])
        if is_weight(plane):
            labels = labels_of(plane)
            key = caller(op, weight, plane)
            node = add_producer(op, key, labels, weight=plane, is_plain=True)
            return [(pack(labels, node),)]
        if op.name == "embedding":
            return [(plane,)]
        return [(through(op, plane, Kind.CARRY),)]
    return []


_ATTENTION = """
_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention
_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
_scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math
scaled_dot_product_attention
"""

RULES: dict[str, Rule] = {
    "mm": product,
    "bmm": product,
    "matmul": product,
    "addmm": added_product,
    "_sparse_addmm": sparse_product,
    "baddbmm": added_product,
    "linear": linear,
    "add": added,
    **dict.fromkeys(("_euclidean_dist", "_cdist_forward", "cdist"), distances),
    **dict.fromkeys(("embedding", "_embedding_bag", "_embedding_bag_forward_only"), embedding),
    **dict.fromkeys(_ATTENTION.split(), attention),
}
