"""Channels that are written into places, or laid out as wide as others are, stay as many."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimcli.network.example import Example
from slimcli.network.structure import Group, analyze

from .proving import EXACT, prepared, zeroed_and_cut


class Two(nn.Module):
    """A conv, something, a conv."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 1)


WIDTHS = (3, 4, 6, 8, 16)
"""Of the small ones a trial knows few numbers of channels to keep: two may fit by luck."""


def found(model: nn.Module, samples: int = 2) -> tuple[nn.Module, Example, list[Group]]:
    torch.manual_seed(0)
    model, example = prepared(model, torch.randn(samples, 3, 8, 8))
    return model, example, [g for g in analyze(model, example).groups if g.name != "head"]


def check_cuts(model: nn.Module, example: Example, groups: list[Group]) -> None:
    """Each group that can be cut is cut alone, to several widths."""
    for group in groups:
        for seed in range(4):
            assert zeroed_and_cut(model, example, [group], seed)[0] <= EXACT


class Pair(nn.Module):
    """Two convs of one width, and what brings their channels together."""

    def __init__(self, width: int, meets: Callable[[Pair, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.second = nn.Conv2d(3, width, 3, padding=1)
        self.pooled, self.gate = nn.Linear(3, 2 * width), nn.Linear(width, 1)
        self.meets, self.head = meets, nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.style, first = self.pooled(x.mean((2, 3))), self.first(x).relu()
        self.gated = self.gate(first.mean((2, 3)))[..., None, None]
        return self.head(self.meets(self, first, self.second(x).relu()))


def overwritten(net: Pair, a: Tensor, b: Tensor) -> Tensor:
    place = torch.empty_like(a)
    place[...] = b
    return place * net.gated


def copied(net: Pair, a: Tensor, b: Tensor) -> Tensor:
    return a.clone().copy_(b) * net.gated


def like_another(net: Pair, a: Tensor, b: Tensor) -> Tensor:
    return b.flatten(1).view_as(a)


def shaped_like_another(net: Pair, a: Tensor, b: Tensor) -> Tensor:
    return b.flatten(1).reshape_as(a)


def unflattened(net: Pair, a: Tensor, b: Tensor) -> Tensor:
    return b.flatten(1).unflatten(1, tuple(a.shape[1:]))


def broadcast_both(net: Pair, a: Tensor, b: Tensor) -> Tensor:
    return torch.stack(torch.broadcast_tensors(a, b), 1).amax(1)


def broadcast_like_another(net: Pair, a: Tensor, b: Tensor) -> Tensor:
    return torch.broadcast_to(b, a.shape)


def in_rows(net: Pair, a: Tensor, b: Tensor) -> Tensor:
    rows = torch.cat([a, b], 1).view(a.shape[0], 2, a.shape[1], *a.shape[2:])
    return rows.amax(1)


def styled(net: Pair, a: Tensor, b: Tensor) -> Tensor:
    style = net.style.view(-1, 2, a.size(1), 1, 1)
    return a * style[:, 0] + b * style[:, 1]


LIKE_ANOTHER = [like_another, shaped_like_another, broadcast_both, broadcast_like_another]
TIES = [*LIKE_ANOTHER, overwritten, copied, unflattened, in_rows, styled]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("meets", TIES, ids=lambda meets: meets.__name__)
def test_channels_laid_where_others_were_are_cut_with_them(
    meets: Callable[[Pair, Tensor, Tensor], Tensor], width: int
) -> None:
    model, example, groups = found(Pair(width, meets))
    tied = {slot.tensor for group in groups if group.exact_zero for slot in group.slots}
    assert {"first.weight", "second.weight"} <= tied
    assert [group.size for group in prunable_of(groups)] == [width]
    check_cuts(model, example, prunable_of(groups))


def prunable_of(groups: list[Group]) -> list[Group]:
    return [group for group in groups if group.is_prunable]


class PartialConv(Two):
    """A conv over half of the channels, written back where they were read."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.part = nn.Conv2d(width // 2, width // 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).clone()
        half = y.shape[1] // 2
        y[:, :half] = self.part(y[:, :half])
        return self.head(y)


@pytest.mark.parametrize("width", [6, 8, 16])
def test_a_part_that_is_written_back_has_the_width_of_its_place(width: int) -> None:
    model, example, groups = found(PartialConv(width))
    assert [(group.name, group.size) for group in groups] == [("first", width // 2)]
    check_cuts(model, example, groups)


class Buffered(Two):
    """Its channels are written into a tensor whose width the code fixes."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y.copy_(torch.linspace(0, 1, 8, dtype=x.dtype).view(1, 8, 1, 1))
        return self.head(y)


def test_a_place_that_is_overwritten_with_values_of_fixed_size_stays() -> None:
    groups = found(Buffered())[2]
    assert "overwritten by a tensor of fixed size at" in groups[0].frozen_reason


class Recurrent(nn.Module):
    """A cell whose first state is as wide as the code says.

    Args:
        start: Makes the state.
    """

    def __init__(self, start: Callable[[Recurrent, Tensor], Tensor]) -> None:
        super().__init__()
        self.start, self.stem = start, nn.Conv2d(3, 6, 1)
        self.gate, self.new = (nn.Conv2d(14, 8, 3, padding=1) for _ in range(2))
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        state = self.start(self, x)
        for _ in range(2):
            both = torch.cat([state, x], 1)
            gate = self.gate(both).sigmoid()
            state = (1 - gate) * state + gate * self.new(both).tanh()
        return self.head(state)


STARTS: dict[str, Callable[[Recurrent, Tensor], Tensor]] = {
    "new zeros": lambda net, x: x.new_zeros(len(x), net.gate.out_channels, *x.shape[2:]),
    "zeros": lambda net, x: torch.zeros(
        x.size(0), net.gate.weight.shape[0], x.size(2), x.size(3), dtype=x.dtype
    ),
    "a size": lambda net, x: torch.zeros(
        size=(x.size(0), net.gate.out_channels, *x.shape[2:]), dtype=x.dtype
    ),
    "emptied": lambda net, x: torch.empty(
        x.size(0), net.gate.out_channels, *x.shape[2:], dtype=x.dtype
    ).zero_(),
}


@pytest.mark.parametrize("name", STARTS)
def test_zeros_made_as_wide_as_a_layer_are_cut_with_it(name: str) -> None:
    model, example, groups = found(Recurrent(STARTS[name]))
    assert {group.name: group.size for group in groups if group.exact_zero} == {"stem": 6, "new": 8}
    check_cuts(model, example, groups)


class Fused(nn.Module):
    """The sum of two weights: of a channel that one of them makes, the other one makes the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.wide, self.narrow = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.wide.weight + F.pad(self.narrow.weight, (1, 1, 1, 1))
        x = F.conv2d(self.first(x).relu(), weight, self.wide.bias, padding=1)
        return self.head(self.norm(x.mean((2, 3))))


@pytest.mark.parametrize("samples", [1, 2])
def test_one_number_of_one_sample_is_no_constant(samples: int) -> None:
    model, example, groups = found(Fused(), samples)
    assert not any(group.exact_zero for group in groups if group.name != "first")
    check_cuts(model, example, [group for group in groups if group.name == "first"])


class Folded(Two):
    """Channels divided twice: in groups that lie in the batch, and there in halves."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        left, right = x.reshape(2 * x.shape[0], -1, *x.shape[2:]).chunk(2, 1)
        both = torch.cat([left * left.mean((2, 3), keepdim=True), right.relu()], 1)
        return self.head(both.reshape(x.shape))


@pytest.mark.parametrize("width", [8, 12, 16, 32])
def test_quarters_can_be_cut_down_to_one_channel(width: int) -> None:
    model, example, groups = found(Folded(width))
    assert [(group.size, group.exact_zero) for group in groups] == [(width // 4, True)]
    check_cuts(model, example, groups)


class Alternating(Two):
    """Every second entry of flattened images is negated."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x.flatten(1)[:, 1::2] *= -1
        return self.head(x)


def test_steps_over_pixels_of_flattened_images_hang_on_the_image() -> None:
    groups = found(Alternating())[2]
    assert "channels are sliced at fixed places" in groups[0].frozen_reason


class Codebook(nn.Module):
    """Picks rows of a table by the nearest one, written as a product."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.table, self.last = nn.Embedding(16, 8), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.first(x).relu()).permute(0, 2, 3, 1)
        nearest = torch.cdist(x.reshape(-1, x.shape[-1]), self.table.weight).argmin(1)
        picked = (F.one_hot(nearest, 16).to(x.dtype) @ self.table.weight).view_as(x)
        return self.head(self.last(picked.permute(0, 3, 1, 2)).relu())


def test_a_check_of_class_numbers_is_no_other_way_through_the_code() -> None:
    model, example, groups = found(Codebook())
    cut = [group for group in groups if group.exact_zero]
    assert {"first", "last"} <= {group.name for group in cut}
    check_cuts(model, example, cut)


class Idle(nn.Module):
    """One of its experts is given no row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.expert, self.head = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.mean((2, 3)))
        rows = x[x.amax(1) > 1e9]
        return self.head(x + self.expert(rows).sum(0))


def test_a_layer_without_rows_is_analysed() -> None:
    structure = analyze(*prepared(Idle(), torch.randn(2, 3, 8, 8)))
    reasons = {group.name: group.frozen_reason for group in structure.groups}
    assert reasons["first"].startswith("amax over channels at ")
    assert reasons["head"] == "it is an output of the model"


class Elsewhere(nn.Module):
    """The weight of a layer is read by other code, its bias by nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1)
        self.head = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.conv2d(self.first(x).relu(), self.middle.weight.tanh()))


def test_a_bias_that_is_not_read_is_cut_with_the_weight_that_is() -> None:
    model, example, groups = found(Elsewhere())
    assert {slot.tensor for group in groups for slot in group.slots if group.exact_zero} >= {
        "middle.weight",
        "middle.bias",
    }
    check_cuts(model, example, groups)


def by_index(net: Pair, a: Tensor, b: Tensor) -> Tensor:
    canvas = torch.zeros(b.shape, dtype=b.dtype)
    canvas[torch.arange(len(a))] = a
    return canvas * b


def by_scatter(net: Pair, a: Tensor, b: Tensor) -> Tensor:
    canvas = b.new_zeros(b.shape)
    return canvas.index_add_(3, torch.arange(a.shape[3]), a) * b


class Beside(nn.Module):
    """Two convs of one width, laid side by side; one of them knows how wide the other one is."""

    def __init__(self, width: int, meets: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.meets, self.head = meets, nn.Conv2d(2 * width, 3, 1)
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.second = nn.Conv2d(3, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.first(x), self.second(x)
        return self.head(torch.cat([self.meets(first, second, x[:, :1] > 0), second], 1))


BESIDE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "a slice": lambda a, b, mask: a[:, : b.shape[1]],
    "a slice from the end": lambda a, b, mask: a[:, -b.shape[1] :],
    "a piece": lambda a, b, mask: a.split(b.shape[1], 1)[0],
    "expanded": lambda a, b, mask: torch.where(mask.expand_as(b), a, -a),
    "broadcast": lambda a, b, mask: torch.where(torch.broadcast_tensors(mask, b)[0], a, -a),
}


@pytest.mark.parametrize("width", [2, 3, 4, 8])
@pytest.mark.parametrize("name", BESIDE)
def test_what_is_as_wide_as_another_one_is_cut_alone_or_with_it(name: str, width: int) -> None:
    model, example, groups = found(Beside(width, BESIDE[name]))
    assert any(group.exact_zero for group in groups)
    check_cuts(model, example, prunable_of(groups))


@pytest.mark.parametrize("meets", [by_index, by_scatter], ids=lambda meets: meets.__name__)
def test_zeros_as_wide_as_others_that_are_written_by_index_are_cut_with_them(
    meets: Callable[[Pair, Tensor, Tensor], Tensor],
) -> None:
    groups = found(Pair(8, meets))[2]
    assert [group.size for group in groups if group.exact_zero] == [8]


class Upsampled(Two):
    """Pixels are written in turns into a canvas.

    Args:
        make: Makes the canvas.
    """

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        canvas = self.make(x)
        canvas[:, :, 0::2, 0::2], canvas[:, :, 1::2, 0::2] = x, -x
        canvas[:, :, 0::2, 1::2], canvas[:, :, 1::2, 1::2] = 2 * x, x.square()
        return self.head(canvas)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: torch.zeros(len(x), int(x.shape[1]), 2 * x.shape[2], 2 * x.shape[3]).to(x),
        lambda x: torch.empty(len(x), x.shape[1], 2 * x.shape[2], 2 * x.shape[3], dtype=x.dtype),
        lambda x: x.new_empty(len(x), x.shape[1], 2 * x.shape[2], 2 * x.shape[3]),
    ],
)
def test_pixels_that_are_written_in_turns_do_not_freeze_their_channels(
    make: Callable[[Tensor], Tensor],
) -> None:
    model, example, groups = found(Upsampled(make))
    assert [(group.size, group.exact_zero) for group in groups] == [(8, True)]
    check_cuts(model, example, groups)


class Unflattened(Alternating):
    """``torch.unflatten`` called by names."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.unflatten(input=self.first(x), dim=1, sizes=(2, -1))
        return self.head(torch.cat([x[:, 0], x[:, 1].relu()], 1))


def test_unflatten_is_followed_however_it_is_called() -> None:
    model, example, groups = found(Unflattened())
    assert [(group.size, group.exact_zero) for group in groups] == [(4, True)]
    check_cuts(model, example, groups)
