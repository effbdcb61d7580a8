"""Does train mode change what a model does with its channels?

Where nothing asks for the mode, a run in train mode would only repeat the run in eval mode.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator

import torch
from torch import nn

_ONE_AT_A_TIME = threading.RLock()


def set_train_mode(model: nn.Module) -> None:
    """Train mode; norms with running statistics stay in eval mode (a batch may have one sample)."""
    model.train()
    for module in model.modules():
        if _keeps_eval_mode(module):
            module.training = False


def _keeps_eval_mode(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._NormBase)


@contextlib.contextmanager
def noted_readers() -> Iterator[list[nn.Module]]:
    """Modules whose attribute ``training`` is read meanwhile, by anything but a dropout layer.

    Dropout scales each value, or each channel, by a number of its own: no channel meets another. A
    norm with running statistics is in eval mode whatever the model is in.

    The attribute is a property of ``nn.Module`` as long as this lasts; its value stays where it
    is, in the module's own dictionary.
    """
    readers: list[nn.Module] = []
    dropouts = {kind.forward.__code__ for kind in _dropouts()}

    def read(module: nn.Module) -> bool:
        if "training" not in vars(module):  # a scripted module keeps it elsewhere
            raise AttributeError("training")
        if not _keeps_eval_mode(module) and sys._getframe(1).f_code not in dropouts:
            readers.append(module)
        mode: bool = vars(module)["training"]
        return mode

    def write(module: nn.Module, mode: bool) -> None:
        vars(module)["training"] = mode

    def remove(module: nn.Module) -> None:
        if vars(module).pop("training", None) is None:
            raise AttributeError("training")

    with _ONE_AT_A_TIME:
        nn.Module.training = property(read, write, remove)  # type: ignore[assignment]
        try:
            yield readers
        finally:
            del nn.Module.training


def _dropouts() -> tuple[type[nn.Module], ...]:
    vision = sys.modules.get("torchvision.ops")  # a model that has one of its layers imported it
    more = () if vision is None else (vision.StochasticDepth,)
    return nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, *more


def keeps_its_own_mode(model: nn.Module) -> bool:
    """Does any of its modules keep or switch its mode by code of its own?"""
    return any(_has_its_own_way(module) for module in model.modules())


def _has_its_own_way(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return True
    kinds = type(module).__mro__[: type(module).__mro__.index(nn.Module)]
    switches = [vars(module), *map(vars, kinds)]
    return any(name in place for place in switches for name in ("train", "eval")) or any(
        "training" in vars(kind) for kind in kinds
    )
