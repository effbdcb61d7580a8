"""What proves a cut: zeroed equals cut, on small networks in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from slimcli.network import surgery
from slimcli.network.copying import deep_copy
from slimcli.network.example import Example
from slimcli.network.structure import Group, Structure, analyze, zero_channels
from slimcli.network.structure.edits import carry_out, equals
from slimcli.network.structure.modes import output_tensors
from slimcli.network.structure.precision import to_dtype
from slimcli.network.structure.situations import other_batches
from slimcli.network.structure.unequal import unequal

from . import structures

EXACT = 1e-10
"""Relative to the largest output, float64: a thousand times the rounding seen (3e-14)."""

TRIED = "a trial cut failed"
"""Part of a reason that a trial gave."""


def call(model: nn.Module, batch: Any) -> Any:
    return model(batch)


def prepared(model: nn.Module, batch: Any) -> tuple[nn.Module, Example]:
    """The model in float64 with unequal norms and scales, and its example."""
    model = model.double().eval()
    unequal(model, torch.Generator().manual_seed(3))
    return model, Example(to_dtype(batch, torch.float64), call)


def network(name: str) -> tuple[nn.Module, Example, Structure]:
    torch.manual_seed(0)
    model, example = prepared(structures.NETWORKS[name](), structures.batch_of(name))
    return model, example, analyze(model, example)


def outputs(model: nn.Module, example: Example) -> list[Tensor]:
    with torch.no_grad():
        return list(output_tensors(example.run(model.eval())))


def difference(left: list[Tensor], right: list[Tensor]) -> float:
    pairs = zip(left, right, strict=True)
    return max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) for a, b in pairs)


def zeroed_and_cut(
    model: nn.Module, example: Example, groups: list[Group], seed: int
) -> tuple[float, float]:
    """Difference of zeroed and cut on any batch, and of zeroed and the model as it was."""
    random = torch.Generator().manual_seed(seed)
    other, cuts = deep_copy(model), []
    for group in groups:
        uniform = int(torch.randint(group.least, group.size, (), generator=random))
        count = (uniform, group.least, 2 ** (uniform.bit_length() - 1), uniform)[seed % 4]
        count = max(count, group.least)
        order = torch.randperm(group.size, generator=random).tolist()
        zero_channels(other, group, order[count:])
        cuts.append(group.cut(order[:count]))
    examples = [example, *other_examples(other, example)]
    zeroed = [outputs(other, each) for each in examples]
    surgery.apply(other, cuts, example=example)
    wrong = max(difference(a, outputs(other, b)) for a, b in zip(zeroed, examples, strict=True))
    return wrong, difference(zeroed[0], outputs(model, example))


def other_examples(model: nn.Module, example: Example) -> Iterator[Example]:
    """Other batches that the model accepts: of other sizes, another number of samples."""
    for batch in other_batches(example.batch):
        another = dataclasses.replace(example, batch=batch)
        try:
            outputs(model, another)
        except (RuntimeError, ValueError, IndexError, AssertionError):
            continue
        yield another


def merge_difference(model: nn.Module, example: Example, group: Group) -> float:
    """Difference that merging pairs of equal channels of a group makes."""
    twins, half = deep_copy(model), group.size // 2
    clusters = [[channel, channel + half] for channel in range(half)]
    clusters += [[group.size - 1]] if group.size % 2 else []
    carry_out(equals(twins, group, clusters))
    before = outputs(twins, example)
    surgery.apply(twins, [group.merge(clusters)], example=example)
    return difference(before, outputs(twins, example))


def check_labels(structure: Structure, model: nn.Module, example: Example) -> None:
    """The labels alone say the same of every group, but for what only a trial can find.

    A group that a rule promises too much of would be frozen by the trial, and nobody would notice.
    """
    alone = {group.name: group for group in analyze(model, example, trial=False).groups}
    for group in structure.groups:
        if TRIED in group.zero_reason + group.duplicate_reason:
            continue
        labelled = alone[group.name]
        assert (labelled.size, labelled.zero_reason) == (group.size, group.zero_reason)
        assert labelled.duplicate_reason == group.duplicate_reason


def prunable(structure: Structure) -> list[Group]:
    """Groups whose zero channels can go."""
    return [group for group in structure.groups if group.exact_zero]
