"""Constants that are not the same number at every place are no constant that a bias takes up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimcli.network.example import Example
from slimcli.network.structure import analyze
from slimcli.network.structure.memory import whole_labels

from . import structures
from .proving import EXACT, call, prepared, prunable, zeroed_and_cut

WORDS = torch.randn(2, 10, 8, generator=torch.Generator().manual_seed(1))


class Sequence(nn.Module):
    """Tokens, whose channels are the constant 0.5 where they are zero, and a mean over them."""

    def __init__(self, changes: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embedding, self.head, self.changes = nn.Linear(8, 12), nn.Linear(12, 4), changes

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.changes(torch.sigmoid(self.embedding(x))).mean(1))


def set_in_place(y: Tensor, part: Any, function: Callable[[Tensor], Tensor]) -> Tensor:
    y = y + 0
    y[part] = function(y[part])
    return y


def scaled_in_place(y: Tensor, part: Any) -> Tensor:
    y = y + 0
    view = y[part]
    view *= 2
    return y


def halves_in_place(y: Tensor) -> Tensor:
    left, right = (y + 0).chunk(2, 2)
    whole = left._base if left._base is not None else left
    left.exp_()
    right.cos_()
    return whole


def shifted_into_zeros(y: Tensor) -> Tensor:
    z = torch.zeros_like(y)
    z[:, 1:] = y[:, :-1]
    return z


DIFFERENT: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros before it": lambda y: torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], 1),
    "new zeros before it": lambda y: torch.cat([y.new_zeros(y[:, :1].shape), y[:, :-1]], 1),
    "twice a part of it": lambda y: torch.cat([2 * y[:, :3], y], 1),
    "written into zeros": shifted_into_zeros,
    "a part of it scaled in place": lambda y: scaled_in_place(y, (slice(None), 0)),
    "a part of it set": lambda y: set_in_place(y, (slice(None), slice(2)), torch.tanh),
    "its spread": lambda y: torch.cat([y.std(1, keepdim=True), y], 1),
    "its variance": lambda y: torch.cat([torch.var_mean(y, 1, keepdim=True)[0], y], 1),
    "two maps": lambda y: torch.cat([y[:, :3].sigmoid(), y.exp()], 1),
    "one map with two numbers": lambda y: torch.cat([y[:, :3] + 1, y + 2], 1),
    "its negative": lambda y: torch.cat([-y, y[:, 4:]], 1),
    "two sums": lambda y: torch.cat([(y + y)[:, :3], y - y.flip(1) * 0.5], 1),
    "a gate of it": lambda y: torch.cat([F.glu(y, 1), y], 1),
    "whole numbers": lambda y: torch.cat([(3 * y).int().double(), y], 1),
    "its product with itself": lambda y: torch.cat([y * y, y + y, y], 1),
}

SAME: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda y: torch.cat([y[:, :3], y.flip(1)], 1),
    "copies": lambda y: torch.cat([y[:, :3].clone(), y.contiguous(), y.roll(2, 1)], 1),
    "one map of both": lambda y: torch.cat([y[:, :3].exp(), y.flip(1).exp()], 1),
    "all of it in place": lambda y: scaled_in_place(y, slice(None)),
    "a view of all of it": lambda y: scaled_in_place(y, slice(None)).view(y.shape),
    "halves of the channels in place": lambda y: halves_in_place(y),
    "zeros added to it": lambda y: y + torch.zeros_like(y),
    "its mean beside it": lambda y: torch.cat([y.mean(1, keepdim=True), y, y.amax(1, True)], 1),
}


@pytest.mark.parametrize("way", DIFFERENT)
def test_a_channel_is_kept_whose_constant_is_another_one_elsewhere(way: str) -> None:
    torch.manual_seed(0)
    model, example = prepared(Sequence(DIFFERENT[way]), WORDS)
    for trial in (False, True):
        reason = analyze(model, example, trial=trial).group("embedding").zero_reason
        assert reason.startswith("a removed channel would not be zero where head reads it")


@pytest.mark.parametrize("way", SAME)
def test_a_channel_is_cut_whose_constant_is_the_same_everywhere(way: str) -> None:
    torch.manual_seed(0)
    model, example = prepared(Sequence(SAME[way]), WORDS)
    groups = prunable(analyze(model, example))
    assert [group.name for group in groups] == ["embedding"]
    assert groups[0].constants
    assert zeroed_and_cut(model, example, groups, 1)[0] < EXACT


class Images(structures.Net):
    """Something is done to features in place, through a view."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__(12)
        self.features, self.change = structures.conv_bn(8, 12), change

    def body(self, x: Tensor) -> Tensor:
        x = self.features(x) + 0
        self.change(x)
        return torch.relu(x)


def halves(x: Tensor) -> Tensor:
    left, right = x.chunk(2, 1)
    left.tanh_()
    right.neg_()
    return left


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels in groups": lambda x: x.view(x.shape[0], 3, -1, *x.shape[2:]).relu_(),
    "channels last": lambda x: x.permute(0, 2, 3, 1).tanh_(),
    "a row of pixels": lambda x: x[:, :, 0].mul_(0.5),
    "every second pixel": lambda x: x[:, :, ::2, ::2].neg_(),
    "pixels in a row": lambda x: x.flatten(2).clamp_(-0.5, 0.5),
    "both halves of the channels": halves,
}


@pytest.mark.parametrize("way", VIEWS)
def test_what_keeps_zeros_may_be_done_in_place_through_a_view(way: str) -> None:
    torch.manual_seed(0)
    model, example = prepared(Images(VIEWS[way]), structures.image())
    structure = analyze(model, example)
    group = structure.group("features.1")
    assert group.exact_zero, group.zero_reason
    assert zeroed_and_cut(model, example, prunable(structure), 1)[0] < EXACT


def test_a_part_holds_all_numbers_of_some_channels() -> None:
    canvas = torch.zeros(4, 6)
    plane = torch.arange(1, 7).view(1, 6)
    parts = [canvas, canvas.t(), canvas.view(2, 12), canvas[:, 2:], canvas[:, ::3], canvas[1]]
    found = [sorted(whole_labels(each, canvas, [plane])) for each in parts]
    assert found == [[1, 2, 3, 4, 5, 6]] * 3 + [[3, 4, 5, 6], [1, 4], []]
    assert whole_labels(canvas.view(torch.int16), canvas, [plane]) == set()


class TwoNorms(nn.Module):
    """Norms of single channels, whose shifts become constants, one beside the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.first, self.second = (
            nn.Conv1d(3, 6, 1),
            nn.GroupNorm(6, 6),
            nn.GroupNorm(6, 6),
        )
        self.b = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(torch.cat([self.first(x[:, :, :3]), self.second(x)], 2).mean(2))


def test_shifts_of_two_norms_are_two_constants() -> None:
    torch.manual_seed(0)
    model, example = prepared(TwoNorms(), torch.randn(2, 3, 8))
    assert not analyze(model, example, trial=False).group("a").exact_zero


def test_a_constant_of_another_length_is_what_it_was() -> None:
    torch.manual_seed(0)
    model, example = prepared(Sequence(SAME["its mean beside it"]), WORDS)
    group = analyze(model, example).group("embedding")
    longer = Example(torch.randn(3, 17, 8).double(), call)
    assert zeroed_and_cut(model, longer, [group], 2)[0] < EXACT
