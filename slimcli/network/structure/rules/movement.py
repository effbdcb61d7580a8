"""Operators that move data: executed on the labels themselves.

Where one divides an axis with channels into blocks, the blocks must shrink together (``Split``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slimcli.network.nested import tensors_in
from slimcli.network.structure import user_line
from slimcli.network.structure.nodes import Kind, Node
from slimcli.network.structure.planes import (
    active_axes,
    entries,
    labels_of,
    pack,
    split_blocks,
    squeeze_equal,
    view,
    with_leading_axes,
)
from slimcli.network.structure.record import Least, Split
from slimcli.network.structure.rules.pointwise import combine_nodes, mapped
from slimcli.network.structure.trace import NO_PLANES, ONE_PICKED, Op, Planes, Rule


def same(op: Op) -> Sequence[Planes]:
    """The output has the labels of the first argument."""
    return [op.planes(op.args[0])]


def restrided(op: Op) -> Sequence[Planes]:
    """``as_strided_`` of pooled pixels: only the strides of axes of size one change.

    Pooling to one pixel ends so where the memory format is channels last. What the strides were
    before is not known any more, so that an image of more pixels is not followed.
    """
    tensor, size, stride = op.args[0], list(op.args[1]), list(op.args[2])
    planes, dense = op.planes(tensor), torch.empty(size, device="meta").stride()
    is_pixel = len(size) > 2 and all(n == 1 for n in size[2:])
    is_dense = all(n == 1 or a == b for n, a, b in zip(size, stride, dense, strict=True))
    is_same = all(plane.dim() == len(size) for plane in planes) and list(tensor.shape) == size
    if not (is_pixel and is_dense and is_same and op.output is tensor):
        op.freeze([tensor], f"{op.name} reads memory in an order of its own")
        return []
    return [planes]


def squeezed(op: Op) -> Sequence[Planes]:
    """``squeeze``; without an axis, or with that of the channels, two of them must stay."""
    dims = len(op.size)
    told = op.arg(1, "dim", range(dims))
    axes = {axis % dims for axis in ([told] if isinstance(told, int) else told)}
    for plane in op.planes(op.args[0]):
        for axis in axes & set(active_axes(plane)):
            labels = op.record.axis_labels([plane], axis, plane.shape[axis])
            op.record.least.append(Least(labels, 2, user_line.current()))
    return executed(op)


def executed(op: Op) -> Sequence[Planes]:
    """The operator itself is run on each plane."""
    return moved_planes(op, op.planes(op.args[0]))


def viewed(op: Op) -> Sequence[Planes]:
    """View and reshape."""
    tensor, output = op.args[0], op.output
    if tensor.dtype != output.dtype or tensor.numel() == 0:
        return frozen(op, "the bits are reinterpreted")
    result: Planes = NO_PLANES
    for plane in op.planes(tensor):
        line = note_line(op, plane)
        blocks = split_blocks(plane, tensor.shape, output.shape)
        if any(size is None for _, size in blocks):
            op.freeze_planes([plane], "channels are cut apart by a reshape")
            continue
        for axis, size in blocks:
            assert size is not None
            add_split(op, plane, axis, size, line)
        moved = view(plane, tensor.shape, output.shape)
        result += (squeeze_equal(moved) if blocks else moved,)
    return [result]


def note_line(op: Op, plane: Tensor) -> str:
    """Remembers that these channels pass here, for errors that come up after a cut."""
    line = user_line.current()
    op.record.lines.append((line, entries(labels_of(plane))))
    return line


def add_split(op: Op, plane: Tensor, axis: int, size: int, line: str) -> None:
    """An axis is divided into blocks of ``size`` entries.

    Nothing is to be decided where all of a block is one channel, as where pixels are told from
    channels that lay beside them.
    """
    labels = labels_of(plane).movedim(axis, 0)
    blocks = labels.reshape(labels.shape[0] // size, size, -1)
    if size > 1 and bool((blocks == blocks[:, :1]).all()):
        op.record.turns = True
        return
    offsets = blocks[:1].expand_as(blocks)
    firsts = blocks[:, :1].expand_as(blocks)
    flat = blocks.reshape(-1).numpy()
    op.record.splits.append(
        Split(
            line,
            size,
            (flat, offsets.reshape(-1).numpy()),
            (flat, firsts.reshape(-1).numpy()),
        )
    )


def divided(op: Op) -> Sequence[Planes]:
    """Split and chunk: equal blocks shrink together; unequal ones are constants in the code."""
    tensor = op.args[0]
    axis = op.arg(2, "dim", 0) % tensor.dim()
    sizes = [each.shape[axis] for each in tensors_in(op.output)]
    planes: Planes = NO_PLANES
    for plane in op.planes(tensor):
        if plane.shape[axis] > 1 and len(sizes) > 1:
            line = note_line(op, plane)
            if len(set(sizes)) > 1:
                op.freeze_planes([plane], "channels are split at fixed sizes")
                continue
            if sizes[0] == 1 and _is_alone(plane, axis):
                for each in tensors_in(op.output):
                    op.tracer.pick(each, plane)
                continue
            add_split(op, plane, axis, sizes[0], line)
        planes += (plane,)
    return moved_planes(op, planes)


def moved_planes(op: Op, planes: Planes) -> Sequence[Planes]:
    """The operator run on these planes of its first argument."""
    outputs = [NO_PLANES for _ in tensors_in(op.output)]
    for plane in planes:
        moved = op.func(plane.expand(op.size), *op.args[1:], **op.kwargs)
        for index, each in enumerate(tensors_in(moved)):
            outputs[index] += (squeeze_equal(each),)
    return outputs


def halves(op: Op) -> Sequence[Planes]:
    """``glu``: the first half times the sigmoid of the second."""
    tensor = op.args[0]
    axis = op.arg(1, "dim", -1) % tensor.dim()
    planes = op.planes(tensor)
    if any(plane.shape[axis] == 1 for plane in planes):
        return [tuple(mapped(op, plane, keeps_zero=True) for plane in planes)]
    result: Planes = NO_PLANES
    add = op.record.table.add
    for plane in planes:
        half = plane.shape[axis] // 2
        add_split(op, plane, axis, half, note_line(op, plane))
        value, gate = plane.narrow(axis, 0, half), plane.narrow(axis, half, half)
        op.record.join(value, gate)
        nodes = combine_nodes(
            [value.contiguous(), gate.contiguous()],
            lambda parents: add(Node(Kind.COMBINE, parents, (True, False), how="glu")),
        )
        result += (pack(labels_of(value), nodes),)
    return [result]


def sliced(op: Op) -> Sequence[Planes]:
    """``x[:, a:b]``: a block of an axis with channels; step 1 and aligned, or frozen."""
    tensor = op.args[0]
    axis = op.arg(1, "dim", 0) % tensor.dim()
    start, step = op.arg(2, "start", 0) or 0, op.arg(4, "step", 1)
    total, size = tensor.shape[axis], op.output.shape[axis]
    start = max(start + total, 0) if start < 0 else start
    planes: Planes = NO_PLANES
    for plane in op.planes(tensor):
        if plane.shape[axis] > 1 and size != total:
            line = note_line(op, plane)
            if not _is_block(start, step, size, total) or _is_run(plane, axis, step):
                op.freeze_planes([plane], "channels are sliced at fixed places")
                continue
            if size == 1 and _is_alone(plane, axis):  # ``x[:, :c // 4]`` with few channels
                op.tracer.pick(op.output, plane)
                continue
            if step == 1:
                add_split(op, plane, axis, size, line)
            else:
                _add_stride(op, plane, axis, step, line)
        planes += (plane,)
    return moved_planes(op, planes)


def _is_block(start: int, step: int, size: int, total: int) -> bool:
    if size == 0 or total % size:
        return False
    return start % size == 0 if step == 1 else step * size == total


def _is_run(plane: Tensor, axis: int, step: int) -> bool:
    """Do more entries in a row belong to one channel than a step, as pixels of flattened images?

    How many they are hangs on the image. Where one channel, or none yet, is all along the axis, as
    in a canvas of pixels, it is no axis of channels.
    """
    if step == 1:
        return False
    labels = labels_of(plane).movedim(axis, 0)
    is_same = (labels[step::step] == labels[step - 1 : -1 : step]) & (labels[step::step] != 0)
    is_channel = ((labels != labels.amax(0)) & (labels != 0)).any(0)
    return bool((is_same & is_channel).any())


def _add_stride(op: Op, plane: Tensor, axis: int, step: int, line: str) -> None:
    """``x[:, i::step]``: neighbours belong together."""
    labels = labels_of(plane).movedim(axis, 0)
    blocks = labels.reshape(labels.shape[0] // step, step, -1)
    pairs = (blocks.reshape(-1).numpy(), blocks[:, :1].expand_as(blocks).reshape(-1).numpy())
    op.record.splits.append(Split(line, step, pairs, pairs))


def picked(op: Op) -> Sequence[Planes]:
    """``select`` and ``unbind``: one index of an axis."""
    tensor = op.args[0]
    axis = op.arg(1, "dim", 0) % tensor.dim()
    planes: Planes = NO_PLANES
    for plane in op.planes(tensor):
        if plane.shape[axis] > 1:
            line = note_line(op, plane)
            if _is_alone(plane, axis):
                op.freeze_planes([plane], ONE_PICKED)
                continue
            add_split(op, plane, axis, 1, line)
        planes += (plane,)
    return moved_planes(op, planes)


def _is_alone(plane: Tensor, axis: int) -> bool:
    return active_axes(plane) == (axis,)


def without(op: Op, planes: Planes, axes: Sequence[int], reason: str) -> Planes:
    """Planes without labels along these axes; the others are frozen."""
    kept: Planes = NO_PLANES
    for plane in planes:
        if any(plane.shape[axis] > 1 for axis in axes):
            op.freeze_planes([plane], reason)
        else:
            kept += (plane,)
    return kept


def shuffled(op: Op) -> Sequence[Planes]:
    """``channel_shuffle``: blocks of axis 1 are interleaved, so that they shrink together."""
    groups = int(op.args[1])
    result: Planes = NO_PLANES
    for plane in op.planes(op.args[0]):
        size = plane.shape[1]
        if size > 1:
            add_split(op, plane, 1, size // groups, note_line(op, plane))
            blocks = plane.reshape(plane.shape[0], groups, size // groups, *plane.shape[2:])
            plane = blocks.transpose(1, 2).reshape(plane.shape)
        result += (plane,)
    return [result]


def repeated(op: Op) -> Sequence[Planes]:
    """``repeat``: executed along axes with channels only."""
    repeats = list(op.args[1])
    result: Planes = NO_PLANES
    for plane in op.planes(op.args[0]):
        padded = with_leading_axes(plane, len(repeats))
        counts = [r if n > 1 else 1 for r, n in zip(repeats, padded.shape, strict=True)]
        result += (padded.repeat(counts),)
    return [result]


def unfolded(op: Op) -> Sequence[Planes]:
    """``x.unfold``: windows along one axis, their places along a new last one."""
    tensor = op.args[0]
    planes = without(op, op.planes(tensor), [op.args[1] % tensor.dim()], "windows over channels")
    return [tuple(plane.unsqueeze(-1) for plane in planes)]


def frozen(op: Op, reason: str) -> Sequence[Planes]:
    """All arguments are frozen."""
    op.freeze(op.tensors(), reason)
    return []


def nothing(op: Op) -> Sequence[Planes]:
    """The output tells nothing about channels (a number read by Python, an empty tensor)."""
    return []


_SAME = """
clone contiguous detach alias lift lift_fresh lift_fresh_copy to _conj _neg_view
resolve_conj resolve_neg view_as _autocast_to_full_precision _autocast_to_reduced_precision positive
"""
_EXECUTED = """
permute transpose t expand unsqueeze movedim moveaxis pixel_shuffle pixel_unshuffle
"""
_VIEWS = """
view _unsafe_view reshape _reshape_alias unflatten flatten
"""
_DIVISIONS = """
split split_with_sizes chunk unsafe_split unsafe_chunk split_with_sizes_copy
"""
_SAYING_NOTHING = """
_local_scalar_dense is_same_size sym_size is_nonzero equal
"""

RULES: dict[str, Rule] = {
    **dict.fromkeys(_SAME.split(), same),
    "as_strided": restrided,
    "squeeze": squeezed,
    **dict.fromkeys(_EXECUTED.split(), executed),
    **dict.fromkeys(_VIEWS.split(), viewed),
    **dict.fromkeys(_DIVISIONS.split(), divided),
    "glu": halves,
    **dict.fromkeys(("slice", "narrow_copy"), sliced),
    **dict.fromkeys(("select", "unbind"), picked),
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), shuffled),
    "repeat": repeated,
    "unfold": unfolded,
    **dict.fromkeys(_SAYING_NOTHING.split(), nothing),
}
