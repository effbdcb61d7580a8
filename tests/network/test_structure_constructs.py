"""One small network for every construct that users write: what is cut, and what stays and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from slimcli.network.structure import analyze

from .paired import Between
from .proving import EXACT, check_labels, merge_difference, prepared, prunable, zeroed_and_cut
from .structures import Net, conv, conv_bn, image


class ChannelsLast(Between):
    def between(self, x: Tensor) -> Tensor:
        return super().between(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Words(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.words, self.place = kind(20, 16), nn.Parameter(torch.randn(1, 16))
        self.a, self.head = nn.Linear(16, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.a(F.relu(self.words(x)) * self.place)))


class Einsum(Net):
    def __init__(self) -> None:
        super().__init__(12)
        self.first, self.last = nn.Parameter(torch.randn(10, 8)), nn.Parameter(torch.randn(12, 16))
        self.a = conv_bn(10, 16)

    def body(self, x: Tensor) -> Tensor:
        x = self.a(F.relu(torch.einsum("nchw,oc->nohw", x, self.first)))
        return torch.einsum("nchw,oc->nohw", x, self.last)


class ShiftedWindows(Net):
    def __init__(self) -> None:
        super().__init__(12)
        self.a, self.b = conv_bn(8, 16), conv_bn(16, 12)
        self.wide, self.narrow = nn.Linear(16, 20), nn.Linear(20, 16)

    def body(self, x: Tensor) -> Tensor:
        x = self.a(x).roll((1, 1), (2, 3))
        n, c, h, w = x.shape
        parts = x.view(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, c)
        parts = parts + self.narrow(F.gelu(self.wide(parts)))
        parts = parts.view(n, h // 4, w // 4, 4, 4, c).permute(0, 5, 1, 3, 2, 4)
        return self.b(parts.reshape(n, c, h, w).roll((-1, -1), (2, 3)))


class SelectiveKernel(Net):
    """Two branches, stacked, weighed by a softmax over the branches."""

    def __init__(self) -> None:
        super().__init__(12)
        self.a, self.b, self.c = conv_bn(8, 16), conv_bn(8, 16, 1), conv_bn(16, 12)

    def body(self, x: Tensor) -> Tensor:
        both = torch.stack([self.a(x), self.b(x)], 1)
        return self.c((both * both.mean((3, 4), keepdim=True).softmax(1)).sum(1))


class Gram(Net):
    """Attention between positions, without weights: activations times activations."""

    def __init__(self) -> None:
        super().__init__(12)
        self.a, self.b, self.c = conv_bn(8, 16), conv_bn(8, 16), conv_bn(16, 12)

    def body(self, x: Tensor) -> Tensor:
        left, right = self.a(x), self.b(x)
        weights = (left.flatten(2).transpose(1, 2) @ right.flatten(2) / 16).softmax(-1)
        return self.c((right.flatten(2) @ weights).view_as(right))


class TalkingHeads(Net):
    """A softmax over positions makes one over n of a zero; larger images have another n."""

    def __init__(self) -> None:
        super().__init__(12)
        self.a, self.b, self.c = conv_bn(8, 16), nn.Conv2d(16, 8, 1), conv_bn(8, 12)

    def body(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.c(F.relu(self.b(x.flatten(2).softmax(-1).view_as(x))))


class UnitLength(Net):
    """Channels of length one: zeros add nothing to the length."""

    def __init__(self) -> None:
        super().__init__(12)
        self.a, self.b = conv_bn(8, 16), conv_bn(16, 12)

    def body(self, x: Tensor) -> Tensor:
        return self.b(F.normalize(self.a(x), dim=1))


class FixedExpansion(UnitLength):
    """The same, for a number of channels that stands in the code."""

    def body(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x / x.norm(dim=1, keepdim=True).expand(-1, 16, -1, -1))


class PositionBias(Net):
    """A small network on a buffer of coordinates makes a bias for each channel and position."""

    def __init__(self) -> None:
        super().__init__(12)
        self.register_buffer("places", torch.rand(16, 16, 2))
        self.a, self.b = conv_bn(8, 16), conv_bn(16, 12)
        self.wide, self.narrow = nn.Linear(2, 20), nn.Linear(20, 16)

    def body(self, x: Tensor) -> Tensor:
        bias = self.narrow(F.relu(self.wide(self.places)))
        return self.b(self.a(x) + bias.permute(2, 0, 1))


class Windows(Net):
    """Overlapping windows, each averaged."""

    def __init__(self) -> None:
        super().__init__(12)
        self.a, self.b = conv_bn(8, 16), conv_bn(16, 12)

    def body(self, x: Tensor) -> Tensor:
        windows = F.pad(self.a(x), (1, 1, 1, 1)).unfold(2, 4, 2).unfold(3, 4, 2)
        return self.b(windows.mean((4, 5)))


class Sums(Net):
    """Running sums along the image, of logarithms or not."""

    def __init__(self, of_logarithms: bool) -> None:
        super().__init__(12)
        self.a, self.b, self.of_logarithms = conv_bn(8, 16), conv_bn(16, 12), of_logarithms

    def body(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x.logcumsumexp(3) if self.of_logarithms else x.cumsum(3) / 16)


class Regions(Net):
    """Boxes of two levels, put together by index into a tensor of one number."""

    def __init__(
        self, base: float, written: float | None = None, before: float | None = None
    ) -> None:
        super().__init__(12)
        self.a, self.b = conv_bn(8, 16), conv_bn(16, 12)
        self.base, self.written, self.before = base, written, before
        self.register_buffer("boxes", torch.tensor([[0.0, -3, 2, 9, 9], [1.0, 4, 4, 15, 19]]))

    def body(self, x: Tensor) -> Tensor:
        x = self.a(x)
        shape = (4, x.shape[1], 5, 5)
        found = x.new_zeros(shape) if self.base == 0 else x.new_full(shape, self.base)
        if self.before is not None:
            found[:1] = self.before
        found[torch.tensor([0, 2])] = torchvision.ops.roi_align(x, self.boxes, 5)
        small = F.avg_pool2d(x, 2)
        found[torch.tensor([1, 3])] = torchvision.ops.roi_pool(small, self.boxes, 5, 0.5)
        if self.written is not None:
            found[torch.tensor([True, False, False, True])] = self.written
        return self.b(found)


class PadResize(Net):
    def __init__(self) -> None:
        super().__init__(12)
        self.a, self.b, self.c = conv_bn(8, 16), nn.Conv2d(16, 16, 3), conv_bn(16, 12)

    def body(self, x: Tensor) -> Tensor:
        x = self.b(F.pad(self.a(x), (1, 1, 1, 1)))
        small = F.interpolate(x[:, :, ::2, ::2], scale_factor=2.0, mode="bilinear")
        return self.c(F.pad(small[:, :, 1:, 1:], (1, 0, 1, 0), mode="reflect") + x)


@dataclasses.dataclass
class Prediction:
    scores: Tensor
    maps: list[Tensor]


class DataclassOutput(Net):
    def __init__(self) -> None:
        super().__init__(16)
        self.a, self.b = conv_bn(8, 12), conv_bn(12, 16)

    def forward(self, x: Tensor) -> Prediction:
        x = self.a(self.stem(x))
        return Prediction(self.head(self.b(x).mean((2, 3))), [x])


class DictOfImagesAndKinds(Net):
    def __init__(self) -> None:
        super().__init__(16)
        self.kinds, self.a = nn.Embedding(10, 8), conv_bn(8, 16)

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        kind = F.relu(self.kinds(inputs["kind"]))[:, :, None, None]
        return {"scores": self.head(self.a(self.stem(inputs["image"]) + kind).mean((2, 3)))}


class Signal(nn.Module):
    """One dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv1d(3, 8, 3, padding=1), nn.BatchNorm1d(8), conv1d()
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(F.relu(self.norm(self.a(x)))).mean(2))


