"""The end of a run: masked channels that didn't reach zero are set to it, and that is measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimcli.algorithms.resrep.bundles import Bundles
from slimcli.network.example import Example


def project(groups: Sequence[Bundles], model: nn.Module, example: Example) -> dict[str, float]:
    """Sets masked channels to zero, in place.

    Returns:
        Nothing if all were at zero already; else how many channels moved, the largest norm among
        them, and the largest change of an output on the example.
    """
    left = [each for each in groups if bool((each.masked & ~each.locked).any())]
    if not left:
        return {}
    before = outputs(model, example)
    moved = [each.project(model) for each in left]
    pairs = zip(before, outputs(model, example), strict=True)
    changes = [float((a - b).abs().max()) for a, b in pairs if a.numel()]
    return {
        "projected_channels": float(sum(count for count, _ in moved)),
        "projected_norm": max(norm for _, norm in moved),
        "projected_output_change": max(changes, default=0.0),
    }


def outputs(model: nn.Module, example: Example) -> list[Tensor]:
    """Floating-point tensors of the prediction in eval mode, float64 on the CPU."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    with torch.no_grad():
        prediction = example.run(model)
    for module, mode in modes.items():
        module.training = mode
    return [each.cpu().double() for each in tensors_in(prediction) if each.is_floating_point()]


def tensors_in(value: Any) -> Iterable[Tensor]:
    """Every tensor in nested tuples, lists and dicts.

    >>> [tensor.item() for tensor in tensors_in({"a": [torch.tensor(1)], "b": torch.tensor(2)})]
    [1, 2]
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_in(each)
