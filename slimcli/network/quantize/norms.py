"""Which batch norms stand right behind a quantized layer, and which of them can be folded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from slimcli.network.fuse import ACTIVATED_NORMS, PLAIN_NORMS, why_not_foldable
from slimcli.network.quantize.layers import TRANSPOSED, Layer
from slimcli.network.quantize.record import ROOT, Op, Record


@dataclass(frozen=True)
class NormBehind:
    """A quantized layer and the batch norm that reads its output.

    Attributes:
        layer: Path of the layer.
        norm: Path of the norm.
        reason: Why it can't be folded into the layer; empty if it can.
    """

    layer: str
    norm: str
    reason: str = ""


def norms_behind(
    model: nn.Module, record: Record, layers: Sequence[Layer]
) -> tuple[NormBehind, ...]:
    """Each quantized layer whose output a batch norm reads.

    Args:
        model: The recorded model, before quantizers are added.
        record: One forward pass in eval mode.
        layers: Its convolutions and linear layers.
    """
    consumers = record.consumers()
    returned = {value for call in record.calls_of(ROOT) for value in call.outputs.values()}
    found = []
    for layer in layers:
        outputs = [value for call in record.calls_of(layer.name) for value in call.outputs.values()]
        readers = [op for value in outputs for op in consumers.get(value, [])]
        norm = next((op for op in readers if _is_norm(model, op)), None)
        if norm is not None and not layer.reason:
            alone = len(readers) == 1 and not returned.intersection(outputs)
            reason = _reason(model, record, layer, norm, alone)
            found.append(NormBehind(layer.name, norm.module, reason))
    return tuple(found)


def _is_norm(model: nn.Module, op: Op) -> bool:
    name = type(model.get_submodule(op.module)).__name__
    return op.name == "batch_norm" or name in PLAIN_NORMS or name in ACTIVATED_NORMS


def _reason(model: nn.Module, record: Record, layer: Layer, norm: Op, alone: bool) -> str:
    """Why a norm can't be folded, or an empty string."""
    module = model.get_submodule(layer.name)
    if isinstance(module, TRANSPOSED):
        return "transposed convolutions have one weight scale, so their codes would change"
    if len(record.calls_of(layer.name)) > 1:
        return "the layer is called more than once"
    if len(record.calls_of(norm.module)) > 1:
        return "the norm is called more than once"
    if not alone:
        return "the layer's output is read elsewhere too"
    if len(norm.shapes[0]) != module.get_parameter("weight").dim():
        return "the norm's channels are not the layer's outputs"
    return why_not_foldable(module, model.get_submodule(norm.module))
