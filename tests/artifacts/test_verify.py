"""Verification notices what it must, and nothing else."""

import copy
import math
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from slimcli.artifacts import verify
from slimcli.network.example import Example

Boxes = namedtuple("Boxes", "corners labels")


@dataclass
class Output:
    logits: torch.Tensor
    aux: list


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4)
        self.act = nn.ReLU(inplace=True)
        self.second = nn.Linear(4, 4)
        self.third = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.second(self.act(self.first(x))))


def seam(left, right, **more):
    return verify.compare(lambda b: left, lambda b: right, [None], **more)


def nest(x: torch.Tensor):
    boxes = Boxes(x + 1, torch.tensor([1, 2]))
    return OrderedDict(a=Output(x, [x * 2, {"deep": x * 3}]), b=(boxes, None, "text"), n=3)


def test_equal_nested_predictions_differ_by_zero():
    found = seam(nest(torch.ones(3)), nest(torch.ones(3)))
    assert (found.max_abs, found.max_rel, found.ok) == (0.0, 0.0, True)


def test_the_difference_is_found_in_the_depth_and_named():
    other = nest(torch.ones(3))
    other["a"].aux[1]["deep"] = other["a"].aux[1]["deep"] + 0.5
    found = seam(nest(torch.ones(3)), other)
    assert found.where == "a.aux.1.deep"
    assert found.max_abs == pytest.approx(0.5)
    assert found.max_rel == pytest.approx(0.5 / 3)
    assert not found.ok


@pytest.mark.parametrize(
    ("peak", "error", "ok"),
    [(0.1, 9e-5, True), (0.1, 2e-4, False), (100.0, 9e-3, True), (100.0, 2e-2, False)],
)
def test_the_limit_grows_with_outputs_above_one_only(peak, error, ok):
    reference = torch.tensor([peak, 0.0], dtype=torch.float64)
    assert seam(reference, reference + torch.tensor([0.0, error])).ok is ok


def test_a_small_output_is_not_hidden_behind_a_large_one():
    large, small = torch.tensor([1000.0]), torch.tensor([0.1])
    found = seam([large, small], [large, small + 0.01])
    assert (found.ok, found.where) == (False, "1")


def test_integers_and_booleans_must_be_equal():
    found = seam(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4]))
    assert not found.ok
    assert "1 of 3 integers differ" in found.notes[0]
    assert not seam(torch.tensor([True]), torch.tensor([False])).ok
    assert seam({"n": 3, "t": "x"}, {"n": 3, "t": "x"}).ok


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_are_equal_only_to_themselves(value):
    odd = torch.tensor([1.0, value])
    same = seam(odd, odd.clone())
    assert same.ok
    assert "reference itself" in same.notes[0]
    for left, right in ((odd, torch.ones(2)), (torch.ones(2), odd)):
        found = seam(left, right)
        assert not found.ok
        assert found.summary()["max_abs"] is None


def test_infinities_of_opposite_sign_differ():
    assert not seam(torch.tensor([math.inf]), torch.tensor([-math.inf])).ok


@pytest.mark.parametrize(
    ("left", "right", "note"),
    [
        (torch.ones(2, 3), torch.ones(3, 2), "shape (2, 3) became (3, 2)"),
        ({"a": torch.ones(1)}, {}, "missing"),
        ({}, {"a": torch.ones(1)}, "only in the candidate"),
        ([torch.ones(1), None], [torch.ones(1), torch.ones(1)], "expected None"),
    ],
)
def test_another_structure_is_a_difference(left, right, note):
    found = seam(left, right)
    assert not found.ok
    assert note in found.notes[0]


def test_no_batch_is_not_a_proof():
    found = verify.compare(lambda b: b, lambda b: b, [])
    assert not found.ok
    assert "no batch" in found.notes[0]


def test_numpy_and_tensors_are_compared_as_numbers():
    assert seam(torch.ones(2), np.ones(2, dtype=np.float32)).ok
    assert seam(1.0, np.float64(1.00001)).max_abs == pytest.approx(1e-5)


def test_every_batch_counts():
    found = verify.compare(
        lambda b: b, lambda b: b * (1 + (b[0] > 1)), [torch.ones(2), torch.ones(2) * 3]
    )
    assert (found.ok, found.batches) == (False, 2)


