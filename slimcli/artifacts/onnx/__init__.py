"""ONNX files: written from a module and a real batch, checked, and run like the module.

``export`` writes, ``OnnxModel`` runs. The file needs nothing of ours to be used elsewhere.
"""

from slimcli.artifacts.onnx.export import DEFAULT_OPSET, OnnxReport, export
from slimcli.artifacts.onnx.runtime import OnnxModel

__all__ = ["DEFAULT_OPSET", "OnnxModel", "OnnxReport", "export"]
