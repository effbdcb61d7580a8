"""The rules: id, severity, what they say and what to do.

Sources: NVIDIA's documentation of explicit quantization, the messages of its ONNX parser, and
builds of small graphs with TensorRT-RTX 1.7.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "info"]


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        severity: ``error``: TensorRT refuses the graph or computes something else. ``warning``:
            it accepts it and runs in float or does needless work. ``info``: good to know.
        title: The rule itself.
        fix: What to change.
    """

    severity: Severity
    title: str
    fix: str


RULES: dict[str, Rule] = {
    "Q1": Rule("error", "zero points are 0", "quantize symmetrically"),
    "Q2": Rule(
        "error",
        "zero points are int8; TensorRT reads uint8 as int8 and clips half the range",
        "use int8 codes with zero point 0",
    ),
    "Q3": Rule("error", "only tensors become int8; biases stay float", "leave the bias float"),
    "Q4": Rule(
        "error", "scales are constant, finite and positive", "calibrate, then store the scale"
    ),
    "Q5": Rule(
        "warning",
        "a per-tensor scale has rank 0; a vector of one counts as per axis and costs int8",
        "reshape the scale to ()",
    ),
    "Q6": Rule(
        "warning",
        "activations have one scale; a scale per channel makes the layer run in float",
        "quantize the activation per tensor",
    ),
    "Q7": Rule(
        "error",
        "conv weights have one scale, or one for each output channel on axis 0",
        "quantize the weight along axis 0",
    ),
    "Q8": Rule(
        "warning",
        "linear weights have one scale, or one for each output channel",
        "quantize the weight along its output channels",
    ),
    "Q9": Rule(
        "info",
        "transposed convolutions have one weight scale; TensorRT-RTX runs them in float",
        "quantize the weight per tensor, or leave this layer float",
    ),
    "Q10": Rule("error", "DQ has the scale and zero point of its Q", "use one scale for the pair"),
    "Q11": Rule(
        "warning", "a tensor is quantized once, not twice in a row", "remove the second pair"
    ),
    "P1": Rule(
        "warning",
        "both operands of a heavy layer are quantized, or neither",
        "quantize the other operand too, or skip this layer",
    ),
    "P2": Rule(
        "warning",
        "no Q/DQ between conv, norm and activation",
        "quantize after the activation",
    ),
    "P4": Rule(
        "warning",
        "the skip input of a residual sum is quantized, with the pair the conv reads",
        "quantize the skip input and share its Q/DQ",
    ),
    "P5": Rule(
        "warning",
        "the conv side of a residual sum stays float, so that conv and sum fuse",
        "remove the Q/DQ behind the conv",
    ),
    "P6": Rule(
        "warning",
        "a concat is quantized once behind it, or all its inputs with one scale",
        "quantize after the concat",
    ),
    "P9": Rule(
        "info",
        "grouped int8 convs are fast with output channels in multiples of 8",
        "measure this layer in float too",
    ),
    "T1": Rule("error", "Q/DQ needs opset 10, scales per axis need 13", "export with opset 19"),
    "T2": Rule("info", "weights are stored as int8, a quarter of the size", "store int8 weights"),
    "T3": Rule("warning", "scales are float32", "store the scale as float32"),
    "T4": Rule(
        "warning", "FP8 runs in matrix products, on SM89 and newer only", "use int8 for convs"
    ),
    "T5": Rule("info", "block quantization is for weights of matrix products", "use one scale"),
    "R1": Rule(
        "warning",
        "weight codes lie in [-127, 127]",
        "use a scale of max|weight| / 127",
    ),
}
