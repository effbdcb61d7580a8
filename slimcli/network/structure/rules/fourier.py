"""Fourier transforms over the image, and complex numbers taken apart and put together."""

from __future__ import annotations

from collections.abc import Sequence

from slimcli.network.structure.nodes import Kind
from slimcli.network.structure.rules.movement import without
from slimcli.network.structure.rules.pointwise import bordered, through
from slimcli.network.structure.trace import Op, Planes, Rule


def transformed(op: Op) -> Sequence[Planes]:
    """A sum with varying weights over some axes: zeros stay zeros, constants don't."""
    tensor = op.args[0]
    axes = [axis % tensor.dim() for axis in op.args[1]]
    planes = without(op, op.planes(tensor), axes, "a Fourier transform over channels")
    return [tuple(through(op, plane, Kind.CARRY) for plane in planes)]


def parted(op: Op) -> Sequence[Planes]:
    """``view_as_real``: real and imaginary part side by side along a new last axis."""
    planes = bordered(op, op.planes(op.args[0]), is_zero=True)
    return [tuple(plane.unsqueeze(-1) for plane in planes)]


def united(op: Op) -> Sequence[Planes]:
    """``view_as_complex``: the two numbers along the last axis become one."""
    planes = without(op, op.planes(op.args[0]), [-1], "channels are real and imaginary parts")
    return [tuple(plane.squeeze(-1) for plane in planes)]


RULES: dict[str, Rule] = {
    **dict.fromkeys(("_fft_r2c", "_fft_c2r", "_fft_c2c"), transformed),
    "view_as_real": parted,
    "view_as_complex": united,
}
