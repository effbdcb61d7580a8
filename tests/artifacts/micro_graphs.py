"""The smallest graph that breaks each rule, beside one that keeps it."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SHAPE = (4, 16, 8, 8)


class Micro:
    """Builds a graph line by line; ``x`` is a [4, 16, 8, 8] image."""

    def __init__(self, opset: int = 19) -> None:
        self.opset, self.nodes, self.stored, self.count = opset, [], [], 0
        self.random = np.random.default_rng(0)

    def const(self, value, dtype=np.float32) -> str:
        self.count += 1
        array = np.asarray(value, dtype=dtype)
        self.stored.append(numpy_helper.from_array(array, f"c{self.count}"))
        return f"c{self.count}"

    def op(self, kind: str, *inputs: str, **attributes) -> str:
        self.count += 1
        output = f"v{self.count}"
        name = f"{kind}_{self.count}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=name, **attributes))
        return output

    def q(self, value, scale=0.05, zero=0, dtype=np.int8, scale_type=np.float32, **attributes):
        zeros = np.full(np.shape(scale), zero)
        extra = [] if zero is None else [self.const(zeros, dtype)]
        return self.op("QuantizeLinear", value, self.const(scale, scale_type), *extra, **attributes)

    def dq(self, value, scale=0.05, zero=0, dtype=np.int8, scale_type=np.float32, **attributes):
        zeros = np.full(np.shape(scale), zero)
        extra = [] if zero is None else [self.const(zeros, dtype)]
        return self.op(
            "DequantizeLinear", value, self.const(scale, scale_type), *extra, **attributes
        )

    def qdq(self, value, scale=0.05, zero=0, dtype=np.int8, **attributes) -> str:
        return self.dq(self.q(value, scale, zero, dtype, **attributes), scale, zero, dtype,
                       **attributes)  # fmt: skip

    def float_weight(self, *shape: int) -> str:
        return self.const(self.random.uniform(-1, 1, shape))

    def weight(self, *shape: int, scale=0.01, low=-127, **attributes) -> str:
        codes = self.random.integers(low, 128, shape)
        codes.reshape(-1)[0] = low
        return self.dq(self.const(codes, np.int8), scale, **attributes)

    def conv(self, value: str, weight: str | None = None, **attributes) -> str:
        return self.op("Conv", value, weight or self.weight(16, 16, 1, 1), **attributes)

    def norm(self, value: str) -> str:
        ones, zeros = self.const(np.ones(16)), self.const(np.zeros(16))
        return self.op("BatchNormalization", value, ones, zeros, zeros, ones)

    def model(self, *outputs: str) -> onnx.ModelProto:
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)
        made = [helper.make_tensor_value_info(each, TensorProto.FLOAT, None) for each in outputs]
        graph = helper.make_graph(self.nodes, "micro", [x], made, self.stored)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)])
        model.ir_version = 10
        inferred = {v.name: v.type for v in onnx.shape_inference.infer_shapes(model).graph.output}
        for each in model.graph.output:
            each.type.CopyFrom(inferred[each.name])
            each.type.tensor_type.shape.SetInParent()
        return model


def conv_of(make_input, make_weight=None, opset=19):
    """A graph of one conv on a quantized input."""
    net = Micro(opset)
    value = make_input(net)
    return net.model(net.conv(value, make_weight(net) if make_weight else None))


def linear(kind: str, scale, axis: int | None, **attributes):
    """Pool, flatten, quantized Gemm or MatMul with 16 inputs and 8 outputs."""
    net = Micro()
    flat = net.op("Flatten", net.op("GlobalAveragePool", "x"))
    shape = (8, 16) if attributes.get("transB") else (16, 8)
    extra = {} if axis is None else {"axis": axis}
    return net.model(
        net.op(kind, net.qdq(flat), net.weight(*shape, scale=scale, **extra), **attributes)
    )


def transposed(axis: int):
    """A MatMul that reads a weight stored [outputs, inputs] behind a Transpose."""
    net = Micro()
    flat = net.op("Flatten", net.op("GlobalAveragePool", "x"))
    weight = net.weight(8, 16, scale=CHANNELS if axis else CHANNELS[:8], axis=axis)
    return net.model(net.op("MatMul", net.qdq(flat), net.op("Transpose", weight, perm=[1, 0])))


def deconv(scale, **attributes):
    net = Micro()
    weight = net.weight(16, 16, 2, 2, scale=scale, **attributes)
    return net.model(net.op("ConvTranspose", net.qdq("x"), weight, strides=[2, 2]))


def bias(quantized: bool):
    net = Micro()
    value, weight = net.qdq("x"), net.weight(16, 16, 1, 1)
    stored = net.const(np.ones(16), np.int32 if quantized else np.float32)
    if quantized:
        stored = net.dq(stored, 0.0005, 0, np.int32)
    return net.model(net.op("Conv", value, weight, stored))


def computed_scale():
    net = Micro()
    scale = net.op("ReduceMax", net.op("Abs", "x"), keepdims=0)
    zero = net.const(0, np.int8)
    pair = net.op("DequantizeLinear", net.op("QuantizeLinear", "x", scale, zero), scale, zero)
    return net.model(net.conv(pair))


def unequal_pair():
    net = Micro()
    return net.model(net.conv(net.dq(net.q("x", 0.05), 0.07)))


def operands(first: bool, second: bool):
    net = Micro()
    value = net.qdq("x") if first else "x"
    return net.model(
        net.conv(value, net.weight(16, 16, 1, 1) if second else net.float_weight(16, 16, 1, 1))
    )


def activation(between: bool):
    net = Micro()
    value = net.conv(net.qdq("x"))
    value = net.op("Relu", net.qdq(value)) if between else net.qdq(net.op("Relu", value))
    return net.model(net.conv(value))


def norm(between: bool):
    net = Micro()
    value = net.conv(net.qdq("x"))
    value = net.norm(net.qdq(value)) if between else net.norm(value)
    return net.model(net.conv(net.qdq(net.op("Relu", value))))


def residual(kind: str):
    """A sum whose skip is float, shared or of another scale, or with both sides quantized."""
    net = Micro()
    start = net.op("Relu", net.conv(net.qdq("x")))
    read = net.qdq(start)
    inner = net.conv(net.qdq(net.op("Relu", net.conv(read))))
    inner = net.qdq(inner) if kind in ("both", "conv") else inner
    skip = {
        "float": lambda: start,
        "conv": lambda: start,
        "shared": lambda: read,
        "both": lambda: read,
        "other": lambda: net.qdq(start, 0.09),
    }[kind]()
    total = net.op("Relu", net.op("Add", inner, skip))
    return net.model(net.conv(net.qdq(total)))


def shortcut(quantized: bool):
    """The sum of two convs, as at the start of a ResNet stage."""
    net = Micro()
    read = net.qdq("x")
    left, right = net.conv(read), net.conv(read)
    right = net.qdq(right) if quantized else right
    return net.model(net.conv(net.qdq(net.op("Relu", net.op("Add", left, right)))))


def concat(first: float | None, second: float | None):
    """A concat of two convs; None: not quantized in front of it but behind."""
    net = Micro()
    read = net.qdq("x")
    branches = [net.op("Relu", net.conv(read)), net.op("Relu", net.conv(read))]
    scales = (first, second)
    parts = [b if s is None else net.qdq(b, s) for b, s in zip(branches, scales, strict=True)]
    joined = net.op("Concat", *parts, axis=1)
    value = joined if first and second else net.qdq(joined)
    return net.model(net.conv(value, net.weight(16, 32, 1, 1)))


def grouped(channels: int):
    net = Micro()
    weight = net.weight(channels, 4, 3, 3)
    return net.model(net.conv(net.qdq("x"), weight, group=4))


def stored(as_int8: bool):
    net = Micro()
    weight = net.weight(16, 16, 1, 1) if as_int8 else net.qdq(net.float_weight(16, 16, 1, 1))
    return net.model(net.conv(net.qdq("x"), weight))


def clipped():
    net = Micro()
    return net.model(net.conv(net.qdq("x"), net.qdq(net.float_weight(16, 16, 1, 1), 0.001)))


def float8():
    net = Micro()
    zero = onnx.helper.make_tensor("z8", TensorProto.FLOAT8E4M3FN, [], [0.0])
    net.stored.append(zero)
    scale = net.const(0.05)
    pair = net.op("DequantizeLinear", net.op("QuantizeLinear", "x", scale, "z8"), scale, "z8")
    weight = net.float_weight(16, 16, 1, 1)
    weight = net.op("DequantizeLinear", net.op("QuantizeLinear", weight, scale, "z8"), scale, "z8")
    return net.model(net.conv(pair, weight))


def blocks(size: int):
    net = Micro(opset=21)
    flat = net.op("Flatten", net.op("GlobalAveragePool", "x"))
    if size:
        shape = (16 // size, 8)
        scale = np.full(shape, 0.01)
        weight = net.weight(16, 8, scale=scale, axis=0, block_size=size)
    else:
        weight = net.weight(16, 8)
    return net.model(net.op("MatMul", net.qdq(flat), weight))


def half(dtype):
    net = Micro()
    x = net.op("Cast", "x", to=TensorProto.FLOAT16 if dtype == np.float16 else TensorProto.FLOAT)
    value = net.dq(net.q(x, scale_type=dtype), scale_type=dtype)
    weight = net.weight(16, 16, 1, 1, scale_type=dtype)
    return net.model(net.op("Cast", net.conv(value, weight), to=TensorProto.FLOAT))


CHANNELS = np.linspace(0.005, 0.05, 16)
PAIRS = {
    "Q1": (lambda: conv_of(lambda n: n.qdq("x", zero=5)), lambda: conv_of(lambda n: n.qdq("x"))),
    "Q2": (
        lambda: conv_of(lambda n: n.qdq("x", dtype=np.uint8)),
        lambda: conv_of(lambda n: n.qdq("x", dtype=np.int8)),
    ),
    "Q3": (lambda: bias(True), lambda: bias(False)),
    "Q4": (
        lambda: conv_of(lambda n: n.qdq("x", -0.1)),
        lambda: conv_of(lambda n: n.qdq("x", 0.1)),
    ),
    "Q5": (
        lambda: conv_of(lambda n: n.qdq("x", [0.05])),
        lambda: conv_of(lambda n: n.qdq("x", 0.05)),
    ),
    "Q6": (
        lambda: conv_of(lambda n: n.qdq("x", CHANNELS, axis=1)),
        lambda: conv_of(lambda n: n.qdq("x")),
    ),
    "Q7": (
        lambda: conv_of(
            lambda n: n.qdq("x"), lambda n: n.weight(16, 16, 1, 1, scale=CHANNELS[:7], axis=0)
        ),
        lambda: conv_of(
            lambda n: n.qdq("x"), lambda n: n.weight(16, 16, 1, 1, scale=CHANNELS, axis=0)
        ),
    ),
    "Q8": (
        lambda: linear("MatMul", CHANNELS, 0),
        lambda: linear("MatMul", CHANNELS[:8], 1),
    ),
    "Q9": (lambda: deconv(CHANNELS, axis=1), lambda: stored(True)),
    "Q10": (unequal_pair, lambda: conv_of(lambda n: n.qdq("x"))),
    "Q11": (
        lambda: conv_of(lambda n: n.qdq(n.qdq("x", 0.05), 0.07)),
        lambda: conv_of(lambda n: n.qdq("x")),
    ),
    "P1": (lambda: operands(True, False), lambda: operands(False, False)),
    "P2": (lambda: activation(True), lambda: activation(False)),
    "P4": (lambda: residual("float"), lambda: residual("shared")),
    "P5": (lambda: residual("both"), lambda: residual("shared")),
    "P6": (lambda: concat(0.05, 0.09), lambda: concat(None, None)),
    "P9": (lambda: grouped(12), lambda: grouped(16)),
    "T1": (
        lambda: conv_of(
            lambda n: n.qdq("x"), lambda n: n.weight(16, 16, 1, 1, scale=CHANNELS), opset=11
        ),
        lambda: conv_of(lambda n: n.qdq("x"), opset=11),
    ),
    "T2": (lambda: stored(False), lambda: stored(True)),
    "T3": (lambda: half(np.float16), lambda: half(np.float32)),
    "T4": (float8, lambda: conv_of(lambda n: n.qdq("x"))),
    "T5": (lambda: blocks(8), lambda: blocks(0)),
    "R1": (
        lambda: conv_of(lambda n: n.qdq("x"), lambda n: n.weight(16, 16, 1, 1, low=-128)),
        lambda: conv_of(lambda n: n.qdq("x"), lambda n: n.weight(16, 16, 1, 1)),
    ),
}

MORE_BAD = {
    "Q1 in uint8": ("Q1", lambda: conv_of(lambda n: n.qdq("x", zero=128, dtype=np.uint8))),
    "Q2 by default": ("Q2", lambda: conv_of(lambda n: n.dq(n.q("x", zero=None), zero=None))),
    "Q3 int16": ("Q3", lambda: conv_of(lambda n: n.qdq("x", dtype=np.int16))),
    "Q4 computed": ("Q4", computed_scale),
    "Q4 zero": ("Q4", lambda: conv_of(lambda n: n.qdq("x", 0.0))),
    "Q7 axis": (
        "Q7",
        lambda: conv_of(
            lambda n: n.qdq("x"), lambda n: n.weight(16, 16, 1, 1, scale=CHANNELS, axis=1)
        ),
    ),
    "Q8 Gemm": ("Q8", lambda: linear("Gemm", CHANNELS, 1, transB=1)),
    "Q8 transposed": ("Q8", lambda: transposed(1)),
    "P1 weight only": ("P1", lambda: operands(False, True)),
    "P2 norm": ("P2", lambda: norm(True)),
    "P4 other scale": ("P4", lambda: residual("other")),
    "P4 wrong side": ("P4", lambda: residual("conv")),
    "P4 shortcut": ("P4", lambda: shortcut(False)),
    "P6 one side": ("P6", lambda: concat(0.05, None)),
    "R1 clipped": ("R1", clipped),
}

MORE_GOOD = {
    "Gemm per channel": lambda: linear("Gemm", CHANNELS[:8], 0, transB=1),
    "MatMul behind Transpose": lambda: transposed(0),
    "norm in the middle": lambda: norm(False),
    "shortcut": lambda: shortcut(True),
    "equal scales in front of concat": lambda: concat(0.05, 0.05),
    "pool between": lambda: conv_of(
        lambda n: n.op("MaxPool", n.qdq("x"), kernel_shape=[2, 2], strides=[2, 2])
    ),
    "no quantization": lambda: operands(False, False),
}
