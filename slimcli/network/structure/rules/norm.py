"""Normalisation, reductions, softmax, sorting: a statistic over channels freezes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from slimcli.network import attributes
from slimcli.network.nested import tensors_in
from slimcli.network.structure.nodes import Kind, Node
from slimcli.network.structure.planes import (
    active_axes,
    axis_entries,
    labels_of,
    nodes_of,
    pack,
)
from slimcli.network.structure.producing import add_sum
from slimcli.network.structure.record import Record
from slimcli.network.structure.rules.pointwise import arbitrary, combine_nodes, mapped, through
from slimcli.network.structure.trace import NO_PLANES, Op, Planes, Rule


def channel_rows(op: Op, plane: Tensor, axis: int) -> Tensor:
    """The packed entry of each index along an axis; what else occurs there is joined to it."""
    if plane.numel() == plane.shape[axis]:
        return plane.reshape(-1)
    return one_of_each(op.record, axis_entries(plane, axis))


def one_of_each(record: Record, rows: Tensor) -> Tensor:
    """The first entry of each row, joined with the rest of it.

    Where a row has different entries (pixel shuffle puts four channels into one), its value is not
    the same number everywhere, even if each of them is.
    """
    first = rows[:, 0]
    if rows.shape[1] == 1:
        return first
    record.join(rows[:, :1], rows)
    uneven = (rows != rows[:, :1]).any(1)
    if not bool(uneven.any()):
        return first
    nodes = nodes_of(first).clone()
    for row in torch.nonzero(uneven).flatten().tolist():
        parents = tuple(node for node in torch.unique(nodes_of(rows[row])).tolist() if node)
        nodes[row] = record.table.add(Node(Kind.JOIN, parents)) if parents else 0
    return pack(labels_of(first), nodes)


def batch_norm(op: Op) -> Sequence[Planes]:
    """Per-channel statistics along axis 1; its parameters and statistics belong to the channels."""
    tensor = op.args[0]
    path, module = op.tracer.calls.top()
    is_module = isinstance(module, attributes.BatchNorm)
    if is_module:
        op.tracer.calls.normed(tensor, path)
    measured = _measures(op)
    result: Planes = NO_PLANES
    tied = False
    for plane in op.planes(tensor):
        if plane.shape[1] == 1:
            if measured:
                op.freeze_planes([plane], "a norm measures statistics over channels")
            result += arbitrary(op, (plane,))  # each place along axis 1 has its own shift
            continue
        tied = True
        rows = channel_rows(op, plane, 1)
        _tie_vectors(op, rows, op.args[1:5])
        if measured and op.args[2] is None:  # its own mean and no shift: zero stays zero
            result += (mapped(op, plane, keeps_zero=True),)
            continue
        name, how = (path, "") if is_module else ("", op.record.table.one_time())
        result += (through(op, plane, Kind.AFFINE, name=name, how=how),)
    if not tied:
        op.freeze(op.args[1:5], "a norm reads a tensor of fixed size")
    return [result]


def _measures(op: Op) -> bool:
    training = [arg for arg in op.args if isinstance(arg, bool)]
    measures = bool(training and training[0])
    return measures or op.args[3] is None or "no_stats" in str(op.func.name())


def _tie_vectors(op: Op, rows: Tensor, vectors: Sequence[Tensor | None]) -> None:
    labels = labels_of(rows).numpy()
    for vector in vectors:
        if vector is None:
            continue
        planes = op.planes(vector)
        other = labels_of(planes[0]).numpy().reshape(-1) if planes else np.zeros_like(labels)
        op.record.tie_labels(labels, other, "a norm reads a tensor of fixed size")


def layer_norm(op: Op) -> Sequence[Planes]:
    """Statistics over the last axes."""
    return _over_axes(
        op, range(-len(op.args[1]), 0), "layer norm measures statistics over channels"
    )


def group_norm(op: Op) -> Sequence[Planes]:
    """Statistics over blocks of axis 1; a block of one channel is that channel's own affair."""
    size, groups = int(op.args[4]), int(op.args[6])
    if size == groups and all(plane.shape[1] > 1 for plane in op.planes(op.args[0])):
        for plane in op.planes(op.args[0]):
            _tie_vectors(op, channel_rows(op, plane, 1), op.args[1:3])
        return [tuple(_shifted(op, plane) for plane in op.planes(op.args[0]))]
    reason = "group norm measures statistics over channels"
    return _over_axes(op, range(1, op.args[0].dim()), reason)


