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
        """The model's prediction for this batch, in the mode and under the grad mode found."""
        return self.predict(model, self.batch)

    def copied(self) -> Example:
        """The same with a batch of its own: ``x.sub_(mean)`` would change it for the next run."""
        return Example(mapped(self.batch, _own), self.predict)


def _own(value: Any) -> Any:
    """A copy of a tensor, as if it came from the data set."""
    if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
        return value
    with torch.no_grad():
        return value.detach().clone().requires_grad_(value.requires_grad)
