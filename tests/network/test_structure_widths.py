"""Code that asks how wide something is: other widths must not lead it another way."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from slimcli.network import surgery
from slimcli.network.structure import Structure, analyze

from . import structures
from .proving import EXACT, difference, outputs, prepared, zero_channels, zeroed_and_cut

Question = Callable[["AddedOnYes", Tensor, Tensor], Any]


class AddedOnYes(structures.Net):
    """Adds the input of ``b`` to its output where a question is answered by yes."""

    def __init__(self, asks: Question) -> None:
        super().__init__(8)
        self.a, self.b, self.c = (
            structures.conv(8, 16),
            structures.conv(16, 12),
            structures.conv(12, 8),
        )
        self.asks = asks

    def body(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        y = torch.relu(self.b(x))
        return self.c(y + x if self.asks(self, x, y) else y)


HEARD: dict[str, Question] = {
    "attributes of layers": lambda net, x, y: net.b.in_channels == net.b.out_channels,
    "entries": lambda net, x, y: x.numel() == y.numel(),
    "a difference": lambda net, x, y: x.size(1) - y.size(1) == 0,
    "one size": lambda net, x, y: x.is_same_size(y),
}
NUMBERS: dict[str, Question] = {
    "plain numbers": lambda net, x, y: int(x.shape[1]) == int(y.shape[1]),
    "mapped numbers": lambda net, x, y: list(map(int, x.size())) == list(map(int, y.size())),
    "rows of weights": lambda net, x, y: len(net.a.weight) == len(net.b.weight),
}


def analysed(asks: Question) -> tuple[nn.Module, Any, Structure]:
    torch.manual_seed(0)
    model, example = prepared(AddedOnYes(asks), structures.image())
    return model, example, analyze(model, example)


@pytest.mark.parametrize("name", HEARD)
def test_the_wider_of_two_widths_stays_where_the_code_compares(name: str) -> None:
    model, example, structure = analysed(HEARD[name])
    assert "its width is compared with another at " in structure.group("a").frozen_reason
    group = structure.group("b")
    zero_channels(model, group, range(4, 12))
    before = outputs(model, example)
    surgery.apply(model, [group.cut(range(4))], example=example)
    assert difference(before, outputs(model, example)) <= EXACT


@pytest.mark.parametrize("name", NUMBERS)
def test_widths_stay_that_are_compared_as(name: str) -> None:
    structure = analysed(NUMBERS[name])[2]
    for group in ("a", "b"):
        assert "its width is read as a number" in structure.group(group).frozen_reason
    assert structure.group("stem.1").exact_zero


def test_widths_that_are_numbers_without_consequence_can_be_cut() -> None:
    structure = analysed(lambda net, x, y: int(x.shape[1]) + int(y.shape[1]) < 0)[2]
    assert {group.name for group in structure.groups if group.exact_zero} >= {"a", "b"}


def test_layers_keep_their_numbers_when_their_widths_were_listened_to() -> None:
    model = analysed(HEARD["attributes of layers"])[0]
    for layer in (model.a, model.b, model.c):
        assert {type(layer.in_channels), type(layer.out_channels)} == {int}


LEAST = {
    "more than three": (lambda net, x, y: x.shape[1] > 3, {"a": 4}),
    "no fewer than nine": (lambda net, x, y: y.size(1) >= 9, {"b": 10}),
    "one": (lambda net, x, y: net.c.in_channels == 1, {"b": 2}),
    "in front of a squeeze": (lambda net, x, y: y.mean((2, 3)).squeeze().dim() == 1, {"b": 2}),
    "squeezed along channels": (lambda net, x, y: y.squeeze(1).dim() == 3, {"b": 2}),
    "squeezed along pixels": (lambda net, x, y: y.squeeze(2).dim() == 3, {}),
    "more than it has": (lambda net, x, y: x.shape[1] > 64, {}),
}


@pytest.mark.parametrize("name", LEAST)
def test_the_fewest_channels_that_must_stay_for(name: str) -> None:
    asks, least = LEAST[name]
    structure = analysed(lambda net, x, y: asks(net, x, y) and False)[2]
    assert {each.name: each.least for each in structure.groups if each.least > 1} == least
    for group, count in least.items():
        with pytest.raises(ValueError, match=f"{group} must keep {count} channels at least"):
            structure.group(group).cut(range(count - 1))
        structure.group(group).cut(range(count))


class Doubled(structures.Net):
    """Doubles features if a number made of their width says so."""

    def __init__(self, asks: Callable[[Tensor], Any], width: int = 32) -> None:
        super().__init__(8)
        self.a, self.b = structures.conv(8, width), structures.conv(width, 8)
        self.asks = asks

    def body(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        return self.b(x * 2 if self.asks(x) else x.tanh())


DERIVED: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "a quarter": (lambda x: x.shape[1] // 4 > 2, 12),
    "twice as many": (lambda x: 2 * x.shape[1] >= 9, 5),
    "one less": (lambda x: x.size(1) - 1 > 3, 5),
    "entries": (lambda x: x.numel() > 2 * 16 * 16 * 5, 6),
    "a fraction": (lambda x: x.shape[1] / 4 > 2, 9),
    "a share": (lambda x: int(x.shape[1] * 0.25) > 0, 4),
    "a root": (lambda x: math.sqrt(x.shape[1]) > 2, 5),
    "a power": (lambda x: x.size(1) ** 2 > 9, 4),
    "a table": (lambda x: {1: False, 2: False}.get(x.shape[1], True), 3),
    "a range": (lambda x: len(range(0, x.shape[1], 4)) > 1, 5),
    "digits": (lambda x: len(str(x.shape[1])) > 1, 10),
    "an array": (lambda x: int(np.prod(x.shape[1:])) > 16 * 16 * 6, 7),
    "a stride": (lambda x: x.stride(0) > 16 * 16 * 2, 3),
    "bytes": (lambda x: x.nbytes > 2 * 8 * 16 * 16 * 3, 4),
}


@pytest.mark.parametrize("name", DERIVED)
def test_the_fewest_channels_are_searched_where_a_width_is_compared_by(name: str) -> None:
    asks, least = DERIVED[name]
    torch.manual_seed(0)
    model, example = prepared(Doubled(asks), structures.image())
    group = analyze(model, example).group("a")
    assert (group.exact_zero, group.least) == (True, least)
    assert zeroed_and_cut(model, example, [group], seed=0)[0] <= EXACT


class TwiceAsWide(nn.Module):
    """Squares where twice one width is another one; cut to one channel, the second one does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1)
        self.head = nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        y = self.b(x)
        return self.head(y if y.shape[1] * 2 != x.shape[1] else y * y)


