"""Learning from a teacher: the distance between two predictions, added to the user's loss.

Geoffrey Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slimcli.errors import HookError, Problem
from slimcli.solver.job import JobHooks


def distance(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence from the teacher's classes to the student's, times ``T**2``.

    Args:
        student: Logits, shape (N, C, ...).
        teacher: Logits of the same shape.
        temperature: T; both are divided by it before the softmax.

    Returns:
        The mean over everything but the classes; a scalar.

    >>> logits = torch.tensor([[1.0, 2.0]])
    >>> float(distance(logits, logits, 2.0))
    0.0
    """
    ours = nn.functional.log_softmax(student / temperature, dim=1)
    theirs = nn.functional.log_softmax(teacher / temperature, dim=1)
    pointwise = nn.functional.kl_div(ours, theirs, reduction="none", log_target=True)
    return pointwise.sum(1).mean() * temperature**2


def pull(
    prediction: Any, data: Any, teacher: nn.Module, hooks: JobHooks, temperature: float
) -> Tensor:
    """The distance of a prediction to the teacher's for the same batch.

    Raises:
        HookError: The predictions are not logits of one shape.
    """
    with torch.no_grad():
        wanted = hooks.predict_function(teacher, data)
    is_logits = isinstance(prediction, Tensor) and isinstance(wanted, Tensor)
    if not is_logits or prediction.dim() < 2 or prediction.shape != wanted.shape:
        raise HookError(
            Problem(
                "E-HOOK-TEACHER",
                "`teacher`: its predictions can't be compared with the model's",
                hooks.where("teacher"),
                expected="logits, one tensor of shape (samples, classes, ...), from both",
                received=f"{_shape(prediction)} and {_shape(wanted)}",
            )
        )
    return distance(prediction, wanted, temperature)


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
