"""Small networks, one a structure that has broken pruning tools, each for 16-pixel images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(inputs: int, outputs: int, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


def conv_bn(inputs: int, outputs: int, size: int = 3, **options: Any) -> nn.Sequential:
    return nn.Sequential(
        conv(inputs, outputs, size, bias=False, **options), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Net(nn.Module):
    """Body, global pooling, a linear head with five classes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.head = nn.Linear(width, 5)

    def body(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


class Chain(Net):
    def __init__(self) -> None:
        super().__init__(16)
        self.a, self.b = conv_bn(8, 12), conv_bn(12, 16)

    def body(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class Residual(Net):
    def __init__(self) -> None:
        super().__init__(16)
        self.a, self.b = conv_bn(8, 12), nn.Sequential(conv(12, 8), nn.BatchNorm2d(8))
        self.c, self.skip = conv_bn(8, 16), nn.Sequential(conv(8, 16, 1), nn.BatchNorm2d(16))

    def body(self, x: Tensor) -> Tensor:
        x = F.relu(x + self.b(self.a(x)))
        return F.relu(self.c(x) + self.skip(x))


class ConcatUneven(Net):
    def __init__(self) -> None:
        super().__init__(16)
        self.a, self.b, self.c = conv_bn(8, 6), conv_bn(8, 14), conv_bn(28, 16)

    def body(self, x: Tensor) -> Tensor:
        return self.c(torch.cat([self.a(x), x, self.b(x)], 1))


class ChannelShuffle(Net):
    def __init__(self) -> None:
        super().__init__(8)
        self.a, self.b, self.c = conv_bn(8, 8), conv_bn(8, 8), conv_bn(16, 8)

    def body(self, x: Tensor) -> Tensor:
        x = torch.cat([self.a(x), self.b(x)], 1)
        n, c, h, w = x.shape
        return self.c(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


class SplitChunk(Net):
    def __init__(self) -> None:
        super().__init__(12)
        self.a, self.b, self.c = conv_bn(8, 16), conv_bn(8, 8), conv_bn(16, 12)

    def body(self, x: Tensor) -> Tensor:
        left, right = self.a(x).chunk(2, 1)
        return self.c(torch.cat([self.b(left), right], 1))


class SplitFixed(SplitChunk):
    def body(self, x: Tensor) -> Tensor:
        left, right = self.a(x).split([8, 8], 1)
        return self.c(torch.cat([self.b(left), right], 1))


class GroupConv(Net):
    def __init__(self) -> None:
        super().__init__(16)
        self.a, self.b, self.c = conv_bn(8, 16, 1), conv_bn(16, 24, groups=4), conv_bn(24, 16)

    def body(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)))


class Depthwise(Net):
    def __init__(self) -> None:
        super().__init__(16)
        self.a, self.b, self.c = conv_bn(8, 16, 1), conv_bn(16, 16, groups=16), conv_bn(16, 16, 1)

    def body(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)))


class DepthwiseMultiplier(Net):
    def __init__(self) -> None:
        super().__init__(16)
        self.a, self.b, self.c = conv_bn(8, 16), conv_bn(16, 32, groups=16), conv_bn(32, 16, 1)

    def body(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)))


class Transposed(Net):
    def __init__(self) -> None:
        super().__init__(12)
        self.a = nn.ConvTranspose2d(8, 16, 2, stride=2)
        self.norm = nn.BatchNorm2d(16)
        self.b, self.c = nn.ConvTranspose2d(16, 12, 3, padding=1), conv_bn(12, 12)

    def body(self, x: Tensor) -> Tensor:
        return self.c(self.b(F.relu(self.norm(self.a(x)))))


class Unflatten(Net):
    def __init__(self) -> None:
        super().__init__(12)
        self.wide, self.a = nn.Linear(8, 128), conv_bn(8, 12)

    def body(self, x: Tensor) -> Tensor:
        return self.a(F.relu(self.wide(x.mean((2, 3)))).view(-1, 8, 4, 4))


