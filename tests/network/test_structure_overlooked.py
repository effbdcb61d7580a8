"""What a trial cut must not overlook: wrong cuts that hide behind zeros, infinities and picks."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimcli.network.example import Example
from slimcli.network.structure import Structure, analyze, zero_channels

from . import structures
from .proving import EXACT, merge_difference, network, prepared, prunable, zeroed_and_cut


class ScaledAttention(structures.Net):
    """Attention whose scale follows the number of channels, so that cutting changes it.

    Args:
        end: What becomes of the attended features and of the features they are made from.
    """

    def __init__(self, end: Callable[[ScaledAttention, Tensor, Tensor], Tensor]) -> None:
        super().__init__(8)
        self.query, self.key = nn.Conv2d(8, 12, 1), nn.Conv2d(8, 12, 1)
        self.gate, self.router = nn.Parameter(torch.zeros(1)), nn.Linear(8, 6)
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        query, key, value = self.query(x).flatten(2), self.key(x).flatten(2), x.flatten(2)
        weights = (query.transpose(1, 2) @ key / math.sqrt(key.shape[1])).softmax(-1)
        return self.end(self, (value @ weights.transpose(1, 2)).mean(2), value.mean(2))


def gated(net: ScaledAttention, attended: Tensor, x: Tensor) -> Tensor:
    return net.head(x + net.gate * attended)


def masked(net: ScaledAttention, attended: Tensor, x: Tensor) -> Tensor:
    hidden = torch.tensor([True, False, False, False, False])
    return net.head(attended).masked_fill(hidden, -math.inf)


def routed(net: ScaledAttention, attended: Tensor, x: Tensor) -> Tensor:
    weight, index = net.router(x).topk(2, -1)
    return net.head(attended) * weight.sum(-1, keepdim=True) + index.sum(-1, keepdim=True)


def classes(net: ScaledAttention, attended: Tensor, x: Tensor) -> Tensor:
    return net.head(attended).argmax(-1)


@pytest.mark.parametrize("end", [gated, masked, routed, classes], ids=lambda end: end.__name__)
def test_a_scale_by_the_number_of_channels_is_found_behind(
    end: Callable[[ScaledAttention, Tensor, Tensor], Tensor],
) -> None:
    torch.manual_seed(0)
    model, example = prepared(ScaledAttention(end), structures.image())
    with torch.no_grad():
        model.gate.zero_()
    group = analyze(model, example).group("query")
    assert "zeroed and cut differ" in group.frozen_reason


class Padded(structures.Net):
    """Code that pads images of odd size; the example is even."""

    def __init__(self) -> None:
        super().__init__(12)
        self.a, self.norm = structures.conv(8, 16), nn.BatchNorm2d(16)
        self.b = nn.Conv2d(16, 12, 2, stride=2)

    def body(self, x: Tensor) -> Tensor:
        x = self.norm(F.relu(self.a(x)))
        return self.b(F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2)))


class Divided(Padded):
    """Windows that leave the image, divided by a number from the code."""

    def body(self, x: Tensor) -> Tensor:
        x = self.norm(F.relu(self.a(x)))
        return self.b(F.avg_pool2d(x, 2, ceil_mode=True, divisor_override=4))


class Branching(Padded):
    """The same padding behind an ``if`` that the example does not enter."""

    def body(self, x: Tensor) -> Tensor:
        x = self.norm(F.relu(self.a(x)))
        if x.shape[2] % 2 or x.size(3) % 2:
            x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        return self.b(x)


class Negated(Padded):
    """Padding up to the next multiple."""

    def body(self, x: Tensor) -> Tensor:
        x = self.norm(F.relu(self.a(x)))
        bottom, right = ((-size) % 2 for size in x.shape[2:])
        return self.b(F.pad(x, (0, right, 0, bottom)) if bottom or right else x)


@pytest.mark.parametrize("kind", [Padded, Divided, Branching, Negated])
def test_what_is_cut_is_exact_on_images_of_another_size(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, example = prepared(kind(), structures.image())
    groups = prunable(analyze(model, example))
    assert [group.name for group in groups] == ["stem.1", "b"]
    odd = Example(torch.randn(2, 3, 17, 13, dtype=torch.float64), example.predict)
    assert zeroed_and_cut(model, odd, groups, 0)[0] <= EXACT


def test_a_remainder_of_a_width_keeps_what_a_bias_can_take_up() -> None:
    class Checked(Padded):
        def body(self, x: Tensor) -> Tensor:
            x = self.norm(F.relu(self.a(x)))
            assert x.shape[1] % 2 in (0, 1)
            return self.b(x)

    torch.manual_seed(0)
    model, example = prepared(Checked(), structures.image())
    group = analyze(model, example).group("a")
    assert group.exact_zero
    assert [path for path, _ in group.constants] == ["b"]


class TiedWords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 16)
        self.last = nn.Linear(16, 20, bias=False)
        self.last.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.words(x)))


class Computed(structures.Net):
    """A conv whose weight is a function of its parameter."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__(12)
        self.a, self.kernel = structures.conv_bn(8, 16), nn.Parameter(torch.randn(12, 16, 3, 3))
        self.function = function

    def body(self, x: Tensor) -> Tensor:
        return F.conv2d(self.a(x), self.function(self.kernel), padding=1)


def merged(model: nn.Module, batch: Tensor) -> Structure:
    """The structure; every merge that it promises is exact."""
    torch.manual_seed(0)
    model, example = prepared(model, batch)
    structure = analyze(model, example)
    for group in structure.groups:
        if group.exact_duplicate:
            assert merge_difference(model, example, group) <= EXACT
    return structure


