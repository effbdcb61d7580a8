"""One batch, and how the user runs the model on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimcli.network.nested import mapped


@dataclass(frozen=True)
class Example:
    """A real batch together with the user's ``predict_function``.

    Attributes:
        batch: What the data loader yields, already on the model's device.
        predict: ``predict(model, batch) -> prediction``; the only way to call a model.
    """

    batch: Any
    predict: Callable[[nn.Module, Any], Any]

    def run(self, model: nn.Module) -> Any:
        """The model's prediction for this batch, in the mode and under the grad mode found.

        The model gets copies: ``x.sub_(mean)`` would change the batch for the next run.
        """
        return self.predict(model, own_copy(self.batch))


def own_copy(value: Any) -> Any:
    """The same lists, tuples and dicts with copies of the tensors in them."""
    return mapped(value, _own)


def _own(value: Any) -> Any:
    """A copy of a tensor, as if it came from the data set."""
    if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
        return value
    with torch.no_grad():
        return value.detach().clone().requires_grad_(value.requires_grad)
