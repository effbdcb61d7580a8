"""What only happens in train mode is found however the code asks for the mode."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, cat, nn
from torchvision.ops import StochasticDepth

from slimcli.network.example import Example
from slimcli.network.structure import analyze
from slimcli.network.structure.remembering import Memory, attributes_of

from . import structures
from .proving import call, prepared, prunable


class Auxiliary(structures.Net):
    """In train mode a second head reads the features.

    Args:
        asks: Is the model in train mode?
    """

    def __init__(self, asks: Callable[[Auxiliary], bool] = lambda net: net.training) -> None:
        super().__init__(12)
        self.features = structures.conv_bn(8, 12)
        self.auxiliary, self.drop, self.asks = nn.Linear(12, 5), nn.Dropout(0.1), asks

    def body(self, x: Tensor) -> Tensor:
        x = self.drop(self.features(x))
        self.seen = x.mean((2, 3))
        if self.asks(self):
            self.guess = self.auxiliary(self.seen)
        return x


class Switched(Auxiliary):
    """Keeps the mode in an attribute of its own."""

    def __init__(self) -> None:
        super().__init__(lambda net: net.learns)
        self.learns = True

    def train(self, mode: bool = True) -> Switched:
        self.learns = mode
        return super().train(mode)


class Renamed(Auxiliary):
    """Its mode is a property, as wrappers have it."""

    @property
    def training(self) -> bool:  # type: ignore[override]
        return self.learns

    @training.setter
    def training(self, mode: bool) -> None:
        self.learns = mode


WAYS: dict[str, Callable[[], nn.Module]] = {
    "attribute": Auxiliary,
    "getattr": lambda: Auxiliary(lambda net: getattr(net, "training")),  # noqa: B009
    "of a child": lambda: Auxiliary(lambda net: net.head.training),
    "of a dropout layer": lambda: Auxiliary(lambda net: net.drop.training),
    "own switch": Switched,
    "own property": Renamed,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_head_of_train_mode_is_found_by(way: str) -> None:
    structure = analyze(WAYS[way](), Example(structures.image(), call))
    slots = {slot.tensor for slot in structure.group("features.1").slots}
    assert "auxiliary.weight" in slots


def test_a_head_of_train_mode_is_found_where_the_predict_function_asks() -> None:
    def predict(model: Any, batch: Tensor) -> Any:
        prediction = call(model, batch)
        return (prediction, model.auxiliary(model.seen)) if model.training else prediction

    structure = analyze(Auxiliary(lambda net: False), Example(structures.image(), predict))
    assert "auxiliary.weight" in {slot.tensor for slot in structure.group("features.1").slots}


class Regularised(structures.Net):
    """Norms and dropout of all kinds, and nothing else that asks for the mode."""

    def __init__(self, extra: nn.Module) -> None:
        super().__init__(12)
        self.features, self.depth = structures.conv_bn(8, 12), StochasticDepth(0.2, "row")
        self.drop, self.plane, self.extra = nn.Dropout(0.1), nn.Dropout2d(0.3), extra

    def body(self, x: Tensor) -> Tensor:
        return self.extra(self.depth(self.plane(self.drop(self.features(x)))))


@pytest.mark.parametrize(("extra", "runs"), [(nn.Identity(), 1), (nn.RReLU(), 2)])
def test_only_what_asks_for_the_mode_costs_a_second_run(extra: nn.Module, runs: int) -> None:
    modes = []

    def predict(model: nn.Module, batch: Tensor) -> Any:
        modes.append(vars(model)["training"])
        return call(model, batch)

    analyze(Regularised(extra), Example(structures.image(), predict), trial=False)
    assert modes == [False, True][:runs]


def test_the_attribute_is_a_plain_one_again_afterwards() -> None:
    def fails(model: nn.Module, batch: Tensor) -> Any:
        raise ValueError("as a user's code may")

    with pytest.raises(ValueError, match="as a user's code may"):
        analyze(Auxiliary(), Example(structures.image(), fails))
    assert "training" not in vars(nn.Module)
    model = Auxiliary()
    analyze(model, Example(structures.image(), call))
    assert model.training
    assert "training" not in vars(nn.Module)


class Remembering(structures.Net):
    """Adds what it made of the last batch, if it fits."""

    def __init__(self) -> None:
        super().__init__(24)
        self.features, self.kept = structures.conv_bn(8, 12), None

    def body(self, x: Tensor) -> Tensor:
        x = self.features(x)
        last = x if self.kept is None or self.kept.shape != x.shape else self.kept
        self.kept = x
        return cat([x, last], 1)


def test_a_model_that_keeps_features_between_runs_is_run_twice() -> None:
    group = analyze(Remembering(), Example(structures.image(), call)).group("features.1")
    assert "its width is compared with another" in group.frozen_reason


class Again(structures.Net):
    """One conv reads the same channels twice."""

    def __init__(self) -> None:
        super().__init__(12)
        self.features, self.twice = structures.conv_bn(8, 12), nn.Conv2d(12, 12, 1)

    def body(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.twice(x) + self.twice(x * 2)


def test_a_layer_that_reads_channels_twice_makes_no_linear_group_of_them() -> None:
    group = analyze(Again(), Example(structures.image(), call)).group("features.1")
    assert [group.is_prunable, group.is_linear] == [True, False]


class ScaledInTraining(structures.Net):
    """Divides by a width, but only in train mode; draws numbers where it is told to."""

    def __init__(self, draws: bool = False) -> None:
        super().__init__(12)
        self.a, self.b = structures.conv(8, 16), structures.conv(16, 12)
        self.draws = draws
        self.register_buffer("seen", torch.zeros(()))

    def body(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        if self.training:
            self.seen += 1
            x = x / x.shape[1]
            x = x * (1 + 0 * torch.rand(x.shape[1]).sum()) if self.draws else x
        return self.b(x)


def test_a_width_that_matters_in_train_mode_alone_is_not_cut() -> None:
    torch.manual_seed(0)
    model, example = prepared(ScaledInTraining(), structures.image())
    seen = float(model.seen)
    reason = analyze(model, example).group("a").frozen_reason
    assert "zeroed and cut differ by" in reason
    assert "in train mode" in reason
    assert float(model.seen) == seen


class OtherNumber(nn.Module):
    """Does something with one number in train mode, and with another one otherwise."""

    def __init__(self, act: Callable[[Tensor, float], Tensor]) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12)
        self.b, self.act = nn.Conv2d(12, 4, 1), act

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.a(x)).relu()
        return self.b(self.act(x, 1.0 if self.training else 0.0))


class ScalesInTraining(nn.Dropout):
    """Drops nothing; divides by a width."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.shape[1] if self.training else x


