"""What fits by luck is not right: dead branches, halves of everything, one choice of channels."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimcli.network.example import Example
from slimcli.network.structure import Group, analyze
from slimcli.network.structure.comparison import Failure, Ran, compare
from slimcli.network.structure.draws import Draws, kept_counts
from slimcli.network.structure.trial import Trial
from slimcli.network.structure.unequal import unequal

from . import structures
from .proving import EXACT, call, prepared, prunable, zeroed_and_cut


class DividedByWidth(nn.Module):
    """Divides by its width in front of a trained norm whose first mean is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = (
            structures.conv(3, 16),
            structures.conv(16, 12),
            nn.BatchNorm2d(12),
        )
        self.head = nn.Linear(12, 5)
        self.norm.running_mean.copy_(torch.linspace(0.02, -0.08, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        return self.head(torch.relu(self.norm(self.b(x / x.shape[1]))).mean((2, 3)))


def test_a_trained_norm_does_not_silence_what_a_trial_must_see() -> None:
    torch.manual_seed(0)
    model = DividedByWidth().double().eval()
    batch = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    structure = analyze(model, Example(batch, call))
    assert [group.name for group in prunable(structure)] == ["norm"]
    assert "zeroed and cut differ" in structure.group("a").frozen_reason


def test_trial_statistics_stay_near_trained_ones_and_differ_from_channel_to_channel() -> None:
    norm = nn.BatchNorm1d(64).double()
    norm.running_mean.fill_(3.0)
    norm.running_var.fill_(4.0)
    unequal(norm, torch.Generator().manual_seed(0))
    assert (norm.running_mean - 3.0).abs().max() <= 0.1 * norm.running_var.sqrt().max()
    assert 3.0 <= norm.running_var.min() < norm.running_var.max() <= 5.0
    for each in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
        assert len(each.unique()) == 64


class FixedHeads(nn.Module):
    """As many heads as there are, of four channels each."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(5, 8), nn.Linear(8, 3)
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.embed(x))
        shape = (*x.shape[:-1], -1, 4)
        q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.query, self.key, self.value))
        weights = (q @ k.transpose(-1, -2) / 2).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


def test_heads_of_fixed_size_are_not_cut_because_half_of_them_is_one() -> None:
    torch.manual_seed(0)
    model, example = prepared(FixedHeads(), torch.randn(2, 9, 5))
    assert [group.name for group in prunable(analyze(model, example))] == ["embed"]


@pytest.mark.parametrize("size", [2, 3, 4, 7, 8, 64, 1000])
def test_a_trial_keeps_an_odd_number_of_channels_and_removes_two_or_more(size: int) -> None:
    counts = kept_counts(size)
    assert all(1 <= count <= max(1, size - 2) and count % 2 for count in counts)
    assert size < 16 or len(counts) > 2


@pytest.mark.parametrize("size", [3, 4, 6, 8, 16, 64])
def test_two_groups_of_one_size_never_keep_equally_many_channels(size: int) -> None:
    for seed in range(20):
        draws = Draws(torch.Generator().manual_seed(seed))
        one, two = (keep for _, keep in draws.of(groups_of(size, size)))
        assert one != two
        assert max(one, two) < size


@pytest.mark.parametrize("size", [3, 4, 5])
def test_of_few_channels_another_number_stays_each_time(size: int) -> None:
    draws = Draws(torch.Generator().manual_seed(0))
    counts = [keep for _ in range(9) for _, keep in draws.of(groups_of(size))]
    assert all(one != two for one, two in itertools.pairwise(counts))


@pytest.mark.parametrize("size", [6, 8, 16, 32])
def test_of_many_groups_two_channels_or_more_go_and_never_an_even_half(size: int) -> None:
    counts = [keep for _, keep in Draws(torch.Generator()).of(groups_of(*[size] * 100))]
    assert max(counts) <= size - 2
    assert size // 2 not in counts or size // 2 % 2


class OfQuantizedWeights(nn.Module):
    """Scales the rows of a weight by their largest entries: of a zero row nothing is a number."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem, self.middle = nn.Conv2d(3, 8, 3), nn.Conv2d(8, width, 1)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.middle.weight
        step = weight.abs().amax((1, 2, 3), keepdim=True) / 7
        x = F.conv2d(self.stem(x), (weight / step).round() * step, self.middle.bias)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("width", [2, 3, 4, 5, 6, 8])
def test_channels_are_zeroed_for_trial_however_few_can_go(width: int) -> None:
    torch.manual_seed(0)
    model, example = prepared(OfQuantizedWeights(width), torch.randn(2, 3, 8, 8))
    group = next(g for g in analyze(model, example).groups if g.name == "middle.weight")
    assert not group.exact_zero


def groups_of(*sizes: int) -> list[Group]:
    return [Group(str(number), size, (), (), (), ()) for number, size in enumerate(sizes)]


def test_every_group_is_turned_round_once_and_neighbours_apart() -> None:
    groups = groups_of(2, 2, 2, 8)
    draws = Draws(torch.Generator().manual_seed(1))
    first = list(draws.of(groups))
    with draws.repeated():
        assert list(draws.of(groups)) == first
    turned = []
    for turn in (0, 1):
        with draws.turned(turn):
            turned.append(list(draws.of(groups)))
    opposite = [(order[::-1], len(order) - keep) for order, keep in first]
    for number in range(4):
        pair = {str(each[number]) for each in turned}
        assert pair == {str(first[number]), str(opposite[number])}
    kept = [set(order[:keep]) for order, keep in first]
    assert kept[0] != kept[1] != kept[2]
    assert [each[2] == first[2] for each in turned] != [each[0] == first[0] for each in turned]
    assert list(draws.of(groups)) != first


class Interleaved(structures.Net):
    """Two branches written into a canvas of zeros, one channel of each in turn."""

    def __init__(self) -> None:
        super().__init__(12)
        self.a, self.c, self.b = (
            structures.conv(8, 10),
            structures.conv(8, 10),
            structures.conv(20, 12),
        )

    def body(self, x: Tensor) -> Tensor:
        left, right = torch.relu(self.a(x)), torch.relu(self.c(x))
        canvas = left.new_zeros(len(x), 2 * left.shape[1], *left.shape[2:])
        canvas[:, 0::2], canvas[:, 1::2] = left, right
        return self.b(canvas)


def test_interleaved_channels_are_not_cut_in_an_order_that_happens_to_fit() -> None:
    torch.manual_seed(0)
    model, example = prepared(Interleaved(), structures.image())
    structure = analyze(model, example)
    for name in ("a", "c"):
        assert "written in place through a view" in structure.group(name).frozen_reason


class PadsOddImages(nn.Conv2d):
    """Pads as TensorFlow does: even images not at all."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = (-(-size // 2) * 2 - size for size in x.shape[2:])
        if height > 0 or width > 0:
            x = F.pad(x, (0, width, 0, height))
        return super().forward(x)


class Padding(structures.Net):
    """A constant reaches a conv that pads some images; a zero reaches another one like it."""

    def __init__(self) -> None:
        super().__init__(12)
        self.a, self.first = structures.conv_bn(8, 16), PadsOddImages(16, 10, 2, 2)
        self.b, self.second = structures.conv_bn(10, 14), PadsOddImages(14, 12, 2, 2)

    def body(self, x: Tensor) -> Tensor:
        x = self.first(torch.sigmoid(self.a(x)))
        return self.second(torch.relu(self.b(x)))


def test_sizes_that_are_divided_keep_constants_from_convs_that_may_pad_and_nothing_else() -> None:
    torch.manual_seed(0)
    model, example = prepared(Padding(), structures.image())
    structure = analyze(model, example)
    names = [group.name for group in prunable(structure)]
    assert "images of other sizes may be padded" in structure.group("a.1").zero_reason
    assert {"first", "b.1"} <= set(names)
    odd = Example(torch.randn(2, 3, 17, 13, dtype=torch.float64), example.predict)
    assert zeroed_and_cut(model, odd, prunable(structure), 0)[0] <= EXACT


class Inverted(structures.Net):
    """A depthwise conv that may pad reads zeros, and makes constants of them for the next layer."""

    def __init__(self) -> None:
        super().__init__(12)
        self.a, self.depthwise = structures.conv_bn(8, 16), PadsOddImages(16, 16, 2, 2, groups=16)
        self.norm, self.b = nn.BatchNorm2d(16), structures.conv(16, 12, 1)

    def body(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.norm(self.depthwise(torch.relu(self.a(x))))))


def test_zeros_at_a_conv_that_may_pad_keep_no_constant_behind_it() -> None:
    torch.manual_seed(0)
    model, example = prepared(Inverted(), structures.image())
    group = analyze(model, example).group("a.1")
    assert group.exact_zero
    assert [path for path, _ in group.constants] == ["b"]
    odd = Example(torch.randn(2, 3, 17, 13, dtype=torch.float64), example.predict)
    assert zeroed_and_cut(model, odd, [group], 0)[0] <= EXACT


class Fused(structures.Net):
    """Levels weighed by a few numbers, as BiFPN does."""

    def __init__(self) -> None:
        super().__init__(12)
        self.a, self.c, self.b = (
            structures.conv(8, 10),
            structures.conv(8, 10),
            structures.conv(10, 12),
        )
        self.weights = nn.Parameter(torch.tensor([0.3, 0.7]))

    def body(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(torch.stack([self.a(x), self.c(x)], -1) @ self.weights))


def test_levels_that_a_small_vector_weighs_are_cut_together() -> None:
    torch.manual_seed(0)
    model, example = prepared(Fused(), structures.image())
    structure = analyze(model, example)
    assert "a" in [group.name for group in prunable(structure)]
    assert {slot.tensor for slot in structure.group("a").producers} >= {"a.weight", "c.weight"}
    assert zeroed_and_cut(model, example, prunable(structure), 0)[0] <= EXACT


def test_outputs_that_differ_in_their_imaginary_part_alone_differ() -> None:
    left = torch.complex(torch.ones(3), torch.ones(3)).to(torch.complex128)
    same, other = Ran([left], [], []), Ran([left.conj()], [], [])
    assert compare(same, Ran([left.clone()], [], []), torch.float64, may_jump=False) is None
    assert "differ by 2.0e+00" in str(compare(same, other, torch.float64, may_jump=False))


def test_outputs_without_a_finite_number_prove_nothing() -> None:
    lost, empty = torch.full((3,), torch.nan), torch.zeros(0)
    some = torch.tensor([torch.inf, 1.0])
    for outputs, told in (
        ([lost], "no output is a finite number"),
        ([lost, some], ""),
        ([empty], ""),
    ):
        ran = Ran(outputs, [], [])
        assert told in str(compare(ran, ran, torch.float64, may_jump=False) or "")
        assert bool(told) == (compare(ran, ran, torch.float64, may_jump=False) is not None)


class FirstEight(structures.Net):
    """Treats the first eight channels in a way of their own, beside layers that draw numbers.

    Args:
        width: Of the layer whose channels these are.
        others: Layers beside it, each of which moves the dice on.
        treat: What is done to the first eight.
    """

    def __init__(self, width: int, others: int, treat: Callable[[Tensor], Tensor]) -> None:
        super().__init__(10)
        self.sides = nn.ModuleList(nn.Conv2d(8, 5 + each, 1) for each in range(others))
        self.ends = nn.ModuleList(nn.Conv2d(5 + each, 10, 1) for each in range(others))
        self.a, self.b = structures.conv(8, width), nn.Conv2d(width, 10, 1)
        self.treat = treat

    def body(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        y = self.b(torch.cat([self.treat(y[:, :8]), y[:, 8:]], 1))
        return y + sum(end(side(x)) for side, end in zip(self.sides, self.ends, strict=True))


@pytest.mark.parametrize("width", [16, 24])
@pytest.mark.parametrize("treat", [lambda x: F.avg_pool2d(x, 3, 1, 1), F.instance_norm, torch.tanh])
def test_a_fixed_slice_is_not_cut_because_its_block_happened_to_stay(
    width: int, treat: Callable[[Tensor], Tensor]
) -> None:
    cut = 0
    for others in range(6):
        torch.manual_seed(others)
        model, example = prepared(FirstEight(width, others, treat), structures.image())
        cut += analyze(model, example).group("a").is_prunable
    assert cut == 0


class Shifted(nn.Module):
    """Moves a quarter of the channels, as networks without pooling do."""

    def __init__(self, width: int, others: int) -> None:
        super().__init__()
        layers = [nn.Conv2d(12, 12, 1) for _ in range(others)]
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 1), *layers)
        self.middle, self.head = nn.Conv2d(12, width, 3), nn.Conv2d(width, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.stem(x)).relu()
        moved, few = x.clone(), x.shape[1] // 4
        moved[:, :few, 1:] = x[:, :few, :-1]
        moved[:, few : 2 * few, :-1] = x[:, few : 2 * few, 1:]
        return self.head(moved).mean((2, 3))


@pytest.mark.parametrize("width", [5, 6, 7])
def test_a_slice_of_a_part_of_the_channels_is_no_block_because_it_has_one(width: int) -> None:
    for others in range(4):
        torch.manual_seed(0)
        model, example = prepared(Shifted(width, others), torch.randn(2, 3, 8, 8))
        assert "single channels" in analyze(model, example).group("middle").frozen_reason


class Hidden(nn.Module):
    """A branch that divides by its width, behind a gate that is closed as yet."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.side, self.last = nn.Linear(6, 8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)
        self.register_buffer("gate", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        y = self.side(x)
        return self.head(x + self.gate * self.last(y / y.shape[1]))


def test_a_branch_behind_a_closed_gate_is_tried() -> None:
    model, example = prepared(Hidden(), torch.randn(2, 6))
    assert "zeroed and cut differ" in analyze(model, example).group("side").frozen_reason


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_trial_that_failed_is_not_forgiven_because_later_ones_pass(
    place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [None] * place + [Failure("they differ")]

    def attempt(trial: Trial, groups: list[Group], **_: bool) -> Failure | None:
        return answers.pop(0) if answers else None

    monkeypatch.setattr(Trial, "attempt", attempt)
    model, example = prepared(structures.ChannelShuffle(), structures.image())
    structure = analyze(model, example)
    assert prunable(structure) == []
    reasons = {group.frozen_reason for group in structure.groups if group.name != "head"}
    assert reasons == {"a trial cut failed: they differ"}
