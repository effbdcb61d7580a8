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
    """The same lists, tuples, dicts and dataclasses with copies of the tensors in them.

    A tensor that occurs twice does so in the copy.
    """
    known: dict[int, Tensor] = {}

    def own(each: Any) -> Any:
        if not isinstance(each, Tensor) or isinstance(each, nn.Parameter):
            return each
        if id(each) not in known:
            known[id(each)] = _own(each)
        return known[id(each)]

    return mapped(value, own)


def _own(tensor: Tensor) -> Tensor:
    """A copy of a tensor, as if it came from the data set, with what is noted on it."""
    with torch.no_grad():
        twin = tensor.detach().clone().requires_grad_(tensor.requires_grad)
    vars(twin).update(vars(tensor))
    return twin
