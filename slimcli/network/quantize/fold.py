"""Batch norms behind quantized layers, folded into what an exporter sees.

A network trains with its batch norms. With one weight scale for each output channel, the norm's
factor ``gamma / sigma`` goes into that scale and its sign into the codes, whose magnitudes stay, so
folding after training is exact. With one scale for the whole layer it is not: the weights of the
channels would be rounded anew on another grid.

What is folded is what an exporter sees: in PyTorch the copy goes on computing what was trained, bit
for bit, so that a file can be compared with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from slimcli.network.fuse import norm_as_scale, remainder
from slimcli.network.quantize.insert import QuantizedWeight, become
from slimcli.network.quantize.nodes import is_traced
from slimcli.network.quantize.norms import NormBehind

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""A scale below this is no normal float32 number: its channel adds nothing that float32 can hold
beside the bias, and gets zero codes instead."""


def folded(
    codes: Tensor, scale: Tensor, bias: Tensor | None, norm: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and bias of the one layer that equals the layer and the norm behind it.

    With the norm as ``x * gain + shift``: the scale times ``|gain|``, the codes times the sign of
    ``gain``, the bias times ``gain`` plus ``shift``. Where the gain is zero, the codes are, and the
    scale stays what it was, because ONNX wants a positive one.

    Args:
        codes: int8, (out, ...).
        scale: (out,).
        bias: (out,) or None.
        norm: Gain and shift, float64, (out,) each.

    Returns:
        int8 codes of the same shape; float64 scale and bias, (out,) each.

    >>> one, gain = torch.ones(3), torch.tensor([2.0, -0.5, 0.0], dtype=torch.float64)
    >>> shift = torch.tensor([1.0, 1.0, 4.0], dtype=torch.float64)
    >>> codes = torch.tensor([[3], [5], [7]], dtype=torch.int8)
    >>> [each.flatten().tolist() for each in folded(codes, one, one, (gain, shift))]
    [[3, -5, 0], [2.0, 0.5, 1.0], [3.0, 0.5, 4.0]]
    """
    gain, shift = norm
    wide = scale.detach().double()
    scaled = wide * gain.abs()
    sign = torch.where(scaled >= SMALLEST_SCALE, gain.sign(), torch.zeros_like(gain))
    by_row = sign.to(torch.int8).reshape(-1, *(1 for _ in codes.shape[1:]))
    moved = shift if bias is None else bias.detach().double() * gain + shift
    return codes * by_row, torch.where(sign != 0, scaled, wide), moved


class FoldedLayer(QuantizedWeight):
    """What the class of a layer is given: in a trace its weight and bias hold the norm as well."""

    folded_weight: Tensor
    folded_bias: Tensor
    folded_norm: str

    @property
    def weight(self) -> Tensor:
        """As trained; inside forward, in a trace, the folded one."""
        if self.is_computing and is_traced():
            return self.weight_quantizer(self.folded_weight)  # type: ignore[no-any-return]
        return super().weight

    @property
    def bias(self) -> Tensor | None:
        """As trained; inside forward, in a trace, the folded one."""
        if self.is_computing and is_traced():
            return self.folded_bias
        return cast("Tensor | None", super().__getattr__("bias"))


class FoldedNorm(nn.Module):
    """What the class of a norm is given: in a trace it only activates, if it ever did."""

    folded_rest: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """The norm; in a trace what is left of it."""
        return cast("Tensor", self.folded_rest(x) if is_traced() else super().forward(x))


def fold(model: nn.Module, pairs: Iterable[NormBehind]) -> None:
    """Folds norms into layers for exporters, in place; what the model computes itself stays.

    Args:
        model: A model with quantizers, in eval mode, that nobody trains on.
        pairs: Norms without a reason to stay, as found in this model.
    """
    for pair in pairs:
        layer, norm = model.get_submodule(pair.layer), model.get_submodule(pair.norm)
        become(layer, FoldedLayer)
        become(norm, FoldedNorm)
        assert isinstance(layer, FoldedLayer)
        weight, quantizer = layer.get_parameter("weight").detach(), layer.weight_quantizer
        gain, shift = (each.to(weight.device) for each in norm_as_scale(norm))
        codes = quantizer.codes(weight)
        codes, scale, bias = folded(codes, quantizer.scale, layer.bias, (gain, shift))
        quantizer.folded_scale = scale.to(quantizer.scale.dtype)
        on_grid = codes.to(weight.dtype) * quantizer.for_each_slice(quantizer.folded_scale, weight)
        layer.register_buffer("folded_weight", on_grid)
        layer.register_buffer("folded_bias", bias.to(weight.dtype))
        layer.folded_norm = pair.norm
        norm.folded_rest = remainder(norm)


def folded_norms(model: nn.Module) -> dict[str, str]:
    """Path of each layer that shows an exporter a folded norm -> path of that norm."""
    return {
        name: each.folded_norm
        for name, each in model.named_modules()
        if isinstance(each, FoldedLayer)
    }
