"""A trial that sees too little is repeated until it sees something."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from slimcli.network.example import Example, own_copy
from slimcli.network.nested import tensors_in
from slimcli.network.structure import analyze
from slimcli.network.structure.situations import other_batches

from . import structures
from .proving import EXACT, call, prepared, prunable, zeroed_and_cut


class FixedWidth(structures.Net):
    """Shuffles channels in groups of a width that the code fixes: whole groups can go."""

    def __init__(self, groups: int, width: int) -> None:
        super().__init__(6)
        self.mid, self.last = nn.Conv2d(8, groups * width, 3), nn.Conv2d(groups * width, 6, 1)
        self.width = width

    def body(self, x: Tensor) -> Tensor:
        x = torch.relu(self.mid(x))
        batch, channels, height, width = x.shape
        x = x.view(batch, channels // self.width, self.width, height, width).transpose(1, 2)
        return torch.relu(self.last(x.reshape(batch, channels, height, width)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("width", [3, 4, 5])
def test_of_as_many_blocks_as_each_is_long_the_right_side_is_cut(width: int, seed: int) -> None:
    torch.manual_seed(seed)
    model, example = prepared(FixedWidth(width, width), structures.image())
    structure = analyze(model, example)
    for group in (g for g in prunable(structure) if g.name == "mid"):
        assert group.producers[0].indices[0] == tuple(range(width))
    for turn in range(4):
        assert zeroed_and_cut(model, example, prunable(structure), turn)[0] < EXACT


class Narrow(nn.Module):
    """Divides by a width in front of two channels that are dead on any image."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 2, 1), nn.Linear(2, 3)
        nn.init.constant_(self.b.bias, -0.2)
        nn.init.normal_(self.b.weight, std=1e-3)
        self.b.bias.data[0] -= 0.1

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        return self.head(torch.relu(self.b(x / x.shape[1])).mean((2, 3)))


def test_dead_activations_hide_no_number_made_of_a_width() -> None:
    torch.manual_seed(0)
    model, example = prepared(Narrow(), structures.image())
    with torch.no_grad():
        answers = model(example.batch)
    assert torch.equal(answers[0], answers[1])
    assert "zeroed and cut differ" in analyze(model, example).group("a").frozen_reason


class OfParts(nn.Module):
    """Treats the first four channels in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.a(x))
        return self.b(torch.cat([x[:, :4].relu(), x[:, 4:]], 1))


class Checked(nn.Module):
    """Works with negative biases alone, in front of dead activations."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(4, 2)
        nn.init.constant_(self.b.bias, -0.9)
        nn.init.normal_(self.b.weight, std=1e-3)
        self.b.bias.data[0] -= 0.01

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.sqrt(-self.b.bias)
        return self.head((self.b(self.a(x).relu()) * scale).relu())


def test_samples_that_are_the_same_have_the_same_answers_and_nothing_is_dead() -> None:
    torch.manual_seed(0)
    batch = torch.randn(1, 3, 6, 6).expand(2, -1, -1, -1).clone()
    model, example = prepared(OfParts(), batch)
    assert "zeroed and cut differ" in analyze(model, example).group("norm").frozen_reason


def test_what_code_says_to_biases_that_were_raised_for_trial_does_not_count() -> None:
    torch.manual_seed(0)
    model, example = prepared(Checked(), torch.randn(3, 6))
    structure = analyze(model, example)
    assert [group.name for group in prunable(structure)] == ["a", "b"]


@dataclass
class Tree:
    """A part knows its whole."""

    image: Tensor
    parent: Any = None
    parts: tuple[Any, ...] = ()


def test_a_dataclass_that_leads_back_to_itself_is_looked_into_once() -> None:
    torch.manual_seed(0)
    tree = Tree(torch.randn(2, 3, 8, 8))
    tree.parts = (Tree(torch.zeros(1), tree),)
    structure = analyze(ByItsMean(), Example(tree, lambda m, b: m(b.image)))
    assert [group.size for group in structure.groups] == [8, 2]
    assert [each.shape for each in tensors_in(tree)] == [(2, 3, 8, 8), (1,)]
    assert own_copy(tree).parts[0].image is not tree.parts[0].image


