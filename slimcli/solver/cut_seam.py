"""The seam of a cut in training: what the model predicts before and after it, on one batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from slimcli.artifacts import verify
from slimcli.artifacts.data_dependent import Watch
from slimcli.network.evaluating import evaluating
from slimcli.network.example import Example
from slimcli.network.structure.modes import preserved_randomness


@contextlib.contextmanager
def measured(model: nn.Module, example: Example, emit: Callable[..., Any]) -> Iterator[None]:
    """Cuts the model inside; the largest difference of its predictions is reported.

    A cut that changes them is a warning: training goes on from what is left, and what it ends with
    is compared again. Outputs whose shape depends on data are not compared here.

    Args:
        model: Run in eval mode, in full precision; modes and random states are put back.
        example: A small batch.
        emit: Told ``verified``, and ``notice`` where the difference is above the limit.
    """
    with Watch() as seen:
        before = _predicted(model, example)
    yield
    if seen.operators:
        return
    seam = verify.compare_values(before, _predicted(model, example))
    seam = replace(seam, source="uncut", target="cut")
    emit("verified", **seam.summary())
    if not seam.ok:
        emit("notice", text=f"the cut changes what the model predicts: {seam}", level="warning")


def _predicted(model: nn.Module, example: Example) -> Any:
    with preserved_randomness(model), verify.exact_arithmetic(), evaluating(model):
        return example.run(model)