class UnflattenFree(Unflatten):
    def body(self, x: Tensor) -> Tensor:
        wide = F.relu(self.wide(x.mean((2, 3))))
        return self.a(wide.view(wide.shape[0], -1, 4, 4))


class FlattenFC(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(3, 8), conv_bn(8, 12)
        self.fc1, self.fc2 = nn.Linear(12 * 16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.b(self.a(x)), 4).flatten(1)
        return self.fc2(F.relu(self.fc1(x)))


class PixelShuffle(Net):
    def __init__(self) -> None:
        super().__init__(12)
        self.a, self.b, self.c = conv(8, 32), conv_bn(8, 8), conv_bn(32, 12)

    def body(self, x: Tensor) -> Tensor:
        return self.c(F.pixel_unshuffle(self.b(F.pixel_shuffle(F.relu(self.a(x)), 2)), 2))


class SE(Net):
    def __init__(self) -> None:
        super().__init__(16)
        self.a, self.b = conv_bn(8, 16), conv_bn(16, 16)
        self.down, self.up = nn.Linear(16, 4), nn.Linear(4, 16)

    def body(self, x: Tensor) -> Tensor:
        x = self.a(x)
        gate = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))
        return self.b(x * gate[:, :, None, None])


class ECA(Net):
    def __init__(self) -> None:
        super().__init__(12)
        self.a, self.b, self.mix = conv_bn(8, 16), conv_bn(16, 12), nn.Conv1d(1, 1, 3, padding=1)

    def body(self, x: Tensor) -> Tensor:
        x = self.a(x)
        gate = self.mix(x.mean((2, 3)).unsqueeze(1)).squeeze(1)
        return self.b(x * torch.sigmoid(gate)[:, :, None, None])


class SpatialGate(Net):
    def __init__(self) -> None:
        super().__init__(12)
        self.a, self.b, self.mix = conv_bn(8, 16), conv_bn(16, 12), conv(2, 1)

    def body(self, x: Tensor) -> Tensor:
        x = self.a(x)
        gate = self.mix(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1))
        return self.b(x * torch.sigmoid(gate))


class PReLUNet(Net):
    def __init__(self) -> None:
        super().__init__(16)
        self.a, self.act, self.b = conv(8, 12), nn.PReLU(12), conv_bn(12, 16)

    def body(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x)))


class LayerScaleParam(Net):
    def __init__(self) -> None:
        super().__init__(8)
        self.a, self.b = conv_bn(8, 12), conv(12, 8)
        self.gamma = nn.Parameter(torch.full((8, 1, 1), 1e-6))

    def body(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.b(self.a(x))


class FunctionalConv(Net):
    def __init__(self) -> None:
        super().__init__(8)
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8, 3, 3)), nn.Parameter(torch.randn(8))

    def body(self, x: Tensor) -> Tensor:
        return F.relu(F.conv2d(x, self.weight, self.bias, padding=1))


class SharedConv(Net):
    def __init__(self) -> None:
        super().__init__(12)
        self.a, self.shared, self.b = conv_bn(8, 12), conv(12, 12), conv_bn(12, 12)

    def body(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.shared(F.relu(self.shared(self.a(x))))))


class TiedWeight(Net):
    def __init__(self) -> None:
        super().__init__(12)
        self.a, self.b, self.c = conv(8, 16), conv(8, 16), conv_bn(16, 12)
        self.b.weight = self.a.weight

    def body(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.a(x)) + F.relu(self.b(x * 2)))


class FrozenBN(Net):
    def __init__(self) -> None:
        super().__init__(12)
        from torchvision.ops import FrozenBatchNorm2d

        self.a, self.norm, self.b = conv(8, 16, bias=False), FrozenBatchNorm2d(16), conv_bn(16, 12)

    def body(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.norm(self.a(x))))


class FrozenStem(Residual):
    def __init__(self) -> None:
        super().__init__()
        for parameter in self.stem.parameters():
            parameter.requires_grad_(False)


