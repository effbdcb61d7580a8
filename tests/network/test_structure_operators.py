"""Single operators that had no rule, or the wrong one: what may be cut before and behind them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from slimcli.network import surgery
from slimcli.network.example import Example
from slimcli.network.structure import Group, analyze

from . import structures
from .paired import Between, proven
from .proving import network, prepared, prunable

Wrap = Callable[[nn.Module], nn.Module]


DROPOUTS = [
    nn.Dropout(0.3),
    nn.Dropout2d(0.3),
    torchvision.ops.StochasticDepth(0.3, "row"),
    torchvision.ops.StochasticDepth(0.3, "batch"),
    timm.layers.DropPath(0.3),
]


@pytest.mark.parametrize("layer", DROPOUTS, ids=lambda layer: type(layer).__name__)
def test_dropout_of_any_kind_stops_no_cut(layer: nn.Module) -> None:
    structure = proven(Between(layer))
    assert [group.name for group in prunable(structure)] == ["stem.1", "a", "b.1"]


@pytest.mark.parametrize("layer", [nn.AlphaDropout(0.3), nn.FeatureAlphaDropout(0.3)])
def test_dropout_that_puts_noise_in_place_of_zeros_leaves_merging_only(layer: nn.Module) -> None:
    group = proven(Between(layer)).group("a")
    assert (group.exact_zero, group.exact_duplicate) == (False, True)
    assert group.zero_reason == "a removed channel would not be zero where b.0 reads it"


class Deformable(structures.Net):
    """A conv whose places of reading come from another conv."""

    def __init__(self, groups: int, offset_groups: int, bias: bool) -> None:
        super().__init__(12)
        self.a, self.b = structures.conv_bn(8, 16), structures.conv_bn(16, 12)
        self.offset = nn.Conv2d(8, 18 * offset_groups, 3, padding=1)
        self.mask = nn.Conv2d(8, 9 * offset_groups, 3, padding=1)
        self.deform = torchvision.ops.DeformConv2d(16, 16, 3, 1, 1, groups=groups, bias=bias)

    def body(self, x: Tensor) -> Tensor:
        offset, mask = self.offset(x), torch.sigmoid(self.mask(x))
        return self.b(F.relu(self.deform(F.relu(self.a(x)), offset, mask)))


@pytest.mark.parametrize(
    ("groups", "offset_groups", "bias"), [(1, 1, True), (1, 4, False), (2, 2, True), (4, 1, False)]
)
def test_deformable_convs_are_cut(groups: int, offset_groups: int, bias: bool) -> None:
    structure = proven(Deformable(groups, offset_groups, bias))
    sizes = {group.name: group.size for group in prunable(structure)}
    assert sizes.pop("stem.1") == 8
    assert sizes == {
        "a.1": 16 // max(groups, offset_groups),
        "deform.weight": 16 // groups,
        "b.1": 12,
    }
    assert "sampling positions" in structure.group("offset").frozen_reason
    assert "sampling positions" in structure.group("mask").frozen_reason


def test_a_deformable_conv_knows_its_new_sizes() -> None:
    torch.manual_seed(0)
    model, example = prepared(Deformable(2, 1, bias=True), structures.image())
    structure = analyze(model, example)
    cuts = [structure.group(name).cut(range(4)) for name in ("a.1", "deform.weight")]
    surgery.apply(model, cuts, example=example)
    layer = model.deform
    assert (layer.in_channels, layer.out_channels, layer.groups) == (8, 8, 2)


@pytest.mark.parametrize(("outputs", "groups"), [(8, 4), (12, 4), (16, 2)])
def test_transposed_convs_of_few_outputs_a_group_are_cut(outputs: int, groups: int) -> None:
    class Transposed(structures.Net):
        def __init__(self) -> None:
            super().__init__(12)
            self.a = nn.ConvTranspose2d(8, outputs, 2, groups=groups)
            self.b = structures.conv_bn(outputs, 12)

        def body(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x)))

    structure = proven(Transposed())
    sizes = {group.name: group.size for group in prunable(structure)}
    assert sizes == {"stem.1": 8 // groups, "a": outputs // groups, "b.1": 12}


@pytest.mark.parametrize(
    ("size", "stride", "is_even"), [(1, 1, True), (1, 2, False), (2, 1, False), (2, 2, False)]
)
def test_a_transposed_conv_takes_up_constants_if_it_answers_evenly(
    size: int, stride: int, is_even: bool
) -> None:
    class Sigmoid(structures.Net):
        def __init__(self) -> None:
            super().__init__(12)
            self.up = nn.ConvTranspose2d(8, 12, size, stride=stride)

        def body(self, x: Tensor) -> Tensor:
            return self.up(x.sigmoid())

    stem = proven(Sigmoid()).group("stem.1")
    assert (stem.exact_zero, bool(stem.constants)) == (is_even, is_even)


class Weights(structures.Net):
    """Two convs whose weights are computed on the way."""

    def __init__(self, wrap: Wrap) -> None:
        super().__init__(12)
        self.a, self.b = wrap(structures.conv(8, 16)), wrap(structures.conv(16, 12))
        self.c = structures.conv_bn(12, 12)

    def body(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


def standardized(kind: type[nn.Module]) -> Wrap:
    return lambda layer: kind(layer.in_channels, layer.out_channels, 3, padding=1)


COMPUTED: list[tuple[str, Wrap, str, list[str]]] = [
    ("weight norm", parametrizations.weight_norm, "weight norm measures the length", ["b"]),
    ("spectral norm", parametrizations.spectral_norm, "a product with a vector (mv) sums", []),
    ("old spectral norm", nn.utils.spectral_norm, "a product with a vector (mv) sums", []),
    ("standardized", standardized(timm.layers.StdConv2d), "a norm measures statistics", ["b"]),
    ("scaled", standardized(timm.layers.ScaledStdConv2d), "a norm measures statistics", ["b"]),
]


@pytest.mark.parametrize(("name", "wrap", "reason", "cut"), COMPUTED, ids=[c[0] for c in COMPUTED])
def test_weights_that_are_computed_are_cut_or_frozen_with_the_reason(
    name: str, wrap: Wrap, reason: str, cut: list[str]
) -> None:
    structure = proven(Weights(wrap))
    assert [group.name for group in prunable(structure)] == [*cut, "c.1"]
    rows = {row.name: row for row in structure.layers}
    assert list(rows) == ["stem.0", "a", "b", "c.0", "head"]
    assert (rows["a"].channels, rows["b"].channels) == (16, 12)
    assert rows["stem.0"].frozen_reason.startswith(reason)
    assert rows["a"].frozen_reason.startswith(reason)


def test_a_filter_with_weight_norm_is_zero_by_its_gain() -> None:
    structure = proven(Weights(parametrizations.weight_norm))
    group = structure.group("b")
    gain, direction = "b.parametrizations.weight.original0", "b.parametrizations.weight.original1"
    assert tensors(group) == ["b.bias", gain]
    assert [slot.tensor for slot in group.followers] == [direction]


def test_a_layer_whose_weight_tells_nothing_is_in_the_table() -> None:
    class Sorted(structures.Net):
        def __init__(self) -> None:
            super().__init__(12)
            self.a, self.b = SortedConv(8, 16, 3, padding=1), structures.conv_bn(16, 12)

        def body(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    structure = proven(Sorted())
    row = next(row for row in structure.layers if row.name == "a")
    assert (row.type, row.channels, row.group) == ("SortedConv", 16, "")
    assert "computed in a way that tells nothing about its channels" in row.frozen_reason
    assert [group.name for group in prunable(structure)] == ["b.1"]


class SortedConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.sort(0).values.sort(1).values
        return F.conv2d(input, weight, self.bias, padding=self.padding)


class Tokens(nn.Module):
    """Linear layers over the last axis of three; the transpose leaves no rows in memory."""

    def __init__(self, is_turned: bool) -> None:
        super().__init__()
        self.is_turned = is_turned
        self.a, self.b, self.head = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x.transpose(0, 1) if self.is_turned else x))
        return self.head(F.relu(self.b(x)))


@pytest.mark.parametrize("is_turned", [False, True])
def test_linear_layers_over_tokens_leave_no_constants(is_turned: bool) -> None:
    structure = proven(Tokens(is_turned), torch.randn(3, 6, 8))
    groups = prunable(structure)
    assert [group.name for group in groups] == ["a", "b"]
    assert [group.constants for group in groups] == [(), ()]
    assert [tensors(group) for group in groups] == [["a.bias", "a.weight"], ["b.bias", "b.weight"]]
    assert all(group.is_linear for group in groups)


class Attention(nn.Module):
    """Four heads of whatever size, fused; the scale is given or depends on that size."""

    def __init__(self, scale: float | None) -> None:
        super().__init__()
        self.scale = scale
        self.query, self.key, self.value = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(8, 16)
        self.out, self.head = nn.Linear(16, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, _ = x.shape
        layers = (self.query, self.key, self.value)
        parts = (layer(x).view(n, tokens, 4, -1).transpose(1, 2) for layer in layers)
        mixed = F.scaled_dot_product_attention(*parts, scale=self.scale)
        return self.head(self.out(mixed.transpose(1, 2).reshape(n, tokens, -1)))


def test_heads_get_narrower_only_where_the_scale_does_not_depend_on_them() -> None:
    structure = proven(Attention(0.5), torch.randn(2, 6, 8))
    assert [(g.name, g.size) for g in prunable(structure)] == [
        ("query", 4),
        ("value", 4),
        ("out", 8),
    ]
    assert not structure.group("query").exact_duplicate
    structure = proven(Attention(None), torch.randn(2, 6, 8))
    reason = structure.group("query").frozen_reason
    assert [group.name for group in prunable(structure)] == ["value", "out"]
    assert reason.startswith("attention scales by the size of a head at ")
    assert "F.scaled_dot_product_attention(*parts, scale=self.scale)" in reason


def test_heads_whose_number_or_size_is_fixed_in_the_code_are_frozen_with_the_line() -> None:
    blocks = torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=5)
    structure = proven(blocks, torch.randn(2, 3, 32, 32))
    prefix = "encoder.layers.encoder_layer_"
    assert [g.name for g in prunable(structure)] == [f"{prefix}{n}.mlp.0" for n in (0, 1)]
    swin = torchvision.models.SwinTransformer(
        [4, 4], 24, [2, 2], [3, 6], [4, 4], num_classes=5, stochastic_depth_prob=0.0
    )
    structure = proven(swin, torch.randn(2, 3, 32, 32))
    assert [group.name for group in prunable(structure)] == [
        *("features.1.0.mlp.0", "features.1.1.mlp.0", "features.3.0.mlp.0", "features.3.1.mlp.0")
    ]
    qkv = next(row for row in structure.layers if row.name == "features.1.0.attn.qkv.weight")
    assert qkv.group == "features.0.0"  # shaped with the width of the layer's input
    assert "layer norm measures statistics over channels" in qkv.frozen_reason


def tensors(group: Group) -> list[str]:
    return sorted(slot.tensor for slot in group.producers)


def test_pooling_to_a_pixel_in_channels_last_keeps_its_channels() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    ).to(dtype=torch.float64, memory_format=torch.channels_last)
    batch = torch.randn(2, 3, 8, 8, dtype=torch.float64).to(memory_format=torch.channels_last)
    structure = analyze(model, Example(batch, lambda network, data: network(data)))
    assert next((each.name, each.zero_reason) for each in structure.groups) == ("0", "")


def test_memory_that_is_read_in_another_order_freezes() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 1), nn.Linear(8 * 64, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x).clone()
            y.as_strided_((2, 8, 8, 8), (512, 1, 64, 8))
            return self.last(y.flatten(1))

    example = Example(torch.rand(2, 3, 8, 8), lambda network, data: network(data))
    first = analyze(Transposed(), example).groups[0]
    assert first.frozen_reason.startswith("as_strided reads memory in an order of its own at ")


class Whole(nn.Module):
    """Its forward runs in inference mode, in which torch takes no operator apart."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 5)

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        y = F.selu(self.a(x).flatten(0, 1).clip(-1, 1)).unflatten(0, x.shape[:2])
        left, right = self.b(y).movedim(1, 2).contiguous().reshape(2, -1, 2, 3).chunk(2, 3)
        return self.head(F.max_pool2d(left, (1, 2)).flatten(2).mean(2) * right.mean((2, 3)))


def test_operators_that_arrive_whole_in_inference_mode_are_followed() -> None:
    torch.manual_seed(0)
    structure = proven(Whole(), torch.randn(2, 6, 8))
    assert [group.name for group in prunable(structure)] == ["a", "b"]


@pytest.mark.parametrize("name", structures.NETWORKS)
def test_a_forward_in_inference_mode_has_the_same_groups(name: str) -> None:
    model, example, structure = network(name)

    def predict(net: nn.Module, batch: Any) -> Any:
        with torch.inference_mode():
            return example.predict(net, batch)

    other = analyze(model, Example(example.batch, predict))
    known = [(group.name, group.size, group.exact_zero) for group in structure.groups]
    assert [(group.name, group.size, group.exact_zero) for group in other.groups] == known


class Tag(torch.Tensor):
    """A tensor of a kind of its own, as libraries for images have."""


def test_a_batch_of_a_kind_of_the_users_is_followed() -> None:
    model, example, structure = network("SplitChunk")
    tagged = Example(example.batch.as_subclass(Tag), example.predict)
    sizes = [(group.size, group.exact_zero) for group in structure.groups]
    assert [(g.size, g.exact_zero) for g in analyze(model, tagged).groups] == sizes