@pytest.mark.parametrize(
    "act",
    [
        lambda x, number: x + number,
        lambda x, number: torch.add(x, torch.ones_like(x), alpha=number),
        lambda x, number: x + torch.tensor(number),
    ],
)
def test_a_number_that_is_another_one_in_train_mode_keeps_channels(
    act: Callable[[Tensor, float], Tensor],
) -> None:
    torch.manual_seed(0)
    model, example = prepared(OtherNumber(act), torch.randn(2, 3, 8, 8))
    assert not analyze(model, example).group("norm").exact_zero


def test_what_the_user_makes_of_a_dropout_layer_is_compared_in_train_mode() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), ScalesInTraining(), nn.Linear(8, 3))
    model, example = prepared(net, torch.randn(2, 6))
    assert "in train mode" in analyze(model, example).group("0").frozen_reason


def test_layers_that_drop_paths_in_train_mode_cost_no_more_runs() -> None:
    runs: list[bool] = []
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), StochasticDepth(0.5, "row"), Asking(), nn.Conv2d(8, 4, 1)
    )

    def predict(model: nn.Module, batch: Tensor) -> Tensor:
        runs.append(model.training)
        return model(batch)

    analyze(net, Example(torch.randn(2, 3, 8, 8), predict))
    assert runs == [False, True, False, False]


class Asking(nn.Module):
    """Asks for the mode, for nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sigmoid() if self.training and x.dim() < 4 else x.relu()


def test_train_mode_is_not_compared_where_random_numbers_are_drawn() -> None:
    torch.manual_seed(0)
    model, example = prepared(ScaledInTraining(draws=True), structures.image())
    assert analyze(model, example).group("a").exact_zero


class Fading(structures.Net):
    """In train mode it halves what it multiplies with, in a buffer."""

    def __init__(self) -> None:
        super().__init__(12)
        self.a, self.b = structures.conv(8, 16), structures.conv(16, 12)
        self.register_buffer("strength", torch.ones(()))

    def body(self, x: Tensor) -> Tensor:
        if self.training:
            self.strength.mul_(0.5)
        return self.b(torch.relu(self.a(x)) * self.strength)


def test_what_train_mode_writes_into_a_buffer_is_undone_before_the_cut_is_compared() -> None:
    torch.manual_seed(0)
    model, example = prepared(Fading(), structures.image())
    assert analyze(model, example).group("a").exact_zero


class KeepsItsWidth(nn.Module):
    """Reads a width when it runs for the first time, into something that it holds."""

    def __init__(self, kept: Any) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.kept = kept

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if isinstance(self.kept, dict):
            width = self.kept["width"] = self.kept["width"] or x.shape[1]
        elif isinstance(self.kept, list):
            width = self.kept[0] = self.kept[0] or x.shape[1]
        elif self.kept is None:
            width = self.kept = x.shape[1]
        elif isinstance(self.kept, int):
            width = self.kept
        else:
            width = self.kept.width = self.kept.width or x.shape[1]
        return self.head(x.relu() / width**0.5)


@pytest.mark.parametrize("kept", [None, {"width": 0}, [0], SimpleNamespace(width=0)], ids=str)
def test_a_width_that_the_first_run_keeps_is_not_cut_because_the_next_one_knows_it(
    kept: Any,
) -> None:
    torch.manual_seed(0)
    model, example = prepared(KeepsItsWidth(kept), torch.randn(2, 6))
    assert prunable(analyze(model, example)) == []


class Counting(nn.Module):
    """Each run gives something else; a list of the user's grows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.runs: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.runs.append(len(self.runs))
        return self.head(self.first(x).relu() * 0.5 ** len(self.runs))


def test_a_model_whose_runs_differ_is_compared_run_by_run() -> None:
    torch.manual_seed(0)
    model, example = prepared(Counting(), torch.randn(2, 6))
    assert [group.name for group in prunable(analyze(model, example))] == ["first"]
    assert model.runs == []


def test_what_a_run_keeps_is_undone_in_the_same_containers() -> None:
    model = nn.Module()
    model.kept, model.by_name, model.count = [1], {"a": 1}, 0
    kept = model.kept
    memory = Memory(attributes_of(model))
    assert memory.changes() == []
    kept.append(2)
    model.by_name["b"] = 2
    model.count, model.new = 1, True
    assert len(memory.changes()) == 4
    memory.undo()
    assert memory.changes() == []
    assert model.kept is kept
    assert (kept, model.by_name, model.count, hasattr(model, "new")) == ([1], {"a": 1}, 0, False)
