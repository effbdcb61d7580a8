"""Does a second run, in train mode, do anything that the first one did not?

Where nothing asks for the mode and nothing is kept, it would only repeat the run in eval mode.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator

import torch
from torch import nn

from slimcli.network.structure.mode_reading import only_drops

_DROPPING: tuple[type[nn.Module], ...] = (nn.MultiheadAttention, nn.RNN, nn.LSTM, nn.GRU)

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
    """Modules whose attribute ``training`` is read meanwhile, by anything but a dropout.

    Dropout scales each value, or each channel, by a number of its own: no channel meets another. A
    norm with running statistics is in eval mode whatever the model is in. Torch's attention and
    recurrent layers drop, too, and else ask only whether their fast path may be taken: never, here.

    The attribute is a property of ``nn.Module`` as long as this lasts; its value stays where it
    is, in the module's own dictionary.
    """
    readers: list[nn.Module] = []
    asking = dict.fromkeys((kind.forward.__code__ for kind in (*dropouts(), *_DROPPING)), False)

    def read(module: nn.Module) -> bool:
        if "training" not in vars(module):  # a scripted module keeps it elsewhere
            raise AttributeError("training")
        if not _keeps_eval_mode(module):
            frame = sys._getframe(1)
            if frame.f_code not in asking:
                asking[frame.f_code] = not only_drops(frame)
            if asking[frame.f_code]:
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


def dropouts() -> tuple[type[nn.Module], ...]:
    """Layers whose train mode makes another network of nothing."""
    vision = sys.modules.get("torchvision.ops")  # a model that has one of its layers imported it
    more = () if vision is None else (vision.StochasticDepth,)
    return nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, *more


def keeps_its_own_mode(model: nn.Module) -> bool:
    """Does any of its modules keep or switch its mode by code of its own?"""
    modules = list(model.modules())
    return any(map(_has_its_own_way, {type(module) for module in modules})) or any(
        name in vars(module) for module in modules for name in ("train", "eval")
    )


def _has_its_own_way(kind: type[nn.Module]) -> bool:
    if issubclass(kind, torch.jit.ScriptModule):
        return True
    own = kind.__mro__[: kind.__mro__.index(nn.Module)]
    return any(name in vars(each) for each in own for name in ("train", "eval", "training"))
