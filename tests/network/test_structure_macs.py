"""Multiply-accumulates under smaller widths, where several channels meet on one axis."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimcli.network import surgery
from slimcli.network.count import count_macs
from slimcli.network.structure import analyze, zero_channels

from .proving import prepared, prunable


class Bilinear(nn.Module):
    """Two sides of a product are the same channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 12), nn.Linear(5, 4)
        self.weight = nn.Parameter(torch.randn(5, 12, 12) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        return self.b(torch.tanh(torch.einsum("bli,kij,blj->blk", x, self.weight, x)))


class Blur(nn.Module):
    """Channels are samples of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x)).transpose(1, 2)
        flat = x.reshape(-1, 1, x.shape[-1])
        x = F.conv1d(flat, x.new_ones(1, 1, 3), padding=1).view(x.shape)
        return self.b(x.transpose(1, 2))


class Heads(nn.Module):
    """Attention by hand: channels lie along two axes; no number is made of their width."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            each(x).unflatten(-1, (2, -1)).transpose(1, 2) for each in (self.q, self.k, self.v)
        )
        return self.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Fused(Heads):
    """The same, fused, with a scale of its own."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            each(x).unflatten(-1, (2, -1)).transpose(1, 2) for each in (self.q, self.k, self.v)
        )
        x = F.scaled_dot_product_attention(q, k, v, scale=0.5)
        return self.out(x.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("kind", [Bilinear, Blur, Heads, Fused])
def test_macs_under_smaller_widths_are_those_of_the_cut_model(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, example = prepared(kind(), torch.randn(2, 10, 8))
    structure = analyze(model, example)
    assert structure.macs == count_macs(model, example).total
    groups = prunable(structure)
    assert groups
    for keep in (2, 3):  # at one torch takes other operators
        twin = kind().double().eval()
        twin.load_state_dict(model.state_dict())
        widths = {group.name: max(keep, group.least) for group in groups}
        for group in groups:
            zero_channels(twin, group, range(widths[group.name], group.size))
        surgery.apply(twin, [g.cut(range(widths[g.name])) for g in groups], example=example)
        assert structure.macs_with(widths) == count_macs(twin, example).total


class Repeated(nn.Module):
    """One channel of six lies eight times along the axis of a product."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 48), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        made = self.a(x.mean(1)).unflatten(1, (8, 6))
        return self.b(torch.bmm(x.repeat(1, 1, 3)[..., :8], made))


def test_macs_of_a_model_that_is_whole_are_counted_whatever_its_channels_are() -> None:
    torch.manual_seed(0)
    model, example = prepared(Repeated(), torch.randn(2, 5, 3))
    assert analyze(model, example).macs == count_macs(model, example).total