def _over_axes(op: Op, axes: Sequence[int], reason: str) -> Sequence[Planes]:
    tensor = op.args[0]
    over = {axis % tensor.dim() for axis in axes}
    rest = op.tensors()[1:]
    result: Planes = NO_PLANES
    for plane in op.planes(tensor):
        if over & set(active_axes(plane)):
            op.freeze_planes([plane], reason)
        elif rest:  # each place has its own scale and shift: what a zero becomes is no one number
            result += arbitrary(op, (plane,))
            continue
        result += (_shifted(op, plane),)
    op.freeze(rest, reason)
    return [result]


def _shifted(op: Op, plane: Tensor) -> Tensor:
    """Behind a norm whose shift is its own."""
    return through(op, plane, Kind.AFFINE, how=op.record.table.one_time())


def softmax(op: Op) -> Sequence[Planes]:
    """Softmax over an axis with channels freezes them.

    Elsewhere a zero gives one over n, and images of other sizes have another n.
    """
    axis = op.args[1] % op.args[0].dim()
    reason = f"{op.name.strip('_')} over channels"
    return [arbitrary(op, across(op, op.planes(op.args[0]), {axis}, reason))]


def bucketed(op: Op) -> Sequence[Planes]:
    """``bucketize`` and ``searchsorted``: for each number its place among sorted ones."""
    tensors = {"bucketize": op.args[:2], "searchsorted": op.args[1::-1]}[op.name]
    values, borders = tensors
    op.freeze([borders], f"channels are searched by {op.name}")
    if not isinstance(values, Tensor) or borders.dim() > 1:
        op.freeze([values], f"channels are searched by {op.name}")
        return []
    return [tuple(mapped(op, plane, keeps_zero=False) for plane in op.planes(values))]


def across(op: Op, planes: Planes, axes: set[int], reason: str) -> Planes:
    """Planes without labels along these axes: blocks laid along them are tied, channels frozen."""
    kept: Planes = NO_PLANES
    for plane in planes:
        active = set(active_axes(plane))
        if active & axes and not active - axes:
            op.freeze_planes([plane], reason)
            continue
        for axis in sorted(active & axes):
            first = plane.narrow(axis, 0, 1)
            op.record.join(first, plane)
            plane = _joined_nodes(op, plane, axis)
        kept += (plane,)
    return kept


def _joined_nodes(op: Op, plane: Tensor, axis: int) -> Tensor:
    pieces = [plane.narrow(axis, each, 1).contiguous() for each in range(plane.shape[axis])]
    return pack(labels_of(pieces[0]), combine_nodes(pieces, op.record.table.one_of))


def reduced(op: Op) -> Sequence[Planes]:
    """Mean, max, variance and their like."""
    tensor = op.args[0]
    axes = _reduced_axes(op)
    keepdim = op.output.dim() == tensor.dim() if isinstance(op.output, Tensor) else _keeps(op)
    reason = f"{op.name.removeprefix('linalg_')} over channels"
    planes = op.planes(tensor)
    if _sums_up(op):
        consumed = [p for p in planes if set(active_axes(p)) and set(active_axes(p)) <= axes]
        for plane in consumed:
            add_sum(op, plane)  # zeros may go, equal numbers can't be merged
            op.record.refuse_duplicates([plane], reason)
        planes = tuple(p for p in planes if all(p is not each for each in consumed))
    result: Planes = NO_PLANES
    for plane in across(op, planes, axes, reason):
        moved = _node_of_reduction(op, plane)
        if not keepdim:
            moved = moved.reshape([n for axis, n in enumerate(moved.shape) if axis not in axes])
        result += (moved,)
    return _with_places(op, result)


def _sums_up(op: Op) -> bool:
    """Do zeros make no difference to the result?

    They do to the least of all numbers, and to a sum of reciprocals: norms of orders below zero.
    """
    if op.name not in ("linalg_vector_norm", "norm"):
        return op.name == "sum"
    order = op.arg(1, "ord", 2)
    return order is None or order > 0


def _with_places(op: Op, planes: Planes) -> Sequence[Planes]:
    """For each output: values first, then the places where they were found."""
    results = [planes for _ in tensors_in(op.output)]
    if op.name.startswith("arg"):
        return [arbitrary(op, planes)]
    if len(results) == 2 and op.name in _PLACES.split():
        results[1] = arbitrary(op, planes)
    return results