def conv1d() -> nn.Sequential:
    return nn.Sequential(nn.ConvTranspose1d(8, 6, 2, stride=2), nn.ReLU())


class Volume(nn.Module):
    """Three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv3d(2, 8, 3, padding=1), nn.BatchNorm3d(8)
        self.b, self.c = nn.ConvTranspose3d(8, 6, 2, stride=2), nn.Conv3d(6, 6, 3, groups=6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.b(F.relu(self.norm(self.a(x))))).mean((2, 3, 4)))


class ShuffledPixels(Net):
    """Four channels with a constant each become one channel with four numbers."""

    def __init__(self) -> None:
        super().__init__(12)
        self.a, self.deep = conv(8, 16), conv(16, 16, groups=16, bias=False)
        self.norm, self.b = nn.BatchNorm2d(16), nn.Conv2d(4, 12, 1)

    def body(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.norm(self.deep(self.a(x))))
        return self.b(F.pixel_shuffle(x, 2))


def words() -> Tensor:
    return torch.randint(0, 20, (3, 6), generator=torch.Generator().manual_seed(0))


def images_and_kinds() -> dict[str, Tensor]:
    return {"image": image(), "kind": torch.tensor([1, 7])}


@dataclasses.dataclass(frozen=True)
class Case:
    """A network; groups whose zero channels go; groups that are merged only; reasons of others."""

    build: Callable[[], nn.Module]
    zero: list[str]
    merge: list[str] = dataclasses.field(default_factory=list)
    frozen: dict[str, str] = dataclasses.field(default_factory=dict)
    batch: Callable[[], Any] = image


LAYER_NORM = "layer norm measures statistics over channels"
CASES = {
    "embedding": Case(lambda: Words(nn.Embedding), ["words", "a"], batch=words),
    "bags of embeddings": Case(lambda: Words(nn.EmbeddingBag), ["words", "a"], batch=words),
    "einsum": Case(Einsum, ["first", "a.1", "last"]),
    "roll and windows": Case(ShiftedWindows, ["a.1", "wide", "b.1"]),
    "stack": Case(SelectiveKernel, ["a.1", "c.1"]),
    "matmul of activations": Case(Gram, ["b.1", "c.1"]),
    "talking heads": Case(TalkingHeads, ["b", "c.1"], ["a.1"]),
    "unit length": Case(UnitLength, ["a.1", "b.1"]),
    "expanded to a fixed size": Case(
        FixedExpansion, ["b.1"], frozen={"a.1": "expand(-1, 16, -1, -1)"}
    ),
    "a bias of positions": Case(PositionBias, ["wide", "narrow", "b.1"]),
    "windows": Case(Windows, ["a.1", "b.1"]),
    "running sums": Case(lambda: Sums(False), ["a.1", "b.1"]),
    "running sums of logarithms": Case(lambda: Sums(True), ["b.1"], ["a.1"]),
    "regions": Case(lambda: Regions(0.0), ["a.1", "b.1"]),
    "regions and zeros by mask": Case(lambda: Regions(0.0, 0.0), ["a.1", "b.1"]),
    "regions and ones by mask": Case(lambda: Regions(0.0, 1.0), ["b.1"], ["a.1"]),
    "regions among ones": Case(lambda: Regions(1.0), ["b.1"], ["a.1"]),
    "regions beside ones": Case(lambda: Regions(0.0, before=1.0), ["b.1"], ["a.1"]),
    "pad and resize": Case(PadResize, ["a.1", "b", "c.1"]),
    "dataclass output": Case(DataclassOutput, ["b.1"], frozen={"a.1": "an output of the model"}),
    "dict of integers": Case(DictOfImagesAndKinds, ["kinds", "a.1"], batch=images_and_kinds),
    "one dimension": Case(Signal, ["norm", "b.0"], batch=lambda: torch.randn(2, 3, 12)),
    "three dimensions": Case(Volume, ["norm", "b"], batch=lambda: torch.randn(2, 2, 6, 6, 6)),
    "instance norm": Case(lambda: Between(nn.InstanceNorm2d(16)), ["a", "b.1"]),
    "instance norm with a shift": Case(
        lambda: Between(nn.InstanceNorm2d(16, affine=True)), ["b.1"], ["a"]
    ),
    "norm of single channels": Case(lambda: Between(nn.GroupNorm(16, 16)), ["b.1"], ["a"]),
    "layer norm": Case(
        lambda: Between(nn.LayerNorm((16, 16, 16))), ["b.1"], frozen={"a": LAYER_NORM}
    ),
    "layer norm, channels last": Case(
        lambda: ChannelsLast(nn.LayerNorm(16)), ["b.1"], frozen={"a": LAYER_NORM}
    ),
    "rms norm": Case(
        lambda: ChannelsLast(nn.RMSNorm(16)), ["b.1"], frozen={"a": "mean over channels"}
    ),
    "response norm": Case(
        lambda: Between(nn.LocalResponseNorm(3)), ["b.1"], frozen={"a": "avg_pool3d along an axis"}
    ),
    "channel shuffle": Case(lambda: Between(nn.ChannelShuffle(4)), ["a", "b.1"]),
    "pixel unshuffle": Case(lambda: Between(nn.PixelUnshuffle(2), width=64), ["a", "b.1"]),
    "glu": Case(lambda: Between(nn.GLU(1), width=8), ["a", "b.1"]),
    "several constants": Case(ShuffledPixels, ["b"], ["a"]),
}


@pytest.mark.parametrize("name", CASES)
def test_groups_are_cut_merged_or_frozen_as_the_table_says(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model, example = prepared(case.build(), case.batch())
    structure = analyze(model, example)
    assert structure.notes == ()
    check_labels(structure, model, example)
    others = {group.name for group in structure.groups} - {"stem.1", "head"}
    assert [g.name for g in prunable(structure) if g.name != "stem.1"] == case.zero
    assert [g.name for g in structure.groups if g.is_prunable and not g.exact_zero] == case.merge
    assert others == {*case.zero, *case.merge, *case.frozen}
    for group, reason in case.frozen.items():
        assert reason in structure.group(group).frozen_reason
    for seed in range(3):
        assert zeroed_and_cut(model, example, prunable(structure), seed)[0] <= EXACT


@pytest.mark.parametrize("name", CASES)
def test_merging_equal_channels_changes_nothing_where_it_is_promised(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model, example = prepared(case.build(), case.batch())
    for group in analyze(model, example).groups:
        if group.exact_duplicate:
            assert merge_difference(model, example, group) <= EXACT
