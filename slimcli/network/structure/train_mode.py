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

DROPOUTS: tuple[type[nn.Module], ...] = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
)
"""Scale each value of their input by a number of its own: no channel meets another."""


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
def noted_readers() -> Iterator[dict[int, nn.Module]]:
    """Modules (by id) whose attribute ``training`` is read meanwhile.

    The attribute is a property of ``nn.Module`` as long as this lasts; its value stays where it
    is, in the module's own dictionary.
    """
    readers: dict[int, nn.Module] = {}

    def read(module: nn.Module) -> bool:
        if "training" not in vars(module):  # a scripted module keeps it elsewhere
            raise AttributeError("training")
        readers[id(module)] = module
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


def may_differ(model: nn.Module, readers: dict[int, nn.Module]) -> bool:
    """Could a run in train mode do anything to channels that the run in eval mode did not?

    Args:
        model: As it ran in eval mode.
        readers: What ``noted_readers`` gave for that run.
    """
    if any(_has_its_own_way(module) for module in model.modules()):
        return True
    return not all(
        _keeps_eval_mode(module) or type(module) in (*DROPOUTS, *_other_dropouts())
        for module in readers.values()
    )


def _has_its_own_way(module: nn.Module) -> bool:
    """Does it keep or switch its mode by code of its own?"""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    kinds = type(module).__mro__[: type(module).__mro__.index(nn.Module)]
    places = [vars(module), *map(vars, kinds)]
    return any(name in place for place in places for name in ("train", "eval")) or any(
        "training" in place for place in places[1:]
    )


def _other_dropouts() -> tuple[type[nn.Module], ...]:
    vision = sys.modules.get("torchvision.ops")  # a model that has one of its layers imported it
    return () if vision is None else (vision.StochasticDepth,)
