"""Constants that hang on the batch: a bias may take up none that the next batch changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimcli.network.example import Example
from slimcli.network.structure import analyze
from slimcli.network.structure.situations import SCALE, other_batches

from .proving import EXACT, call, prepared, prunable, zeroed_and_cut

FICKLE = "as a constant, and on another batch, of other sizes and values, it is another one"
PADDED = "as a constant, and images of other sizes may be padded at "

Function = Callable[[Tensor, Tensor, float], Tensor]


class Normed(nn.Module):
    """A zero channel of ``a`` leaves its norm as a constant, which the bias of ``b`` can take up.

    Args:
        end: What becomes of it before, with the image and a number that came with it.
    """

    def __init__(self, end: Function) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.b, self.head = nn.Conv2d(12, 8, 2, 2), nn.Conv2d(8, 2, 1)
        self.end = end

    def forward(self, batch: Any) -> Tensor:
        x, number = batch if isinstance(batch, tuple) else (batch, 1.0)
        y = self.end(self.norm(torch.relu(self.a(x))), x, number)
        return self.head(torch.relu(self.b(y)))


def padded(by: Callable[[int], int], asked: int = 0) -> Function:
    """Asks the features, or the image (1), for their sizes."""

    def end(y: Tensor, x: Tensor, number: float) -> Tensor:
        height, width = (by((y, x)[asked].size(dim)) for dim in (2, 3))
        return F.pad(y, (0, width, 0, height)) if height or width else y

    return end


def as_large_as(other: Tensor, y: Tensor) -> Tensor:
    missing = other.size(2) - y.size(2), other.size(3) - y.size(3)
    return F.pad(y, (0, missing[1], 0, missing[0])) if any(missing) else y


def fits(y: Tensor, x: Tensor, number: float) -> Tensor:
    return y if y.shape[2:] == x.shape[2:] else F.pad(y, (0, 1, 0, 1))


PADS: dict[str, Function] = {
    "a difference of sizes": lambda y, x, _: as_large_as(x, y),
    "unequal sizes": fits,
    "the last bit": padded(lambda size: size & 1),
    "up to the next even one": padded(lambda size: (size + 1) // 2 * 2 - size),
    "up to a least size": padded(lambda size: max(0, 16 - size)),
    "a remainder of a plain number": padded(lambda size: int(size) % 2),
    "a small image": padded(lambda size: 1 if size < 16 else 0),
    "a remainder of the image's": padded(lambda size: size % 2, asked=1),
    "an image too small": padded(lambda size: max(0, 16 - size), asked=1),
}
NUMBERS: dict[str, Function] = {
    "a mean read": lambda y, x, _: y + x.mean().item(),
    "a deviation read": lambda y, x, _: y * float(x.std()),
    "a list read": lambda y, x, _: y * x.mean((1, 2, 3)).tolist()[0],
    "pixels counted by sizes": lambda y, x, _: y / (y.shape[2] * y.shape[3]) * 50,
    "entries counted": lambda y, x, _: y * (x.numel() / 1000),
    "samples counted": lambda y, x, _: y + 0.1 * len(x),
    "a number of the batch": lambda y, _, number: y * number,
    "a size it is divided by": lambda y, x, _: y / y.shape[3],
    "a root of a size": lambda y, x, _: y / math.sqrt(y.shape[3]),
    "a power of a size": lambda y, x, _: y * x.shape[3] ** -0.5,
    "an array of sizes": lambda y, x, _: y * float(np.prod(x.shape[2:])) / 99,
    "a range of a size": lambda y, x, _: y * len([*range(x.shape[3])]) / 9,
    "a stride": lambda y, x, _: y * y.stride(2) / 9,
    "a size by keyword": lambda y, x, _: torch.add(y, y, alpha=x.shape[3]),
    "a share of samples": lambda y, x, _: y + 1 / y.shape[0],
}
ZEROS: dict[str, Function] = {
    "a remainder that is zero": lambda y, x, _: torch.relu(y) + x.shape[2] % 2,
    "a number of the batch that is zero": lambda y, _, number: torch.relu(y) + number,
    "a root that is zero": lambda y, x, _: torch.relu(y) + (math.sqrt(y.shape[3]) - 4),
    "a product with zero": lambda y, _, number: torch.relu(y) + torch.sigmoid(y) * number,
}
STEADY: dict[str, Function] = {
    "nothing done": lambda y, *_: y,
    "a number that only scales what is zero": lambda y, x, _: torch.relu(y) * 1.5,
}


def images_and(number: float) -> tuple[Tensor, float]:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2)), number


def group_a(end: Function, batch: Any) -> Any:
    torch.manual_seed(0)
    model, example = prepared(Normed(end), batch)
    return {group.name: group for group in analyze(model, example).groups}["a"]


@pytest.mark.parametrize("name", PADS)
def test_no_bias_takes_up_a_constant_where_other_images_may_be_padded_for(name: str) -> None:
    reason = group_a(PADS[name], torch.randn(2, 3, 16, 16)).zero_reason
    assert PADDED in reason or FICKLE in reason


@pytest.mark.parametrize("name", NUMBERS)
def test_no_bias_takes_up_a_constant_that_is_made_with(name: str) -> None:
    batch = (torch.randn(2, 3, 16, 16), 1.0)
    group = group_a(NUMBERS[name], batch if name.endswith("batch") else batch[0])
    assert FICKLE in group.zero_reason


@pytest.mark.parametrize("name", ZEROS)
def test_a_zero_does_not_count_as_zero_that_is_added_to(name: str) -> None:
    assert FICKLE.rpartition("and ")[2] in group_a(ZEROS[name], images_and(0.0)).zero_reason


def test_channels_are_not_taken_for_samples_because_the_example_has_one() -> None:
    group = group_a(
        lambda y, *_: y.view(y.shape[1], len(y), *y.shape[2:]).transpose(0, 1),
        torch.randn(1, 3, 16, 16),
    )
    assert "zeroed and cut differ" in group.frozen_reason


ROUNDED: dict[str, Function] = {
    "its sign": lambda y, *_: torch.sign(y - y.mean((2, 3), keepdim=True)),
    "a comparison": lambda y, *_: ((y - y.mean((2, 3), keepdim=True)) > 0) * y,
    "whole numbers": lambda y, *_: torch.floor(y / y.mean((2, 3), keepdim=True)),
    "a remainder": lambda y, *_: torch.remainder(y, y.mean((2, 3), keepdim=True)),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_no_bias_takes_up_what_rounding_decides_as(name: str) -> None:
    group = group_a(ROUNDED[name], torch.randn(2, 3, 16, 16))
    assert (group.exact_zero, group.constants) == (False, ())


def test_a_bias_takes_up_the_sign_of_what_a_norm_makes_of_a_zero() -> None:
    assert group_a(lambda y, *_: torch.sign(y), torch.randn(2, 3, 16, 16)).constants


class OwnWeight(nn.Conv2d):
    """Multiplies with its weight, as it is."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride)


