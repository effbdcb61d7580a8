"""Convolutions: labels end at the weight's input dimension and start at its output dimension."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from slimcli.network.structure.nodes import Kind, Node
from slimcli.network.structure.planes import LABEL_MASK, labels_of, nodes_of, pack
from slimcli.network.structure.producing import (
    SEVERAL_KINDS,
    add_consumer,
    add_producer,
    caller,
    is_made,
    note_unfollowed,
    of_activations,
    only_plane,
    takes_up,
)
from slimcli.network.structure.record import MacTerm, Producer
from slimcli.network.structure.rules.norm import channel_rows
from slimcli.network.structure.rules.pointwise import map_nodes
from slimcli.network.structure.trace import NO_PLANES, Op, Planes, Rule

FIXED_INPUT = "it reads a tensor of fixed size (the model's input or computed values)"
FIXED_WEIGHT = "it meets a weight whose channels are fixed"


def convolution(op: Op) -> Sequence[Planes]:
    """``aten::convolution`` and its variants: dense, grouped, depthwise, transposed."""
    tensor, weight = op.args[0], op.args[1]
    groups, transposed = int(op.args[8]), bool(op.args[6])
    unbatched = tensor.dim() == weight.dim() - 1
    if unbatched:
        return _refuse(op, "a convolution without a batch axis")
    inputs = _channel_plane(op, tensor)
    out_dim, in_dim = (1, 0) if transposed else (0, 1)
    _count(op)
    if (
        groups > 1
        and weight.shape[1] == 1
        and groups == tensor.shape[1]
        and weight.shape[0] >= groups
    ):
        return _depthwise(op, inputs, weight, groups)
    arriving = only_plane(op, weight, in_dim)
    leaving = only_plane(op, weight, out_dim)
    _connect(op, inputs, arriving, groups, transposed)
    outputs = _outputs(op, leaving, groups, transposed)
    op.tracer.calls.produced(op.output, caller(op, weight, leaving))
    return [_carried(op, tensor) + outputs]


def deformable(op: Op) -> Sequence[Planes]:
    """``torchvision.ops.deform_conv2d``: a convolution whose places of reading are computed."""
    tensor, weight, offset, mask, bias = op.args[:5]
    groups, offset_groups = op.args[11], op.args[12]
    op.freeze([offset, mask], "channels are used as sampling positions")
    if offset_groups > 1:
        for plane in op.planes(tensor):
            if plane.shape[1] > 1:
                blocks = channel_rows(op, plane, 1).view(offset_groups, -1)
                op.record.join(blocks[:1], blocks)
    bias = None if op.tracer.is_blank(bias) else bias
    pads = (1, 1)  # whatever they are: off the image it reads zeros
    args = (tensor, weight, bias, op.args[5:7], pads, op.args[9:11], False, (0, 0), groups)
    return convolution(replace(op, args=args))


def _refuse(op: Op, reason: str) -> Sequence[Planes]:
    op.freeze(op.tensors(), reason)
    return []


def _channel_plane(op: Op, tensor: Tensor) -> Tensor | None:
    """The packed entry of each input channel, or None; labels along the image are frozen."""
    planes = op.planes(tensor)
    along = [each for each in planes if each.shape[1] == 1 and each.shape[0] == 1]
    op.freeze_planes(along, "a convolution runs along an axis with channels")
    found = of_activations(op, [each for each in planes if each.shape[1] > 1])
    if len(found) > 1:
        op.freeze_planes(found, SEVERAL_KINDS)
    return found[0] if len(found) == 1 else None


def _carried(op: Op, tensor: Tensor) -> Planes:
    """Channels folded into the batch axis pass, each mixed with itself only."""
    planes = [plane for plane in op.planes(tensor) if plane.shape[0] > 1 and plane.shape[1] == 1]
    if not planes:
        return NO_PLANES
    add = op.record.table.add
    flags, how = (op.args[2] is not None, _spoils_constants(op)), op.record.table.one_time()

    def node(parent: int) -> int:
        answer = add(Node(Kind.DEPTHWISE, (parent,), flags, how=how))
        if op.output.shape[1] == 1:
            return answer
        return add(Node(Kind.BORDER, (answer,)))  # of each output another bias, and another sum

    result: Planes = NO_PLANES
    for plane in planes:
        if plane.numel() > plane.shape[0]:
            op.freeze_planes([plane], "a convolution runs along an axis with channels")
        else:
            result += (map_nodes(plane, node),)
    return result


def _spoils_constants(op: Op) -> bool:
    """Is the answer of each channel to one number an image?

    At the border zeros are met, and a transposed conv reaches pixels by parts of its kernel.
    """
    return any(op.args[4]) or bool(op.args[6])


def _connect(
    op: Op, plane: Tensor | None, arriving: Tensor | None, groups: int, transposed: bool
) -> None:
    """Ties the input channels to the weight's input dimension, group by group."""
    size = op.args[0].shape[1]
    if plane is None:
        if arriving is not None:
            op.freeze_planes([arriving], FIXED_INPUT)
        return
    rows = channel_rows(op, plane, 1)
    if arriving is None:
        if size > 1:
            op.freeze_planes([plane], FIXED_WEIGHT)
        return
    wanted = arriving.reshape(-1)
    blocks = wanted.view(groups, -1) if transposed else wanted.view(1, -1).expand(groups, -1)
    by_group = rows.view(groups, -1)
    if groups > 1:
        op.record.join(blocks[:1], blocks)
        op.record.join(by_group[:1], by_group)
    pairs = np.stack([each.numpy().reshape(-1) for each in (by_group, blocks)]) & LABEL_MASK
    op.record.tie_labels(pairs[0], pairs[1], FIXED_INPUT)
    path = caller(op, op.args[1], arriving)
    absorbs = takes_up(op, path, arriving, op.args[0]) and _answers_evenly(op, transposed)
    add_consumer(
        op,
        path,
        rows,
        pairs,
        takes_constants=absorbs,
        is_plain=groups == 1,
    )


