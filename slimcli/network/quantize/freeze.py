"""Whose statistics a batch norm uses: the batch's, or its own that no longer move."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from slimcli.network.quantize.insert import become

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Switch(nn.Module):
    """Whether a batch norm is frozen; stored with the state."""

    flag: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("flag", torch.zeros((), dtype=torch.bool))
        self.is_on = False
        self.register_load_state_dict_post_hook(_restore)  # type: ignore[no-untyped-call]


def _restore(module: nn.Module, _incompatible: Any) -> None:
    assert isinstance(module, Switch)
    module.is_on = bool(module.flag)


class FreezableNorm(nn.Module):
    """What the class of a batch norm is given: once frozen, it stays in eval mode."""

    statistics_frozen: Switch

    def train(self, mode: bool = True) -> FreezableNorm:
        """Sets the mode; a frozen norm takes only eval mode."""
        return super().train(mode and not self.statistics_frozen.is_on)


def make_freezable(model: nn.Module) -> None:
    """Gives every batch norm a switch, off: nothing changes yet."""
    for module in list(model.modules()):
        if isinstance(module, BATCH_NORMS):
            device = next((each.device for each in module.buffers()), torch.device("cpu"))
            module.add_module("statistics_frozen", Switch().to(device))
            become(module, FreezableNorm)


def freeze_statistics(model: nn.Module) -> None:
    """From now on batch norms use their running statistics and leave them alone."""
    for module in model.modules():
        if isinstance(module, FreezableNorm):
            module.statistics_frozen.is_on = True
            module.statistics_frozen.flag.fill_(True)
            module.train(False)


@contextlib.contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norms that would do so in training use each batch's statistics, and keep their own."""
    norms = [
        each
        for each in model.modules()
        if isinstance(each, BATCH_NORMS)
        and not (isinstance(each, FreezableNorm) and each.statistics_frozen.is_on)
    ]
    modes = [each.training for each in norms]
    stored = [[value.clone() for value in each.buffers(recurse=False)] for each in norms]
    for norm in norms:
        norm.train()
    try:
        yield
    finally:
        with torch.no_grad():
            for norm, mode, values in zip(norms, modes, stored, strict=True):
                norm.training = mode
                for buffer, value in zip(norm.buffers(recurse=False), values, strict=True):
                    buffer.copy_(value)


def remove_switches(model: nn.Module) -> None:
    """Makes batch norms ordinary again; call before :func:`~.insert.restore`."""
    for module in model.modules():
        if isinstance(module, FreezableNorm):
            del module.statistics_frozen
