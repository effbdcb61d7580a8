"""Targets made by hand and small networks for the tests of ResRep."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from slimcli.algorithms.resrep.targets import Place, Target
from slimcli.network.cuts import Slot
from slimcli.network.structure import Group


def one_layer_target(conv: str, size: int) -> Target:
    """One conv without a norm whose channels nobody shares."""
    rows = tuple((channel,) for channel in range(size))
    place = Place(conv, conv, None, False, False, 2, size)
    group = Group(
        name=conv,
        size=size,
        producers=(Slot(f"{conv}.weight", 0, rows),),
        followers=(),
        consumers=(),
        sites=(),
    )
    return Target(group, (place,), (rows,))


def conv_bn(inputs: int, outputs: int, kernel: int = 3, **keywords: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **keywords)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Chain(nn.Module):
    """Two convs with a norm, pooling, then Linear after a flatten with H*W = 6."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv_bn(2, 6), conv_bn(6, 5)
        self.fc = nn.Linear(5 * 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.fc(nn.functional.adaptive_avg_pool2d(x, (2, 3)).flatten(1))


class Residual(nn.Module):
    """Stem, identity shortcut, projection shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(2, 6)
        self.a, self.b = conv_bn(6, 5), conv_bn(5, 6)
        self.c, self.d = conv_bn(6, 7, stride=2), conv_bn(7, 8)
        self.projection = conv_bn(6, 8, 1, stride=2)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.b(torch.relu(self.a(x))) + x)
        x = torch.relu(self.d(torch.relu(self.c(x))) + self.projection(x))
        return self.fc(x.mean((2, 3)))


class Concat(nn.Module):
    """Branches of unequal width that meet twice."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv_bn(2, 5), conv_bn(2, 7, 1)
        self.join = conv_bn(12, 6)
        self.fc = nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.relu(self.left(x)), torch.relu(self.right(x))
        joined = torch.relu(self.join(torch.cat([left, right], 1)))
        return self.fc(torch.cat([left, joined], 1).mean((2, 3)))


class Depthwise(nn.Module):
    """What a dead channel becomes behind a depthwise conv and its norm is a constant."""

    def __init__(self, activation: Callable[[], nn.Module] = nn.ReLU6) -> None:
        super().__init__()
        self.expand = conv_bn(2, 8, 1)
        self.depthwise = conv_bn(8, 8, groups=8)
        self.project = conv_bn(8, 6, 1)
        self.act, self.head = activation(), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.depthwise(self.act(self.expand(x))))
        return self.head(torch.relu(self.project(x)))


class SqueezeExcite(nn.Module):
    """A gate whose last layer follows the channels it multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = conv_bn(2, 8), conv_bn(8, 6)
        self.reduce, self.expand = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        gate = torch.relu(self.reduce(x.mean((2, 3), keepdim=True)))
        x = torch.relu(self.last(x * torch.sigmoid(self.expand(gate))))
        return self.fc(x.mean((2, 3)))


class Transposed(nn.Module):
    """A decoder; the transposed conv with a norm and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.down = conv_bn(2, 6, stride=2)
        self.up = nn.ConvTranspose2d(6, 5, 4, 2, 1)
        self.bn = nn.BatchNorm2d(5)
        self.again = nn.ConvTranspose2d(5, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.up(torch.relu(self.down(x)))))
        return self.head(torch.relu(self.again(x)))


class Plain(nn.Module):
    """No norm anywhere, and a conv without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        return self.fc2(torch.relu(self.fc1(x.mean((2, 3)))))


class Grouped(nn.Module):
    """A conv with groups: a full compactor would mix what its groups keep apart."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = conv_bn(2, 8), conv_bn(8, 8, groups=2)
        self.last = conv_bn(8, 6, 1)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.middle(torch.relu(self.first(x))))
        return self.fc(torch.relu(self.last(x)).mean((2, 3)))


class Perceptron(nn.Module):
    """Linear layers with a norm, channels last and channels second."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.bn = nn.Linear(2, 9), nn.BatchNorm1d(9)
        self.fc2, self.fc3 = nn.Linear(9, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.fc1(x.mean((2, 3)))))
        return self.fc3(torch.relu(self.fc2(x)))


class TokenMixer(nn.Module):
    """Linear layers over the last of four dimensions, as in ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 5, 1)
        self.fc1, self.fc2 = nn.Linear(5, 9), nn.Linear(9, 5)
        self.head = nn.Conv2d(5, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = self.fc2(torch.relu(self.fc1(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        return self.head(torch.relu(x + y))


class OneAndThree(nn.Module):
    """Convs over one and over three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(2, 6, 3, padding=1), nn.BatchNorm1d(6)
        self.conv2 = nn.Conv1d(6, 5, 3)
        self.conv3, self.bn3 = nn.Conv3d(2, 6, 3, padding=1), nn.BatchNorm3d(6)
        self.conv4 = nn.Conv3d(6, 5, 1)
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        line = torch.relu(self.conv2(torch.relu(self.bn1(self.conv1(x.flatten(2))))))
        volume = x.unsqueeze(2).expand(-1, -1, 2, -1, -1)
        volume = torch.relu(self.conv4(torch.relu(self.bn3(self.conv3(volume)))))
        return self.fc(line.mean(2) + volume.mean((2, 3, 4)))


class SharedConv(nn.Module):
    """One conv called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(2, 6)
        self.shared = nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.shared(torch.relu(self.shared(x))))
        return self.fc(x.mean((2, 3)))


class BatchNormAct2d(nn.BatchNorm2d):
    """As in timm: a batch norm with ``drop`` and ``act`` inside."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class NormWithActivation(nn.Module):
    """The compactor belongs between the norm and the activation inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 6, 3, padding=1, bias=False), BatchNormAct2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 5, 3, padding=1, bias=False), BatchNormAct2d(5)
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn2(self.conv2(self.bn1(self.conv1(x)))).mean((2, 3)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "chain": Chain,
    "residual": Residual,
    "concat": Concat,
    "depthwise, relu6": Depthwise,
    "depthwise, sigmoid": lambda: Depthwise(nn.Sigmoid),
    "depthwise, silu": lambda: Depthwise(nn.SiLU),
    "squeeze and excite": SqueezeExcite,
    "transposed": Transposed,
    "no norm": Plain,
    "grouped conv": Grouped,
    "perceptron": Perceptron,
    "linear over the last dimension": TokenMixer,
    "one and three dimensions": OneAndThree,
    "a conv called twice": SharedConv,
    "norm with an activation inside": NormWithActivation,
}
SHAPE = (4, 2, 6, 7)


def build(name: str) -> nn.Module:
    """In float64, with norms that do something: scales, shifts (also below zero), statistics."""
    torch.manual_seed(3)
    model = NETWORKS[name]().double()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.5)
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2.0)
    return model
