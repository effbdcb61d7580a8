"""Reading by index: fine along axes without channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slimcli.network.structure.nodes import Kind, Node
from slimcli.network.structure.planes import (
    active_axes,
    broadcast,
    labels_of,
    move,
    pack,
    squeeze_equal,
)
from slimcli.network.structure.rules.movement import without
from slimcli.network.structure.rules.pointwise import combine_nodes
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


def selected(op: Op) -> Sequence[Planes]:
    """``index_select`` along an axis without channels."""
    tensor = op.args[0]
    axis = op.args[1] % tensor.dim()
    op.freeze([op.args[2]], "channels are used as an index")
    return [without(op, op.planes(tensor), [axis], "channels are picked by index")]


def gathered(op: Op) -> Sequence[Planes]:
    """``gather`` along an axis without channels; each channel may have places of its own."""
    tensor, index = op.args[0], op.args[2]
    axis = op.args[1] % max(tensor.dim(), 1)
    planes = without(op, op.planes(tensor), [axis], "channels are picked by index")
    places = without(op, op.planes(index), [axis], "channels are used as an index")
    return [at_places(op, (tensor, planes), (index, places))]


Labelled = tuple[Tensor, Planes]
"""A tensor, and those of its planes that count."""


def at_places(op: Op, values: Labelled, index: Labelled) -> Planes:
    """Values that are read from, or written to, places of which each channel may have its own.

    Args:
        op: For what is frozen.
        values: The values.
        index: Numbers of the places, of as many axes; its planes are the channels' that they are
            for. Without any they are the same for all channels, or a cut raises an error.
    """
    result: Planes = NO_PLANES
    places = index[1]
    for value in values[1]:
        axes = active_axes(value)
        match = [plane for plane in places if set(active_axes(plane)) & set(axes)]
        places = tuple(plane for plane in places if all(plane is not each for each in match))
        if not match and all(index[0].shape[a] == values[0].shape[a] for a in axes):
            result += (value,)
        elif len(match) == 1 and active_axes(match[0]) == axes:
            result += (_gated(op, value, match[0]),)
        else:
            op.freeze_planes([value, *match], "channels meet a tensor of fixed size")
    op.freeze_planes(places, "channels are used as an index")
    return result


def _gated(op: Op, value: Tensor, place: Tensor) -> Tensor:
    """A zero stays one at whatever place."""
    op.record.tie(value, place, "channels meet fixed values")
    add = op.record.table.add
    wide = [plane.contiguous() for plane in broadcast([value, place])]
    nodes = combine_nodes(wide, lambda parents: add(Node(Kind.COMBINE, parents, (True, False))))
    return pack(labels_of(wide[0]), nodes)


RULES: dict[str, Rule] = {
    "index": indexed,
    "gather": gathered,
    "index_select": selected,
}
