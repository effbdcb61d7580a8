"""Concatenation: executed along channels; what lies beside each other has the same channels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from slimcli.network.structure.planes import active_axes, broadcast, labels_of, pack
from slimcli.network.structure.producing import note_united
from slimcli.network.structure.record import Record
from slimcli.network.structure.rules.pointwise import combine_nodes
from slimcli.network.structure.trace import NO_PLANES, Op, Planes, Rule


def concatenated(op: Op) -> Sequence[Planes]:
    """``cat`` and ``stack``: executed along channels; pieces beside each other are tied."""
    tensors = [tensor for tensor in op.args[0] if tensor.numel()]
    dims = op.output.dim()
    axis = op.arg(1, "dim", 0) % dims
    stacks = op.name == "stack"
    along: list[Tensor | None] = []
    across: list[tuple[Tensor, Planes]] = []
    for tensor in tensors:
        planes = op.planes(tensor)
        if stacks:
            planes = tuple(plane.unsqueeze(axis) for plane in planes)
        here = [plane for plane in planes if plane.shape[axis] > 1]
        if len(here) > 1:
            op.freeze_planes(here, "two kinds of channels lie along a concatenated axis")
            here = []
        along.append(here[0] if here else None)
        across.append((tensor, tuple(plane for plane in planes if plane.shape[axis] == 1)))
    result = joined_across(op, across, axis, stacks)
    if any(plane is not None for plane in along):
        result += (_laid_along(along, [t.shape[axis] for t in tensors], axis),)
    return [result]


def _laid_along(planes: list[Tensor | None], sizes: list[int], axis: int) -> Tensor:
    known = [plane for plane in planes if plane is not None]
    shape = list(np.broadcast_shapes(*(tuple(p.narrow(axis, 0, 1).shape) for p in known)))
    parts = []
    for plane, size in zip(planes, sizes, strict=True):
        shape[axis] = size
        parts.append(
            torch.zeros(shape, dtype=torch.int64) if plane is None else plane.expand(shape)
        )
    return torch.cat(parts, axis)


def joined_across(op: Op, pieces: list[tuple[Tensor, Planes]], axis: int, stacks: bool) -> Planes:
    """Planes that don't lie along the axis: pieces next to each other have the same channels.

    Args:
        op: For what is frozen.
        pieces: Each tensor with its planes, of as many axes as the result.
        axis: Where a stack has its new axis.
        stacks: The tensors have no such axis themselves.
    """
    first = next((planes for _, planes in pieces if planes), NO_PLANES)
    result: Planes = NO_PLANES
    for plane in first:
        axes = set(active_axes(plane))
        matching = [plane]
        for tensor, planes in pieces:
            match = [p for p in planes if set(active_axes(p)) == axes]
            sizes = tensor.unsqueeze(axis).shape if stacks else tensor.shape
            if match:
                matching += [p for p in match if p is not plane]
            elif any(sizes[a] > 1 for a in axes):
                op.freeze_planes([plane], "channels are laid beside a tensor of fixed size")
                matching = []
                break
        if matching:
            note_united(op, broadcast(matching))
            result += (_beside(op.record, matching),)
    for _, planes in pieces:
        odd = [p for p in planes if all(active_axes(p) != active_axes(q) for q in first)]
        op.freeze_planes(odd, "channels are laid beside a tensor of fixed size")
    return result


def _beside(record: Record, planes: list[Tensor]) -> Tensor:
    for other in planes[1:]:
        record.tie(planes[0], other, "channels meet fixed values")
    if len(planes) == 1:
        return planes[0]
    nodes = combine_nodes([plane.contiguous() for plane in planes], record.table.one_of)
    return pack(labels_of(planes[0]), nodes)


RULES: dict[str, Rule] = {"cat": concatenated, "stack": concatenated}
