"""A batch stays what it was, however the user's code treats it."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slimcli.network.example import Example, own_copy


@dataclasses.dataclass(frozen=True)
class Images:
    pixels: Tensor
    names: list[str]


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


class Tagged(list[Any]):
    """A list with something noted on it, made in a way of its own."""

    def __init__(self, values: list[Any], tag: str) -> None:
        super().__init__(values)
        self.tag = tag


def test_a_model_that_writes_into_its_batch_writes_into_a_copy() -> None:
    batch = {"images": Images(torch.ones(2, 3), ["a", "b"])}

    def predict(model: nn.Module, batch: dict[str, Images]) -> Tensor:
        return model(batch["images"].pixels.mul_(255))

    example, layer = Example(batch, predict), nn.Linear(3, 2)
    assert torch.equal(example.run(layer), example.run(layer))
    assert torch.equal(batch["images"].pixels, torch.ones(2, 3))


def test_a_tensor_that_occurs_twice_occurs_twice_in_the_copy() -> None:
    one = torch.rand(3)
    twin = own_copy(Pair(one, one))
    assert twin.left is twin.right
    assert twin.left is not one
    assert torch.equal(twin.left, one)


def test_what_is_noted_on_a_batch_is_on_the_copy() -> None:
    tensor = torch.rand(3)
    tensor.scale = 2  # type: ignore[attr-defined]
    twin = own_copy(Tagged([tensor], "left"))
    assert (twin.tag, twin[0].scale) == ("left", 2)