class AuxHead(Net):
    def __init__(self) -> None:
        super().__init__(16)
        self.a, self.b, self.side = conv_bn(8, 12), conv_bn(12, 16), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.a(self.stem(x))
        result = self.head(self.b(x).mean((2, 3)))
        return (result, self.side(x.mean((2, 3)))) if self.training else result


class PermuteLinear(Net):
    def __init__(self) -> None:
        super().__init__(16)
        self.a, self.wide, self.narrow = conv_bn(8, 16), nn.Linear(16, 24), nn.Linear(24, 16)

    def body(self, x: Tensor) -> Tensor:
        x = self.a(x).permute(0, 2, 3, 1)
        return self.narrow(F.gelu(self.wide(x))).permute(0, 3, 1, 2)


class OneChannelConv(Net):
    def __init__(self) -> None:
        super().__init__(12)
        self.a, self.gate, self.b = conv_bn(8, 16), conv(16, 1), conv_bn(16, 12)

    def body(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x * torch.sigmoid(self.gate(x)))


class GroupNormNet(Net):
    def __init__(self) -> None:
        super().__init__(16)
        self.a, self.norm, self.b = conv(8, 12), nn.GroupNorm(4, 12), conv_bn(12, 16)

    def body(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.norm(self.a(x))))


class MaxoutOverChannels(Net):
    def __init__(self) -> None:
        super().__init__(12)
        self.a, self.b = conv(8, 16), conv_bn(8, 12)

    def body(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x.view(x.shape[0], 2, -1, *x.shape[2:]).amax(1))


class DictOutputTwoInputs(Net):
    def __init__(self) -> None:
        super().__init__(16)
        self.other, self.a = conv_bn(1, 8), conv_bn(16, 16)

    def forward(self, inputs: dict[str, Tensor]) -> Any:
        x = torch.cat([self.stem(inputs["image"]), self.other(inputs["depth"])], 1)
        x = self.a(x)
        scores = self.head(x.mean((2, 3)))
        return {"scores": scores, "more": [scores.mean()]}


class PreAct(Net):
    def __init__(self) -> None:
        super().__init__(8)
        self.norm1, self.a = nn.BatchNorm2d(8), conv(8, 16, bias=False)
        self.norm2, self.b = nn.BatchNorm2d(16), conv(16, 8, bias=False)

    def body(self, x: Tensor) -> Tensor:
        return x + self.b(F.relu(self.norm2(self.a(F.relu(self.norm1(x))))))


class DenseBlock(Net):
    def __init__(self) -> None:
        super().__init__(24)
        self.norm, self.a, self.b = nn.BatchNorm2d(8), conv(8, 8, 1), conv(8, 16)

    def body(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.b(self.a(F.relu(self.norm(x))))], 1)


def image() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def image_and_depth() -> dict[str, Tensor]:
    return {"image": image(), "depth": image()[:, :1]}


_NETS: list[type[nn.Module]] = [
    Chain,
    Residual,
    ConcatUneven,
    ChannelShuffle,
    SplitChunk,
    SplitFixed,
    GroupConv,
    Depthwise,
    DepthwiseMultiplier,
    Transposed,
    Unflatten,
    UnflattenFree,
    FlattenFC,
    PixelShuffle,
    SE,
    ECA,
    SpatialGate,
    PReLUNet,
    LayerScaleParam,
    FunctionalConv,
    SharedConv,
    TiedWeight,
    FrozenBN,
    FrozenStem,
    AuxHead,
    PermuteLinear,
    OneChannelConv,
    GroupNormNet,
    MaxoutOverChannels,
    DictOutputTwoInputs,
    PreAct,
    DenseBlock,
]
NETWORKS: dict[str, Callable[[], nn.Module]] = {net.__name__: net for net in _NETS}
BATCHES: dict[str, Callable[[], Any]] = {"DictOutputTwoInputs": image_and_depth}


def batch_of(name: str) -> Any:
    return BATCHES.get(name, image)()
