"""Weights of a trial cut have no memory of their own: they are made when an operator asks."""

from __future__ import annotations

import copy
import ctypes
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimcli.network.example import Example
from slimcli.network.selection import select
from slimcli.network.structure import analyze
from slimcli.network.structure.analyze import trace
from slimcli.network.structure.edits import Edit
from slimcli.network.structure.hollow import LARGE, Hollow, is_large
from slimcli.network.structure.traced import Traced
from slimcli.network.structure.trial import Trial

from . import structures
from .proving import EXACT, network, prepared, prunable, zeroed_and_cut

WIDTH = 160
"""Channels, so many that a weight between two of them is large."""


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(0)))


def hollow_twin(parameter: nn.Parameter, hollow: Hollow) -> nn.Parameter:
    return nn.Parameter(hollow.shell(parameter), requires_grad=False)


def test_a_hollow_weight_holds_one_number_and_computes_as_the_whole_one_in_float64() -> None:
    origin, hollow = weight(WIDTH, WIDTH), Hollow()
    twin, data = hollow_twin(origin, hollow), torch.randn(3, WIDTH, dtype=torch.float64)
    assert (twin.shape, twin.dtype) == (origin.shape, torch.float64)
    assert twin.untyped_storage().nbytes() == 8
    with hollow:
        found = F.linear(data, twin)
    torch.testing.assert_close(found, F.linear(data, origin.detach().double()), rtol=0, atol=0)


def test_changes_of_a_hollow_weight_are_seen_wherever_it_is_used() -> None:
    origin, hollow = weight(WIDTH, WIDTH), Hollow()
    twin = hollow_twin(origin, hollow)
    hollow.edit(Edit(twin, 0, [3, 5]))
    hollow.edit(Edit(twin, 1, [7], [8]))
    expected = origin.detach().double()
    expected[[3, 5]] = 0
    expected[:, 7] = expected[:, 8]
    with hollow:
        assert torch.equal(twin * 1, expected)
        assert torch.equal(twin.t().contiguous(), expected.t())
        assert torch.equal(torch.cat([twin, twin]), torch.cat([expected, expected]))


def test_what_a_cut_leaves_of_a_hollow_weight_is_hollow_and_added_up_in_float64() -> None:
    origin, hollow = weight(WIDTH, WIDTH), Hollow()
    twin = hollow_twin(origin, hollow)
    sources = {0: ((0,), (4,), (2,)), 1: ((1, 5, 9), (2,), (3, 4))}
    left = hollow.select(twin, sources)
    assert hollow.stands_for(left)
    assert left.untyped_storage().nbytes() == 8
    with hollow:
        assert torch.equal(left * 1, select(origin.detach().double(), sources))


def test_what_a_model_writes_into_a_hollow_weight_stays_and_never_reaches_the_users_own() -> None:
    for dtype in (torch.float32, torch.float64):
        origin, hollow = nn.Parameter(weight(WIDTH, WIDTH).detach().to(dtype)), Hollow()
        before = origin.detach().clone()
        twin = hollow_twin(origin, hollow)
        with hollow, torch.no_grad():
            twin.data.clamp_(-0.5, 0.5)
            first = twin * 1
        hollow.forget()
        with hollow:
            assert torch.equal(twin * 1, first)
        assert torch.equal(first, before.double().clamp(-0.5, 0.5))
        assert torch.equal(hollow.select(twin, {0: ((1,),)}), first[1:2])
        assert torch.equal(origin.detach(), before)


def test_small_weights_biases_and_parameters_of_other_kinds_are_copied() -> None:
    class Special(nn.Parameter):
        pass

    assert is_large(weight(WIDTH, WIDTH))
    assert not is_large(weight(LARGE - 1, 1))
    assert not is_large(weight(LARGE))
    assert not is_large(Special(torch.zeros(WIDTH, WIDTH)))


class Wide(structures.Net):
    """Two large convs and a large linear layer."""

    def __init__(self) -> None:
        super().__init__(WIDTH)
        self.first = structures.conv_bn(8, WIDTH)
        self.second = structures.conv_bn(WIDTH, WIDTH)

    def body(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Looks(Wide):
    """Looks at its weights' numbers without asking torch."""

    def body(self, x: Tensor) -> Tensor:
        scale = float(abs(self.second[0].weight.detach().numpy()).max())
        return self.second(self.first(x)) / scale


class Peeks(Wide):
    """Looks at its weights' memory as compiled code would, which no mode of torch hears."""

    def body(self, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            address = self.second[0].weight.data_ptr()
        number = ctypes.c_double.from_address(address).value
        x = self.first(x)
        return self.second(x / x.shape[1]) + 0 * number


class Clamps(Wide):
    """Changes its own weights whenever it runs."""

    def body(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.second[0].weight.data.clamp_(-0.01, 0.01)
        return super().body(x)


@pytest.mark.parametrize("kind", [Wide, Looks, Clamps])
def test_networks_with_hollow_weights_are_cut_exactly_and_stay_as_they_are(kind: type) -> None:
    torch.manual_seed(0)
    model, example = prepared(kind(), structures.image())
    before = copy.deepcopy(model.state_dict())
    structure = analyze(model, example)
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())
    found = {group.name for group in prunable(structure)}
    assert found == ({"stem.1"} if kind is Looks else {"stem.1", "first.1", "second.1"})
    if kind is Looks:  # the largest of all numbers changes with the channels
        assert "channels leave torch at" in structure.group("first.1").frozen_reason
    for seed in range(3):
        error, effect = zeroed_and_cut(model, example, prunable(structure), seed)
        assert error <= EXACT < effect


def test_a_trial_copies_a_small_part_of_a_large_network() -> None:
    model, example = prepared(Wide(), structures.image())
    traced: Traced = trace(model, example)
    trial = Trial(model, example, traced)
    twin = trial._fresh()
    copied = sum(each.untyped_storage().nbytes() for each in twin.parameters())
    assert copied < 0.1 * 8 * sum(each.numel() for each in model.parameters())


@pytest.mark.parametrize(
    ("name", "count"), [("Depthwise", 3), ("Residual", 3), ("ChannelShuffle", 7)]
)
def test_an_analysis_runs_the_network_traced_whole_and_cut_again_where_sizes_are_asked(
    name: str, count: int
) -> None:
    model, example, _ = network(name)
    runs = []

    def predict(net: nn.Module, batch: Any) -> Any:
        runs.append(net)
        return example.predict(net, batch)

    structure = analyze(model, Example(example.batch, predict))
    assert len(runs) == count
    assert prunable(structure)
    # constants are read in the run of the whole network
    assert any(group.constants for group in structure.groups) == (name == "Depthwise")


def test_a_trial_copies_all_weights_where_the_code_reads_numbers_without_operators() -> None:
    for kind, is_hollow in ((Wide, True), (Looks, False)):
        model, example = prepared(kind(), structures.image())
        trial = Trial(model, example, trace(model, example))
        sizes = [each.untyped_storage().nbytes() for each in trial._fresh().parameters()]
        assert (sum(sizes) < 8 * LARGE) == is_hollow


def test_a_shell_that_compiled_code_looks_at_hides_nothing() -> None:
    torch.manual_seed(0)
    model, example = prepared(Peeks(), structures.image())
    structure = analyze(model, example)
    assert [group.name for group in prunable(structure)] == ["stem.1", "second.1"]
    assert "zeroed and cut differ" in structure.group("first.1").frozen_reason
