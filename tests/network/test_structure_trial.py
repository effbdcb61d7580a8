"""The trial cut itself: widths that code compares, double precision throughout, merging, rounds."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimcli.network.example import Example
from slimcli.network.structure import analyze, assemble, search
from slimcli.network.structure.precision import Widened, copy_as
from slimcli.network.structure.record import Record
from slimcli.network.structure.shapes import Length
from slimcli.network.structure.sources import Sources

from . import structures
from .proving import EXACT, call, merge_difference, prepared, prunable, zeroed_and_cut


class Matching(structures.Net):
    """A residual that is added only where the widths happen to be equal."""

    def __init__(self, is_equal: Callable[[Tensor, Tensor], bool]) -> None:
        super().__init__(24)
        self.a, self.b = structures.conv_bn(8, 16), structures.conv_bn(16, 24)
        self.inner = structures.conv_bn(16, 12)
        self.outer = structures.conv_bn(12, 16)
        self.is_equal = is_equal

    def body(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = y + x if self.is_equal(x, y) else y
        z = self.outer(self.inner(y))
        y = z + y if self.is_equal(z, y) else z
        z = self.b(y)
        return z + y if self.is_equal(y, z) else z


COMPARISONS = {
    "shapes": lambda x, y: x.shape == y.shape,
    "sizes": lambda x, y: 1 - (x.size(1) != y.size(dim=1)),
    "order": lambda x, y: x.shape[1] >= y.shape[1] and y.size()[1] >= x.size()[1],
    "slices": lambda x, y: x.shape[:2] == y.shape[:2],
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_widths_that_code_compares_never_become_equal(name: str) -> None:
    torch.manual_seed(0)
    model, example = prepared(Matching(COMPARISONS[name]), structures.image())
    structure = analyze(model, example)
    assert [group.name for group in prunable(structure)] == ["stem.1", "inner.1"]
    reason = structure.group("b.1").frozen_reason
    assert reason.startswith("its width is compared with another at network/test_structure_trial")


def test_equal_widths_that_code_compares_stay_equal() -> None:
    class Asserting(structures.Net):
        def __init__(self) -> None:
            super().__init__(24)
            self.a, self.b = structures.conv_bn(8, 12), structures.conv_bn(8, 12)

        def body(self, x: Tensor) -> Tensor:
            left, right = self.a(x), self.b(x)
            assert left.shape == right.shape
            return torch.cat([left, right], 1)

    torch.manual_seed(0)
    model, example = prepared(Asserting(), structures.image())
    groups = prunable(analyze(model, example))
    assert [(group.name, group.size) for group in groups] == [("stem.1", 8), ("a.1", 12)]
    assert zeroed_and_cut(model, example, groups, 0)[0] <= EXACT


def test_comparing_the_sizes_of_images_freezes_nothing() -> None:
    class Resized(structures.Chain):
        def body(self, x: Tensor) -> Tensor:
            y = self.a(F.max_pool2d(x, 2))
            if y.shape[-2:] != x.shape[-2:] or y.size(0) < x.size(0):
                y = F.interpolate(y, x.shape[2:])
            return self.b(y)

    model, example = prepared(Resized(), structures.image())
    assert [group.name for group in prunable(analyze(model, example))] == ["stem.1", "a.1", "b.1"]


def length_of(record: Record, first_label: int) -> Length:
    length = Length(4)
    length.record, length.labels = record, np.arange(first_label, first_label + 4)
    return length


def test_a_size_that_code_kept_from_another_trace_is_a_plain_number() -> None:
    records = [Record(Sources(nn.Linear(4, 4))) for _ in range(2)]
    assert length_of(records[0], 1) == length_of(records[1], 5)
    assert [record.edges for record in records] == [[], []]
    assert length_of(records[0], 1) == length_of(records[0], 5)
    assert [pair.tolist() for pair in records[0].edges[0]] == [[1, 2, 3, 4], [5, 6, 7, 8]]


class HalfWay(structures.Net):
    """Attention in float32, whatever the model is in, faint beside what it is added to."""

    def __init__(self) -> None:
        super().__init__(8)
        self.query, self.key = nn.Conv2d(8, 12, 1), nn.Conv2d(8, 12, 1)
        self.gain = nn.Parameter(torch.full((8, 1, 1), 1e-3))

    def body(self, x: Tensor) -> Tensor:
        query, key = self.query(x.float()).flatten(2), self.key(x.float()).flatten(2)
        weights = (query.transpose(1, 2) @ key / math.sqrt(key.shape[1])).softmax(-1)
        attended = x.flatten(2).float() @ weights.transpose(1, 2)
        ones = torch.ones(1, dtype=torch.float32) + torch.zeros(1)
        return x + attended.view(x.shape).to(x.dtype) * self.gain * ones


def test_code_that_casts_to_float32_is_tried_in_float64() -> None:
    torch.manual_seed(0)
    model, example = HalfWay(), Example(structures.image().float(), call)
    structure = analyze(model, example)
    assert structure.notes == ()
    assert "zeroed and cut differ" in structure.group("query").frozen_reason
    assert structure.group("stem.1").exact_zero


def test_constants_are_measured_in_float64_too() -> None:
    class Shifted(structures.Net):
        def __init__(self) -> None:
            super().__init__(12)
            self.a, self.norm = structures.conv(8, 16), nn.BatchNorm2d(16)
            self.b = nn.Conv2d(16, 12, 2, stride=2)

        def body(self, x: Tensor) -> Tensor:
            return self.b(self.norm(F.relu(self.a(x.float()))))

    torch.manual_seed(0)
    structure = analyze(Shifted(), Example(structures.image().float(), call))
    assert structure.notes == ()
    assert [path for path, _ in structure.group("a").constants] == ["b"]


def test_everything_made_while_widened_is_double() -> None:
    with Widened():
        made = torch.zeros(2), torch.ones(2, dtype=torch.float16), torch.ones(2).to(torch.bfloat16)
        assert {each.dtype for each in made} == {torch.float64}
        assert torch.ones(2, dtype=torch.complex64).dtype == torch.complex128
        assert torch.arange(3).dtype == torch.int64
    assert torch.zeros(2).dtype == torch.float32


def test_a_copy_in_double_keeps_the_imaginary_parts() -> None:
    model = nn.Linear(3, 2)
    model.filter = nn.Parameter(torch.randn(4, dtype=torch.complex64))
    model.register_buffer("window", torch.randn(4, dtype=torch.complex64))
    twin = copy_as(model, torch.float64)
    assert (twin.weight.dtype, twin.filter.dtype) == (torch.float64, torch.complex128)
    assert torch.equal(twin.filter, model.filter.to(torch.complex128))
    assert torch.equal(twin.window, model.window.to(torch.complex128))


class AbsoluteWeight(structures.Net):
    def __init__(self) -> None:
        super().__init__(12)
        self.a, self.kernel = structures.conv_bn(8, 16), nn.Parameter(torch.randn(12, 16, 3, 3))

    def body(self, x: Tensor) -> Tensor:
        return F.conv2d(self.a(x), self.kernel.abs(), padding=1)


def test_a_merge_that_the_rules_wrongly_promise_fails_the_trial(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(assemble, "_not_additive", lambda *arguments: "")
    torch.manual_seed(0)
    model, example = prepared(AbsoluteWeight(), structures.image())
    structure = analyze(model, example)
    group = structure.group("a.1")
    assert (group.exact_zero, group.exact_duplicate) == (True, False)
    assert group.duplicate_reason.startswith("equal channels were merged for trial: zeroed and cut")
    others = [each for each in structure.groups if each.exact_duplicate]
    assert [each.name for each in others] == ["stem.1", "kernel"]
    assert all(merge_difference(model, example, each) <= EXACT for each in others)


def test_many_lines_of_fixed_numbers_do_not_use_up_the_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(search, "PATIENCE", 1)
    monkeypatch.setattr(search, "MAX_ROUNDS", 3)

    class Fixed(structures.Net):
        def __init__(self) -> None:
            super().__init__(12)
            self.a, self.b = structures.conv_bn(8, 16), structures.conv_bn(16, 12)
            self.c, self.d = structures.conv_bn(12, 10), structures.conv_bn(10, 14)
            self.e, self.f = structures.conv_bn(14, 9), structures.conv_bn(9, 12)

        def body(self, x: Tensor) -> Tensor:
            x = self.a(x).view(2, 16, 256)
            x = self.b(x.view(2, -1, 16, 16)).view(2, 12, 256)
            x = self.c(x.view(2, -1, 16, 16)).view(2, 10, 256)
            x = self.d(x.view(2, -1, 16, 16)).view(2, 14, 256)
            x = self.e(x.view(2, -1, 16, 16)).view(2, 9, 256)
            return self.f(x.view(2, -1, 16, 16))

    model, example = prepared(Fixed(), structures.image())
    assert [group.name for group in prunable(analyze(model, example))] == ["stem.1", "f.1"]
