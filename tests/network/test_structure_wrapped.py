"""Models as users bring them: wrapped, compiled, scripted, with state; and what a cut keeps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from slimcli.network import surgery
from slimcli.network.example import Example
from slimcli.network.structure import Group, Structure, analyze, zero_channels
from slimcli.network.structure.edits import carry_out, equals
from slimcli.network.structure.unequal import unequal

from . import structures
from .proving import EXACT, call, difference, network, outputs, prepared, prunable, zeroed_and_cut

WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "module": nn.DataParallel,
    "_orig_mod": lambda model: torch.compile(model, backend="eager"),
}


@pytest.mark.parametrize("prefix", WRAPPERS)
def test_a_wrapped_or_compiled_model_has_the_groups_of_the_model_inside(prefix: str) -> None:
    inside, example, expected = network("Residual")
    model = WRAPPERS[prefix](inside)
    structure = analyze(model, example)
    assert [g.name for g in structure.groups] == [f"{prefix}.{g.name}" for g in expected.groups]
    assert [g.is_prunable for g in structure.groups] == [g.is_prunable for g in expected.groups]
    error, effect = zeroed_and_cut(model, example, prunable(structure), 0)
    assert error <= EXACT < effect


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_a_model_wrapped_for_distribution_is_frozen_with_what_to_do() -> None:
    inside, example, _ = network("Chain")
    structure = analyze(nn.parallel.DistributedDataParallel(inside), example)
    assert {group.is_prunable for group in structure.groups} == {False}
    assert "give slim the module inside" in structure.group("module.a.1").frozen_reason


def test_a_scripted_model_is_frozen_with_what_to_do() -> None:
    inside, example, _ = network("Chain")
    with pytest.warns(FutureWarning, match="deprecated"):
        model = torch.jit.trace(inside, example.batch)
    structure = analyze(model, example)
    assert {group.is_prunable for group in structure.groups} == {False}
    assert "give slim the Python module" in structure.groups[0].frozen_reason


def test_a_scripted_part_is_frozen_with_what_to_do_and_the_rest_is_not() -> None:
    torch.manual_seed(0)
    first, last = structures.conv_bn(3, 16), structures.conv_bn(12, 20)
    with pytest.warns(FutureWarning, match="deprecated"):
        part = torch.jit.script(structures.conv_bn(16, 12))
    whole = nn.Sequential(first, part, last, nn.Conv2d(20, 4, 1))
    model, example = prepared(whole, structures.image())
    structure = analyze(model, example)
    frozen = {group.size for group in structure.groups if "Python module" in group.frozen_reason}
    assert (frozen, [group.size for group in prunable(structure)]) == ({16, 12}, [20])
    assert zeroed_and_cut(model, example, prunable(structure), 1)[0] < EXACT


class Counting(structures.Net):
    """Its forward writes into a parameter and into a buffer."""

    def __init__(self) -> None:
        super().__init__(12)
        self.a, self.b = structures.conv_bn(8, 16), structures.conv_bn(16, 12)
        self.scale = nn.Parameter(torch.ones(16, 1, 1))
        self.register_buffer("calls", torch.zeros(3))

    def body(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.calls += 1
            self.scale.mul_(1.5)
            self.b[0].weight.data.add_(0.1)
        return self.b(self.a(x) * self.scale)


def test_what_the_forward_writes_into_the_model_is_undone_after_the_analysis() -> None:
    model = Counting().double().eval()
    before = copy.deepcopy(model.state_dict())
    analyze(model, Example(structures.image().double(), call))
    assert [n for n, each in model.state_dict().items() if not torch.equal(each, before[n])] == []


class OwnConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.contiguous())


class OwnNorm(nn.BatchNorm2d):
    pass


class OwnLinear(nn.Linear):
    pass


class Own(nn.Module):
    """The user's own layers, one of them used twice, and two that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = OwnConv(3, 16, 3, padding=1, bias=False), OwnNorm(16)
        self.twice = OwnConv(16, 16, 1)
        self.again = self.twice
        self.left, self.right = OwnLinear(16, 12), OwnLinear(16, 12)
        self.right.weight = self.left.weight
        self.head = OwnLinear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.twice(F.relu(self.norm(self.a(x)))))
        x = F.relu(self.again(x)).mean((2, 3))
        return self.head(F.relu(self.left(x)) + F.relu(self.right(2 * x)))


