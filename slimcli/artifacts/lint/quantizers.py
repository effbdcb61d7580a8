"""Rules about single Q and DQ nodes: types, scales, axes, pairs (Q, R and T rules)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx

from slimcli.artifacts.lint.graph import (
    DEQUANTIZE,
    QUANTIZE,
    Array,
    Graph,
    attribute,
    axis,
    has_input,
)

Broken = tuple[str, onnx.NodeProto, str]
INT8 = onnx.TensorProto.INT8
FP8 = (
    onnx.TensorProto.FLOAT8E4M3FN,
    onnx.TensorProto.FLOAT8E4M3FNUZ,
    onnx.TensorProto.FLOAT8E5M2,
    onnx.TensorProto.FLOAT8E5M2FNUZ,
)


def quantizer_findings(graph: Graph) -> Iterator[Broken]:
    """Every broken rule of every Q and DQ node."""
    for node in graph.quantizers():
        yield from _version(graph, node)
        yield from _zero_point(graph, node)
        yield from _scale(graph, node)
        if node.op_type == QUANTIZE:
            yield from _twice(graph, node)
        else:
            yield from _pair(graph, node)
            yield from _reader(graph, node)
        yield from _weight_codes(graph, node)


def _version(graph: Graph, node: onnx.NodeProto) -> Iterator[Broken]:
    scale = graph.scale(node)
    if graph.opset < 10:
        yield "T1", node, f"Q/DQ in opset {graph.opset}"
    elif graph.opset < 13 and scale is not None and scale.size > 1:
        yield "T1", node, f"a scale per axis in opset {graph.opset}"
    if attribute(node, "block_size", 0):
        yield "T5", node, f"blocks of {attribute(node, 'block_size', 0)} values"


def _stored_type(graph: Graph, name: str) -> int | None:
    """Element type of an initializer or Constant; None if it is computed."""
    if name in graph.stored:
        return int(graph.stored[name].data_type)
    node = graph.producers.get(name)
    if node is not None and node.op_type == "Constant":
        value = attribute(node, "value", None)
        return None if value is None else int(value.data_type)
    return None


def _code_type(graph: Graph, node: onnx.NodeProto) -> int | None:
    """Element type of the codes: of the zero point, else of the stored codes, else uint8."""
    if has_input(node, 2):
        return _stored_type(graph, node.input[2])
    if node.op_type == DEQUANTIZE:
        made = graph.producers.get(node.input[0])
        if made is not None and made.op_type == QUANTIZE:
            return _code_type(graph, made)
        return _stored_type(graph, node.input[0])
    return int(attribute(node, "output_dtype", 0)) or int(onnx.TensorProto.UINT8)


def _zero_point(graph: Graph, node: onnx.NodeProto) -> Iterator[Broken]:
    kind = _code_type(graph, node)
    name = onnx.TensorProto.DataType.Name(kind) if kind else ""
    if kind in FP8:
        heavy = [each for each in graph.readers(node) if each.op_type.startswith("Conv")]
        if heavy:
            yield "T4", node, f"FP8 codes read by {heavy[0].op_type} {heavy[0].name}"
        return
    zero = graph.zero_point(node)
    if has_input(node, 2) and zero is None and kind is None:
        yield "Q1", node, "the zero point is computed at run time"
    if zero is not None and np.any(zero.astype(np.int64) != 0):
        yield "Q1", node, f"zero point {zero.reshape(-1)[np.argmax(zero != 0)]}"
    if kind == onnx.TensorProto.UINT8:
        yield "Q2", node, "codes are uint8"
    elif kind is not None and kind != INT8 and "INT4" not in name:
        yield "Q3", node, f"codes are {name.lower()}"


def _scale(graph: Graph, node: onnx.NodeProto) -> Iterator[Broken]:
    scale = graph.scale(node)
    if scale is None:
        yield "Q4", node, "the scale is computed at run time"
        return
    values = scale.astype(np.float64)
    if not np.isfinite(values).all() or (values <= 0).any():
        worst = values.reshape(-1)[np.argmin(np.where(np.isfinite(values), values, -np.inf))]
        yield "Q4", node, f"scale {worst:g}"
    if scale.dtype != np.float32:
        yield "T3", node, f"the scale is {scale.dtype}"
    if attribute(node, "block_size", 0):
        return
    if scale.ndim == 1 and scale.size == 1 and not _has_one_channel(graph, node):
        yield "Q5", node, "the scale is a vector of one"
    elif scale.ndim and not graph.is_weight(node):
        yield "Q6", node, f"{scale.size} scales for an activation"


def _has_one_channel(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether a scale of one value is per axis in truth: the tensor is one wide there."""
    value = graph.quantized_value(node) if node.op_type == DEQUANTIZE else node.input[0]
    weight = graph.constant(value)
    return (
        weight is not None
        and -weight.ndim <= axis(node) < weight.ndim
        and (weight.shape[axis(node)] == 1)
    )


