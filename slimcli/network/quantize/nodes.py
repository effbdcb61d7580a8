"""What an ONNX exporter sees of a fake quantizer: QuantizeLinear, then DequantizeLinear."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

OPSET = 19


def is_traced() -> bool:
    """Whether one of torch's two ONNX exporters is tracing right now."""
    return torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()


def quantize_nodes(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    """Stands for the two nodes in a trace; outside of one its value means nothing.

    Args:
        x: A float32 tensor.
        scale: Rank 0, or one value for each slice along ``axis``.
        zero_point: int8 zeros in the shape of ``scale``.
        axis: The dimension that has a scale for each slice; None for one scale.
    """
    if not torch.compiler.is_exporting():
        traced: Tensor = _TracedNodes.apply(x, scale, zero_point, axis)
        return traced
    attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
    codes = torch.onnx.ops.symbolic(
        "QuantizeLinear",
        (x, scale, zero_point),
        attributes,
        dtype=torch.int8,
        shape=x.shape,
        version=OPSET,
    )
    return torch.onnx.ops.symbolic(
        "DequantizeLinear",
        (codes, scale, zero_point),
        attributes,
        dtype=torch.float32,
        shape=x.shape,
        version=OPSET,
    )


class _TracedNodes(torch.autograd.Function):
    """The same for the TorchScript exporter, which asks a Function for its ``symbolic``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
        return x.clone()

    @staticmethod
    def symbolic(graph: Any, x: Any, scale: Any, zero_point: Any, axis: int | None) -> Any:
        attributes = {} if axis is None else {"axis_i": axis}
        codes = graph.op("QuantizeLinear", x, scale, zero_point, **attributes)
        found = graph.op("DequantizeLinear", codes, scale, zero_point, **attributes)
        found.setType(x.type())
        return found
