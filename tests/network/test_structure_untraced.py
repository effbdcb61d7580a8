"""Models that no mode can look into, and tensors that have no memory of the usual kind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from slimcli.network.example import Example
from slimcli.network.structure import Structure, analyze

from .proving import EXACT, call, prepared, prunable, zeroed_and_cut


class Perceptron(nn.Module):
    """Two layers, called in some way.

    Args:
        way: What the forward does with the module and its input.
    """

    def __init__(self, way: Callable[[Perceptron, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 10), nn.Linear(10, 2)
        self.register_buffer("graph", torch.eye(4).add(torch.eye(4).roll(1, 0)).to_sparse())
        self.way = way

    def layers(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


def graph_convolution(net: Perceptron, x: Tensor) -> Tensor:
    return net.head(torch.tanh(torch.sparse.mm(net.graph, net.first(x))))


def one_by_one(net: Perceptron, x: Tensor) -> Tensor:
    return torch.vmap(net.layers)(x)


def derivative(net: Perceptron, x: Tensor) -> Tensor:
    return torch.func.grad(lambda each: net.layers(each).sum())(x)


def conditional(net: Perceptron, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, net.layers, net.layers, (x,))


def analysed(way: Callable[[Perceptron, Tensor], Tensor]) -> tuple[nn.Module, Example, Structure]:
    torch.manual_seed(0)
    model, example = prepared(Perceptron(way), torch.randn(4, 6))
    return model, example, analyze(model, example)


@pytest.mark.parametrize("way", [graph_convolution, one_by_one], ids=lambda way: way.__name__)
def test_channels_are_followed_through(way: Callable[[Perceptron, Tensor], Tensor]) -> None:
    model, example, structure = analysed(way)
    assert [(group.name, group.size) for group in prunable(structure)] == [("first", 10)]
    error, effect = zeroed_and_cut(model, example, prunable(structure), seed=0)
    assert error <= EXACT < effect


def test_what_a_derivative_says_can_be_cut_is_exact() -> None:
    model, example, structure = analysed(derivative)
    for group in prunable(structure):
        assert zeroed_and_cut(model, example, [group], seed=1)[0] <= EXACT


def test_a_model_that_can_not_be_followed_is_left_alone_with_the_reason() -> None:
    structure = analysed(conditional)[2]
    assert structure.groups == ()
    assert structure.macs == 6 * 10 + 10 * 2
    assert [row.name for row in structure.layers] == ["first", "head"]
    for row in structure.layers:
        assert "could not be followed: NotImplementedError" in row.frozen_reason
        assert "x: Tensor" not in row.frozen_reason
        assert "test_structure_untraced.py" in row.frozen_reason
    assert structure.notes == (structure.layers[0].frozen_reason,)


def test_what_the_model_raises_by_itself_is_not_hidden() -> None:
    def fails(net: Perceptron, x: Tensor) -> Tensor:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        analyze(Perceptron(fails), Example(torch.randn(4, 6), call))
