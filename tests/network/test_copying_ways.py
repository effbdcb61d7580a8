"""Modules that say how they are copied are copied so; others as ``copy.deepcopy`` would."""

from __future__ import annotations

import copy
import threading
from typing import Any

import torch
from torch import Tensor, nn

from slimcli.network.copying import deep_copy


class Counting(nn.Module):
    """Leaves a cache out of its state, and counts its parts when it comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        self.cache = object()

    def __getstate__(self) -> dict[str, Any]:
        return {name: each for name, each in vars(self).items() if name != "cache"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.widths = [each.out_features for each in self.parts if isinstance(each, nn.Linear)]


class Told(nn.Module):
    """Comes back with what its parts are like."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.widths = [each.out_features for each in self.parts]


class Single(nn.Module):
    """There is only one of it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Single:
        return self


class Made(nn.Module):
    """Is made by a function that knows its width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Made, (self.width + 100,)


def state_of(module: nn.Module) -> dict[str, list[float]]:
    return {name: each.tolist() for name, each in module.state_dict().items()}


def test_a_module_with_a_state_of_its_own_keeps_its_ways() -> None:
    model = nn.Sequential(Counting(), Told())
    twin = deep_copy(model)
    assert not hasattr(twin[0], "cache")
    assert (twin[0].widths, twin[1].widths) == ([3, 2], [3, 2])
    assert state_of(twin) == state_of(model)
    assert twin[0].parts[0].weight is not model[0].parts[0].weight


class Logged(nn.Module):
    """Leaves out a part that has no copy."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.log = nn.Linear(2, 2), nn.Identity()
        self.log.lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        parts = {name: each for name, each in self._modules.items() if name != "log"}
        return {**vars(self), "_modules": parts}


class Decoder(nn.Module):
    """Looks at a part that it shares with others when it comes back."""

    def __init__(self, shared: nn.Linear) -> None:
        super().__init__()
        self.shared = shared

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.width = self.shared.weight.shape[1]


def test_a_part_that_is_left_out_is_not_copied() -> None:
    twin = deep_copy(nn.Sequential(nn.Linear(2, 2), Logged()))
    assert list(dict(twin[1].named_children())) == ["layer"]


def test_a_part_is_there_before_the_second_one_that_shares_it() -> None:
    shared = nn.Linear(3, 4)
    twin = deep_copy(nn.Sequential(nn.Sequential(shared), Decoder(shared)))
    assert twin[1].width == 3
    assert twin[1].shared is twin[0][0]


def test_modules_that_copy_themselves_do() -> None:
    single, made, forced = Single(), Made(3), nn.ReLU()
    forced.__deepcopy__ = lambda memo: nn.GELU()  # type: ignore[method-assign,assignment]
    twin = deep_copy(nn.ModuleList([single, made, forced]))
    assert twin[0] is single
    assert twin[1].width == 103
    assert type(twin[2]) is nn.GELU


def test_what_is_one_object_in_several_places_is_one_in_the_copy() -> None:
    model, names = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), ["a"]
    model[1].weight = model[0].weight
    model.names, model[0].names, model[0].up = names, (names, model[1]), {"top": [model]}
    twin = deep_copy(model)
    assert twin[1].weight is twin[0].weight
    assert twin[0].names[0] is twin.names
    assert twin[0].names[1] is twin[1]
    assert twin[0].up["top"][0] is twin
    assert twin.names is not names


def test_flags_names_and_empty_containers_stay_what_they_are() -> None:
    model = nn.Conv2d(3, 4, (1, 2), padding="same", padding_mode="circular")
    model.note, model.table, model.rates = "x", {}, (1, 2.5, None)
    model.eval()
    twin, other = deep_copy(model), copy.deepcopy(model)
    numbers = {
        name: each for name, each in vars(other).items() if not isinstance(each, (dict, Tensor))
    }
    assert {name: vars(twin)[name] for name in numbers} == numbers
    assert list(vars(twin)) == list(vars(other))
    twin.table["b"] = 1
    twin.register_forward_hook(lambda *_: None)
    assert (model.table, len(model._forward_hooks)) == ({}, 0)
    x = torch.randn(1, 3, 5, 5)
    assert torch.equal(deep_copy(model)(x), model(x))


def test_a_chain_deeper_than_python_recurses_is_copied() -> None:
    model: nn.Module = nn.Linear(1, 1)
    for _ in range(400):
        model = nn.Sequential(model)
    twin = deep_copy(model)
    assert sum(1 for _ in twin.modules()) == 401
    assert next(twin.parameters()) is not next(model.parameters())
