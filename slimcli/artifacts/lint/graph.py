"""A read-only view of an ONNX graph: who makes a value, who reads it, what is constant."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
HEAVY = ("Conv", "ConvTranspose", "Gemm", "MatMul")
COMMUTING = (
    "MaxPool", "Pad", "Transpose", "Resize", "Reshape", "Flatten", "Squeeze", "Unsqueeze",
    "Identity", "Slice", "Dropout",
)  # fmt: skip
ACTIVATIONS = ("Relu", "LeakyRelu", "PRelu", "Clip", "HardSwish", "HardSigmoid", "Elu", "Selu")
Array = np.ndarray[Any, Any]


class Graph:
    """The main graph of a model, indexed."""

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.opset = next((each.version for each in model.opset_import if not each.domain), 0)
        self.nodes: list[onnx.NodeProto] = list(graph.node)
        self.stored = {each.name: each for each in graph.initializer}
        self.outputs = {each.name for each in graph.output}
        self.producers = {name: node for node in self.nodes for name in node.output}
        self.consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)

    def constant(self, name: str) -> Array | None:
        """The value of an initializer or Constant node; None if it is computed or unreadable."""
        if name in self.stored:
            return _array(self.stored[name])
        node = self.producers.get(name)
        if node is not None and node.op_type == "Identity":
            return self.constant(node.input[0])
        if node is not None and node.op_type == "Constant":
            value = next((each for each in node.attribute if each.name == "value"), None)
            return None if value is None else _array(value.t)
        return None

    def of_type(self, *operators: str) -> list[onnx.NodeProto]:
        """Nodes of these types, in order."""
        return [node for node in self.nodes if node.op_type in operators]

    def quantizers(self) -> list[onnx.NodeProto]:
        """All Q and DQ nodes."""
        return self.of_type(QUANTIZE, DEQUANTIZE)

    def scale(self, node: onnx.NodeProto) -> Array | None:
        """The constant scale of a Q or DQ node."""
        return self.constant(node.input[1])

    def zero_point(self, node: onnx.NodeProto) -> Array | None:
        """The constant zero point; None if it is left out (0) or computed."""
        return self.constant(node.input[2]) if has_input(node, 2) else None

    def through(self, name: str, operators: tuple[str, ...]) -> onnx.NodeProto | None:
        """The node that makes a value, looking through operators of these types."""
        node = self.producers.get(name)
        while node is not None and node.op_type in operators and node.input:
            node = self.producers.get(node.input[0])
        return node

    def dequantizer(self, name: str) -> onnx.NodeProto | None:
        """The DQ a value comes from, through ops that commute with quantization.

        A concat counts as its first input if all its inputs are dequantized.
        """
        node = self.through(name, COMMUTING)
        if node is not None and node.op_type == "Concat":
            parts = [self.dequantizer(each) for each in node.input]
            return parts[0] if all(parts) else None
        return node if node is not None and node.op_type == DEQUANTIZE else None

    def quantized_value(self, dequantizer: onnx.NodeProto) -> str:
        """The float value a Q/DQ pair quantizes; the int8 constant if there is no Q."""
        node = self.producers.get(dequantizer.input[0])
        is_pair = node is not None and node.op_type == QUANTIZE
        return str(node.input[0] if is_pair and node is not None else dequantizer.input[0])

    def is_weight(self, dequantizer: onnx.NodeProto) -> bool:
        """Whether a DQ (or Q) stands for a constant tensor."""
        value = dequantizer.input[0]
        if dequantizer.op_type == DEQUANTIZE:
            value = self.quantized_value(dequantizer)
        return self.constant(value) is not None

    def readers(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Nodes that read what a node makes, through DQ and ops that commute."""
        found: list[onnx.NodeProto] = []
        open_values = list(node.output)
        while open_values:
            for reader in self.consumers.get(open_values.pop(), []):
                if reader.op_type in (*COMMUTING, DEQUANTIZE):
                    open_values += list(reader.output)
                else:
                    found.append(reader)
        return found

    def is_int8(self, node: onnx.NodeProto) -> bool:
        """Whether both operands of a heavy node are dequantized."""
        return all(self.dequantizer(name) is not None for name in list(node.input)[:2])


def has_input(node: onnx.NodeProto, index: int) -> bool:
    """Whether an optional input is there."""
    return len(node.input) > index and bool(node.input[index])


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """Value of an attribute."""
    for each in node.attribute:
        if each.name == name:
            return onnx.helper.get_attribute_value(each)
    return default


def axis(node: onnx.NodeProto) -> int:
    """The axis attribute of a Q or DQ node."""
    return int(attribute(node, "axis", 1))


def _array(tensor: onnx.TensorProto) -> Array | None:
    try:
        return numpy_helper.to_array(tensor)
    except (ValueError, TypeError):  # a type numpy has no name for
        return None
