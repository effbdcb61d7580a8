"""Tensors that the forward makes as wide as another one is: they are cut with it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from .paired import Case, check_case

BLUR = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64).outer(
    torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
)
BOTH = {"a": 16}


def blurred(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=1, groups=x.shape[1])


def haar(x: Tensor) -> Tensor:
    """Two filters for each channel."""
    pair = torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[1.0, -1.0], [1.0, -1.0]]], dtype=x.dtype)
    both = F.conv2d(x, pair[:, None].repeat(x.shape[1], 1, 1, 1), stride=2, groups=x.shape[1])
    return both[:, ::2] - both[:, 1::2]


CASES = {
    "expanded filter": Case(lambda x, _: blurred(x, BLUR.expand(x.shape[1], 1, 3, 3)), BOTH),
    "repeated filter": Case(
        lambda x, _: blurred(x, BLUR[None, None].repeat(x.size(1), 1, 1, 1)), BOTH
    ),
    "repeated and scaled filter": Case(
        lambda x, _: blurred(x, BLUR[None, None].repeat(x.size(1), 1, 1, 1).to(x) / 2), BOTH
    ),
    "box of ones": Case(lambda x, _: blurred(x, x.new_ones(x.shape[1], 1, 3, 3) / 9), BOTH),
    "upsampled by ones": Case(
        lambda x, _: F.conv_transpose2d(
            x, torch.ones(x.shape[1], 1, 2, 2).to(x), stride=2, groups=x.shape[1]
        ),
        BOTH,
    ),
    "two filters a channel": Case(lambda x, _: haar(x), BOTH),
    "as wide as another one": Case(
        lambda x, y: blurred(x, BLUR.expand(y.shape[1], 1, 3, 3)) * y.sigmoid(), BOTH
    ),
    "scaled": Case(lambda x, _: x * torch.full((1, x.shape[1], 1, 1), 2.0).to(x), BOTH),
    "shifted": Case(lambda x, _: x + torch.ones(x.shape[1]).to(x).view(1, -1, 1, 1), merge=("a",)),
    "every channel another number": Case(
        lambda x, _: x * torch.linspace(1, 2, x.shape[1]).to(x).view(1, -1, 1, 1),
        frozen={"a": "channels meet a tensor of fixed size at "},
    ),
    "channels mixed by ones": Case(
        lambda x, _: F.conv2d(x, torch.ones(x.shape[1], x.shape[1], 1, 1).to(x)),
        frozen={"a": "a weight is made in the forward, as wide as its input at "},
    ),
    "channels summed by a product": Case(
        lambda x, _: x * (x.mean((2, 3)) @ x.new_ones(x.shape[1], 1))[..., None, None],
        frozen={"a": "a product with a tensor made as wide as another one at "},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_cut_beside_a_tensor_made_in_the_forward(name: str) -> None:
    check_case(CASES[name])
