"""A model as something to run and compare, and what a comparison says: a seam."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from slimcli.network.evaluating import evaluating

Run = Callable[[Any], Any]


@dataclass(frozen=True)
class Seam:
    """How far two forms of one model are apart, at the output that is furthest from equal.

    Attributes:
        source: Name of the reference (``deploy``).
        target: Name of what was made from it (``onnx``).
        max_abs: Largest absolute difference; inf where no number can be given.
        max_rel: ``max_abs`` over the largest magnitude of that output in the reference.
        limit: Largest ``max_abs`` allowed there.
        ok: Whether every compared output of every batch is within its limit.
        where: Path of that output (``boxes.0``); empty for a bare tensor.
        batches: Number of batches compared.
        notes: What was not compared, and why something can't be equal.
    """

    source: str
    target: str
    max_abs: float
    max_rel: float
    limit: float
    ok: bool
    where: str = ""
    batches: int = 0
    notes: tuple[str, ...] = ()

    def summary(self) -> dict[str, Any]:
        """The entry of ``summary.json``; a difference that is no number becomes null.

        >>> Seam("deploy", "onnx", math.inf, math.inf, 1e-4, False).summary()["max_abs"] is None
        True
        """
        return {
            "from": self.source,
            "to": self.target,
            "max_abs": self.max_abs if math.isfinite(self.max_abs) else None,
            "max_rel": self.max_rel if math.isfinite(self.max_rel) else None,
            "limit": self.limit,
            "ok": self.ok,
        }

    def __str__(self) -> str:
        """``deploy -> onnx: 2.4e-06 (limit 1.0e-04)``."""
        place = f" at output {self.where}" if self.where else ""
        text = f"{self.source} -> {self.target}: {self.max_abs:.1e} (limit {self.limit:.1e}){place}"
        return "; ".join([text, *self.notes])


@dataclass(frozen=True)
class Runner:
    """A model as a callable batch -> prediction, run in eval mode.

    Attributes:
        model: A module or a file that is called like one.
        predict: The user's predict function.
    """

    model: Any
    predict: Callable[[Any, Any], Any]

    def __call__(self, batch: Any) -> Any:
        """The prediction for one batch."""
        with evaluating(self.model):
            return self.predict(self.model, batch)


def runner(model: Any, predict: Callable[[Any, Any], Any]) -> Runner:
    """A callable batch -> prediction for ``compare``; the model runs in eval mode."""
    return Runner(model, predict)