def test_widths_of_two_are_tried_with_one_of_them_whole_and_told_in_channels() -> None:
    torch.manual_seed(0)
    structure = analyze(*prepared(TwiceAsWide(), structures.image()))
    assert "its width must not fall below 2 at " in structure.group("b").frozen_reason
    assert structure.group("a").exact_zero


def test_of_few_channels_each_number_is_tried_because_more_may_fail_where_fewer_pass() -> None:
    torch.manual_seed(0)
    net = Doubled(lambda x: x.shape[1] / 2 not in (0.5, 2), width=8)
    model, example = prepared(net, structures.image())
    assert analyze(model, example).group("a").least == 5


@pytest.mark.parametrize(
    "asks",
    [
        lambda net: net.a.out_channels / 4 > 2,
        lambda net: net.a.out_channels**0.5 > 3,
        lambda net: math.sqrt(net.a.out_channels) > 3,
    ],
)
def test_the_fewest_channels_are_searched_where_a_layer_is_asked_for_them(
    asks: Callable[[Doubled], bool],
) -> None:
    torch.manual_seed(0)
    net = Doubled(lambda x: asks(net))
    model, example = prepared(net, structures.image())
    net.asks = lambda x: asks(model)
    assert analyze(model, example).group("a").least > 7


@pytest.mark.parametrize(("width", "is_cut"), [(35, False), (14, True)])
def test_a_width_that_a_number_may_divide_is_tried_with_a_multiple_of_it(
    width: int, is_cut: bool
) -> None:
    torch.manual_seed(0)
    net = Doubled(lambda x: x.shape[1] % 16 == 0, width)
    model, example = prepared(net, structures.image())
    group = analyze(model, example).group("a")
    assert group.exact_zero == is_cut
    assert is_cut or "where 16 divides its width" in group.frozen_reason


class Together(structures.Net):
    """The width of two maps laid side by side is compared with a number."""

    def __init__(self, number: int) -> None:
        super().__init__(16)
        self.a, self.c, self.b = (
            structures.conv(8, 12),
            structures.conv(8, 6),
            structures.conv(18, 16),
        )
        self.number = number

    def body(self, x: Tensor) -> Tensor:
        y = torch.cat([self.a(x), self.c(x)], 1)
        return self.b(y * 2 if y.shape[1] > self.number else y)


@pytest.mark.parametrize(("number", "least"), [(5, {"a": 4, "c": 2}), (16, {})])
def test_groups_that_share_a_width_keep_their_shares(number: int, least: dict[str, int]) -> None:
    model, example = prepared(Together(number), structures.image())
    structure = analyze(model, example)
    found = {each.name: each.least for each in structure.groups if each.name in ("a", "c")}
    if least:
        assert found == least
    else:
        for name in ("a", "c"):
            reason = structure.group(name).frozen_reason
            assert f"its width must not fall below {number + 1} at " in reason


