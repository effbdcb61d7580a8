"""A removed channel that is one number everywhere, which a bias takes up, until something acts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .paired import Case, Paired, check_paired

INDEX = (torch.arange(256) * 7) % 100
MASK = torch.rand(16, 16, generator=torch.Generator().manual_seed(0)) > 0.5
FIXED = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).double()

KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda x: x,
    "flipped": lambda x: x.flip(2),
    "turned": lambda x: torch.rot90(x, 1, (2, 3)),
    "gathered": lambda x: x.flatten(2).gather(2, INDEX.expand_as(x.flatten(2))).view_as(x),
    "selected": lambda x: x.index_select(2, torch.arange(16).flip(0)),
    "pooled": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "the largest": lambda x: x.topk(4, 2)[0],
    "the middle": lambda x: x.median(2, True)[0],
    "the extremes": lambda x: torch.cat(x.aminmax(dim=2, keepdim=True), 2),
    "the mean": lambda x: x.mean((2, 3), True),
    "the deviation": lambda x: x.std((2, 3), keepdim=True),
    "unfolded": lambda x: F.unfold(x, 2, stride=2).view(2, -1, 2, 2, 8, 8).mean((2, 3)),
    "by what it is": lambda x: torch.where(x > 0.4, x, x * 2),
    "in a bucket": lambda x: torch.bucketize(x, torch.linspace(-1, 1, 8).double()).to(x.dtype),
}
CORNERS = (torch.arange(8)[:, None] * 32 + torch.arange(8) * 2).expand(2, 1, 8, 8)
LOST: dict[str, Callable[[Tensor], Tensor]] = {
    "unpooled to fixed places": lambda x: F.max_unpool2d(
        F.avg_pool2d(x, 2), CORNERS.expand(-1, x.shape[1], -1, -1), 2
    ),
    "unpooled": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
    "places": lambda x: F.max_pool2d(x, 2, return_indices=True)[1].to(x.dtype) / 256,
    "transformed": lambda x: torch.fft.rfft2(x).abs(),
    "parts of a complex number": lambda x: torch.view_as_real(torch.complex(x, x * 0)).flatten(3),
    "triangle": lambda x: x.tril(),
    "on a diagonal": lambda x: torch.diag_embed(x[:, :, 0]),
    "summed by index": lambda x: torch.zeros_like(x.flatten(2)).index_add(2, INDEX, x.flatten(2)),
    "put over itself": lambda x: x.flatten(2).index_add(2, INDEX, x.flatten(2)),
    "scattered": lambda x: torch.zeros_like(x.flatten(2)).scatter(
        2, INDEX.expand_as(x.flatten(2)), x.flatten(2)
    ),
    "zeros by index": lambda x: x.index_fill(2, torch.arange(3), 0.0),
    "zeros in a slice": lambda x: x.slice_scatter(torch.zeros_like(x[:, :, :3]), 2, 0, 3),
    "zeros in a block": lambda x: zeroed(x),
    "the sum": lambda x: x.sum((2, 3), True),
    "the sum of numbers": lambda x: x.nansum((2, 3), True),
    "the length": lambda x: x.norm(dim=(2, 3), keepdim=True),
    "the product": lambda x: x.prod(3, True),
    "the logarithm of a sum": lambda x: x.logsumexp((2, 3), True),
    "pasted": lambda x: pasted(x),
    "windows with a border": lambda x: F.unfold(x, 3, padding=1).view(2, -1, 9, 256).mean(2),
    "folded": lambda x: F.fold(F.unfold(x, 3), (16, 16), 3),
    "chosen by a fixed mask": lambda x: torch.where(MASK, x, 0.0),
    "times a fixed image": lambda x: x * FIXED,
    "a product of rows and columns": lambda x: x @ (x * FIXED),
}


def zeroed(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :, 2:5, 3:7] = 0
    return x


def pasted(x: Tensor) -> Tensor:
    canvas = x.new_zeros(2, x.shape[1], 20, 20)
    canvas[:, :, 2:18, 2:18] = x
    return canvas


class Absorbing(Paired):
    """The reader has no border and a bias: it takes up one number for each channel."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__(lambda x, _: image_like(between(torch.sigmoid(x))))
        self.b = nn.Sequential(nn.Conv2d(16, 12, 1), nn.ReLU())


def image_like(x: Tensor) -> Tensor:
    return x if x.dim() == 4 else x.unsqueeze(3)


@pytest.mark.parametrize("name", KEPT)
def test_a_bias_takes_up_one_number_behind_what_keeps_it_one(name: str) -> None:
    torch.manual_seed(0)
    check_paired(Case(KEPT[name], {"a": 16}), Absorbing(KEPT[name]))


@pytest.mark.parametrize("name", LOST)
def test_no_channel_is_cut_where_one_number_becomes_several(name: str) -> None:
    torch.manual_seed(0)
    check_paired(Case(LOST[name], merge=("a",)), Absorbing(LOST[name]))
