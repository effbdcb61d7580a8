"""Layers that did not run on the example, and recurrent ones: what is beside them stays."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimcli.network import surgery
from slimcli.network.example import Example
from slimcli.network.structure import Structure, analyze

from . import structures
from .proving import EXACT, call, outputs, prepared, prunable, zeroed_and_cut


class Branches(structures.Net):
    """Which of two layers runs depends on the batch."""

    def __init__(self) -> None:
        super().__init__(12)
        self.a, self.b, self.c = (structures.conv_bn(*w) for w in ((8, 16), (16, 12), (16, 12)))

    def forward(self, x: Tensor) -> Any:
        layer = self.b if x.mean() < 1 else self.c
        return self.head(layer(self.a(self.stem(x))).mean((2, 3)))


def analyzed(model: nn.Module, batch: Any = None) -> tuple[nn.Module, Example, Structure]:
    torch.manual_seed(0)
    model, example = prepared(model, structures.image() if batch is None else batch)
    return model, example, analyze(model, example)


def test_channels_that_fit_a_layer_that_did_not_run_are_left_alone() -> None:
    _, _, structure = analyzed(Branches())
    expected = "c.0 did not run on the example: it may read or make these channels"
    assert structure.group("a.1").frozen_reason == expected
    assert structure.group("b.1").frozen_reason == expected
    assert [group.name for group in prunable(structure)] == ["stem.1"]


def test_the_other_branch_still_runs_after_the_cut() -> None:
    model, example, structure = analyzed(Branches())
    cut = copy.deepcopy(model)
    surgery.apply(cut, [group.cut([0, 1]) for group in prunable(structure)])
    other = Example(example.batch + 2, call)
    assert outputs(cut, other)[0].shape == outputs(model, other)[0].shape


def test_a_layer_that_did_not_run_is_in_the_table_and_in_the_notes() -> None:
    _, _, structure = analyzed(Branches())
    row = next(row for row in structure.layers if row.name == "c.0")
    assert (row.type, row.channels, row.group) == ("Conv2d", 12, "")
    assert row.frozen_reason == "it did not run on the example"
    unseen, other_ways = structure.notes
    assert unseen.startswith("did not run on the example: c.0, c.1; ")
    assert (
        "reads values of the batch, or dice, at network/test_structure_left_alone.py:" in other_ways
    )


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.extra = structures.conv(16, 16)

    def forward(self, x: Tensor, *, with_extra: bool = False) -> Tensor:
        return self.extra(x) if with_extra else x


def test_channels_that_only_pass_the_module_around_it_are_left_alone_too() -> None:
    class Passing(structures.Net):
        def __init__(self) -> None:
            super().__init__(12)
            self.a, self.b = structures.conv_bn(8, 16), structures.conv_bn(16, 12)
            self.c, self.optional = structures.conv_bn(12, 16), Optional()
            self.d = structures.conv_bn(16, 12)

        def body(self, x: Tensor) -> Tensor:
            return self.d(self.c(self.b(self.optional(x=self.a(x)))))

    _, _, structure = analyzed(Passing())
    assert "optional.extra did not run" in structure.group("a.1").frozen_reason
    assert [group.name for group in prunable(structure)] == ["stem.1", "b.1", "c.1", "d.1"]


def test_a_parameter_that_was_not_used_counts_as_a_layer_that_did_not_run() -> None:
    class Scaled(Branches):
        def __init__(self) -> None:
            super().__init__()
            del self.c
            self.scale = nn.Parameter(torch.ones(16, 1, 1))

        def forward(self, x: Tensor) -> Any:
            y = self.a(self.stem(x))
            y = y * self.scale if x.mean() > 1 else y
            return self.head(self.b(y).mean((2, 3)))

    _, _, structure = analyzed(Scaled())
    assert structure.group("a.1").frozen_reason.startswith("scale did not run on the example")
    assert [group.name for group in prunable(structure)] == ["stem.1", "b.1"]


def test_channels_made_with_a_parameter_of_the_module_around_it_are_left_alone_too() -> None:
    class Functional(Branches):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(20, 12, 1, 1))
            self.c, self.head = nn.Conv2d(20, 12, 1), nn.Linear(20, 5)

        def forward(self, x: Tensor) -> Any:
            y = F.relu(F.conv2d(self.b(self.a(self.stem(x))), self.weight))
            y = F.relu(F.conv2d(self.c(y), self.weight)) if x.mean() > 1 else y
            return self.head(y.mean((2, 3)))

    _, _, structure = analyzed(Functional())
    assert structure.group("weight").frozen_reason.startswith("c did not run on the example")
    assert [group.name for group in prunable(structure)] == ["stem.1", "a.1"]


def test_channels_inside_other_modules_are_out_of_reach_whatever_their_width() -> None:
    class Inner(Branches):
        def __init__(self) -> None:
            super().__init__()
            self.c = structures.conv_bn(12, 12)
            self.b = nn.Sequential(structures.conv_bn(16, 12), structures.conv_bn(12, 20))
            self.head = nn.Linear(20, 5)

        def forward(self, x: Tensor) -> Any:
            x = self.a(self.stem(x))
            return self.head(self.b(self.c(x) if x.shape[1] == 12 else x).mean((2, 3)))

    _, _, structure = analyzed(Inner())
    assert [group.name for group in prunable(structure)] == ["stem.1", "a.1", "b.0.1", "b.1.1"]


def test_a_layer_that_runs_in_train_mode_only_has_run() -> None:
    _, _, structure = analyzed(structures.AuxHead())
    assert structure.notes == ()


class Rewired(structures.Net):
    """All layers run on the example; another batch would take another way through them."""

    def __init__(self) -> None:
        super().__init__(24)
        pairs = {"a": (8, 16), "b": (16, 16), "c": (16, 16), "d": (16, 24)}
        self.layers = nn.ModuleDict({name: structures.conv_bn(*w) for name, w in pairs.items()})

    def forward(self, x: Tensor) -> Any:
        is_bright = bool(x.mean() > 1)
        layers = self.layers
        x = layers["a"](self.stem(x))
        x = layers["b"](x) if is_bright else layers["c"](x)
        return self.head(layers["d"](F.relu(layers["b"](x) + x)).mean((2, 3)))


def test_channels_that_another_batch_would_lay_upon_others_are_left_alone() -> None:
    model, example, structure = analyzed(Rewired())
    for name in ("layers.a.1", "layers.c.1"):
        reason = structure.group(name).frozen_reason
        assert reason.startswith("the next batch may take another way at network/test_structure")
        assert reason.endswith("is_bright = bool(x.mean() > 1)")
    assert [group.name for group in prunable(structure)] == ["stem.1", "layers.d.1"]
    surgery.apply(model, [group.cut([0, 1]) for group in prunable(structure)])
    assert outputs(model, Example(example.batch + 2, call))[0].shape == (2, 5)


def test_a_value_that_is_read_where_no_other_way_fits_freezes_nothing() -> None:
    class Checked(structures.Chain):
        def forward(self, x: Tensor) -> Any:
            assert bool(torch.isfinite(x).all())
            return super().forward(x)

    _, _, structure = analyzed(Checked())
    assert [group.name for group in prunable(structure)] == ["stem.1", "a.1", "b.1"]


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.before, self.inner, self.after = nn.Linear(8, 12), kind(12, 16), nn.Linear(16, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.before(x))
        if isinstance(self.inner, nn.RNNBase):
            return self.head(F.relu(self.after(self.inner(x)[0])))
        state = None
        for step in x:
            state = self.inner(step, state)
        hidden = state[0] if isinstance(state, tuple) else state
        return self.head(F.relu(self.after(hidden)))


KINDS = [nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell]


@pytest.mark.parametrize("kind", KINDS)
def test_a_recurrent_layer_is_left_alone_with_exactly_its_neighbours(kind: type[nn.Module]) -> None:
    model, example, structure = analyzed(Recurrent(kind), torch.randn(4, 2, 8))
    assert structure.notes == ()
    rows = {row.name: row for row in structure.layers}
    assert list(rows) == ["before", "inner", "after", "head"]
    assert (rows["inner"].type, rows["inner"].channels) == (kind.__name__, 16)
    reason = "recurrent layers are left alone (inner)"
    assert rows["before"].frozen_reason == rows["inner"].frozen_reason == reason
    assert [group.name for group in prunable(structure)] == ["after"]
    assert zeroed_and_cut(model, example, prunable(structure), 0)[0] <= EXACT


class Tagged(torch.Tensor):
    """A tensor of a kind of its own."""


COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "a deep copy": copy.deepcopy,
    "a parameter": nn.Parameter,
    "another kind of tensor": lambda x: x.as_subclass(Tagged),
    "its memory": lambda x: x.new_empty(0).set_(x.untyped_storage(), 0, x.shape, x.stride()),
}


class PicksFrom(nn.Module):
    """Picks a channel of a copy."""

    def __init__(self, copied: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 4, 1)
        self.copied = copied

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.b(x * self.copied(x)[:, :1].sigmoid())


@pytest.mark.parametrize("name", COPIES)
def test_channels_are_followed_or_frozen_where_no_operator_makes(name: str) -> None:
    torch.manual_seed(0)
    example = Example(torch.randn(2, 3, 8, 8), call)
    reason = analyze(PicksFrom(COPIES[name]), example, trial=False).group("a").frozen_reason
    assert re.match("single channels are picked|channels (leave torch|reach a tensor by)", reason)


class Checking(nn.Module):
    """Asks torch to check something, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x).relu(), self.b(x).relu()
        torch._check_tensor_all(torch.as_tensor(x.shape[0]) > 0)
        return self.c(left) + self.c(right)


