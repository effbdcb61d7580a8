"""Two layers, a function of what both give, a layer: what may be cut through that function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimcli.network.structure import Structure, analyze

from .proving import EXACT, check_labels, merge_difference, prepared, prunable, zeroed_and_cut
from .structures import Net, conv, conv_bn, image

Function = Callable[[Tensor, Tensor], Tensor]


class Paired(Net):
    """``between`` is called with the channels of ``a`` and of ``side``."""

    def __init__(self, between: Function, width: int = 16) -> None:
        super().__init__(12)
        self.a, self.side, self.b = conv(8, 16), conv(8, 16, 1), conv_bn(width, 12)
        self.between = between

    def body(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x), self.side(x)))


class Between(Net):
    """A conv, something, a rectifier, a conv."""

    def __init__(self, *layers: nn.Module, width: int = 16) -> None:
        super().__init__(12)
        self.a, self.layers, self.b = conv(8, 16), nn.ModuleList(layers), conv_bn(width, 12)

    def body(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.between(self.a(x))))

    def between(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@dataclasses.dataclass(frozen=True)
class Case:
    """A function; groups whose zero channels go, with sizes; groups that are merged only; reasons.

    Attributes:
        between: Called with two tensors.
        zero: Name of a group -> its size.
        merge: Names of groups whose zeros don't stay zeros, though equal channels stay equal.
        frozen: Name of a group -> a part of the reason.
        width: Channels of what it gives.
        only_zero: Names of groups whose equal channels can't be merged.
    """

    between: Function
    zero: dict[str, int] = dataclasses.field(default_factory=dict)
    merge: tuple[str, ...] = ()
    frozen: dict[str, str] = dataclasses.field(default_factory=dict)
    width: int = 16
    only_zero: tuple[str, ...] = ()


def proven(model: nn.Module, batch: Tensor | None = None) -> Structure:
    """The structure of a model: what it says can be cut, or merged, was."""
    model, example = prepared(model, image() if batch is None else batch)
    structure = analyze(model, example)
    assert structure.notes == ()
    check_labels(structure, model, example)
    for seed in range(4):
        assert zeroed_and_cut(model, example, prunable(structure), seed)[0] <= EXACT
    for group in structure.groups:
        if group.exact_duplicate and group.size > 1:
            assert merge_difference(model, example, group) <= EXACT
    return structure


def check_paired(case: Case, model: nn.Module, batch: Tensor | None = None) -> None:
    """The structure is what the case says."""
    structure = proven(model, batch)
    mine = [group for group in structure.groups if group.name in ("a", "side")]
    assert {g.name: g.size for g in mine if g.exact_zero} == case.zero
    assert tuple(g.name for g in mine if g.exact_duplicate and not g.exact_zero) == case.merge
    assert tuple(g.name for g in mine if g.exact_zero and not g.exact_duplicate) == case.only_zero
    unread = "nothing reads it"
    frozen = {g.name: g.frozen_reason for g in mine if g.frozen_reason not in ("", unread)}
    assert frozen.keys() == case.frozen.keys()
    for name, reason in case.frozen.items():
        assert reason in frozen[name]
    if "b.1" in {group.name for group in structure.groups}:
        assert structure.group("b.1").exact_zero


def check_case(case: Case) -> None:
    torch.manual_seed(0)
    check_paired(case, Paired(case.between, case.width))
