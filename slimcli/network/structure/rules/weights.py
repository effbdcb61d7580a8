"""Weights that are computed on the way: weight norm, and products that measure a whole weight."""

from __future__ import annotations

from collections.abc import Sequence

from slimcli.network.structure.nodes import Kind
from slimcli.network.structure.rules.pointwise import through
from slimcli.network.structure.trace import NO_PLANES, Op, Planes, Rule


def weight_norm(op: Op) -> Sequence[Planes]:
    """``gain * direction / length(direction)``: a zero gain makes a zero filter.

    The channels are the gain's, because a direction of zeros would have no length. The length runs
    over the inputs of a filter, so that those must stay.
    """
    direction, gain = op.args[0], op.args[1]
    axis = op.arg(2, "dim", 0) % direction.dim()
    kept = [plane for plane in op.planes(direction) if plane.shape[axis] > 1]
    inputs = [plane for plane in op.planes(direction) if plane.shape[axis] == 1]
    op.freeze_planes(inputs, "weight norm measures the length of each filter over its inputs")
    gains = [plane for plane in op.planes(gain) if plane.shape[axis] > 1]
    if len(kept) != 1 or len(gains) != 1 or kept[0].shape != gains[0].shape:
        op.freeze_planes([*kept, *gains], "weight norm of a computed weight")
        return [NO_PLANES, NO_PLANES]
    op.record.join(gains[0], kept[0])
    return [(gains[0], *inputs), (kept[0],)]


def measured(op: Op) -> Sequence[Planes]:
    """Products with a vector, as spectral norm uses them, sum over all channels of a weight."""
    op.freeze(op.tensors(), f"a product with a vector ({op.name}) sums over channels")
    return []


def weighed(op: Op) -> Sequence[Planes]:
    """``matrix @ vector`` along an axis without channels, as where pyramid levels are fused."""
    matrix, vector = op.args[0], op.args[1]
    planes = op.planes(matrix)
    if not planes or any(plane.shape[1] > 1 for plane in planes):
        return measured(op)
    op.freeze([vector], "it weighs what lies along an axis without channels")
    return [tuple(through(op, plane, Kind.CARRY).squeeze(1) for plane in planes)]


RULES: dict[str, Rule] = {
    "_weight_norm_interface": weight_norm,
    "_weight_norm": weight_norm,
    "mv": weighed,
    **dict.fromkeys(("dot", "vdot", "addmv"), measured),
}