def _answers_evenly(op: Op, transposed: bool) -> bool:
    """Is the answer to a constant input the same number everywhere?"""
    stride, padding, more = op.args[3], op.args[4], op.args[7]
    if transposed and (max(op.args[1].shape[2:]) > 1 or max(stride) > 1 or any(more)):
        return False
    return not any(padding)


def _outputs(op: Op, leaving: Tensor | None, groups: int, transposed: bool) -> Planes:
    """Fresh values under the labels of the weight's output dimension."""
    size = op.output.shape[1]
    bias = op.args[2]
    if leaving is None:
        if size > 1:
            op.freeze([bias], FIXED_WEIGHT)
        note_unfollowed(op, size)
        return NO_PLANES
    labels = labels_of(leaving).reshape(-1)
    labels = labels.repeat(groups) if transposed else labels
    if groups > 1:
        blocks = labels.view(groups, -1)
        op.record.join(blocks[:1], blocks)
    if bias is not None:
        planes = op.planes(bias)
        other = planes[0].reshape(-1) if planes else torch.zeros_like(labels)
        op.record.tie(labels, other, FIXED_WEIGHT)
    key = caller(op, op.args[1], leaving)
    node = add_producer(op, key, labels, weight=leaving, is_plain=groups == 1, bias=bias)
    shape = [1] * op.output.dim()
    shape[1] = size
    return (pack(labels, node).view(shape),)


def _depthwise(op: Op, plane: Tensor | None, weight: Tensor, groups: int) -> Sequence[Planes]:
    """Every channel by itself; with a multiplier all outputs of a channel go with it."""
    fitted = [each for each in op.planes(weight) if is_made(op, each)]
    leaving = fitted[0] if len(fitted) == 1 else only_plane(op, weight, 0)
    if plane is None:
        op.freeze([weight, op.args[2]], FIXED_INPUT)
        return []
    rows = channel_rows(op, plane, 1)
    multiplier = op.output.shape[1] // groups
    spread = rows.repeat_interleave(multiplier)
    labels = torch.zeros_like(spread) if leaving is None else labels_of(leaving).reshape(-1)
    op.record.tie(spread, labels, FIXED_WEIGHT)
    if op.args[2] is not None:
        bias = op.planes(op.args[2])
        op.record.tie(
            spread, bias[0].reshape(-1) if bias else torch.zeros_like(spread), FIXED_WEIGHT
        )
    flags = (op.args[2] is not None, _spoils_constants(op))
    key = "" if fitted else caller(op, weight, leaving)
    how = op.record.table.one_time() if fitted else ""
    shape = [1] * op.output.dim()
    shape[1] = spread.numel()
    add = op.record.table.add
    out = map_nodes(spread, lambda n: add(Node(Kind.DEPTHWISE, (n,), flags, name=key, how=how)))
    out = pack(torch.where(labels == 0, labels_of(spread), labels), nodes_of(out))
    if fitted:
        return [(out.view(shape),)]
    numbers = labels_of(out).numpy()
    op.record.layers.setdefault(key, numbers)
    if not key.startswith("tensor:"):
        order = op.record.next_order()
        biases = tuple(labels_of(plane).numpy() for plane in op.planes(op.args[2]))
        op.record.depthwise.append(Producer(order, key, numbers, multiplier == 1, biases))
    op.tracer.calls.produced(op.output, key)
    return [(out.view(shape),)]


def _count(op: Op) -> None:
    tensor, weight = op.args[0], op.args[1]
    places = tensor.shape[2:] if op.args[6] else op.output.shape[2:]
    samples, factors = op.record.leading_factors(op.planes(tensor), tensor.shape[:1])
    for dim in (0, 1):
        factors += (op.record.axis_labels(op.planes(weight), dim, weight.shape[dim]),)
    scale = samples * math.prod(places) * math.prod(weight.shape[2:])
    op.record.macs.append(MacTerm(scale, factors))


RULES: dict[str, Rule] = {
    "convolution": convolution,
    "_convolution": convolution,
    "torchvision::deform_conv2d": deformable,
}