class Fussy(nn.Module):
    """Wants float32, and does not say so."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError
        return self.b(self.a(x))


def test_an_error_without_a_word_is_one_all_the_same() -> None:
    structure = analyze(Fussy(), Example(torch.randn(3, 6), call))
    assert [group.name for group in prunable(structure)] == ["a"]
    assert structure.notes == ("trial cuts ran in float32, float64 fails: TypeError",)


class Keeping(nn.Module):
    """In train mode a buffer is filled that was none, one is made and one is deleted."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 4)
        self.register_buffer("empty", None)
        self.register_buffer("old", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        if self.training:
            self.empty = x.detach().mean(0)
            self.register_buffer("new", x.detach().amax(0))
            del self.old
        return self.b(x)


def test_buffers_that_train_mode_makes_or_deletes_are_as_before_in_the_next_run() -> None:
    torch.manual_seed(0)
    model, example = prepared(Keeping(), torch.randn(5, 6))
    assert [group.name for group in prunable(analyze(model, example))] == ["a"]
    assert (model.empty, list(dict(model.named_buffers()))) == (None, ["old"])


@dataclass(frozen=True)
class Record:
    image: Tensor
    number: int = 3


class Row(NamedTuple):
    image: Tensor


class Dictionary(UserDict):  # type: ignore[type-arg]
    """As tokenizers give it."""

    @property
    def image(self) -> Tensor:
        return self["image"]


BATCHES: dict[str, Callable[[Tensor], Any]] = {
    "a named tuple": Row,
    "a dataclass": Record,
    "a dictionary of a kind": lambda image: Dictionary(image=image),
    "dataclasses in a list": lambda image: Row([Record(image)]),  # type: ignore[arg-type]
}


def image_of(batch: Any) -> Tensor:
    return batch.image if isinstance(batch.image, Tensor) else batch.image[0].image


class ByItsMean(nn.Module):
    """Multiplies with a number that it makes of the whole batch: a constant is another one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.sigmoid(self.a(x)) * float(x.mean()))


@pytest.mark.parametrize("kind", BATCHES)
def test_other_batches_are_made_of(kind: str) -> None:
    torch.manual_seed(0)
    batch = BATCHES[kind](torch.randn(2, 3, 8, 8))
    structure = analyze(ByItsMean(), Example(batch, lambda m, b: m(image_of(b))))
    assert [each.split(" at ")[0] for each in structure.notes] == [
        "the code reads values of the batch, or dice,"
    ]
    assert "a" not in [group.name for group in structure.groups if group.exact_zero]
    others = [image_of(each).shape for each in other_batches(batch)]
    assert others[0] != image_of(batch).shape
    copy = own_copy(batch)
    image_of(copy).zero_()
    assert image_of(batch).abs().sum() > 1


class Opaque:
    """Holds an image, and nobody knows where."""

    def __init__(self, image: Tensor) -> None:
        self.image = image


def test_a_batch_without_reachable_tensors_is_told() -> None:
    torch.manual_seed(0)
    example = Example(Opaque(torch.randn(2, 3, 8, 8)), lambda m, b: m(b.image))
    notes = analyze(ByItsMean(), example).notes
    assert any("slim finds no tensors in the batch" in each for each in notes)


class Centred(nn.Module):
    """In train mode a buffer is replaced, and a teacher's parameters are moved."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 4)
        self.teacher = nn.Linear(12, 4).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(4))

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.a(x))
        y = self.b(x)
        if self.training:
            self.centre = self.centre * 0.9 + y.detach().mean(0) * 0.1
            with torch.no_grad():
                for mine, other in zip(self.teacher.parameters(), self.b.parameters(), strict=True):
                    mine.mul_(0.9).add_(other, alpha=0.1)
        return y - self.centre, self.teacher(x)


def test_what_train_mode_does_to_tensors_is_undone_before_the_cut_is_compared() -> None:
    torch.manual_seed(0)
    model, example = prepared(Centred(), torch.randn(5, 6))
    before = {name: each.clone() for name, each in model.state_dict().items()}
    centre = model.centre
    structure = analyze(model, example)
    assert [group.name for group in prunable(structure)] == ["a"]
    assert model.centre is centre
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert zeroed_and_cut(model, Example(example.batch, call), prunable(structure), 1)[0] < EXACT
