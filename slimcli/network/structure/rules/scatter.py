"""Writing by index: fine along axes without channels.

Messages of a graph are summed so, boxes and windows are put in their places. Where nothing is
written the target stays what it was: zero, channels, or anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from slimcli.network.structure.rules.index import at_places
from slimcli.network.structure.rules.joining import joined_across
from slimcli.network.structure.rules.movement import frozen, without
from slimcli.network.structure.rules.pointwise import bordered, pointwise
from slimcli.network.structure.trace import NO_PLANES, Op, Planes, Rule

WRITTEN = "channels are written by index"
AS_INDEX = "channels are used as an index"


def put(op: Op) -> Sequence[Planes]:
    """``x[indices] = values`` where the indices go along neighbouring axes without channels."""
    target, indices, values = op.args[0], list(op.args[1]), op.args[2]
    if _is_mask(op, indices, values):
        args = (indices[0], values, target)
        return pointwise(replace(op, name="where", func=torch.ops.aten.where.self, args=args))
    op.freeze([index for index in indices if index is not None], AS_INDEX)
    place = _place(indices)
    if place is None:
        return frozen(op, WRITTEN)
    start, width, block = place
    old = without(op, op.planes(target), range(start, start + width), WRITTEN)
    if values.dim() == 0:
        return [bordered(op, old, is_zero=op.tracer.is_blank(values))]
    new: Planes = NO_PLANES
    rest = target.dim() - start - width
    for plane in op.planes(values):
        lead = start + block + rest - plane.dim()
        sizes = [1] * lead + list(plane.shape)
        if lead < 0 or any(size > 1 for size in sizes[start : start + block]):
            op.freeze_planes([plane], WRITTEN)
            continue
        new += (plane.reshape(sizes[:start] + [1] * width + sizes[start + block :]),)
    return [written(op, target, old, new)]


def _is_mask(op: Op, indices: Sequence[Tensor | None], values: Tensor) -> bool:
    """``x[x < 0] = 0``: one number wherever a mask with channels says so."""
    mask = indices[0]
    if len(indices) != 1 or mask is None or values.dim() or op.arg(3, "accumulate", False):
        return False
    return mask.shape == op.args[0].shape and bool(op.planes(mask))


def _place(indices: Sequence[Tensor | None]) -> tuple[int, int, int] | None:
    """Where the indices go: first axis, number of axes, axes of the values for them."""
    given = [number for number, index in enumerate(indices) if index is not None]
    if given != list(range(given[0], given[-1] + 1)):
        return None
    found = [index for index in indices if index is not None]
    is_mask = [index.dtype == torch.bool for index in found]
    width = sum(i.dim() if m else 1 for i, m in zip(found, is_mask, strict=True))
    block = max(1 if m else i.dim() for i, m in zip(found, is_mask, strict=True))
    return given[0], width, block


def written(op: Op, target: Tensor, old: Planes, new: Planes) -> Planes:
    """A tensor into which values were written or added in some places.

    Args:
        op: For what is frozen.
        target: What it was before, for its sizes.
        old: Its planes.
        new: Planes of the values, laid out like the target.
    """
    joined = new
    if old or not op.tracer.is_blank(target):  # zeros may be made as wide as other channels are
        joined = joined_across(op, [(target, old), (target, new)], -1, stacks=False)
    return bordered(op, joined, is_zero=True)


def scattered(op: Op) -> Sequence[Planes]:
    """``scatter`` and its reductions: each channel may have places of its own."""
    target, index, source = op.args[0], op.args[2], op.arg(3, "src", op.kwargs.get("value"))
    axis = op.args[1] % max(target.dim(), 1)
    places = without(op, op.planes(index), [axis], AS_INDEX)
    old = without(op, op.planes(target), [axis], WRITTEN)
    if not isinstance(source, Tensor):
        planes = bordered(op, old, is_zero=source == 0)
        return [at_places(op, (target, planes), (index, places))]
    new = without(op, op.planes(source), [axis], WRITTEN)
    return [written(op, target, old, at_places(op, (source, new), (index, places)))]


def added(op: Op) -> Sequence[Planes]:
    """``index_add``, ``index_copy``, ``index_reduce``: one index for whole slices."""
    target, index, source = op.args[0], op.args[2], op.args[3]
    axis = op.args[1] % max(target.dim(), 1)
    op.freeze([index], AS_INDEX)
    old = without(op, op.planes(target), [axis], WRITTEN)
    new = without(op, op.planes(source), [axis], WRITTEN)
    return [written(op, target, old, new)]


def filled(op: Op) -> Sequence[Planes]:
    """``index_fill``: one number in whole slices."""
    target, value = op.args[0], op.args[3]
    op.freeze([op.args[2]], AS_INDEX)
    old = without(op, op.planes(target), [op.args[1] % max(target.dim(), 1)], WRITTEN)
    is_zero = op.tracer.is_blank(value) if isinstance(value, Tensor) else value == 0
    return [bordered(op, old, is_zero=is_zero)]


def replaced(op: Op) -> Sequence[Planes]:
    """``slice_scatter`` and ``select_scatter``: a part along one axis is replaced."""
    target, source = op.args[0], op.args[1]
    axis = op.arg(2, "dim", 0) % target.dim()
    planes = op.planes(source)
    if op.name == "select_scatter":
        planes = tuple(plane.unsqueeze(axis) for plane in planes)
    old = without(op, op.planes(target), [axis], WRITTEN)
    return [written(op, target, old, without(op, planes, [axis], WRITTEN))]


RULES: dict[str, Rule] = {
    **dict.fromkeys(("index_put", "_unsafe_index_put", "_index_put_impl"), put),
    **dict.fromkeys(("scatter", "scatter_add", "scatter_reduce"), scattered),
    **dict.fromkeys(("index_add", "index_copy", "index_reduce"), added),
    "index_fill": filled,
    **dict.fromkeys(("slice_scatter", "select_scatter"), replaced),
}
