"""Reading and writing by index: fine along axes without channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from slimcli.network.structure.planes import move, squeeze_equal
from slimcli.network.structure.rules_movement import frozen, without
from slimcli.network.structure.rules_pointwise import joined_across
from slimcli.network.structure.rules_spatial import bordered
from slimcli.network.structure.trace import NO_PLANES, Op, Planes, Rule


def indexed(op: Op) -> Sequence[Planes]:
    """``x[indices]``: fine unless the indices go along an axis with channels."""
    tensor, indices = op.args[0], list(op.args[1])
    axes: list[int] = []
    position = 0
    for index in indices:
        width = index.dim() if index is not None and index.dtype == torch.bool else 1
        axes += list(range(position, position + width)) if index is not None else []
        position += width
    planes = without(op, op.planes(tensor), axes, "channels are picked by index")
    op.freeze(indices, "channels are used as an index")
    indices = [None if index is None else index.cpu() for index in indices]
    result: Planes = NO_PLANES
    for plane in planes:
        result += (move(plane, tensor.shape, lambda full: op.func(full, indices)),)
    return [tuple(squeeze_equal(plane) for plane in result)]


def gathered(op: Op) -> Sequence[Planes]:
    """``gather`` and ``index_select`` along an axis without channels."""
    tensor = op.args[0]
    axis, index = op.args[1] % tensor.dim(), op.args[2]
    planes = without(op, op.planes(tensor), [axis], "channels are picked by index")
    op.freeze([index], "channels are used as an index")
    return [
        tuple(
            squeeze_equal(op.func(plane.expand(tensor.shape), axis, index.cpu()))
            for plane in planes
        )
    ]


def put(op: Op) -> Sequence[Planes]:
    """``x[indices] = values`` where the indices go along the first axes, without channels there.

    Where nothing is written ``x`` stays what it was: zero, channels, or anything.
    """
    target, indices, values = op.args[0], list(op.args[1]), op.args[2]
    op.freeze([index for index in indices if index is not None], "channels are used as an index")
    if any(index is None for index in indices) or op.arg(3, "accumulate", False):
        return frozen(op, WRITTEN)
    first = sum(index.dim() if index.dtype == torch.bool else 1 for index in indices)
    old = without(op, op.planes(target), range(first), WRITTEN)
    if values.dim() == 0:
        return [bordered(op, old, is_zero=bool(values == 0))]
    new: Planes = NO_PLANES
    for plane in op.planes(values):
        lead = max(plane.dim() - target.dim() + first, 0)
        if any(size > 1 for size in plane.shape[:lead]):
            op.freeze_planes([plane], WRITTEN)
            continue
        axes = list(plane.shape[lead:])
        new += (plane.reshape([1] * (target.dim() - len(axes)) + axes),)
    if op.tracer.is_blank(target):
        return [bordered(op, new, is_zero=True)]
    return [joined_across(op, [(target, old), (target, new)], -1, stacks=False)]


WRITTEN = "channels are written by index"

RULES: dict[str, Rule] = {
    "index": indexed,
    "gather": gathered,
    "index_select": gathered,
    "index_put": put,
    "_unsafe_index_put": put,
}
