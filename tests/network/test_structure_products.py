"""Products over axes without channels, distances, masks, windows: what is cut through them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .paired import Case, check_case, proven
from .proving import prunable
from .structures import Net, conv_bn

ONE = {"a": 16}
GRID = torch.rand(2, 16, 16, 2, generator=torch.Generator().manual_seed(0)).double() * 2.4 - 1.2
TURN = torch.tensor([[[0.8, 0.6, 0.1], [-0.6, 0.8, 0.3]]]).double().expand(2, 2, 3)
MASK = torch.rand(16, 16, generator=torch.Generator().manual_seed(0)) > 0.5


def pixels(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


PRODUCTS = {
    "each channel's rows by columns": Case(lambda x, y: x @ y, ONE),
    "einsum of two kinds of axes": Case(
        lambda x, y: torch.einsum("nchw,ncvw->nchv", x, y.sigmoid()), ONE
    ),
    "einsum over all of the image": Case(
        lambda x, y: x * torch.einsum("nchw,nchw->nc", x, y)[:, :, None, None], ONE
    ),
    "a product added to channels": Case(
        lambda x, y: torch.baddbmm(x.flatten(0, 1), y.flatten(0, 1), y.flatten(0, 1)).view_as(x),
        ONE,
    ),
    "mixed along the last axis": Case(
        lambda x, _: x @ torch.linspace(-1, 1, 256).view(16, 16).double(), ONE
    ),
    "positions weigh positions": Case(
        lambda x, y: (
            x.flatten(2) @ torch.softmax(pixels(y.mean(1, True)) @ y.sum(1, True).flatten(2), -1)
        ).view_as(x),
        frozen={"side": "mean over channels"},
        zero=ONE,
    ),
    "distances between positions": Case(
        lambda x, y: x * torch.cdist(pixels(x), pixels(y)).mean(2).view(2, 1, 16, 16),
        ONE,
        only_zero=("a",),
    ),
    "distances of many positions": Case(
        lambda x, y: x * torch.cdist(pixels(x), pixels(y), p=1.0).mean(2).view(2, 1, 16, 16),
        ONE,
        only_zero=("a",),
    ),
    "distances to one number": Case(
        lambda x, y: x * torch.cdist(pixels(x), pixels(y.exp())).mean(2).view(2, 1, 16, 16),
        frozen={"a": "a removed channel would arrive at a sum over channels as a constant"},
    ),
    "distances to fixed places": Case(
        lambda x, _: x * torch.cdist(pixels(x), torch.ones(2, 3, 16).double()).mean(),
        frozen={"a": "it reads a tensor of fixed size"},
    ),
    "distances between channels": Case(
        lambda x, _: x * torch.cdist(x.flatten(2), x.flatten(2)).mean(),
        frozen={"a": "distances between channels at "},
    ),
}
POINTWISE = {
    "chosen by a mask": Case(lambda x, y: torch.where(y > 0.1, x, 0.0), ONE),
    "chosen among ones": Case(lambda x, y: torch.where(y > 0.1, x, 1.0), merge=("a",)),
    "chosen from two": Case(lambda x, y: torch.where(y > 0.1, x, y), ONE),
    "chosen by a fixed mask": Case(lambda x, y: torch.where(MASK, x, y), ONE),
    "chosen by what both are": Case(lambda x, y: torch.where(x > y, x, y.exp()), merge=("a",)),
    "zeros of the same size": Case(lambda x, y: torch.where(y > 0.1, x, torch.zeros_like(x)), ONE),
    "masked": Case(lambda x, y: x.masked_fill(y > 0.1, 0.0), ONE),
    "masked with ones": Case(lambda x, y: x.masked_fill(y < 0.1, 1.0), merge=("a",)),
    "both masks": Case(lambda x, y: x * ((x > 0.1) & (y < 0.3)), ONE),
    "either mask": Case(lambda x, y: y.exp() * ((x > 0.1) | (y < 0.3)), merge=("a",)),
    "between bounds": Case(lambda x, y: x.clamp(-y.abs(), y.abs()), ONE),
    "between fixed bounds": Case(
        lambda x, _: x.clamp(torch.tensor(-0.3).double(), torch.tensor(0.2).double()),
        merge=("a",),
    ),
    "interpolated": Case(lambda x, y: x.lerp(y, 0.3), ONE),
    "added to a product": Case(lambda x, y: torch.addcmul(x, x, y), ONE),
    "added to a quotient": Case(lambda x, y: torch.addcdiv(x, x, y.exp()), merge=("a",)),
    "in a bucket": Case(
        lambda x, _: x * torch.bucketize(x, torch.linspace(-1, 1, 8).double()), ONE
    ),
    "searched": Case(
        lambda x, _: torch.searchsorted(torch.linspace(-1, 1, 8).double(), x).to(x.dtype),
        merge=("a",),
    ),
    "searched among channels": Case(
        lambda x, y: x * torch.searchsorted(y.mean((0, 2, 3)).sort()[0], x),
        ONE,
        frozen={"side": "sort over channels"},
    ),
    "in place without an axis": Case(
        lambda x, _: x * x.mean((2, 3), True).clone().squeeze_(3).unsqueeze_(3), ONE
    ),
    "in place transposed": Case(lambda x, _: x.clone().transpose_(2, 3), ONE),
}
IMAGES = {
    "unfolded and folded": Case(
        lambda x, _: F.fold(F.unfold(x, 3, padding=1), (16, 16), 3, padding=1), ONE
    ),
    "windows of one number": Case(
        lambda x, _: F.unfold(torch.sigmoid(x), 2, padding=1, stride=2).view(2, -1, 9, 9),
        merge=("a",),
        width=64,
    ),
    "whole windows of one number": Case(
        lambda x, _: F.unfold(torch.sigmoid(x), 2, stride=2).view(2, -1, 8, 8),
        merge=("a",),
        width=64,
    ),
    "folded": Case(
        lambda x, _: F.fold(x.flatten(2)[:, :, :64], (16, 16), 2, stride=2), {"a": 4}, width=4
    ),
    "sampled at fixed places": Case(lambda x, _: F.grid_sample(x, GRID, align_corners=False), ONE),
    "sampled on an affine grid": Case(
        lambda x, _: F.grid_sample(
            x, F.affine_grid(TURN, x.shape, align_corners=False), align_corners=False
        ),
        ONE,
    ),
    "sampled at places that channels give": Case(
        lambda x, y: F.grid_sample(x, y[:, :2].permute(0, 2, 3, 1), align_corners=False),
        ONE,
        frozen={"side": "channels are used as sampling positions"},
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_group_is_cut_through_a_product_exactly_where_the_table_says(name: str) -> None:
    check_case(PRODUCTS[name])


@pytest.mark.parametrize("name", POINTWISE)
def test_a_group_is_cut_through_masks_and_choices_exactly_where_the_table_says(name: str) -> None:
    check_case(POINTWISE[name])


@pytest.mark.parametrize("name", IMAGES)
def test_a_group_is_cut_through_windows_and_grids_exactly_where_the_table_says(name: str) -> None:
    check_case(IMAGES[name])


class Transformer(Net):
    """An image is turned by an angle that a small network finds, as in spatial transformers."""

    def __init__(self) -> None:
        super().__init__(12)
        self.find, self.angle = conv_bn(3, 16), nn.Linear(16, 6)
        self.a, self.b = conv_bn(8, 16), conv_bn(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        theta = self.angle(self.find(x).mean((2, 3))).view(-1, 2, 3)
        x = self.a(self.stem(x))
        grid = F.affine_grid(theta, x.size(), align_corners=False)
        x = F.grid_sample(x, grid, align_corners=False)
        return self.head(self.b(x).mean((2, 3)))


def test_a_spatial_transformer_is_cut_before_and_behind() -> None:
    torch.manual_seed(0)
    structure = proven(Transformer())
    sizes = {group.name: group.size for group in prunable(structure)}
    assert sizes == {"find.1": 16, "stem.1": 8, "a.1": 16, "b.1": 12}


class Mixer(Net):
    """Layers over the columns of the image, and over its rows, beside those over channels."""

    def __init__(self) -> None:
        super().__init__(12)
        self.a, self.b = conv_bn(8, 16), conv_bn(16, 12)
        self.rows, self.columns = nn.Linear(16, 16), nn.Linear(16, 16)

    def body(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(self.rows(x) + self.columns(x.transpose(2, 3)).transpose(2, 3))


def test_layers_over_rows_and_columns_leave_channels_alone() -> None:
    torch.manual_seed(0)
    structure = proven(Mixer())
    assert [group.name for group in structure.groups if group.is_prunable] == [
        "stem.1",
        "a.1",
        "b.1",
    ]
