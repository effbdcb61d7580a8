"""Random networks of all constructs: zeroed or equalized equals cut, whatever the graph."""

from __future__ import annotations

import copy
import os
import random
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from slimcli.network import surgery
from slimcli.network.example import Example
from slimcli.network.structure import analyze, zero_channels
from slimcli.network.structure.edits import carry_out, equals
from slimcli.network.structure.unequal import unequal

EXACT = 1e-10
"""Relative to the largest output, float64: rounding was seen up to 1e-13."""
NETWORKS = int(os.environ.get("SLIM_RANDOM_NETWORKS", "25"))
"""In the suite; the full count is 500 (about eight minutes)."""


class RandomNet(nn.Module):
    """A stack of random steps on a list of feature maps of one size."""

    def __init__(self, seed: int, steps: int) -> None:
        super().__init__()
        self.choose = random.Random(seed)
        self.layers = nn.ModuleDict()
        self.scales = nn.ParameterDict()
        self.program: list[tuple[str, list[int], str]] = []
        self.widths = [8]
        self.add("stem", nn.Conv2d(3, 8, 3, padding=1))
        for number in range(steps):
            getattr(self, "plan_" + self.choose.choice(KINDS))(f"s{number}")
        self.places = self.choose.choice([1, 9])
        self.add("head", nn.Linear(self.widths[-1] * self.places, 4))

    def add(self, name: str, layer: nn.Module) -> None:
        self.layers[name] = layer

    def plan(self, kind: str, sources: list[int], name: str, width: int) -> None:
        self.program.append((kind, sources, name))
        self.widths.append(width)

    def pick(self, multiple: int = 1) -> int:
        fitting = [i for i, width in enumerate(self.widths) if width % multiple == 0]
        return self.choose.choice(fitting)

    def plan_conv(self, name: str) -> None:
        source, width = self.pick(), self.choose.choice([4, 6, 8, 12])
        size, bias = self.choose.choice([1, 3]), self.choose.random() < 0.5
        layer = nn.Conv2d(self.widths[source], width, size, padding=size // 2, bias=bias)
        norm = nn.BatchNorm2d(width) if self.choose.random() < 0.7 else nn.Identity()
        act = self.choose.choice([nn.ReLU(), nn.Hardswish(), nn.Sigmoid(), nn.GELU()])
        self.add(name, nn.Sequential(layer, norm, act))
        self.plan("layer", [source], name, width)

    def plan_depthwise(self, name: str) -> None:
        source = self.pick()
        width = self.widths[source]
        layer = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.add(name, nn.Sequential(layer, nn.BatchNorm2d(width), nn.ReLU()))
        self.plan("layer", [source], name, width)

    def plan_grouped(self, name: str) -> None:
        source = self.pick(2)
        width = self.widths[source]
        self.add(name, nn.Conv2d(width, 2 * width, 3, padding=1, groups=2))
        self.plan("layer", [source], name, 2 * width)

    def plan_add(self, name: str) -> None:
        left = self.pick()
        same = [i for i, width in enumerate(self.widths) if width == self.widths[left]]
        self.plan("add", [left, self.choose.choice(same)], name, self.widths[left])

    def plan_mul(self, name: str) -> None:
        left = self.pick()
        same = [i for i, width in enumerate(self.widths) if width == self.widths[left]]
        self.plan("mul", [left, self.choose.choice(same)], name, self.widths[left])

    def plan_cat(self, name: str) -> None:
        left, right = self.pick(), self.pick()
        self.plan("cat", [left, right], name, self.widths[left] + self.widths[right])

    def plan_halves(self, name: str) -> None:
        source = self.pick(2)
        self.plan("halves", [source], name, self.widths[source] // 2)

    def plan_shuffle(self, name: str) -> None:
        source = self.pick(2)
        self.plan("shuffle", [source], name, self.widths[source])

    def plan_gate(self, name: str) -> None:
        source = self.pick()
        width = self.widths[source]
        self.add(name, nn.Sequential(nn.Linear(width, 4), nn.ReLU(), nn.Linear(4, width)))
        self.plan("gate", [source], name, width)

    def plan_norm(self, name: str) -> None:
        source = self.pick(2)
        self.add(name, nn.GroupNorm(2, self.widths[source]))
        self.plan("layer", [source], name, self.widths[source])

    def plan_pool(self, name: str) -> None:
        source = self.pick()
        self.add(name, self.choose.choice([nn.AvgPool2d, nn.MaxPool2d])(3, 1, 1))
        self.plan("layer", [source], name, self.widths[source])

    def plan_transposed(self, name: str) -> None:
        source = self.pick()
        layer = nn.ConvTranspose2d(self.widths[source], 6, 3, padding=1)
        self.add(name, nn.Sequential(layer, nn.BatchNorm2d(6), nn.ReLU()))
        self.plan("layer", [source], name, 6)

    def plan_per_channel(self, name: str) -> None:
        source = self.pick()
        width = self.widths[source]
        layers = [nn.PReLU(width), nn.Dropout2d(0.2), nn.Dropout(0.2), nn.GroupNorm(width, width)]
        layers += [nn.InstanceNorm2d(width, affine=True), nn.BatchNorm2d(width), nn.AlphaDropout()]
        self.add(name, self.choose.choice(layers))
        self.plan("layer", [source], name, width)

    def plan_movement(self, name: str) -> None:
        source = self.pick()
        kind = self.choose.choice(["roll", "pad", "resize", "windows", "stack"])
        self.plan(kind, [source], name, self.widths[source])

    def plan_pixels(self, name: str) -> None:
        source = self.pick(4)
        self.add(name, nn.Conv2d(self.widths[source] // 4, 3, 1))
        self.plan("pixels", [source], name, 12)

    def plan_channels_last(self, name: str) -> None:
        source = self.pick()
        width = self.widths[source]
        norm = nn.LayerNorm(width) if self.choose.random() < 0.3 else nn.Identity()
        self.add(name, nn.Sequential(norm, nn.Linear(width, 10), nn.GELU(), nn.Linear(10, width)))
        self.plan("channels_last", [source], name, width)

    def plan_shared(self, name: str) -> None:
        source = self.pick()
        width = self.widths[source]
        self.add(name, nn.Conv2d(width, width, 3, padding=1))
        self.plan("twice", [source], name, width)

    def plan_scale(self, name: str) -> None:
        source = self.pick()
        self.scales[name] = nn.Parameter(torch.rand(self.widths[source], 1, 1) + 0.5)
        self.plan("scale", [source], name, self.widths[source])

    def plan_einsum(self, name: str) -> None:
        source = self.pick()
        self.scales[name] = nn.Parameter(torch.randn(7, self.widths[source]))
        self.plan("einsum", [source], name, 7)

    def plan_affinity(self, name: str) -> None:
        source = self.pick()
        width = self.widths[source]
        self.add(name, nn.ModuleList([nn.Conv2d(width, 5, 1), nn.Conv2d(width, 5, 1)]))
        self.plan("affinity", [source], name, width)

    def plan_attention(self, name: str) -> None:
        source = self.pick()
        width = self.widths[source]
        self.add(name, nn.ModuleList([nn.Linear(width, 8) for _ in range(3)]))
        self.plan("attention", [source], name, 8)

    def plan_tied(self, name: str) -> None:
        source = self.pick()
        layers = nn.ModuleList([nn.Conv2d(self.widths[source], 6, 1) for _ in range(2)])
        layers[1].weight = layers[0].weight
        self.add(name, layers)
        self.plan("tied", [source], name, 6)

    def plan_glu(self, name: str) -> None:
        source = self.pick(2)
        self.plan("glu", [source], name, self.widths[source] // 2)

    def plan_reparametrized(self, name: str) -> None:
        source = self.pick()
        layer = nn.Conv2d(self.widths[source], 8, 3, padding=1)
        self.add(name, nn.utils.parametrizations.weight_norm(layer))
        self.plan("layer", [source], name, 8)

    def step(self, kind: str, inputs: list[Tensor], name: str) -> Tensor:
        if kind in STEPS:
            return STEPS[kind](*inputs)
        owned = self.scales[name] if name in self.scales else self.layers[name]
        return OWNING_STEPS[kind](owned, inputs[0])

    def forward(self, x: Tensor) -> Any:
        maps = [self.layers["stem"](x)]
        for kind, sources, name in self.program:
            maps.append(self.step(kind, [maps[source] for source in sources], name))
        last = F.adaptive_max_pool2d(maps[-1], 3 if self.places == 9 else 1)
        return self.layers["head"](last.flatten(1))


def halves(x: Tensor) -> Tensor:
    left, right = x.chunk(2, 1)
    return F.relu(left) + right


def shuffle(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def windows(x: Tensor) -> Tensor:
    """Windows of 3 x 3 and back, as Swin does."""
    n, c, h, w = x.shape
    parts = x.view(n, c, h // 3, 3, w // 3, 3).permute(0, 2, 4, 3, 5, 1).reshape(-1, 9, c)
    parts = parts - parts.mean(1, keepdim=True)
    return parts.view(n, h // 3, w // 3, 3, 3, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)


STEPS: dict[str, Any] = {
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "cat": lambda a, b: torch.cat([a, b], 1),
    "halves": halves,
    "shuffle": shuffle,
    "windows": windows,
    "roll": lambda x: x.roll(1, 3),
    "pad": lambda x: F.pad(x, (1, 1, 1, 1))[:, :, 1:-1, 1:-1] + F.pad(x[:, :, 1:], (0, 0, 1, 0)),
    "resize": lambda x: F.interpolate(x[:, :, ::2, ::2], size=x.shape[2:], mode="bilinear"),
    "glu": lambda x: F.glu(x, 1),
    "stack": lambda x: torch.stack([x, F.relu(x)]).amax(0),
}


def affinity(layers: Any, x: Tensor) -> Tensor:
    """Every position becomes a mean over positions that are like it."""
    query, key = (layer(x).flatten(2) for layer in layers)
    weights = (query.transpose(1, 2) @ key).softmax(-1)
    return (x.flatten(2) @ weights.transpose(1, 2)).view(x.shape[0], -1, *x.shape[2:])


def attention(layers: Any, x: Tensor) -> Tensor:
    """Two heads, fused; the scale is a number."""
    n, _, h, w = x.shape
    rows = x.flatten(2).transpose(1, 2)
    parts = (layer(rows).view(n, h * w, 2, -1).transpose(1, 2) for layer in layers)
    mixed = F.scaled_dot_product_attention(*parts, scale=0.5)
    return mixed.transpose(1, 2).permute(0, 2, 3, 1).reshape(n, -1, h, w)


OWNING_STEPS: dict[str, Any] = {
    "layer": lambda layer, x: layer(x),
    "twice": lambda layer, x: layer(F.relu(layer(x))),
    "scale": lambda scale, x: x * scale,
    "einsum": lambda weight, x: torch.einsum("nchw,oc->nohw", x, weight),
    "pixels": lambda layer, x: F.pixel_unshuffle(layer(F.pixel_shuffle(x, 2)), 2),
    "channels_last": lambda layer, x: layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    "gate": lambda layer, x: x * torch.sigmoid(layer(x.mean((2, 3))))[:, :, None, None],
    "tied": lambda layers, x: F.relu(layers[0](x)) + F.silu(layers[1](x)),
    "affinity": affinity,
    "attention": attention,
}
KINDS = [name[len("plan_") :] for name in vars(RandomNet) if name.startswith("plan_")]


@settings(
    max_examples=NETWORKS,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(seed=st.integers(0, 10**6), steps=st.integers(2, 9))
def test_any_network_is_cut_exactly_or_left_alone(seed: int, steps: int) -> None:
    torch.manual_seed(seed)
    model = RandomNet(seed, steps).double().eval()
    unequal(model, torch.Generator().manual_seed(seed))
    batch = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    example = Example(batch, lambda net, data: net(data))
    structure = analyze(model, example)
    assert structure.notes == ()
    choose = torch.Generator().manual_seed(seed)
    cuts = []
    for group in structure.groups:
        order = torch.randperm(group.size, generator=choose).tolist()
        keep = int(torch.randint(1, group.size, (), generator=choose)) if group.size > 1 else 1
        if group.is_prunable and (not group.exact_duplicate or (group.exact_zero and seed % 3)):
            zero_channels(model, group, order[keep:])
            cuts.append(group.cut(order[:keep]))
        elif group.is_prunable:
            clusters = sorted(sorted(order[start::keep]) for start in range(keep))
            carry_out(equals(model, group, clusters))
            cuts.append(group.merge(clusters))
    with torch.no_grad():
        before = model(batch)
        cut = copy.deepcopy(model)
        surgery.apply(cut, cuts, example=example)
        error = float((cut(batch) - before).abs().max() / before.abs().max().clamp_min(1e-30))
    assert error <= EXACT