def _node_of_reduction(op: Op, plane: Tensor) -> Tensor:
    """A zero stays zero or becomes another number.

    A sum, of one number, is as large as the image, and other images have other sizes.
    """
    if op.name in _SELECTING.split():
        return plane
    if op.name in _GROWING.split():
        return through(op, plane, Kind.CARRY)
    if op.name == "logsumexp":
        return arbitrary(op, (plane,))[0]
    return mapped(op, plane, keeps_zero=op.name in _SPREADS)


def _keeps(op: Op) -> bool:
    first = next(tensors_in(op.output))
    return bool(first.dim() == op.args[0].dim())


def _reduced_axes(op: Op) -> set[int]:
    tensor = op.args[0]
    index = 2 if op.name in ("linalg_vector_norm", "norm", "kthvalue") else 1
    dims = op.arg(index, "dim", -1 if op.name in ("mode", "kthvalue") else None)
    if dims is None or dims == []:
        return set(range(tensor.dim()))
    dims = [dims] if isinstance(dims, int) else dims
    return {dim % tensor.dim() for dim in dims}


def accumulated(op: Op) -> Sequence[Planes]:
    """``cumsum`` and its like along an axis without channels."""
    tensor = op.args[0]
    axis = op.args[1] % tensor.dim()
    result: Planes = NO_PLANES
    for plane in op.planes(tensor):
        if plane.shape[axis] > 1:
            op.freeze_planes([plane], f"{op.name} over channels")
        elif op.name == "logcumsumexp":  # of zeros: log(1), log(2), ...
            result += arbitrary(op, (plane,))
        else:
            result += (through(op, plane, Kind.CARRY),)
    return _with_places(op, result)


def sorted_along(op: Op) -> Sequence[Planes]:
    """``topk``, ``sort`` and ``argmax``: along an axis without channels they pass."""
    tensor = op.args[0]
    index = 2 if op.name == "topk" else 1
    axis = op.arg(index, "dim", None if op.name.startswith("arg") else -1)
    planes = op.planes(tensor)
    if axis is None or any(plane.shape[axis] > 1 for plane in planes):
        op.freeze_planes(planes, f"{op.name} over channels")
        return []
    first = next(tensors_in(op.output))
    if first.dim() != tensor.dim():
        planes = tuple(plane.squeeze(axis) for plane in planes)
    return _with_places(op, planes)


_REDUCTIONS = """
sum mean amax amin max min var std var_mean std_mean linalg_vector_norm norm prod logsumexp any all
count_nonzero nansum median nanmedian mode kthvalue aminmax
"""

_PLACES = """
max min median nanmedian mode kthvalue topk sort cummax cummin
"""  # they also tell where they found their values

_SELECTING = """
mean amax amin max min aminmax median nanmedian mode kthvalue
"""  # of equal numbers they give that number, however many they are

_SPREADS = frozenset(("var", "std", "var_mean"))
"""Of equal numbers they give zero."""

_GROWING = """
sum nansum linalg_vector_norm norm prod count_nonzero
"""  # of zeros they give zero; of other numbers it depends on how many they are

_BATCH_NORM = """
native_batch_norm cudnn_batch_norm miopen_batch_norm _native_batch_norm_legit
_native_batch_norm_legit_no_training _batch_norm_with_update _batch_norm_no_update
"""
_SOFTMAX = """
_softmax _log_softmax _safe_softmax softmax log_softmax
"""
_ACCUMULATIONS = """
cumsum cumprod cummax cummin logcumsumexp
"""
_SORTINGS = """
topk sort argsort argmax argmin msort
"""

RULES: dict[str, Rule] = {
    "native_layer_norm": layer_norm,
    "_fused_rms_norm": layer_norm,
    "rms_norm": layer_norm,
    "native_group_norm": group_norm,
    **dict.fromkeys(_BATCH_NORM.split(), batch_norm),
    **dict.fromkeys(_SOFTMAX.split(), softmax),
    **dict.fromkeys(("bucketize", "searchsorted"), bucketed),
    **dict.fromkeys(_REDUCTIONS.split(), reduced),
    **dict.fromkeys(_ACCUMULATIONS.split(), accumulated),
    **dict.fromkeys(_SORTINGS.split(), sorted_along),
}
