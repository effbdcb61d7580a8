"""Numbers made unequal, so that a trial finds nothing right by accident."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slimcli.network.structure.hollow import Hollow


def unequal(model: nn.Module, random: torch.Generator, hollow: Hollow | None = None) -> None:
    """Gives norms, and parameters whose entries are all equal, different entries, in place.

    Args:
        model: Changed.
        random: What they are drawn from.
        hollow: Its tensors stay as they are.
    """
    with torch.no_grad():
        for module in model.modules():
            for tensor in module.parameters(recurse=False):
                if (hollow is None or not hollow.stands_for(tensor)) and is_uniform(tensor):
                    positive = float(tensor.flatten()[0]) > 0
                    tensor.copy_(_spread(tensor, positive, random))
            for buffer in module.buffers(recurse=False):  # a gate that fades in
                if buffer.numel() == 1 and buffer.is_floating_point() and not bool(buffer.any()):
                    buffer.fill_(0.1)
            mean, variance = (
                getattr(module, "running_mean", None),
                getattr(module, "running_var", None),
            )
            if isinstance(mean, Tensor) and isinstance(variance, Tensor):
                _disturb(mean, variance, random)


def wake(model: nn.Module, random: torch.Generator) -> None:
    """Raises all biases, in place: activations that are dead come to life."""
    with torch.no_grad():
        for module in model.modules():
            bias = dict(module.named_parameters(recurse=False)).get("bias")
            if bias is not None and bias.is_floating_point():
                bias.add_(0.5 + torch.rand(bias.shape, generator=random).to(bias))


def _disturb(mean: Tensor, variance: Tensor, random: torch.Generator) -> None:
    """Moves statistics a little: far ones would silence every channel behind an activation."""
    variance.mul_(_spread(variance, True, random).to(variance.device))
    shift = 2 * torch.rand(mean.shape, generator=random, dtype=torch.float64) - 1
    mean.add_(0.1 * shift.to(mean.device) * variance.clamp_min(0).sqrt())


def is_uniform(tensor: Tensor) -> bool:
    """Are all entries the same, or is its only one zero?"""
    if not tensor.numel() or not tensor.is_floating_point():
        return False
    if tensor.numel() == 1:  # a gate that starts at zero would hide what lies behind it
        return not bool(tensor.any())
    flat = tensor.flatten()
    return bool(flat[0] == flat[-1]) and bool((flat == flat[0]).all())


def _spread(tensor: Tensor, positive: bool, random: torch.Generator) -> Tensor:
    if positive:
        return 0.75 + 0.5 * torch.rand(tensor.shape, generator=random, dtype=torch.float64)
    return 0.1 * torch.randn(tensor.shape, generator=random, dtype=torch.float64)