def test_a_check_by_torch_is_no_other_way() -> None:
    structure = analyze(Checking(), Example(torch.randn(2, 3, 8, 8), call))
    assert [group.size for group in prunable(structure)] == [8]
    assert structure.notes == ()


class Reading(nn.Module):
    """Python gets a value, of what a function gives."""

    def __init__(self, value: Callable[[Reading, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.scale = nn.Parameter(torch.ones(1))
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()) * float(self.value(self, x))


READ: dict[str, tuple[Callable[[Reading, Tensor], Tensor], bool]] = {
    "the batch": (lambda net, x: x.mean(), True),
    "what is made of it": (lambda net, x: (net.scale * x.amax()).sum(), True),
    "dice": (lambda net, x: torch.rand(()), True),
    "a parameter": (lambda net, x: net.scale * 2, False),
    "sizes": (lambda net, x: torch.tensor(x.shape[2:]).prod(), False),
}


@pytest.mark.parametrize("name", READ)
def test_a_note_says_where_the_batch_is_read_and_nothing_else(name: str) -> None:
    value, is_told = READ[name]
    torch.manual_seed(0)
    model, example = prepared(Reading(value), torch.randn(2, 3, 8, 8))
    notes = analyze(model, example).notes
    assert ["reads values of the batch" in note for note in notes] == [True] * is_told


def test_a_slice_of_one_channel_that_is_asked_for_its_shape_freezes_nothing() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).relu()
            return self.b(x * torch.ones_like(x[:, :1]))

    structure = analyze(Masked(), Example(torch.randn(2, 3, 8, 8), call))
    assert structure.group("a").exact_zero
