"""What the rules say by themselves, without a trial cut that would catch a wrong one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimcli.network.example import Example
from slimcli.network.structure import Group, analyze

from .proving import EXACT, prepared, zeroed_and_cut

Function = Callable[[Tensor], Tensor]
VARYING = "a removed channel would not be zero where b reads it"


def judged(model: nn.Module, batch: Tensor) -> tuple[Group, nn.Module, Example]:
    """The group of layer ``a`` as the labels alone show it; the model and the example."""
    torch.manual_seed(0)
    model, example = prepared(model, batch)
    structure = analyze(model, example, trial=False)
    assert structure.notes == ()
    return structure.group("a"), model, example


class Table(nn.Module):
    """Something is looked up in what a layer gives."""

    def __init__(self, look_up: Function) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(4, 3)
        self.look_up = look_up

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(self.a(x))
        return self.head(self.b(y).relu() + self.look_up(y))


FIRST = torch.tensor([0])
LOOKED_UP: dict[str, Function] = {
    "one channel": lambda y: F.embedding(FIRST, y.t()).t(),
    "a sum of one channel": lambda y: F.embedding_bag(FIRST[None], y.t(), mode="sum").t(),
}


@pytest.mark.parametrize("way", LOOKED_UP)
def test_channels_along_the_rows_of_a_table_stay(way: str) -> None:
    group, _, _ = judged(Table(LOOKED_UP[way]), torch.randn(5, 6))
    assert group.frozen_reason.startswith("channels are picked by index at ")


class Weighed(nn.Module):
    """A bag's words weigh as much as channels say."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.a, self.b = nn.Embedding(8, 3), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        index = torch.arange(8).expand_as(y)
        bags = F.embedding_bag(index, self.words.weight, mode="sum", per_sample_weights=y)
        return self.b(y.relu()) + bags


def test_channels_that_weigh_words_stay() -> None:
    group, _, _ = judged(Weighed(), torch.randn(5, 6))
    assert group.frozen_reason.startswith("channels weigh the rows of a table at ")


class Picked(nn.Module):
    """Rows of what a layer gives are picked, or summed, for the next one."""

    def __init__(self, pick: Function) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(4, 3)
        self.pick = pick

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.pick(self.a(x))).relu())


ROWS = torch.tensor([2, 0, 0])
PICKED: dict[str, Function] = {
    "rows": lambda y: F.embedding(ROWS, y),
    "rows of constants": lambda y: F.embedding(ROWS, y.sigmoid()),
    "sums": lambda y: F.embedding_bag(ROWS, y, ROWS.sort().values[:2], mode="sum"),
}


@pytest.mark.parametrize("way", PICKED)
def test_channels_of_a_table_that_is_computed_are_those_of_the_layer_behind_it(way: str) -> None:
    group, model, example = judged(Picked(PICKED[way]), torch.randn(5, 6))
    assert group.exact_zero
    assert zeroed_and_cut(model, example, [group], 0)[0] <= EXACT


def test_a_sum_of_unknown_many_constants_is_taken_up_by_no_bias() -> None:
    bags = Picked(lambda y: F.embedding_bag(ROWS, y.sigmoid(), ROWS[1:], mode="sum"))
    group, _, _ = judged(bags, torch.randn(5, 6))
    assert group.zero_reason == VARYING


class Rows(nn.Module):
    """Something acts on the output of a layer before the next one reads it."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(4, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.between(self.a(x))).relu())


def test_a_norm_over_tokens_leaves_no_zeros() -> None:
    group, _, _ = judged(Rows(nn.BatchNorm1d(5)), torch.randn(4, 5, 6))
    assert (group.zero_reason, group.exact_duplicate) == (VARYING, True)


class Images(nn.Module):
    """The same for images; the second layer takes up constants."""

    def __init__(self, between: Function | nn.Module, width: int = 8) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(width, 4, 1), nn.Conv2d(4, 3, 1)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.between(self.a(x))).relu())


def test_a_layer_norm_over_the_image_leaves_no_constants() -> None:
    group, _, _ = judged(Images(nn.LayerNorm([6, 6])), torch.randn(2, 3, 8, 8))
    assert (group.zero_reason, group.exact_duplicate) == (VARYING, True)


def test_a_layer_norm_over_the_image_without_weights_leaves_constants() -> None:
    norm = nn.LayerNorm([6, 6], elementwise_affine=False)
    group, model, example = judged(Images(norm), torch.randn(2, 3, 8, 8))
    assert group.exact_zero
    assert zeroed_and_cut(model, example, [group], 0)[0] <= EXACT


KERNEL = torch.linspace(0.5, 1.5, 4, dtype=torch.float64).view(1, 1, 2, 2)
BIAS = torch.tensor([0.7, -0.4], dtype=torch.float64)


def each_alone(x: Tensor, filtered: Function) -> Tensor:
    """Channels folded into the batch, so that one filter serves them all."""
    y = filtered(x.flatten(0, 1)[:, None])
    return y.reshape(*x.shape[:2], *y.shape[1:]).flatten(2, 3)


FILTERED: dict[str, tuple[Function, bool]] = {
    "a filter without a border": (lambda x: F.conv2d(x.sigmoid(), KERNEL), True),
    "a filter with a border": (lambda x: F.conv2d(x.sigmoid(), KERNEL, padding=1), False),
    "a transposed filter": (lambda x: F.conv_transpose2d(x.sigmoid(), KERNEL, stride=2), False),
    "two filters": (lambda x: F.conv2d(x.sigmoid(), KERNEL.repeat(2, 1, 1, 1)), False),
    "two filters on zeros": (lambda x: F.conv2d(x, KERNEL.repeat(2, 1, 1, 1)), True),
    "two shifts": (lambda x: F.conv2d(x, KERNEL.repeat(2, 1, 1, 1), BIAS), False),
}


@pytest.mark.parametrize("way", FILTERED)
def test_channels_in_the_batch_stay_constants_only_where_one_filter_answers_evenly(
    way: str,
) -> None:
    filtered, is_exact = FILTERED[way]
    images = Images(lambda x: each_alone(x, filtered))
    group, model, example = judged(images, torch.randn(2, 3, 8, 8))
    assert (group.exact_zero, group.exact_duplicate) == (is_exact, True)
    if is_exact:
        assert zeroed_and_cut(model, example, [group], 0)[0] <= EXACT


@pytest.mark.parametrize(
    ("order", "is_exact"),
    [(2, True), (1, True), (torch.inf, True), (-1, False), (-torch.inf, False)],
)
def test_zero_channels_leave_a_length_only_if_its_order_is_above_zero(
    order: float, is_exact: bool
) -> None:
    images = Images(lambda x: x * torch.linalg.vector_norm(x, order, 1, True))
    group, model, example = judged(images, torch.randn(2, 3, 8, 8))
    assert group.exact_zero == is_exact
    if is_exact:
        assert zeroed_and_cut(model, example, [group], 0)[0] <= EXACT
    else:
        assert group.frozen_reason.startswith("vector_norm over channels at ")
