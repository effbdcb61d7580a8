"""An ONNX file in half precision, for engines that compute in fp16.

TensorRT networks are strongly typed: fp16 is what the file says, not an option of the builder.
Inputs and outputs stay float32.
"""

from __future__ import annotations

from pathlib import Path

import onnx

from slimcli.artifacts.onnx import store
from slimcli.artifacts.onnx.runtime import is_quantized
from slimcli.errors import Problem, RecipeError, RunError

HALF_LIMIT = 1e-2
"""Relative limit for half precision: 11 bits of mantissa, errors of some tens of layers."""


def to_half(source: Path, path: Path) -> Path:
    """Writes the file with weights and arithmetic in fp16.

    Args:
        source: A float32 file.
        path: Where to write.

    Raises:
        RecipeError: The file is quantized; int8 and fp16 are different answers.
        RunError: The file cannot be converted.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel as Sorter

    model = onnx.load(source)
    if is_quantized(model):
        raise RecipeError(
            Problem(
                "E-EXPORT-FP16", "--fp16 is for models that are not quantized", str(source),
                received="a file with Q/DQ nodes", fix="drop --fp16: its heavy layers are int8",
            )
        )  # fmt: skip
    try:
        half = convert_float_to_float16(model, keep_io_types=True)
        Sorter.graph_topological_sort(half.graph)  # the converter appends its casts at the end
        onnx.checker.check_model(half, full_check=True)
    except Exception as error:  # the converter and onnx raise classes of their own
        what = f"cannot be converted to fp16: {str(error).splitlines()[0]}"
        raise RunError(Problem("E-EXPORT-FP16", what, str(source))) from error
    with store.staged(half, path) as staged:
        staged.publish({"made_from": source.name, "precision": "fp16", "sha256": staged.sha256})
    return path
