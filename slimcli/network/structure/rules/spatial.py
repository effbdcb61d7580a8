"""Pooling, resizing, padding: operators on the last axes that leave channels alone."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch

from slimcli.network.nested import tensors_in
from slimcli.network.structure.nodes import Kind
from slimcli.network.structure.rules.index import at_places
from slimcli.network.structure.rules.movement import without
from slimcli.network.structure.rules.norm import one_of_each
from slimcli.network.structure.rules.pointwise import arbitrary, bordered, through
from slimcli.network.structure.trace import NO_PLANES, Op, Planes, Rule


def passing(op: Op) -> Sequence[Planes]:
    """Zero stays zero and a constant stays constant (max pooling, resizing, reflecting)."""
    planes = off_image(op, _image_axes(op.name))
    places = arbitrary(op, planes)
    return [places if number else planes for number, _ in enumerate(tensors_in(op.output))]


def averaged(op: Op) -> Sequence[Planes]:
    """Average pooling: zeros that are padded and counted spoil a constant at the border."""
    padding = op.arg(3, "padding", [0])
    counts = op.arg(5, "count_include_pad", True)
    planes = off_image(op, _image_axes(op.name))
    uneven = op.arg(6, "divisor_override") is not None  # at the border fewer pixels are divided
    if uneven or (counts and any(padding if isinstance(padding, (list, tuple)) else [padding])):
        planes = bordered(op, planes, is_zero=True)
    return [planes]


def unpooled(op: Op) -> Sequence[Planes]:
    """``max_unpool2d``: zeros, and each value at the place that a pooling found for its channel."""
    values, index = op.args[0], op.args[1]
    axes = range(-_image_axes(op.name), 0)
    places = without(op, op.planes(index), axes, f"{op.name} along an axis with channels")
    planes = at_places(op, (values, off_image(op, len(axes))), (index, places))
    return [bordered(op, planes, is_zero=True)]


def folded(op: Op) -> Sequence[Planes]:
    """``fold``: the entries for all places of the kernel make one channel, a sum of them."""
    tensor, places = op.args[0], math.prod(op.args[2])
    result: Planes = NO_PLANES
    lead = tensor.dim() - 2
    for plane in without(op, op.planes(tensor), (*range(lead), -1), "channels lie along windows"):
        entries = one_of_each(op.record, plane.reshape(-1, places))
        summed = through(op, entries, Kind.CARRY)
        result += (summed.reshape([1] * lead + [-1, 1, 1]),)
    return [result]


def im2col(op: Op) -> Sequence[Planes]:
    """``unfold``: each channel becomes one entry for each place of the kernel."""
    planes, places = off_image(op, 2), math.prod(op.args[1])
    if any(op.args[3]):
        planes = bordered(op, planes, is_zero=True)
    result: Planes = NO_PLANES
    for plane in planes:
        flat = plane.reshape(plane.shape[:-2])
        many = flat.repeat_interleave(places, -1) if flat.shape[-1] > 1 else flat
        result += (many.unsqueeze(-1),)
    return [result]


def sampled(op: Op) -> Sequence[Planes]:
    """``grid_sample``: outside the image there are zeros."""
    op.freeze([op.args[1]], "channels are used as sampling positions")
    return [bordered(op, off_image(op, 2), is_zero=True)]


def regions(op: Op) -> Sequence[Planes]:
    """``roi_align`` and ``roi_pool``: zeros where a box leaves the image or holds no pixel."""
    op.freeze([op.args[1]], "channels are used as boxes")
    kept: Planes = NO_PLANES
    for plane in off_image(op, 2):
        if plane.shape[0] > 1:
            op.freeze_planes([plane], f"{op.name} along an axis with channels")
        else:
            kept += (plane,)
    planes = bordered(op, kept, is_zero=True)
    return [planes for _ in tensors_in(op.output)]


def padded(op: Op) -> Sequence[Planes]:
    """``constant_pad_nd``; new entries along an axis with channels have no label."""
    tensor, pads = op.args[0], list(op.args[1])
    value = op.arg(2, "value", 0) or 0
    result: Planes = NO_PLANES
    for plane in op.planes(tensor):
        spec: list[int] = []
        along = False
        for place in range(len(pads) // 2):
            axis = tensor.dim() - 1 - place
            here = plane.shape[axis] > 1
            along |= here and any(pads[2 * place : 2 * place + 2])
            spec += pads[2 * place : 2 * place + 2] if here else [0, 0]
        wide = torch.constant_pad_nd(plane, spec, 0) if along else plane
        # Pads of zero are those of this example: another image may get a border here.
        only_channels = along and spec == pads
        result += (wide,) if only_channels else bordered(op, (wide,), is_zero=value == 0)
    return [result]


def off_image(op: Op, count: int) -> Planes:
    """Planes of the first argument; those along the last ``count`` axes are frozen."""
    kept: Planes = NO_PLANES
    for plane in op.planes(op.args[0]):
        if any(size > 1 for size in plane.shape[plane.dim() - count :]):
            op.freeze_planes([plane], f"{op.name} along an axis with channels")
        else:
            kept += (plane,)
    return kept


def _image_axes(name: str) -> int:
    found = re.search(r"(\d)d", name)
    return int(found.group(1)) if found else 2


_PASSING = """
max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices
max_pool3d_with_indices adaptive_avg_pool1d adaptive_max_pool1d _adaptive_avg_pool2d
_adaptive_avg_pool3d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d
adaptive_max_pool3d mkldnn_max_pool2d fractional_max_pool2d upsample_nearest1d upsample_nearest2d
upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d
_upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad1d reflection_pad2d reflection_pad3d
replication_pad1d replication_pad2d replication_pad3d
"""

RULES: dict[str, Rule] = {
    **dict.fromkeys(_PASSING.split(), passing),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d"), averaged),
    **dict.fromkeys(("grid_sampler_2d", "grid_sampler_3d"), sampled),
    **dict.fromkeys(("torchvision::roi_align", "torchvision::roi_pool"), regions),
    "constant_pad_nd": padded,
    **dict.fromkeys(("max_unpool2d", "max_unpool3d"), unpooled),
    "im2col": im2col,
    "col2im": folded,
}
