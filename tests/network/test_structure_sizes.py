"""A width of one tensor given as a size of another: both must be cut alike."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from slimcli.network.structure import analyze

from . import structures
from .proving import EXACT, prepared, zeroed_and_cut


class Sized(structures.Net):
    """Makes 8 channels of 8 others and shapes them with the number of the others.

    Args:
        end: Shapes (batch, channels, height, width) with the sizes of the second tensor.
    """

    def __init__(self, end: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(8)
        self.a, self.end = structures.conv(8, 8), end

    def body(self, x: Tensor) -> Tensor:
        return self.end(torch.relu(self.a(x)), x)


def viewed(y: Tensor, x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    return y.view(batch, channels, height * width).mean(-1).view(batch, channels, 1, 1)


def reshaped(y: Tensor, x: Tensor) -> Tensor:
    return torch.reshape(y, (x.size(0), x.size(1), -1))[..., None]


def unpacked(y: Tensor, x: Tensor) -> Tensor:
    return y.mean((2, 3)).reshape(*x.shape[:2], 1, 1)


@pytest.mark.parametrize("end", [viewed, reshaped, unpacked], ids=lambda end: end.__name__)
def test_channels_shaped_by_the_width_of_others_are_cut_with_them(
    end: Callable[[Tensor, Tensor], Tensor],
) -> None:
    torch.manual_seed(0)
    model, example = prepared(Sized(end), structures.image())
    structure = analyze(model, example)
    together = [g for g in structure.groups if any(s.tensor == "a.weight" for s in g.producers)]
    assert [len(group.producers) > 2 for group in together] == [True]  # the stem's, too
    assert together[0].exact_zero
    for seed in range(3):
        error, effect = zeroed_and_cut(model, example, together, seed)
        assert error <= EXACT < effect


def test_a_size_of_the_same_channels_ties_nothing() -> None:
    torch.manual_seed(0)
    model, example = prepared(
        Sized(lambda y, x: y.view(*y.shape[:2], -1)[..., None]), structures.image()
    )
    structure = analyze(model, example)
    found = [g for g in structure.groups if any(s.tensor == "a.weight" for s in g.producers)]
    assert found[0].exact_zero
    assert all(not slot.tensor.startswith("stem") for slot in found[0].producers)