def test_a_tied_weight_that_makes_and_reads_is_not_merged() -> None:
    words = torch.randint(0, 20, (3, 6), generator=torch.Generator().manual_seed(0))
    group = merged(TiedWords(), words).group("words")
    assert (group.exact_zero, group.exact_duplicate) == (True, False)
    assert group.duplicate_reason == "one tensor dimension both makes and reads these channels"


@pytest.mark.parametrize("function", [torch.abs, torch.tanh, torch.square, torch.sign])
def test_a_weight_that_is_no_sum_of_its_parts_is_not_merged(
    function: Callable[[Tensor], Tensor],
) -> None:
    group = merged(Computed(function), structures.image()).group("a.1")
    assert (group.exact_zero, group.exact_duplicate) == (True, False)
    assert group.duplicate_reason.endswith("of a weight is no sum over merged channels")


@pytest.mark.parametrize("function", [torch.neg, lambda kernel: 0.5 * kernel, torch.clone])
def test_a_weight_that_is_the_sum_of_its_parts_is_merged(
    function: Callable[[Tensor], Tensor],
) -> None:
    assert merged(Computed(function), structures.image()).group("a.1").exact_duplicate


class Slotted:
    """An output without a dictionary."""

    __slots__ = ("features",)

    def __init__(self, features: Tensor) -> None:
        self.features = features


def test_an_output_in_slots_is_protected() -> None:
    class Slots(structures.Net):
        def forward(self, x: Tensor) -> Slotted:
            return Slotted(self.stem(x))

    model, example = prepared(Slots(8), structures.image())
    assert analyze(model, example).group("stem.1").frozen_reason == "it is an output of the model"


def test_only_the_guilty_of_a_line_are_frozen() -> None:
    class OneLine(structures.Net):
        def __init__(self) -> None:
            super().__init__(12)
            self.a, self.b = structures.conv_bn(8, 16), structures.conv_bn(16, 12)

        def body(self, x: Tensor) -> Tensor:
            return self.b(self.a(x.view(2, 8, 256).view(2, -1, 16, 16)).view(2, -1, 16, 16))

    torch.manual_seed(0)
    model, example = prepared(OneLine(), structures.image())
    groups = prunable(analyze(model, example))
    assert [group.name for group in groups] == ["a.1", "b.1"]


class Shown(structures.Net):
    """Something behind the features that a width changes, and what is shown of it."""

    def __init__(self, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__(9)
        self.a, self.b = structures.conv(8, 12), structures.conv(12, 9)
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.b(torch.relu(self.a(self.stem(x))) / 12))


class Largest(Shown):
    """The largest pixels of each channel, divided by the number of channels."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(self.stem(x))).flatten(2).topk(9, 2)[0]
        return self.b((x / x.shape[1]).view(len(x), -1, 3, 3))


class Scaling(Shown):
    """Shows a mask of numbers; what makes it follows the number of channels."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(self.stem(x)))
        return self.end(self.b(x / x.shape[1]))


@pytest.mark.parametrize(
    "net", [Largest(lambda x: x), Scaling(lambda x: (x > 0).double())], ids=["places", "mask"]
)
def test_a_width_that_scales_is_seen_behind(net: nn.Module) -> None:
    torch.manual_seed(0)
    model, example = prepared(net, structures.image())
    assert "zeroed and cut differ" in analyze(model, example).group("a").frozen_reason


class KernelsOfOne(nn.Module):
    """Kernels that sum to one: of merged channels they would sum to more."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.head = nn.Conv2d(3, channels, 3), nn.Conv2d(6, 2, 1)
        self.weight = nn.Parameter(torch.randn(6, channels, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.flatten(2).softmax(-1).view_as(self.weight)
        return self.head(F.conv2d(torch.relu(self.a(x)), weight))


@pytest.mark.parametrize("channels", [2, 3, 4, 9])
def test_a_small_group_is_merged_for_trial_too(channels: int) -> None:
    torch.manual_seed(0)
    model, example = prepared(KernelsOfOne(channels), torch.randn(2, 3, 9, 9))
    group = analyze(model, example).group("a")
    assert not group.exact_duplicate
    assert "equal channels were merged for trial" in group.duplicate_reason


def test_no_channels_are_zeroed_if_none_is_named() -> None:
    model, _, structure = network("Chain")
    before = [each.clone() for each in model.parameters()]
    zero_channels(model, prunable(structure)[0], [])
    assert all(map(torch.equal, before, model.parameters()))


class SideBySide(nn.Module):
    """Two weights make one, which reads channels that can be merged only."""

    def __init__(self, unite: Callable[[Tensor, Tensor], Tensor], rows: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.a, self.b = nn.Conv2d(12, 7, 1, bias=False), nn.Conv2d(12, rows, 1, bias=False)
        self.head = nn.Linear(7 if rows == 7 else 7 + rows, 4)
        self.unite = unite

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(torch.cos(self.stem(x)), self.unite(self.a.weight, self.b.weight))
        return self.head(F.relu(x).mean((2, 3)))


@pytest.mark.parametrize(
    ("unite", "rows"), [(lambda a, b: torch.cat([a, b]), 2), (lambda a, b: a + b, 7)]
)
@pytest.mark.parametrize("seed", range(4))
def test_channels_that_two_weights_read_as_one_are_not_merged(
    unite: Callable[[Tensor, Tensor], Tensor], rows: int, seed: int
) -> None:
    torch.manual_seed(seed)
    model, example = prepared(SideBySide(unite, rows), torch.randn(1, 3, 4, 4))
    assert not analyze(model, example).group("stem").is_prunable
