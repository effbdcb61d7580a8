"""Checks on a running network that what was placed really is what every layer reads."""

from __future__ import annotations

from torch import nn

from slimcli.network.copying import deep_copy
from slimcli.network.example import Example
from slimcli.network.quantize.fake_quant import quantizers
from slimcli.network.quantize.insert import QuantizedWeight
from slimcli.network.quantize.layers import input_path
from slimcli.network.quantize.place import COMMUTING
from slimcli.network.quantize.record import record_forward


def float_readers(model: nn.Module, example: Example) -> list[str]:
    """Quantized layers that read, at some call, a tensor that is on no int8 grid (rule P1).

    The quantizers must have ranges. ``model`` stays as it is.
    """
    clone = deep_copy(model)
    names = set(quantizers(clone))
    layers = {name for name, each in clone.named_modules() if isinstance(each, QuantizedWeight)}
    record = record_forward(clone, example)
    on_grid = {
        value for call in record.calls if call.module in names for value in call.outputs.values()
    }
    for op in record.ops:
        if op.name in COMMUTING and op.inputs and op.inputs[0] in on_grid:
            on_grid.update(op.outputs)
    found = []
    for call in record.calls:
        if call.module in layers:
            path = input_path(call)
            if path is None or call.inputs[path] not in on_grid:
                found.append(call.module)
    return found
