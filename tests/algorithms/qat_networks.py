"""Small networks that between them hold every shape of graph a quantizer meets."""

import torch
from torch import nn
from torch.nn import functional

from slimcli.network.example import Example


def predict(model, images):
    return model(images)


def example_of(size=16, channels=3, batch=4):
    generator = torch.Generator().manual_seed(7)
    return Example(torch.randn(batch, channels, size, size, generator=generator), predict)


def conv(inputs, outputs, kernel=3, **keywords):
    padding = kernel // 2
    return nn.Conv2d(inputs, outputs, kernel, padding=padding, bias=False, **keywords)


class Residual(nn.Module):
    """conv-bn-relu, then a residual block; ``spelling``: how sums and activations are written."""

    def __init__(self, spelling="+"):
        super().__init__()
        self.spelling = spelling
        self.conv1, self.bn1 = conv(3, 8), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = conv(8, 8), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = conv(8, 8), nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.relu_in_place = nn.ReLU(inplace=True)
        self.fc = nn.Linear(8, 5)

    def act(self, x):
        if self.spelling in ("F.relu", "torch.add"):
            return functional.relu(x)
        if self.spelling == "+=":
            return self.relu_in_place(x)
        if self.spelling == "add":
            return x.relu()
        return self.relu(x)

    def add(self, left, right):
        if self.spelling == "+=":
            left += right
            return left
        if self.spelling == "torch.add":
            return torch.add(left, right)
        if self.spelling == "add":
            return left.add(right)
        return left + right

    def forward(self, x):
        x = self.act(self.bn1(self.conv1(x)))
        y = self.act(self.bn2(self.conv2(x)))
        y = self.act(self.add(self.bn3(self.conv3(y)), x))
        return self.fc(y.mean((2, 3)))


class Gated(nn.Module):
    """Squeeze and excitation: a gate multiplies what it was computed from."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = conv(3, 16), nn.BatchNorm2d(16)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.tail, self.fc = conv(16, 16, groups=4), nn.Linear(16, 5)

    def forward(self, x):
        x = functional.silu(self.norm(self.stem(x)))
        gate = functional.relu(self.squeeze(x.mean((2, 3), keepdim=True)))
        x = self.tail(x * torch.sigmoid(self.excite(gate)))
        return self.fc(functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Concat(nn.Module):
    """Two branches and a pooled one are joined; one of them is read elsewhere too."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU())
        self.left, self.right = conv(8, 8, 1), conv(8, 8, 3)
        self.pooled = conv(8, 8, 1)
        self.join, self.fc = conv(24, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        pooled = self.pooled(functional.max_pool2d(x, 3, 1, 1))
        x = torch.cat([functional.relu(self.left(x)), functional.relu(self.right(x)), pooled], 1)
        return self.fc(self.join(x).mean((2, 3)))


class Upsampling(nn.Module):
    """An autoencoder with transposed convolutions."""

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(conv(3, 8, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.up1 = nn.ConvTranspose2d(8, 6, 2, 2)
        self.norm = nn.BatchNorm2d(6)
        self.up2 = nn.ConvTranspose2d(6, 3, 3, padding=1)

    def forward(self, x):
        return self.up2(functional.relu(self.norm(self.up1(self.down(x)))))


class UNet(nn.Module):
    """Skips by concatenation over two scales."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.below = nn.Sequential(conv(8, 16), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.merge = nn.Sequential(conv(16, 8), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        high = self.enter(x)
        low = self.below(functional.max_pool2d(high, 2))
        return self.head(self.merge(torch.cat([self.up(low), high], 1)))


class Depthwise(nn.Module):
    """An inverted residual without activation after the last conv."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU6())
        self.expand = nn.Sequential(conv(8, 24, 1), nn.BatchNorm2d(24), nn.ReLU6())
        self.deep = nn.Sequential(conv(24, 24, groups=24), nn.BatchNorm2d(24), nn.ReLU6())
        self.project = nn.Sequential(conv(24, 8, 1), nn.BatchNorm2d(8))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.project(self.deep(self.expand(x)))
        return self.fc(x.mean((2, 3)))


NETWORKS = {
    "residual": Residual,
    "gated": Gated,
    "concat": Concat,
    "upsampling": Upsampling,
    "unet": UNet,
    "depthwise": Depthwise,
}


def build(name):
    """The network with weights and batch statistics that are not the trivial ones."""
    torch.manual_seed(3)
    model = NETWORKS[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return model.eval()
