"""Reading and writing by index: along other axes channels pass, each perhaps to its own place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .paired import Case, Function, check_case, proven
from .proving import prunable
from .structures import Net, conv_bn

ONE = {"a": 16}
TARGETS = (torch.arange(256) * 7) % 100
HALF = torch.arange(8)


def flat(function: Callable[[Tensor], Tensor]) -> Function:
    """Channels and a long axis of positions."""
    return lambda x, _: function(x.flatten(2)).view_as(x)


def reduced(how: str, include_self: bool = True) -> Function:
    def function(x: Tensor) -> Tensor:
        index = TARGETS.expand_as(x)
        return torch.zeros_like(x).scatter_reduce(2, index, x, how, include_self=include_self)

    return flat(function)


def indexed(how: str) -> Function:
    return flat(lambda x: torch.zeros_like(x).index_reduce(2, TARGETS, x, how))


def changed(change: Callable[[Tensor, Tensor], None], start: float | None = None) -> Function:
    """A copy, or new numbers, written into in place."""

    def function(x: Tensor, y: Tensor) -> Tensor:
        target = x.clone() if start is None else torch.zeros_like(x) + start
        change(target, x)
        return target

    return function


def write_half(target: Tensor, x: Tensor) -> None:
    target[:, :, HALF] = x[:, :, 8:]


def write_corner(target: Tensor, x: Tensor) -> None:
    target[:, :, HALF, HALF] = x[:, :, HALF, 0]


def write_apart(target: Tensor, x: Tensor) -> None:
    target[torch.tensor([0, 1]), :, torch.tensor([3, 4])] = x[:, :, 0]


def write_everywhere(number: float) -> Callable[[Tensor, Tensor], None]:
    def write(target: Tensor, x: Tensor) -> None:
        target[x < 0.1] = number

    return write


def write_block(number: float) -> Callable[[Tensor, Tensor], None]:
    def write(target: Tensor, x: Tensor) -> None:
        target[:, :, 2:5, 3:7] = number

    return write


def pasted(number: float) -> Function:
    """Into a canvas, not made from channels, that is larger than the image."""

    def function(x: Tensor, _: Tensor) -> Tensor:
        make = torch.ones if number else torch.zeros
        canvas = make(2, x.shape[1], 20, 20, dtype=x.dtype)
        canvas[:, :, 2:18, 1:17] = x
        return canvas

    return function


def pasted_one_by_one(x: Tensor, _: Tensor) -> Tensor:
    canvas = x.new_zeros(2, x.shape[1], 20, 20)
    for image, part in zip(canvas, x, strict=True):
        image[:, 2:18, 2:18].copy_(part)
    return canvas


def pasted_over(x: Tensor, y: Tensor) -> Tensor:
    canvas = x.new_zeros(2, 20, x.shape[1], 20)
    canvas[:, :16, :, :16] = x.transpose(1, 2)
    canvas[:, 4:, :, 4:] += y.transpose(1, 2)
    return canvas.transpose(1, 2)


def beside(x: Tensor, y: Tensor) -> Tensor:
    canvas = x.new_zeros(2, x.shape[1] + y.shape[1], 16, 16)
    canvas[:, : x.shape[1]], canvas[:, x.shape[1] :] = x, y
    return canvas


PICKED = "channels are picked by index at "
WRITTEN = "channels are written by index at "
CASES = {
    "gathered": Case(flat(lambda x: x.gather(2, TARGETS.expand_as(x))), ONE),
    "gathered by a repeated index": Case(
        flat(lambda x: x.gather(2, TARGETS.view(1, 1, -1).repeat(2, x.shape[1], 1))), ONE
    ),
    "taken along an axis": Case(
        lambda x, _: torch.take_along_dim(x, HALF.repeat(2).view(1, 1, -1, 1), 2), ONE
    ),
    "sorted by its own order": Case(flat(lambda x: x.gather(2, x.argsort(2))), ONE),
    "sorted by another's order": Case(
        lambda x, y: x.flatten(2).gather(2, y.flatten(2).argsort(2)).view_as(x), ONE
    ),
    "a quantile": Case(lambda x, _: x - x.quantile(0.3, dim=2, keepdim=True), merge=("a",)),
    "an index for too few channels": Case(
        flat(lambda x: x.gather(2, TARGETS.expand(2, 8, -1)).repeat(1, 2, 1)),
        frozen={"a": "channels meet a tensor of fixed size at "},
    ),
    "gathered among channels": Case(
        lambda x, _: x.gather(1, torch.zeros_like(x, dtype=torch.long)), frozen={"a": PICKED}
    ),
    "selected": Case(lambda x, _: x.index_select(3, HALF), ONE),
    "selected channels": Case(
        lambda x, _: x.index_select(1, torch.arange(15, -1, -1)), frozen={"a": PICKED}
    ),
    "added by index": Case(flat(lambda x: torch.zeros_like(x).index_add(2, TARGETS, x)), ONE),
    "added by index to others": Case(lambda x, y: x.index_add(2, HALF, y[:, :, 8:]), ONE),
    "added by index to a number": Case(
        changed(lambda target, x: target.index_add_(2, HALF, x[:, :, 8:]), 1.0), merge=("a",)
    ),
    "added among channels": Case(
        lambda x, _: x.index_add(1, torch.arange(16).flip(0), x), frozen={"a": WRITTEN}
    ),
    "copied by index": Case(
        flat(lambda x: torch.zeros_like(x).index_copy(2, TARGETS[:100], x[:, :, :100])), ONE
    ),
    "filled with zeros by index": Case(lambda x, _: x.index_fill(2, HALF, 0.0), ONE),
    "filled with ones by index": Case(lambda x, _: x.index_fill(2, HALF, 1.0), merge=("a",)),
    "added by places": Case(
        flat(lambda x: torch.zeros_like(x).scatter_add(2, TARGETS.expand_as(x), x)), ONE
    ),
    "added by places to others": Case(
        lambda x, y: (
            y.flatten(2).scatter_add(2, TARGETS.expand_as(x.flatten(2)), x.flatten(2)).view_as(x)
        ),
        ONE,
    ),
    "put in places": Case(
        flat(lambda x: torch.zeros_like(x).scatter(2, TARGETS.expand_as(x), x)), ONE
    ),
    "put in places among ones": Case(
        flat(lambda x: torch.ones_like(x).scatter(2, TARGETS.expand_as(x), x)), merge=("a",)
    ),
    "put in places of the largest": Case(
        flat(lambda x: torch.zeros_like(x).scatter(2, x.topk(9, 2)[1], x[:, :, :9])), ONE
    ),
    "zeros put in places": Case(flat(lambda x: x.scatter(2, TARGETS.expand_as(x), 0.0)), ONE),
    "ones put in places": Case(
        flat(lambda x: x.scatter(2, TARGETS.expand_as(x), 1.0)), merge=("a",)
    ),
    "put among channels": Case(
        lambda x, _: x.scatter(1, torch.arange(16).flip(0).view(1, -1, 1, 1).expand_as(x), x),
        frozen={"a": WRITTEN},
    ),
    "sums": Case(reduced("sum"), ONE),
    "means": Case(reduced("mean"), ONE),
    "means of what arrives": Case(reduced("mean", include_self=False), ONE),
    "maxima": Case(reduced("amax"), ONE),
    "minima of what arrives": Case(reduced("amin", include_self=False), ONE),
    "products": Case(reduced("prod"), ONE),
    "means by index": Case(indexed("mean"), ONE),
    "maxima by index": Case(indexed("amax"), ONE),
    "a slice replaced": Case(lambda x, y: x.slice_scatter(y[:, :, :4], 2, 3, 7), ONE),
    "a row replaced": Case(lambda x, y: x.select_scatter(y[:, :, 5], 2, 0), ONE),
    "written behind two axes": Case(changed(write_half, 0.0), ONE),
    "written among ones": Case(changed(write_half, 1.0), merge=("a",)),
    "written over itself": Case(changed(write_half), ONE),
    "written at points": Case(changed(write_corner), ONE),
    "written at axes apart": Case(changed(write_apart), frozen={"a": WRITTEN}),
    "zeros by a mask": Case(changed(write_everywhere(0.0)), ONE),
    "ones by a mask": Case(changed(write_everywhere(1.0)), merge=("a",)),
    "zeros in a block": Case(changed(write_block(0.0)), ONE),
    "ones in a block": Case(changed(write_block(1.0)), merge=("a",)),
    "pasted": Case(pasted(0), ONE),
    "pasted among ones": Case(pasted(1), merge=("a",)),
    "pasted one by one": Case(pasted_one_by_one, ONE),
    "pasted over each other": Case(pasted_over, ONE),
    "channels pasted side by side": Case(beside, {"a": 16, "side": 16}, width=32),
    "added twice": Case(
        lambda x, _: (
            torch.zeros_like(x.transpose(0, 2))
            .index_put((torch.arange(16) // 2,), x.transpose(0, 2), accumulate=True)
            .transpose(0, 2)
        ),
        ONE,
    ),
}


@pytest.mark.filterwarnings("ignore:index_reduce")
@pytest.mark.parametrize("name", CASES)
def test_a_group_is_cut_through_an_index_exactly_where_the_table_says(name: str) -> None:
    check_case(CASES[name])


POOLINGS = {
    "as numbers": Case(
        lambda x, _: F.max_pool2d(x, 2, return_indices=True)[1].to(x.dtype), merge=("a",)
    ),
    "unpooled": Case(lambda x, _: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), ONE),
    "unpooled by another's": Case(
        lambda x, y: F.max_unpool2d(
            F.avg_pool2d(x, 2), F.max_pool2d(y, 2, return_indices=True)[1], 2
        ),
        ONE,
    ),
    "unpooled from one number": Case(
        lambda x, y: F.max_unpool2d(
            torch.sigmoid(x[:, :, ::2, ::2]), F.max_pool2d(y, 2, return_indices=True)[1], 2
        ),
        merge=("a",),
    ),
    "unpooled rows": Case(
        lambda x, _: F.max_unpool1d(*F.max_pool1d(x.flatten(2), 2, return_indices=True), 2).view_as(
            x
        ),
        ONE,
    ),
    "unpooled blocks": Case(
        lambda x, _: F.max_unpool3d(
            *F.max_pool3d(x.unflatten(2, (4, 4)), 2, return_indices=True), 2
        ).flatten(2, 3),
        ONE,
    ),
    "unpooled from overlapping windows": Case(
        lambda x, _: F.max_unpool2d(
            *F.max_pool2d(x, 3, 2, 1, return_indices=True), 3, 2, 1, output_size=x.shape
        ),
        ONE,
    ),
    "unpooled over channels": Case(
        lambda x, _: F.max_unpool3d(
            *F.max_pool3d(x[:, None], (2, 2, 2), return_indices=True), (2, 2, 2)
        )[:, 0],
        frozen={"a": "max_pool3d_with_indices along an axis with channels at "},
    ),
    "places of a maximum": Case(lambda x, _: x.argmax(2, True).to(x.dtype) * 0.1, merge=("a",)),
    "places of the largest": Case(lambda x, _: x.topk(4, 2)[1].to(x.dtype), merge=("a",)),
    "the order": Case(lambda x, _: x.sort(3)[1].to(x.dtype), merge=("a",)),
    "places of running maxima": Case(lambda x, _: x.cummax(2)[1].to(x.dtype), merge=("a",)),
    "the middle": Case(lambda x, _: x - x.median(2, True)[0], ONE),
    "the third smallest": Case(lambda x, _: x - x.kthvalue(3, 2, True)[0], ONE),
    "the extremes": Case(lambda x, _: torch.cat(x.aminmax(dim=2, keepdim=True), 2), ONE),
}


@pytest.mark.parametrize("name", POOLINGS)
def test_what_is_cut_with_the_places_of_pooling_and_sorting(name: str) -> None:
    check_case(POOLINGS[name])


class SegNet(Net):
    """Two poolings, undone by their indices in reverse order."""

    def __init__(self) -> None:
        super().__init__(12)
        self.a, self.b, self.c = conv_bn(8, 16), conv_bn(16, 20), conv_bn(20, 16)
        self.d, self.e = conv_bn(16, 8), conv_bn(8, 12)
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)

    def body(self, x: Tensor) -> Tensor:
        x, first = self.pool(self.a(x))
        size = x.shape
        x, second = self.pool(self.b(x))
        x = self.c(self.unpool(x, second, output_size=size))
        return self.e(self.d(self.unpool(x, first)))


def test_an_encoder_and_the_decoder_that_unpools_are_cut_together() -> None:
    torch.manual_seed(0)
    structure = proven(SegNet())
    groups = {group.name: group for group in prunable(structure)}
    sizes = {name: group.size for name, group in groups.items()}
    assert sizes == {"stem.1": 8, "a.1": 16, "b.1": 20, "d.1": 8, "e.1": 12}
    assert [site.conv for site in groups["a.1"].sites] == ["a.0", "c.0"]


class Messages(nn.Module):
    """Nodes of a graph: each gets the sum, or another statistic, of what its neighbours say."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.say, self.hear = nn.Linear(16, 20), nn.Linear(8 + 20, 12)
        self.a, self.head, self.how = nn.Linear(3, 8), nn.Linear(12, 5), how
        edges = torch.randint(0, 10, (2, 40), generator=torch.Generator().manual_seed(0))
        self.register_buffer("edges", edges)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        source, target = self.edges
        said = F.relu(self.say(torch.cat([x[source], x[target]], 1)))
        heard = self.collect(said, target, said.new_zeros(len(x), said.shape[1]))
        return self.head(F.relu(self.hear(torch.cat([x, heard], 1))))

    def collect(self, said: Tensor, target: Tensor, heard: Tensor) -> Tensor:
        index = target[:, None].expand_as(said)
        if self.how == "index_add_":
            return heard.index_add_(0, target, said)
        if self.how == "scatter_add_":
            return heard.scatter_add_(0, index, said)
        return heard.scatter_reduce_(0, index, said, self.how, include_self=False)


@pytest.mark.parametrize("how", ["index_add_", "scatter_add_", "mean", "amax"])
def test_messages_of_a_graph_are_cut(how: str) -> None:
    torch.manual_seed(0)
    structure = proven(Messages(how), torch.randn(10, 3))
    assert {g.name: g.size for g in prunable(structure)} == {"a": 8, "say": 20, "hear": 12}
