"""An analysis leaves the user's parameters as they were, whatever the forward does to them."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimcli.network.example import Example
from slimcli.network.structure import analyze

from . import structures
from .proving import EXACT, call, prepared, prunable, zeroed_and_cut


class Teacher(nn.Module):
    """A student and its moving average, which the forward moves on.

    Args:
        move: Moves the second of two lists of parameters towards the first.
    """

    def __init__(self, move: Callable[[list[nn.Parameter], list[nn.Parameter]], None]) -> None:
        super().__init__()
        self.student, self.teacher = (
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(392, 5))
            for _ in range(2)
        )
        self.move = move

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.move([*self.student.parameters()], [*self.teacher.parameters()])
        return self.student(x) + self.teacher(x)


def replaced(new: list[nn.Parameter], old: list[nn.Parameter]) -> None:
    for q, k in zip(new, old, strict=True):
        k.data = k.data * 0.9 + q.data * 0.1


def written(new: list[nn.Parameter], old: list[nn.Parameter]) -> None:
    for q, k in zip(new, old, strict=True):
        k.data.mul_(0.9).add_(q.data, alpha=0.1)


def all_at_once(new: list[nn.Parameter], old: list[nn.Parameter]) -> None:
    torch._foreach_lerp_(old, new, 0.1)


def given_as_result(new: list[nn.Parameter], old: list[nn.Parameter]) -> None:
    for q, k in zip(new, old, strict=True):
        torch.lerp(k.data, q.data, 0.1, out=k.data)


def as_one_vector(new: list[nn.Parameter], old: list[nn.Parameter]) -> None:
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(new) * 0.5, old)


WAYS = [replaced, written, all_at_once, given_as_result, as_one_vector]


class Masked(structures.Net):
    """A conv whose forward puts zeros into its weight, as autoregressive models do."""

    def __init__(self) -> None:
        super().__init__(12)
        self.a, self.k, self.b = (
            structures.conv(8, 16),
            structures.conv(16, 10),
            structures.conv(10, 12),
        )
        self.register_buffer("mask", torch.ones(10, 16, 3, 3).tril())

    def body(self, x: Tensor) -> Tensor:
        self.k.weight.data *= self.mask
        return self.b(torch.relu(self.k(torch.relu(self.a(x)))))


def test_channels_of_a_weight_that_is_masked_in_place_are_cut_with_the_mask() -> None:
    torch.manual_seed(0)
    model, example = prepared(Masked(), structures.image())
    before = model.k.weight.clone()
    structure = analyze(model, example)
    assert torch.equal(model.k.weight, before)
    assert {"a", "k"} <= {group.name for group in prunable(structure)}
    for seed in range(3):
        error, effect = zeroed_and_cut(model, example, prunable(structure), seed)
        assert error <= EXACT < effect


class Copying(structures.Net):
    """A conv whose weight is written with that of another one."""

    def __init__(self) -> None:
        super().__init__(12)
        self.a, self.k, self.m = (
            structures.conv(8, 16),
            structures.conv(16, 10),
            structures.conv(16, 10),
        )
        self.b = structures.conv(10, 12)

    def body(self, x: Tensor) -> Tensor:
        self.k.weight.data.copy_(self.m.weight.data)
        x = torch.relu(self.a(x))
        return self.b(torch.relu(self.k(x)) + torch.relu(self.m(x)))


def test_a_weight_written_with_another_one_is_cut_with_it() -> None:
    torch.manual_seed(0)
    model, example = prepared(Copying(), structures.image())
    structure = analyze(model, example)
    for group in prunable(structure):
        error, effect = zeroed_and_cut(model, example, [group], seed=2)
        assert error <= EXACT < effect
    written = [g for g in structure.groups for s in g.slots if (s.tensor, s.dim) == ("k.weight", 0)]
    assert [{"k.weight", "m.weight"} <= {s.tensor for s in g.slots} for g in written] == [True]


class OwnAverages(nn.Module):
    """Statistics of a norm that are parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Linear(8, 5)
        self.mean = nn.Parameter(torch.zeros(8), requires_grad=False)
        self.var = nn.Parameter(torch.ones(8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(F.conv2d(x, self.weight), self.mean, self.var, training=True)
        return self.head(torch.relu(x).mean((2, 3)))


def check_untouched(model: nn.Module) -> None:
    model.eval()
    places = {name: each.data_ptr() for name, each in model.named_parameters()}
    before = {name: each.clone() for name, each in model.state_dict().items()}
    analyze(model, Example(torch.randn(2, 3, 9, 9), call))
    after = model.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert {name: each.data_ptr() for name, each in model.named_parameters()} == places


@pytest.mark.parametrize("move", WAYS, ids=lambda way: way.__name__)
def test_a_teacher_is_where_it_was_after_being(move: Callable[..., None]) -> None:
    torch.manual_seed(0)
    check_untouched(Teacher(move))


def test_averages_that_are_parameters_are_as_they_were() -> None:
    torch.manual_seed(0)
    check_untouched(OwnAverages())


class Normalising(nn.Module):
    """Changes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 2, 3)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.b(torch.relu(self.a(batch["images"].sub_(0.45).div_(0.22))))


def test_a_batch_that_the_model_changes_is_the_users_own_again() -> None:
    images = torch.rand(2, 3, 16, 16)
    batch = defaultdict(list, images=images)
    before = images.clone()
    structure = analyze(Normalising().eval(), Example(batch, call))
    assert torch.equal(batch["images"], before)
    assert structure.group("a").exact_zero


class Adapting(nn.Module):
    """Takes gradients in its forward, and writes into arrays."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)
        self.mean = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        self.mean.numpy()[:] *= 0.5
        with torch.enable_grad():
            y = self.b(torch.relu(self.a(x)))
            y.square().sum().backward()
        return y.detach()


def test_gradients_and_what_arrays_change_are_as_they_were() -> None:
    torch.manual_seed(0)
    model = Adapting().eval()
    model.a.weight.grad = torch.full_like(model.a.weight, 3.0)
    analyze(model, Example(torch.randn(2, 6), call))
    assert torch.equal(model.a.weight.grad, torch.full_like(model.a.weight, 3.0))
    assert model.b.weight.grad is None
    assert model.mean.tolist() == [1.0, 1.0, 1.0]


class Unfollowed(Adapting):
    """No mode can look into it; it draws numbers and writes into a parameter."""

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.5)
        return torch.cond(x.sum() > 0, self.a, self.a, (x,)) + 0 * torch.randn(8)


def test_a_model_that_can_not_be_followed_is_as_it_was() -> None:
    model = Unfollowed().eval()
    state = torch.get_rng_state()
    structure = analyze(model, Example(torch.randn(2, 6, generator=torch.Generator()), call))
    assert structure.groups == ()
    assert model.mean.tolist() == [1.0, 1.0, 1.0]
    assert torch.equal(state, torch.get_rng_state())


@functools.lru_cache
def ramp(height: int, width: int) -> Tensor:
    """Brightness from the left to the right."""
    return torch.linspace(0, 1, width).expand(height, width)


TABLE: dict[int, Tensor] = {}


def tabled(height: int, width: int) -> Tensor:
    if width not in TABLE:
        TABLE[width] = torch.linspace(0, 1, width)
    return TABLE[width].expand(height, width)


class Lit(nn.Module):
    """Multiplies features with something that is kept outside of the model."""

    light: Callable[[int, int], Tensor]

    def __init__(self, light: Callable[[int, int], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.light = light

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x * self.light(*x.shape[2:]))


@pytest.mark.parametrize("light", [ramp, tabled])
def test_caches_outside_of_the_model_keep_nothing_of_the_trials(
    light: Callable[[int, int], Tensor],
) -> None:
    known = light(3, 3)
    model = Lit(light)
    structure = analyze(model, Example(torch.randn(2, 3, 16, 16), call))
    assert [group.name for group in prunable(structure)] == ["a"]
    for size in (16, 15, 13):
        assert model(torch.randn(1, 3, size, size)).dtype == torch.float32
    assert torch.equal(light(3, 3), known)
