"""Known networks, cut at random in every group, come back from their deploy files."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from slimcli.artifacts import deploy
from slimcli.network import fuse, surgery
from slimcli.network.example import Example
from slimcli.network.structure import analyze, zero_channels

EXACT = 1e-9
"""Float64, relative to the output; some tens of layers deep."""


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    keywords = {"init_weights": False} if name == "googlenet" else {}
    model = getattr(torchvision.models, name)(num_classes=10, **keywords).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0.0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.bias, 0.0, 0.2)
    return model


def loss_of(output) -> torch.Tensor:
    outputs = output if isinstance(output, tuple) else (output,)
    return sum(each.square().sum() for each in outputs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v2", "googlenet", "shufflenet_v2_x1_0", "densenet121"]
)
def test_random_surgery_folding_and_a_training_step_survive_the_deploy_files(tmp_path: Path, name):
    model, choice = build(name), random.Random(0)
    example = Example(
        torch.randn(2, 3, 64, 64, dtype=torch.float64), lambda module, data: module(data)
    )
    structure = analyze(model, example)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss_of(example.run(model.train())).backward()
    optimizer.step()
    model.eval()
    cuts = []
    for group in structure.groups:
        if not group.frozen_reason and group.exact_zero and group.size > 1:
            kept = sorted(choice.sample(range(group.size), group.size // 2))
            zero_channels(model, group, [each for each in range(group.size) if each not in kept])
            cuts.append(group.cut(kept))
    assert len(cuts) > 10
    expected = example.run(model)
    surgery.apply(model, cuts, optimizer=optimizer, example=example)
    scale = expected.abs().max().item()
    torch.testing.assert_close(example.run(model), expected, rtol=0.0, atol=EXACT * scale)
    loss_of(example.run(model.train())).backward()
    optimizer.step()
    fuse.fold_pairs(model.eval(), structure.conv_batch_norms)
    deploy.save(tmp_path, model, build(name))
    loaded = deploy.load_deploy(tmp_path, build(name))
    assert torch.equal(example.run(loaded), example.run(model))
    assert not [module for module in loaded.modules() if isinstance(module, nn.BatchNorm2d)] or (
        name == "densenet121"  # its norms come before the convs
    )