def test_autocast_that_the_users_code_switches_on_hides_nothing_and_changes_nothing():
    torch.manual_seed(0)
    net, batch = nn.Linear(64, 64), torch.randn(8, 64)
    near = copy.deepcopy(net)
    with torch.no_grad():
        near.weight += 1e-3 * torch.randn(64, 64)

    def predict(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch)

    same, other = (
        verify.compare(verify.runner(net, predict), verify.runner(model, predict), [batch])
        for model in (copy.deepcopy(net), near)
    )
    with torch.no_grad():
        difference = (net(batch) - near(batch)).abs().max().item()
    assert (same.ok, same.max_abs) == (True, 0.0)
    assert not other.ok
    assert other.max_abs == pytest.approx(difference, rel=1e-4)
    assert predict(net, batch).dtype == torch.bfloat16


def half_input(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
        return model(batch.bfloat16())


def own_cast(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model[0](batch)
        if torch.is_autocast_enabled("cpu"):
            hidden = hidden.to(torch.get_autocast_dtype("cpu"))
        return model[1](hidden)


def written_in_place(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
        half = batch.bfloat16()
        part, place = half.view(-1), torch.empty(2, 8, dtype=torch.bfloat16)
        part += 1
        torch.nn.functional.relu(part, inplace=True)
        torch.mul(half, 2, out=place)
        return model(place)


def test_what_the_code_writes_into_what_it_cast_is_written_in_a_comparison_too():
    torch.manual_seed(0)
    net, batch = nn.Linear(8, 4), torch.randn(2, 8)
    with verify.exact_arithmetic():
        found = written_in_place(net, batch)
        expected = net(2 * (batch + 1).relu())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("predict", [half_input, own_cast])
@pytest.mark.parametrize("is_half", [False, True], ids=["float32", "a half layer"])
def test_code_that_autocast_lets_mix_precisions_runs_without_it_too(predict, is_half):
    torch.manual_seed(0)
    net, batch = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), torch.randn(2, 8)
    net[1] = net[1].bfloat16() if is_half else net[1]
    found = verify.compare(verify.runner(net, predict), verify.runner(net, predict), [batch])
    assert (found.ok, found.max_abs) == (True, 0.0)
    with verify.exact_arithmetic():
        assert predict(net, batch).dtype == torch.float32


def test_settings_and_modes_are_put_back():
    net = Net().train()
    net.second.eval()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            seen = []
            verify.compare(
                lambda b: seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"))),
                verify.runner(net, lambda m, b: seen.append(m.training)),
                [0],
            )
        assert seen == [(False, False), False]
        assert torch.get_float32_matmul_precision() == "high"
        assert (net.training, net.second.training) == (True, False)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_first_differing_layer_is_named():
    net = Net()
    broken = copy.deepcopy(net)
    with torch.no_grad():
        broken.second.bias += 1.0
    example = Example(torch.randn(3, 4), lambda m, b: m(b))
    found = verify.first_difference(net, broken, example)
    assert found is not None
    assert (found.module, found.last_equal) == ("second", "act")
    assert found.max_abs == pytest.approx(1.0, abs=1e-5)
    assert str(found).startswith("second (1.0e+00 apart")
    assert "act still agrees" in str(found)
    assert verify.first_difference(net, copy.deepcopy(net), example) is None


def test_a_folded_pair_is_no_difference():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(self.conv(x))

    net = Pair()
    net.norm.weight.data.fill_(2.0)
    folded = copy.deepcopy(net)
    scale = 2.0 / (1 + net.norm.eps) ** 0.5
    folded.conv.weight.data *= scale
    folded.conv.bias.data *= scale
    folded.norm = nn.Identity()
    example = Example(torch.randn(3, 4), lambda m, b: m(b))
    assert verify.first_difference(net, folded, example) is None


def test_an_in_place_op_behind_a_layer_is_not_blamed_on_it():
    class Shifted(Net):
        def __init__(self, shift: float) -> None:
            super().__init__()
            self.shift = shift

        def forward(self, x):
            return self.third(self.second(self.first(x).add_(self.shift)))

    example = Example(torch.randn(3, 4), lambda m, b: m(b))
    found = verify.first_difference(Shifted(0.0), Shifted(1.0), example)
    assert found is not None
    assert (found.module, found.last_equal) == ("second", "first")
