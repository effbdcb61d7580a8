"""Rules about where Q/DQ pairs stand: operands, activations, sums, concats (P rules)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx

from slimcli.artifacts.lint.graph import (
    ACTIVATIONS,
    HEAVY,
    QUANTIZE,
    Graph,
    attribute,
)
from slimcli.artifacts.lint.quantizers import Broken


def placement_findings(graph: Graph) -> Iterator[Broken]:
    """Every misplaced or missing Q/DQ pair; none in a graph without any."""
    if not graph.quantizers():
        return
    for node in graph.of_type(*HEAVY):
        yield from _operands(graph, node)
    for node in graph.of_type(QUANTIZE):
        yield from _between(graph, node)
    for node in graph.of_type("Add"):
        yield from _residual(graph, node)
    for node in graph.of_type("Concat"):
        yield from _concat(graph, node)


def _operands(graph: Graph, node: onnx.NodeProto) -> Iterator[Broken]:
    quantized = [graph.dequantizer(name) is not None for name in list(node.input)[:2]]
    if any(quantized) and not all(quantized):
        which, other = ("first", "second") if quantized[0] else ("second", "first")
        yield "P1", node, f"the {which} operand is quantized, the {other} is not"
    groups = int(attribute(node, "group", 1))
    if all(quantized) and groups > 1:
        weight = graph.dequantizer(node.input[1])
        stored = graph.constant(graph.quantized_value(weight)) if weight is not None else None
        channels = stored.shape[0] if stored is not None else 0
        if channels % 8:
            yield "P9", node, f"{channels} output channels in {groups} groups"


def _between(graph: Graph, node: onnx.NodeProto) -> Iterator[Broken]:
    """Q behind a conv or norm whose reader is the norm or activation that would be fused."""
    made = graph.producers.get(node.input[0])
    fused = ("Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization")
    if made is None or made.op_type not in fused:
        return
    for dequantizer in graph.consumers.get(node.output[0], []):
        for reader in graph.consumers.get(dequantizer.output[0], []):
            if reader.op_type in (*ACTIVATIONS, "BatchNormalization"):
                yield "P2", node, f"stands between {made.op_type} and {reader.op_type}"


def _conv_behind(graph: Graph, name: str) -> onnx.NodeProto | None:
    """The int8 conv or linear whose plain output (norm allowed) a value is, for one reader only.

    What others read as well is stored anyway, so an addition is not fused with its convolution.
    """
    node = graph.producers.get(name)
    while len(graph.consumers.get(name, [])) == 1 and node is not None:
        if node.op_type not in ("BatchNormalization", "Identity"):
            break
        name = node.input[0]
        node = graph.producers.get(name)
    if len(graph.consumers.get(name, [])) != 1:
        return None
    return node if node is not None and node.op_type in HEAVY and graph.is_int8(node) else None


def _residual(graph: Graph, node: onnx.NodeProto) -> Iterator[Broken]:
    """A sum with an int8 conv in it: its other input should be int8, the conv's output float."""
    if any(graph.constant(name) is not None for name in node.input):
        return
    pairs = [graph.dequantizer(name) for name in node.input]
    convs = [_conv_behind(graph, name) for name in node.input]
    behind = [
        None if pair is None else _conv_behind(graph, graph.quantized_value(pair)) for pair in pairs
    ]
    if all(pairs) and any(behind):
        conv = next(each for each in behind if each is not None)
        yield "P5", node, f"the output of {conv.name or conv.op_type} is quantized too"
        return
    if any(behind) and any(convs):
        return  # the sum of two convs: one is added in the epilogue of the other
    if any(behind):
        yield "P4", node, "the conv side is quantized, the skip input is not"
        return
    if not any(convs):
        return
    if not any(pairs):
        both = all(convs)
        yield (
            "P4",
            node,
            "neither input is quantized" if both else "the skip input is not quantized",
        )
        return
    skip = next(pair for pair in pairs if pair is not None)
    yield from _unshared(graph, node, skip)


def _unshared(graph: Graph, node: onnx.NodeProto, skip: onnx.NodeProto) -> Iterator[Broken]:
    """The skip is quantized with another scale than the same tensor has for a conv."""
    value, scale = graph.quantized_value(skip), graph.scale(skip)
    for reader in graph.consumers.get(value, []):
        if reader.op_type != QUANTIZE:
            continue
        other = graph.scale(reader)
        if scale is not None and other is not None and not np.array_equal(scale, other):
            yield "P4", node, "the skip input has another scale than the conv reads"
            return


def _concat(graph: Graph, node: onnx.NodeProto) -> Iterator[Broken]:
    pairs = [graph.dequantizer(name) for name in node.input]
    found = [each for each in pairs if each is not None]
    if not found:
        return
    readers = graph.readers(node)
    if not any(each.op_type in (*HEAVY, QUANTIZE) for each in readers):
        return
    scales = {str(graph.scale(each)) for each in found}
    if len(found) < len(pairs):
        yield "P6", node, f"{len(found)} of {len(pairs)} inputs are quantized"
    elif len(scales) > 1:
        yield "P6", node, f"its inputs have {len(scales)} scales"
