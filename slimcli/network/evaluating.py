"""Eval mode for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Every module of the models in eval mode; each gets its own mode back, whatever is raised.

    A model that is in eval mode is not told so again: its own ``train`` may do more. What is no
    module stays as it is.

    >>> net = nn.Sequential(nn.Dropout().eval(), nn.Dropout())
    >>> with evaluating(net):
    ...     print(net.training, net[1].training)
    False False
    >>> net.training, net[0].training, net[1].training
    (True, False, True)
    """
    whole = [model for model in models if isinstance(model, nn.Module)]
    modes = {module: module.training for model in whole for module in model.modules()}
    try:
        for model in whole:
            if any(module.training for module in model.modules()):
                model.eval()
        for module in modes:  # a model's own `train` may leave a part of it in train mode
            module.training = False
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
