"""Gives a graph with Q/DQ nodes the form that int8 runtimes read best; its function stays.

Weights become int8 initializers (a quarter of the size, bit-equal results), scales of one value get
rank 0 (a vector of one counts as per axis and costs the int8 kernel), and all readers of one tensor
share one Q/DQ pair.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from slimcli.artifacts.onnx import tidy

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
WEIGHT_LOW, HIGH = -127, 127
Array = np.ndarray[Any, Any]


def finish(model: onnx.ModelProto) -> list[dict[str, Any]]:
    """Brings all Q/DQ pairs into their final form, in place.

    Returns:
        One entry a quantizer: name, tensor, kind, granularity, axis, scale and largest magnitude.
    """
    graph = model.graph
    stored = {each.name: each for each in graph.initializer}
    for node in graph.node:
        if node.op_type in (QUANTIZE, DEQUANTIZE):
            _scalar_scale(node, stored)
    while _share(graph, stored):
        pass
    for node in [each for each in graph.node if each.op_type == QUANTIZE]:
        if node.input[0] in stored:
            _fold_weight(graph, node, stored)
    del graph.initializer[:]
    graph.initializer.extend(stored.values())
    tidy.remove_unused_initializers(model)
    values = [each for each in graph.value_info if each.name not in stored]  # their shape is known
    del graph.value_info[:]
    graph.value_info.extend(values)
    _rename(model)
    return quantizers(model)


def codes(values: Array, scale: Array, axis: int | None, low: int, high: int = HIGH) -> Array:
    """int8 codes as ONNX QuantizeLinear defines them: true division, ties to even, clamped.

    >>> codes(np.array([0.5, 1.5, -300.0], np.float32), np.float32(1), None, -127).tolist()
    [0, 2, -127]
    """
    shape = [-1 if axis == dim else 1 for dim in range(values.ndim)] if axis is not None else []
    steps = scale.astype(np.float32).reshape(shape)
    rounded: Array = np.rint(values.astype(np.float32) / steps)
    return rounded.clip(low, high).astype(np.int8)


def axis_of(node: onnx.NodeProto, scale: Array) -> int | None:
    """The axis of a per-axis scale; None for a scale of rank 0."""
    if scale.ndim == 0:
        return None
    return next((int(each.i) for each in node.attribute if each.name == "axis"), 1)


def _scalar_scale(node: onnx.NodeProto, stored: dict[str, onnx.TensorProto]) -> None:
    """Makes a scale (and zero point) of one value rank 0 and drops its axis."""
    for name in list(node.input)[1:3]:
        if name in stored and list(stored[name].dims) == [1]:
            value = numpy_helper.to_array(stored[name]).reshape(())
            stored[name].CopyFrom(numpy_helper.from_array(value, name))
    if len(node.input) > 1 and node.input[1] in stored and not stored[node.input[1]].dims:
        for each in [a for a in node.attribute if a.name == "axis"]:
            node.attribute.remove(each)


def _share(graph: onnx.GraphProto, stored: dict[str, onnx.TensorProto]) -> bool:
    """Merges Q (or DQ) nodes that do the same to the same tensor; True if it merged any."""
    first: dict[tuple[Any, ...], onnx.NodeProto] = {}
    merged: dict[str, str] = {}
    outputs = {each.name for each in graph.output}
    for node in [each for each in graph.node if each.op_type in (QUANTIZE, DEQUANTIZE)]:
        values = tuple(_value_key(name, stored) for name in list(node.input)[1:])
        attributes = tuple(sorted(each.SerializeToString() for each in node.attribute))
        key = (node.op_type, node.input[0], values, attributes)
        if key not in first or node.output[0] in outputs:
            first.setdefault(key, node)
            continue
        merged[node.output[0]] = first[key].output[0]
        graph.node.remove(node)
    for node in tidy.nodes(graph):
        for index, name in enumerate(node.input):
            node.input[index] = merged.get(name, name)
    return bool(merged)


def _value_key(name: str, stored: dict[str, onnx.TensorProto]) -> Any:
    if name not in stored:
        return name
    array = numpy_helper.to_array(stored[name])
    return (str(array.dtype), array.shape, array.tobytes())


def _fold_weight(
    graph: onnx.GraphProto, node: onnx.NodeProto, stored: dict[str, onnx.TensorProto]
) -> None:
    """Replaces float weight + Q by an int8 initializer, in the range [-127, 127]."""
    scale = numpy_helper.to_array(stored[node.input[1]])
    weight = numpy_helper.to_array(stored[node.input[0]])
    name = node.input[0] + "_int8"
    while name in stored:
        name += "_"
    quantized = codes(weight, scale, axis_of(node, scale), WEIGHT_LOW)
    stored[name] = numpy_helper.from_array(quantized, name)
    for reader in tidy.nodes(graph):
        for index, value in enumerate(reader.input):
            if value == node.output[0]:
                reader.input[index] = name
    graph.node.remove(node)


def _rename(model: onnx.ModelProto) -> None:
    """Q and DQ nodes are called ``<module path>/Q`` and ``/DQ``, their results after the tensor."""
    short = {QUANTIZE: "Q", DEQUANTIZE: "DQ"}
    values: dict[str, str] = {}
    taken = {name for node in model.graph.node for name in (node.name, *node.output)}
    taken |= {each.name for each in (*model.graph.input, *model.graph.initializer)}
    outputs = {each.name for each in model.graph.output}
    for node in model.graph.node:
        if node.op_type not in short:
            continue
        path, _, _ = node.name.rpartition("/")
        node.name = _unique(f"{path}/{short[node.op_type]}".lstrip("/"), taken)
        if node.output[0] not in outputs:
            source = values.get(node.input[0], node.input[0]).removesuffix("_codes")
            end = "_codes" if node.op_type == QUANTIZE else "_dequantized"
            values[node.output[0]] = _unique(source + end, taken)
    tidy.rename_values(model, values)


def _unique(name: str, taken: set[str]) -> str:
    found, count = name, 0
    while found in taken:
        count += 1
        found = f"{name}_{count}"
    taken.add(found)
    return found


def quantizers(model: onnx.ModelProto) -> list[dict[str, Any]]:
    """Every quantizer of the graph: what is quantized, how finely, with which range."""
    stored = {each.name: each for each in model.graph.initializer}
    rows: list[dict[str, Any]] = []
    for node in model.graph.node:
        is_weight = node.op_type == DEQUANTIZE and node.input[0] in stored
        if not (is_weight or node.op_type == QUANTIZE) or node.input[1] not in stored:
            continue
        scale = numpy_helper.to_array(stored[node.input[1]])
        rows.append(
            {
                "name": node.name.rpartition("/")[0],
                "tensor": node.input[0],
                "kind": "weight" if is_weight else "activation",
                "granularity": "channel" if scale.ndim else "tensor",
                "axis": axis_of(node, scale),
                "scale": scale.tolist(),
                "amax": (scale * HIGH).tolist(),
            }
        )
    return rows
