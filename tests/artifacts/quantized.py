"""A fake quantizer and a network with it, as small as can be, for tests of the Q/DQ export."""

import torch
from torch import nn
from torch.nn import functional


class Quantizer(nn.Module):
    """Rounds to int8 and back; an exporter sees Q and DQ. ``skew`` makes the two disagree."""

    def __init__(self, scale, axis=None, low=-128, skew=1.0) -> None:
        super().__init__()
        self.axis, self.low, self.skew = axis, low, skew
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.float32))
        self.register_buffer("zero_point", torch.zeros(self.scale.shape, dtype=torch.int8))

    def forward(self, x):
        if torch.compiler.is_exporting():
            attributes = {} if self.axis is None else {"axis": self.axis}
            shape, tail = x.shape, (self.scale, self.zero_point)
            codes = torch.onnx.ops.symbolic(
                "QuantizeLinear", (x, *tail), attributes, dtype=torch.int8, shape=shape, version=19
            )
            return torch.onnx.ops.symbolic(
                "DequantizeLinear",
                (codes, *tail),
                attributes,
                dtype=torch.float32,
                shape=shape,
                version=19,
            )
        scale = self.scale * self.skew
        if self.axis is not None:
            scale = scale.view([-1 if dim == self.axis else 1 for dim in range(x.ndim)])
        return torch.clamp(torch.round(x / scale), self.low, 127) * scale


class QuantizedLayer(nn.Module):
    """A conv, deconv or linear layer with a quantizer on its input and on its weight."""

    def __init__(self, layer, channels=False, clip=1.0, shape=(), skew=1.0) -> None:
        super().__init__()
        self.layer = layer
        weight = layer.weight.detach()
        others = tuple(range(1, weight.ndim))
        amax = (weight.abs().amax(others) if channels else weight.abs().max()) * clip
        self.weight_quantizer = Quantizer(amax / 127, 0 if channels else None, -127)
        self.input_quantizer = Quantizer(torch.full(shape, 0.02), skew=skew)

    def forward(self, x):
        layer, x, weight = self.layer, self.input_quantizer(x), self.weight_quantizer
        if isinstance(layer, nn.Linear):
            return functional.linear(x, weight(layer.weight), layer.bias)
        if isinstance(layer, nn.ConvTranspose2d):
            return functional.conv_transpose2d(x, weight(layer.weight), layer.bias, layer.stride)
        return functional.conv2d(x, weight(layer.weight), layer.bias, layer.stride, layer.padding)


class QuantizedNet(nn.Module):
    """Two convs read one tensor, a residual sum, a transposed conv and a linear head."""

    def __init__(self, channels=False, **first) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = QuantizedLayer(nn.Conv2d(3, 16, 3, padding=1), channels, **first)
        self.norm = nn.BatchNorm2d(16)
        self.left = QuantizedLayer(nn.Conv2d(16, 16, 3, padding=1), channels)
        self.right = QuantizedLayer(nn.Conv2d(16, 16, 1), channels)
        self.up = QuantizedLayer(nn.ConvTranspose2d(16, 16, 2, 2))
        self.head = QuantizedLayer(nn.Linear(16, 4), channels)
        self.eval()

    def forward(self, x):
        h = torch.relu(self.norm(self.stem(x)))
        h = torch.relu(self.left(h) + self.right(h))
        return self.head(self.up(h).mean((2, 3)))