class TwoWidths(nn.Module):
    """Doubles features if a number made of two widths says so."""

    def __init__(self, asks: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(16, 4, 1)
        self.asks = asks

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x).tanh(), self.b(x).tanh()
        y = torch.cat([a, b], 1)
        return self.c(y * 2 if self.asks(a, b) else y)


@pytest.mark.parametrize(
    "asks",
    [
        lambda a, b: (a.shape[1] + b.shape[1]) / 2 < 2,
        lambda a, b: a.shape[1] * b.shape[1] < 4,
        lambda a, b: (a.shape[1] / 2 < 1) & (b.shape[1] / 2 < 1),
        lambda a, b: a.shape[1] / b.shape[1] > 3,
        lambda a, b: b.shape[1] / a.shape[1] > 3,
    ],
)
def test_a_number_made_of_two_widths_keeps_one_of_them(
    asks: Callable[[Tensor, Tensor], Any],
) -> None:
    torch.manual_seed(0)
    model, example = prepared(TwoWidths(asks), structures.image())
    a, b = (analyze(model, example).group(name) for name in "ab")
    assert not (a.is_prunable and b.is_prunable and a.least == b.least == 1)


class Meeting(nn.Module):
    """Something else happens where one width is the other one, which stays, or is six.

    Args:
        asks: Gets both tensors, the second with six channels; what it gives is a factor.
    """

    def __init__(self, asks: Callable[[Tensor, Tensor], Any], width: int = 8) -> None:
        super().__init__()
        self.asks, self.head = asks, nn.Conv2d(width, 4, 1)
        self.a, self.b = nn.Conv2d(3, width, 1), nn.Conv2d(3, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        y, z = self.a(x), self.b(x)
        return self.head(y * self.asks(y, z)), z.mean()


MEETING: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a set": lambda y, z: len({y.shape[1], z.shape[1]}),
    "a set of shapes": lambda y, z: len({tuple(y.shape), tuple(z.shape)}),
    "a key": lambda y, z: 1 if z.shape[1] in {y.shape[1]: 0} else 2,
    "fractions": lambda y, z: 1 + (float(y.shape[1]) == float(z.shape[1])),
    "a ratio": lambda y, z: 1 + (y.shape[1] / z.shape[1] == 1.0),
    "text": lambda y, z: 1 + (str(y.shape[1]) == f"{z.shape[1]}"),
    "text of shapes": lambda y, z: 1 + (str(tuple(y.shape)) == str(tuple(z.shape))),
    "a hash": lambda y, z: 1 + (hash(y.shape[1]) == hash(z.shape[1])),
    "twice as many": lambda y, z: 1 + (y.shape[1] * 2 == z.shape[1] * 2),
    "squares": lambda y, z: 1 + (y.shape[1] ** 2 == z.shape[1] ** 2),
    "strides": lambda y, z: 1 + (y.stride() == z.stride()),
    "bytes": lambda y, z: 1 + (y.nbytes == z.nbytes),
    "a tensor": lambda y, z: 1 + int((torch.tensor(y.shape) == torch.tensor(z.shape)).all()),
    "a number": lambda y, z: 1 + (int(y.shape[1]) == 6),
}


@pytest.mark.parametrize("name", MEETING)
def test_a_width_does_not_meet_another_one_that_stays_in(name: str) -> None:
    torch.manual_seed(0)
    model, example = prepared(Meeting(MEETING[name]), structures.image())
    group = analyze(model, example).group("a")
    assert (group.exact_zero, group.least) == (True, 7)
    zero_channels(model, group, range(7, 8))
    before = outputs(model, example)
    surgery.apply(model, [group.cut(range(7))], example=example)
    assert difference(before, outputs(model, example)) <= EXACT


REMAINDERS: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "of four": (lambda x: x.shape[1] // 4 * 4 != x.shape[1] - 1, 20),
    "of eight": (lambda x: x.shape[1] // 8 * 8 != x.shape[1] - 1, 32),
    "of blocks": (lambda x: (x.shape[1] // 4) % 2 == 0, 26),
}


@pytest.mark.parametrize("name", REMAINDERS)
def test_no_fewest_channels_are_told_where_more_fail(name: str) -> None:
    asks, width = REMAINDERS[name]
    torch.manual_seed(0)
    net = Meeting(lambda y, z: 1 + bool(asks(y)), width=width)
    assert not analyze(*prepared(net, structures.image())).group("a").is_prunable