def test_classes_and_sharing_of_the_users_layers_survive_a_cut() -> None:
    torch.manual_seed(0)
    model, example = prepared(Own(), structures.image())
    structure = analyze(model, example)
    assert [group.name for group in structure.groups if group.is_prunable] == ["a", "left"]
    both, left = structure.group("a"), structure.group("left")
    assert both.zero_reason == "a removed channel would arrive at twice as different constants"
    pairs = [[channel, channel + 8] for channel in range(8)]
    carry_out(equals(model, both, pairs))
    zero_channels(model, left, range(3, 12))
    before = outputs(model, example)
    surgery.apply(model, [both.merge(pairs), left.cut([0, 1, 2])], example=example)
    assert difference(before, outputs(model, example)) <= EXACT
    assert type(model.a) is OwnConv
    assert (model.a.out_channels, model.norm.num_features) == (8, 8)
    assert (model.twice.in_channels, model.twice.out_channels) == (8, 8)
    assert (model.left.in_features, model.left.out_features, model.head.in_features) == (8, 3, 3)
    assert model.again is model.twice
    assert model.right.weight is model.left.weight


class Lookahead(torch.optim.Optimizer):
    """A user's own optimizer: a slow copy of every parameter, and a count that is no tensor."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state.setdefault("slow", parameter.clone())
                state["count"] = state.get("count", 0) + 1
                parameter.add_(parameter.grad, alpha=-group["lr"])
                state["slow"].lerp_(parameter, 0.3)
                if state["count"] % 2 == 0:
                    parameter.copy_(state["slow"])


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.01),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.01),
    "own": Lookahead,
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> None:
    optimizer.zero_grad()
    model(batch).square().sum().backward()
    optimizer.step()


def sliced(tensor: Tensor, name: str, groups: list[Group], keep: dict[str, list[int]]) -> Tensor:
    """What stays of a tensor, by indexing each dimension with what the groups say."""
    for dim in range(tensor.dim()):
        gone = set()
        for group in groups:
            for slot in group.slots:
                if (slot.tensor, slot.dim) == (name, dim):
                    for channel in set(range(group.size)) - set(keep[group.name]):
                        gone |= set(slot.indices[channel])
        kept = [index for index in range(tensor.shape[dim]) if index not in gone]
        tensor = tensor.index_select(dim, torch.tensor(kept))
    return tensor


def cut_by_hand(
    model: nn.Module, make: Callable[[Any], Any], optimizer: Any, structure: Structure
) -> tuple[nn.Module, Any]:
    """A model of the narrow shapes and a new optimizer, both filled by plain indexing."""
    groups = prunable(structure)
    keep = {group.name: list(range(0, group.size, 2)) for group in groups}
    names = [name for name, _ in model.named_parameters()]
    narrow = copy.deepcopy(model)
    surgery.apply(narrow, [group.cut(keep[group.name]) for group in groups])
    with torch.no_grad():
        for name, parameter in narrow.named_parameters():
            parameter.copy_(sliced(model.get_parameter(name), name, groups, keep))
    fresh, state = make(narrow.parameters()), copy.deepcopy(optimizer.state_dict())
    for number, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor) and value.dim():
                values[key] = sliced(value, names[number], groups, keep)
    fresh.load_state_dict(state)
    return narrow, fresh


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("net", ["Residual", "SharedConv", "SE", "GroupConv"])
def test_a_step_after_the_cut_equals_the_step_of_a_new_model_with_sliced_state(
    name: str, net: str
) -> None:
    torch.manual_seed(0)
    model = structures.NETWORKS[net]().double().eval()
    unequal(model, torch.Generator().manual_seed(3))
    example = Example(structures.image().double(), call)
    structure, make = analyze(model, example), OPTIMIZERS[name]
    optimizer = make(model.parameters())
    for _ in range(3):
        step(model, optimizer, example.batch)
    narrow, fresh = cut_by_hand(model, make, optimizer, structure)
    cuts = [group.cut(range(0, group.size, 2)) for group in prunable(structure)]
    for group in prunable(structure):
        zero_channels(model, group, range(1, group.size, 2))
    surgery.apply(model, cuts, optimizer=optimizer, example=example)
    for _ in range(2):
        step(model, optimizer, example.batch)
        step(narrow, fresh, example.batch)
    assert difference(outputs(narrow, example), outputs(model, example)) <= EXACT
