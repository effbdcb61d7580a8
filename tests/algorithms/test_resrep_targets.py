"""Which groups get compactors, and what is said of the others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from slimcli.algorithms.resrep.targets import find_targets
from slimcli.network.example import Example
from slimcli.network.structure import analyze

from .csgd_networks import build, images
from .resrep_networks import conv_bn


def test_a_group_that_can_only_be_merged_gets_no_compactor_and_its_reason_is_told() -> None:
    model = build("preactivated")
    structure = analyze(model, Example(images(), lambda net, data: net(data)))
    targets, reasons = find_targets(model, structure, "all_bn", None, ())
    assert [target.name for target in targets] == ["inner_norm"]
    assert reasons == {
        "stem": "a removed channel would arrive at inner as a constant that no bias can take up"
    }


class Tied(nn.Module):
    """Two convs with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv_bn(3, 8), conv_bn(8, 8), conv_bn(8, 8)
        self.b[0].weight = self.a[0].weight
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(self.stem(x))).mean((2, 3)))


@pytest.mark.parametrize("strategy", ["all_bn", "all_conv"])
def test_convs_that_share_a_weight_are_told_as_the_reason(strategy: str) -> None:
    model = Tied().eval()
    structure = analyze(model, Example(torch.randn(2, 3, 12, 12), lambda net, data: net(data)))
    targets, reasons = find_targets(model, structure, strategy, None, ())
    assert targets == []
    told = "a.0 and b.0 share one weight: folded compactors would give each its own"
    assert reasons == {"stem.1": told}
