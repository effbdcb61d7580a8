"""One batch, and how the user runs the model on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


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