def _twice(graph: Graph, node: onnx.NodeProto) -> Iterator[Broken]:
    before = graph.dequantizer(node.input[0])
    if before is None:
        return
    ours, theirs = graph.scale(node), graph.scale(before)
    if ours is None or theirs is None or not np.array_equal(ours, theirs):
        yield "Q11", node, f"quantized again behind {before.name or before.output[0]}"


def _pair(graph: Graph, node: onnx.NodeProto) -> Iterator[Broken]:
    made = graph.producers.get(node.input[0])
    if made is None or made.op_type != QUANTIZE:
        return
    ours, theirs = graph.scale(node), graph.scale(made)
    if ours is not None and theirs is not None and not np.array_equal(ours, theirs):
        yield "Q10", node, "its scale is not that of the Q before it"
    elif ours is not None and ours.ndim and axis(node) != axis(made):
        yield "Q10", node, f"axis {axis(node)} behind a Q of axis {axis(made)}"


def _reader(graph: Graph, node: onnx.NodeProto) -> Iterator[Broken]:
    """Axis and number of weight scales, as the layer that reads the weight wants them."""
    value = graph.quantized_value(node)
    weight, scale = graph.constant(value), graph.scale(node)
    if weight is None or scale is None:
        return
    made = graph.producers.get(node.input[0])
    if made is not None and weight.ndim > 1:
        yield "T2", node, f"{value} is stored as {weight.dtype}"
    for reader in graph.readers(node):
        is_bias = reader.op_type in ("Conv", "ConvTranspose", "Gemm") and weight.ndim == 1
        if reader.op_type == "ConvTranspose" and not is_bias:
            yield "Q9", node, _axis_text(scale, node)
        if scale.ndim == 0 or attribute(node, "block_size", 0) or is_bias:
            continue
        yield from _axis(graph, node, reader, weight, scale)


def _axis_text(scale: Array, node: onnx.NodeProto) -> str:
    return f"{scale.size} scales on axis {axis(node)}" if scale.ndim else "one scale"


def _transposed(graph: Graph, node: onnx.NodeProto, where: int) -> int:
    """Which axis an axis has become where the weight is read: behind transpositions of it."""
    following = graph.consumers.get(node.output[0], [])
    while len(following) == 1 and following[0].op_type == "Transpose":
        order = list(attribute(following[0], "perm", []))
        where = order.index(where) if where in order else where
        following = graph.consumers.get(following[0].output[0], [])
    return where


def _axis(
    graph: Graph, node: onnx.NodeProto, reader: onnx.NodeProto, weight: Array, scale: Array
) -> Iterator[Broken]:
    counted = axis(node) % weight.ndim
    where = _transposed(graph, node, counted)
    if scale.size != weight.shape[counted]:
        yield "Q7", node, f"{scale.size} scales for {weight.shape[counted]} channels"
    elif reader.op_type == "Conv" and where != 0:
        yield "Q7", node, f"scales on axis {where} of a conv weight"
    elif reader.op_type == "Gemm":
        wanted = 0 if attribute(reader, "transB", 0) else 1
        if where != wanted:
            yield "Q8", node, f"scales on axis {where}, output channels are on axis {wanted}"
    elif reader.op_type == "MatMul" and where != weight.ndim - 1:
        yield "Q8", node, f"scales on axis {where}, output channels are on {weight.ndim - 1}"


def _weight_codes(graph: Graph, node: onnx.NodeProto) -> Iterator[Broken]:
    """Codes outside [-127, 127], stored or about to be computed."""
    stored = graph.constant(node.input[0])
    if stored is None or stored.ndim < 2:
        return
    if node.op_type == DEQUANTIZE:
        if stored.dtype == np.int8 and (stored == -128).any():
            yield "R1", node, f"{int((stored == -128).sum())} codes are -128"
        return
    scale = graph.scale(node)
    if scale is None or (scale.ndim and scale.size != stored.shape[axis(node) % stored.ndim]):
        return
    shape = [-1 if dim == axis(node) % stored.ndim else 1 for dim in range(stored.ndim)]
    steps = np.abs(stored / (scale.reshape(shape) if scale.ndim else scale))
    outside = int((np.rint(steps) > 127).sum())
    if outside:
        yield "R1", node, f"{outside} of {stored.size} weights are clipped"
