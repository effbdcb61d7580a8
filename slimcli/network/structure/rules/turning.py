"""Flips, rolls, quarter turns, triangles, diagonals: where an entry's place decides.

A cut moves channels to other places, so that only a flip may run along them.
"""

from __future__ import annotations

from collections.abc import Sequence

from slimcli.network.structure.rules.movement import executed, moved_planes, without
from slimcli.network.structure.rules.pointwise import bordered
from slimcli.network.structure.trace import Op, Planes, Rule


def flipped(op: Op) -> Sequence[Planes]:
    """Nothing moves along axes without channels; what is left of others is flipped as well."""
    tensor = op.args[0]
    axes = [axis % tensor.dim() for axis in op.arg(1, "dims", ())]
    planes = op.planes(tensor)
    if any(plane.shape[axis] > 1 for plane in planes for axis in axes):
        op.record.turns = True
        return executed(op)
    return [planes]


def rolled(op: Op) -> Sequence[Planes]:
    """``roll``: the last channels come first, and after a cut the last ones are others."""
    tensor = op.args[0]
    axes = [axis % tensor.dim() for axis in op.arg(2, "dims", ())]
    return [without(op, op.planes(tensor), axes or range(tensor.dim()), "channels are rolled")]


def turned(op: Op) -> Sequence[Planes]:
    """``rot90``: two axes change places."""
    axes = [axis % op.args[0].dim() for axis in op.arg(2, "dims", (0, 1))]
    return [without(op, op.planes(op.args[0]), axes, "channels are turned")]


def triangular(op: Op) -> Sequence[Planes]:
    """``tril`` and ``triu``: zeros on one side of a diagonal."""
    planes = without(op, op.planes(op.args[0]), (-2, -1), f"{op.name} along channels")
    return [bordered(op, planes, is_zero=True)]


def diagonal(op: Op) -> Sequence[Planes]:
    """``diagonal``: pairs of places along two axes."""
    tensor = op.args[0]
    axes = [op.arg(2, "dim1", 0) % tensor.dim(), op.arg(3, "dim2", 1) % tensor.dim()]
    return moved_planes(op, without(op, op.planes(tensor), axes, "a diagonal over channels"))


def embedded(op: Op) -> Sequence[Planes]:
    """``diag_embed``: the last axis becomes two, with zeros off their diagonal."""
    dims = op.output.dim()
    axes = sorted((op.arg(2, "dim1", -2) % dims, op.arg(3, "dim2", -1) % dims))
    planes = without(op, op.planes(op.args[0]), [-1], "a diagonal over channels")
    planes = bordered(op, planes, is_zero=True)
    return [tuple(plane.squeeze(-1).unsqueeze(axes[0]).unsqueeze(axes[1]) for plane in planes)]


RULES: dict[str, Rule] = {
    "flip": flipped,
    "roll": rolled,
    "rot90": turned,
    "tril": triangular,
    "triu": triangular,
    "diagonal": diagonal,
    "diag_embed": embedded,
}
