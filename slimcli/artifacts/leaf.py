"""Compares two leaves of a prediction: tensors as numbers, everything else for equality.

Keeps the worst of many comparisons, measured as a share of what each is allowed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from slimcli.artifacts import nested

RELATIVE_LIMIT = 1e-4


@dataclass
class Worst:
    """The running maximum over outputs and batches.

    Attributes:
        ratio: Difference over limit; -1 while nothing was compared, inf where no number can be
            given.
        max_abs: Largest absolute difference there.
        max_rel: The same over the largest magnitude of that output.
        limit: What was allowed there.
        where: Path of the output.
        notes: Sentences, each once.
    """

    ratio: float = -1.0
    max_abs: float = 0.0
    max_rel: float = 0.0
    limit: float = RELATIVE_LIMIT
    where: str = ""
    notes: dict[str, None] = field(default_factory=dict)

    def take(self, where: str, difference: float, magnitude: float, limit: float) -> None:
        """Keeps a comparison if it is the worst so far."""
        ratio = difference / limit if limit > 0 else (math.inf if difference > 0 else 0.0)
        if ratio > self.ratio:
            self.ratio, self.where, self.limit = ratio, where, limit
            self.max_abs = difference
            self.max_rel = difference / magnitude if magnitude > 0 else difference

    def differ(self, where: str, note: str) -> None:
        """Keeps a difference that no number describes."""
        self.take(where, math.inf, 1.0, RELATIVE_LIMIT)
        self.notes[f"{where or 'output'}: {note}"] = None


def compare_leaf(where: str, ours: Any, theirs: Any, limit: float, worst: Worst) -> None:
    """Compares two leaves and keeps the result in ``worst``.

    Args:
        where: Path of the leaf.
        ours: Leaf of the reference.
        theirs: Leaf of the candidate.
        limit: Relative limit.
        worst: Where the result goes.
    """
    left, right = as_tensor(ours), as_tensor(theirs)
    if left is None or right is None:
        if ours is not theirs and ours != theirs:
            worst.differ(where, f"expected {ours!r:.60}, received {theirs!r:.60}")
    elif left.shape != right.shape:
        worst.differ(where, f"shape {tuple(left.shape)} became {tuple(right.shape)}")
    elif not (left.is_floating_point() or left.is_complex()):
        unequal = int((left != right).sum())
        if unequal:
            worst.differ(where, f"{unequal} of {left.numel()} integers differ")
        else:
            worst.take(where, 0.0, 1.0, limit)
    else:
        _compare_floats(where, left, right, limit, worst)


def _compare_floats(
    where: str, left: torch.Tensor, right: torch.Tensor, limit: float, worst: Worst
) -> None:
    """Compares floating point tensors of one shape, in float64."""
    wide = torch.complex128 if left.is_complex() or right.is_complex() else torch.float64
    left, right = left.to(wide), right.to(wide)
    same = (left == right) | (left.isnan() & right.isnan())
    finite = left.isfinite() & right.isfinite()
    broken = int((~finite & ~same).sum())
    if broken:
        worst.differ(where, f"{broken} of {left.numel()} values are nan or inf on one side only")
        return
    if not bool(left.isfinite().all()):
        worst.notes[f"{where or 'output'}: the reference itself holds nan or inf"] = None
    difference = torch.where(finite, left - right, 0).abs()
    magnitude = torch.where(finite, left, 0).abs()
    peak = float(magnitude.max()) if left.numel() else 0.0
    largest = float(difference.max()) if left.numel() else 0.0
    worst.take(where, largest, peak, limit * max(1.0, peak))


def as_tensor(value: Any) -> torch.Tensor | None:
    """The leaf as a dense CPU tensor; None if it holds no numbers."""
    if isinstance(value, torch.Tensor):
        dense = value.detach().to_dense() if value.layout != torch.strided else value.detach()
        return dense.cpu()
    if nested.is_tensor(value) or isinstance(value, bool | int | float):
        try:
            return torch.as_tensor(value)
        except (TypeError, RuntimeError):
            return None
    return None