class GainedWeight(nn.Conv2d):
    """Multiplies with more than its weight; one, as yet."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.gain, self.bias, self.stride)


class ClampedInput(nn.Conv2d):
    """Reads something else than it is given, if that is large."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(max=6.0))


@pytest.mark.parametrize(
    ("kind", "takes_up"), [(OwnWeight, True), (GainedWeight, False), (ClampedInput, False)]
)
def test_a_bias_takes_up_what_its_layer_multiplies_with_its_weight(
    kind: type[nn.Conv2d], takes_up: bool
) -> None:
    torch.manual_seed(0)
    net = Normed(STEADY["nothing done"])
    net.b = kind(12, 8, 2, 2)
    model, example = prepared(net, torch.randn(2, 3, 16, 16))
    assert bool(analyze(model, example).group("a").constants) == takes_up


class ByKeyword(Normed):
    """Calls the layer that reads a constant by keyword."""

    def forward(self, batch: Any) -> Tensor:
        y = torch.sigmoid(self.norm(input=torch.relu(self.a(batch))))
        return self.head(torch.relu(self.b(input=y)))


def test_a_bias_takes_up_a_constant_of_a_layer_that_is_called_by_keyword() -> None:
    torch.manual_seed(0)
    model, example = prepared(ByKeyword(STEADY["nothing done"]), torch.randn(2, 3, 16, 16))
    structure = analyze(model, example)
    assert structure.notes == ()
    assert [path for path, _ in structure.group("a").constants] == ["b"]
    assert zeroed_and_cut(model, example, prunable(structure), seed=0)[0] <= EXACT


@pytest.mark.parametrize("name", STEADY)
def test_a_bias_takes_up_a_constant_with(name: str) -> None:
    group = group_a(STEADY[name], (torch.randn(2, 3, 16, 16), 1.0))
    assert [path for path, _ in group.constants] == ["b"]


def test_a_constant_is_not_compared_with_its_own_mean() -> None:
    group = group_a(
        lambda y, *_: torch.where(y > y.mean((2, 3), keepdim=True), y, torch.zeros_like(y)),
        torch.randn(2, 3, 16, 16),
    )
    assert "would not be zero" in group.zero_reason


class Refusing(Normed):
    """Takes images of one size, one at a time."""

    def forward(self, batch: Any) -> Tensor:
        if batch[0].shape != (1, 3, 16, 16):
            raise ValueError("one image of 16 x 16")
        return super().forward(batch)


def test_a_model_that_refuses_other_batches_is_asked_with_other_values() -> None:
    torch.manual_seed(0)
    model = Refusing(NUMBERS["a mean read"])
    model, example = prepared(model, (torch.randn(1, 3, 16, 16), 1.0))
    assert FICKLE in analyze(model, example).group("a").zero_reason


class Stubborn(Normed):
    """Takes nothing but the example."""

    def forward(self, batch: Any) -> Tensor:
        if batch[0].shape[0] != 1 or abs(float(batch[0].mean()) - 1) > 1e-6:
            raise ValueError("this image and no other")
        return super().forward(batch)


def test_a_model_that_takes_no_other_batch_is_told_of() -> None:
    torch.manual_seed(0)
    model, example = prepared(Stubborn(STEADY["nothing done"]), (torch.ones(1, 3, 16, 16), 1.0))
    notes = analyze(model, example).notes
    assert sum("takes no batch but the example" in note for note in notes) == 1


def test_other_batches_differ_in_values_in_samples_and_in_sizes() -> None:
    images, kinds = torch.ones(4, 3, 8, 8), torch.arange(4)
    first, second, third = other_batches({"images": images, "kinds": kinds, "time": 0.5})
    assert [tuple(each["images"].shape) for each in (first, second, third)] == [
        (5, 3, 7, 5),
        (5, 3, 8, 8),
        (4, 3, 8, 8),
    ]
    assert first["images"].unique().item() == pytest.approx(SCALE)
    assert first["time"] == pytest.approx(0.5 * SCALE)
    assert first["kinds"].tolist() == [0, 1, 2, 3, 0]


def test_the_group_beside_a_fickle_constant_can_still_be_cut() -> None:
    torch.manual_seed(0)
    model = Normed(NUMBERS["a mean read"]).double().eval()
    structure = analyze(model, Example(torch.randn(2, 3, 16, 16, dtype=torch.float64), call))
    assert [group.name for group in prunable(structure)] == ["b"]
    assert structure.group("a").exact_duplicate
