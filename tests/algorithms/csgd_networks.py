"""Small networks in which merged channels are read in every way there is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Flattened(nn.Module):
    """Two convs, then a Linear that reads 2 x 3 positions of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 10, 3, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(10)
        self.pool = nn.AdaptiveAvgPool2d((2, 3))
        self.fc = nn.Linear(60, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.fc(self.pool(x).flatten(1))


class Upsampling(nn.Module):
    """A transposed conv that reads merged channels and makes some."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.up = nn.ConvTranspose2d(12, 8, 4, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.out = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        return self.out(torch.relu(self.norm(self.up(x))))


class Depthwise(nn.Module):
    """Pointwise, depthwise with a bias, pointwise."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(3, 12, 1)
        self.norm1 = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.norm2 = nn.BatchNorm2d(12)
        self.project = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.silu(self.norm1(self.expand(x)))
        x = nn.functional.silu(self.norm2(self.depthwise(x)))
        return self.project(x)


class Concatenated(nn.Module):
    """Two producers side by side, one norm over both, so offsets count."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 6, 3, padding=1)
        self.right = nn.Conv2d(3, 10, 1)
        self.norm = nn.BatchNorm2d(16)
        self.join = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x), self.right(x)], 1)
        return self.join(torch.relu(self.norm(x)))


class Residual(nn.Module):
    """Stem and block output are one coupled group; the conv inside is another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.inner = nn.Conv2d(12, 8, 3, padding=1)
        self.inner_norm = nn.BatchNorm2d(8)
        self.outer = nn.Conv2d(8, 12, 3, padding=1)
        self.outer_norm = nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        y = torch.relu(self.inner_norm(self.inner(x)))
        x = torch.relu(x + self.outer_norm(self.outer(y)))
        return self.fc(x.mean((2, 3)))


class Preactivated(Residual):
    """A zero channel of the residual stream would be a constant at a padded conv."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.inner(torch.relu(self.norm(x)))
        x = x + self.outer(torch.relu(self.inner_norm(y)))
        return self.fc(torch.relu(self.outer_norm(x)).mean((2, 3)))


class Unnormalised(nn.Module):
    """No norm at all: conv biases must be tied."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        return self.fc(x.amax((2, 3)))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "flattened": (Flattened, ("bn1", "bn2")),
    "upsampling": (Upsampling, ("conv", "norm")),
    "depthwise": (Depthwise, ("norm1",)),
    "concatenated": (Concatenated, ("left", "right")),
    "residual": (Residual, ("norm", "inner_norm")),
    "preactivated": (Preactivated, ("stem", "inner_norm")),
    "unnormalised": (Unnormalised, ("conv1", "conv2")),
}
"""Name -> class and the names of all groups that can be merged."""


def build(name: str, seed: int = 0) -> nn.Module:
    """A network in float64 with the statistics of a trained one."""
    torch.manual_seed(seed)
    model = NETWORKS[name][0]().double()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(std=0.3)
            norm.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.3)
    return model


def images(seed: int = 0) -> Tensor:
    """A batch of eight."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 3, 8, 8, generator=generator, dtype=torch.float64)
