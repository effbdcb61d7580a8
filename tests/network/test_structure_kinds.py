"""Several kinds of channels along one axis, or in one tensor; and what of a group is left to do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimcli.network.structure import Structure, analyze

from .proving import EXACT, merge_difference, prepared, zeroed_and_cut


def proven(model: nn.Module, batch: Tensor) -> Structure:
    """What can be cut, or merged, group by group, was."""
    model, example = prepared(model, batch)
    structure = analyze(model, example)
    for group in structure.groups:
        if group.exact_zero:
            assert max(zeroed_and_cut(model, example, [group], n)[0] for n in range(4)) <= EXACT
        if group.exact_duplicate and group.size > 1:
            assert merge_difference(model, example, group) <= EXACT
    return structure


def cut_groups(structure: Structure) -> dict[str, int]:
    return {group.name: group.size for group in structure.groups if group.exact_zero}


class Frequencies(nn.Module):
    """Every feature is multiplied with two learned frequencies, laid side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.frequencies = nn.Conv2d(3, 8, 1), nn.Parameter(torch.tensor([1.0, 2.0]))
        self.middle, self.head = nn.Conv2d(16, 6, 1), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu().unsqueeze(2) * self.frequencies[:, None, None]
        return self.head(self.middle(x.sin().flatten(1, 2)).relu())


def test_features_are_cut_with_what_their_frequencies_make_of_them() -> None:
    torch.manual_seed(0)
    structure = proven(Frequencies(), torch.randn(2, 3, 8, 8))
    assert cut_groups(structure) == {"first": 8, "middle": 6}


class Experts(nn.Module):
    """Layers in one tensor, multiplied by ``einsum``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 10), nn.Linear(10, 4)
        self.up = nn.Parameter(torch.randn(3, 10, 14))
        self.down = nn.Parameter(torch.randn(3, 14, 10))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("bd,edh->beh", self.first(x).relu(), self.up)
        return self.head(torch.einsum("beh,ehd->bed", F.gelu(hidden), self.down).mean(1))


def test_the_hidden_channels_of_experts_in_one_tensor_are_cut() -> None:
    torch.manual_seed(0)
    structure = proven(Experts(), torch.randn(4, 6))
    assert 14 in cut_groups(structure).values()
    assert cut_groups(structure)["first"] == 10


class TiedNorms(nn.Module):
    """Two norms with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.before, self.after = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.after.weight = self.before.weight
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.after(self.middle(self.before(self.first(x)).relu())))


def test_norms_that_share_a_weight_are_cut_together() -> None:
    torch.manual_seed(0)
    assert list(cut_groups(proven(TiedNorms(), torch.randn(2, 3, 8, 8))).values()) == [8]


class Split(nn.Module):
    """Each channel is a tensor of its own for a while."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([F.relu(each) for each in self.first(x).split(1, 1)], 1))


def test_channels_that_are_split_one_by_one_are_said_to_be() -> None:
    group = proven(Split(), torch.randn(2, 3, 8, 8)).group("first")
    assert "single channels are picked at" in group.frozen_reason


class MadeWeight(nn.Module):
    """A weight that is not zero where its tensors are.

    Args:
        kind: ``sum`` of two weights, of which one is named; ``exp`` of one.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.wide = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.kind, self.head, self.norm = kind, nn.Linear(8, 4), nn.BatchNorm1d(8)
        self.narrow = nn.Conv2d(8, 8, 1) if kind == "sum" else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.wide.weight
        if self.narrow is not None:
            weight = weight + F.pad(self.narrow.weight, (1, 1, 1, 1))
        else:
            weight = (weight / 4).exp()
        x = F.conv2d(self.first(x).relu(), weight, self.wide.bias, padding=1)
        return self.head(self.norm(x.mean((2, 3))))


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("kind", ["sum", "exp"])
def test_channels_of_a_weight_that_does_not_vanish_stay_or_are_merged(
    kind: str, samples: int
) -> None:
    torch.manual_seed(0)
    group = proven(MadeWeight(kind), torch.randn(samples, 3, 8, 8)).group("wide.weight")
    assert (group.exact_zero, group.exact_duplicate) == (False, True)
    assert "would not be zero where head reads it" in group.zero_reason


class WeightTwice(nn.Module):
    """A layer's input is multiplied with sums of the layer's own weight: of degree two in it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.first = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, width, 3, padding=1)
        self.middle, self.head = nn.Conv2d(width, 6, 1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.before(x))
        x = self.middle(x * self.middle.weight.sum((0, 2, 3))[:, None, None])
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("width", [3, 4, 6, 8])
def test_a_small_group_beside_one_of_its_size_is_tried_merged_and_zeroed(width: int) -> None:
    torch.manual_seed(0)
    group = proven(WeightTwice(width), torch.randn(2, 3, 8, 8)).group("first")
    assert (group.exact_zero, group.exact_duplicate) == (True, False)


class Iterated(nn.Module):
    """A weight that comes out of many steps, each of which reads the last one three times."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.first.weight
        for _ in range(40):
            weight = 1.5 * weight - 0.5 * weight * weight * weight
        return self.head(F.conv2d(x, weight).relu())


def test_a_weight_that_comes_out_of_many_steps_is_followed_once() -> None:
    torch.manual_seed(0)
    assert cut_groups(proven(Iterated(), torch.randn(2, 3, 8, 8))) == {"first.weight": 8}
