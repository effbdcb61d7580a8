"""ONNX files: written from a module and a real batch, checked, and run like the module.

``export`` writes, ``OnnxModel`` runs. The file needs nothing of ours to be used elsewhere.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import nn

from slimcli.artifacts import verify
from slimcli.artifacts.onnx import runtime
from slimcli.artifacts.onnx.export import DEFAULT_OPSET, OnnxReport, export
from slimcli.artifacts.onnx.runtime import OnnxModel

__all__ = ["DEFAULT_OPSET", "OnnxModel", "OnnxReport", "compare", "export", "is_quantized"]


def compare(
    model: nn.Module,
    path: str | Path,
    predict: Callable[[Any, Any], Any],
    batches: Iterable[Any],
    *,
    names: tuple[str, str] = ("deploy", "onnx"),
) -> verify.Seam:
    """The seam between a model and a file made from it, on real batches.

    Plain files must agree within the limit of ``verify.compare``, quantized ones within the noise
    of the model itself.
    """
    reference, file = (verify.runner(each, predict) for each in (model, OnnxModel(path)))
    return verify.compare(reference, file, batches, names=names)


def is_quantized(path: str | Path) -> bool:
    """Whether a file holds Q/DQ nodes."""
    import onnx

    return runtime.is_quantized(onnx.load(path, load_external_data=False))
