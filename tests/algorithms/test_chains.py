"""One method after another on the same model: nothing is lost at the seam between them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimcli.compressor import registry
from slimcli.network.count import count_macs
from slimcli.network.example import Example

from ..contract.loop import Run, begin, outputs, predict, train
from ..contract.networks import SHAPE, build

EXACT = 1e-9
"""Relative, float64: kernels folded, norms put back, channels cut."""
EPOCHS = 4

SECOND: dict[str, dict[str, Any]] = {
    "csgd": {"cluster_percent": 0.25, "centri_strength": "auto", "prune_epoch": EPOCHS},
    "resrep": registry()["resrep"].example,
}


def stage(name: str, keys: dict[str, Any], model: nn.Module) -> Run:
    return begin(registry()[name], keys, model, SHAPE, EPOCHS)


def relative(first: Tensor, second: Tensor) -> float:
    return ((first - second).abs().max() / second.abs().max()).item()


def examples(run: Run) -> list[Example]:
    return [Example(batch, predict) for batch in run.batches[:4]]


@pytest.mark.slow
@pytest.mark.parametrize("block", ["acnet_cr", "merged"])
@pytest.mark.parametrize("second", sorted(SECOND))
@pytest.mark.parametrize("network", ["chain", "residual"])
def test_a_strengthened_model_is_pruned_and_every_seam_holds(
    network: str, second: str, block: str
) -> None:
    first = stage("acnet", {"acnet_type": block}, build(network))
    train(first, 2)
    handed = first.compressor.handover(first.model, examples(first))
    assert relative(outputs(handed, first.batches), outputs(first.model, first.batches)) < EXACT

    names = [name for name, _ in build(network).named_modules()]
    assert [name for name, _ in handed.named_modules()] == names

    then = stage(second, SECOND[second], handed)
    assert relative(outputs(then.model, then.batches), outputs(first.model, first.batches)) < EXACT
    train(then, EPOCHS)
    assert then.may_save[-1]
    plain = then.compressor.deploy(then.model)
    assert relative(outputs(plain, then.batches), outputs(then.model, then.batches)) < EXACT
    norms = [m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms == []
    example = Example(then.batches[0], predict)
    assert count_macs(plain, example).total <= then.plan.goal.target < then.plan.macs


def test_a_pruned_model_can_be_strengthened_afterwards() -> None:
    first = stage("csgd", SECOND["csgd"], build("residual"))
    train(first, EPOCHS)
    handed = first.compressor.handover(first.model, examples(first))
    then = stage("acnet", {}, handed)
    assert relative(outputs(then.model, then.batches), outputs(first.model, first.batches)) < EXACT
    train(then, 2)
    plain = then.compressor.deploy(then.model)
    assert relative(outputs(plain, then.batches), outputs(then.model, then.batches)) < EXACT
    widths = [m.out_channels for m in plain.modules() if isinstance(m, nn.Conv2d)]
    merged = [m.out_channels for m in first.model.modules() if isinstance(m, nn.Conv2d)]
    assert widths == merged
    assert torch.is_tensor(plain.stem.bias)
