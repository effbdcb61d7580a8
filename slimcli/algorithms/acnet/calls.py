"""Which convolutions a model calls, and on what: a block is run only where its conv was called."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from slimcli.network.copying import deep_copy
from slimcli.network.example import Example
from slimcli.network.nested import tensors_in
from slimcli.network.structure.modes import preserved_randomness
from slimcli.network.structure.train_mode import set_train_mode

Dimensions = dict[str, set[int]]

NEVER = "it is not called as a module, so a block would never run"
ONLY_READ = "eval mode computes with its weight and does not call it, so a block would not be seen"


def input_dimensions(model: nn.Module, example: Example) -> tuple[Dimensions, dict[str, str]]:
    """Dimensions of what each Conv2d is called on, and why the others have none; changes nothing.

    A conv that eval mode leaves out is looked for in train mode: there may be two copies of a
    network, one to train and an average of it to evaluate, or a head for training alone.
    """
    found = _run(deep_copy(model).eval(), example)
    missing = [path for path in _convs(model) if path not in found]
    if not missing:
        return found, {}
    twin = deep_copy(model)
    set_train_mode(twin)
    try:
        in_training = _run(twin, example)
    except Exception as error:  # the user's code: anything can come
        what = f"eval mode does not call it, and train mode raised {type(error).__name__}: {error}"
        return found, dict.fromkeys(missing, what)
    read = _read_weights(deep_copy(model).eval(), example)
    reasons = {}
    for path in missing:
        if path in in_training and path not in read:
            found[path] = in_training[path]
        else:
            reasons[path] = ONLY_READ if path in in_training else NEVER
    return found, reasons


def _convs(model: nn.Module) -> dict[str, nn.Conv2d]:
    return {path: each for path, each in model.named_modules() if isinstance(each, nn.Conv2d)}


def _run(model: nn.Module, example: Example) -> Dimensions:
    """Runs a model that nobody needs any more; a conv that is not called is missing."""
    seen: Dimensions = {}
    for path, conv in _convs(model).items():

        def look(_module: nn.Module, inputs: tuple[Any, ...], path: str = path) -> None:
            seen.setdefault(path, set()).add(inputs[0].dim() if inputs else 4)

        conv.register_forward_pre_hook(look)
    with preserved_randomness(model), torch.no_grad():
        example.run(model)
    return seen


class _Reading(TorchFunctionMode):
    """Notes by their id which tensors anything is called on."""

    def __init__(self) -> None:
        super().__init__()
        self.read: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self.read.update(map(id, tensors_in((args, kwargs))))
        return func(*args, **kwargs)


def _read_weights(model: nn.Module, example: Example) -> set[str]:
    """Convs whose weight is read, by themselves or by other code."""
    reading = _Reading()
    with preserved_randomness(model), torch.no_grad(), reading:
        example.run(model)
    return {path for path, conv in _convs(model).items() if id(conv.weight) in reading.read}
