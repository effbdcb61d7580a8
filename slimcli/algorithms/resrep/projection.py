"""The end of a run: masked channels that didn't reach zero are set to it, and that is measured."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slimcli.algorithms.resrep.bundles import Bundles
from slimcli.network.evaluating import evaluating
from slimcli.network.example import Example
from slimcli.network.nested import tensors_in


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
    with evaluating(model), torch.no_grad():
        prediction = example.run(model)
    return [each.cpu().double() for each in tensors_in(prediction) if each.is_floating_point()]
