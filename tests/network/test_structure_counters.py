"""Layers without tensors that say in an attribute how many channels they get."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimcli.network import surgery
from slimcli.network.attributes import counters
from slimcli.network.structure import analyze

from . import structures
from .proving import EXACT, merge_difference, outputs, prepared, zeroed_and_cut


class Counted(structures.Net):
    """Two convs, a layer over both, a conv.

    Args:
        between: Gets twelve channels of the first conv and four of the second.
    """

    def __init__(self, between: nn.Module) -> None:
        super().__init__(12)
        self.left, self.right = nn.Conv2d(8, 12, 1), nn.Conv2d(8, 4, 1)
        self.between, self.last = between, structures.conv_bn(16, 12)

    def body(self, x: Tensor) -> Tensor:
        both = torch.cat([self.left(x), self.right(x)], 1)
        return self.last(F.relu(self.between(both)))


def test_an_instance_norm_without_weights_is_told_how_many_channels_are_left() -> None:
    model, example = prepared(Counted(nn.InstanceNorm2d(16)), structures.image())
    structure = analyze(model, example)
    left, right = structure.group("left"), structure.group("right")
    assert [left.exact_zero, right.exact_zero] == [True, True]
    other = copy.deepcopy(model)
    surgery.apply(other, [left.cut([0, 2, 5]), right.cut([1])], example=example)
    assert other.between.num_features == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where the number is not what arrives
        outputs(other, example)
    error, effect = zeroed_and_cut(model, example, [left, right], seed=1)
    assert error <= EXACT < effect
    assert merge_difference(model, example, left) <= EXACT


def test_a_group_norm_without_weights_is_told_how_many_channels_are_left() -> None:
    model, example = prepared(Counted(nn.GroupNorm(16, 16, affine=False)), structures.image())
    left = analyze(model, example).group("left")
    surgery.apply(model, [left.cut([0, 2, 5])], example=example)
    assert model.between.num_channels == 7


def test_a_wrong_number_and_layers_with_tensors_are_left_as_they_are() -> None:
    with_tensors = nn.InstanceNorm2d(16, track_running_stats=True)
    assert list(counters(dict(Counted(with_tensors).named_modules()))) == []
    model, example = prepared(Counted(nn.InstanceNorm2d(5)), structures.image())
    with pytest.warns(UserWarning, match="does not match num_features"):
        left = analyze(model, example).group("left")
    assert left.counters == ()
    surgery.apply(model, [left.cut([0, 2, 5])], example=example)
    assert model.between.num_features == 5
