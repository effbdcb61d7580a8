"""Looks into an ONNX file: what each module of the original computes there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from torch import nn

from slimcli.artifacts.onnx import tidy
from slimcli.artifacts.onnx.capture import capture
from slimcli.network.example import Example


def outputs_inside(model: nn.Module, path: Path, example: Example) -> dict[str, Any]:
    """What each module's part of a file computes, module path -> output.

    The output of a module is that of the last node that carries the module's name.

    Args:
        model: The module the file was made from.
        path: The file.
        example: A batch and the user's predict function.
    """
    file = onnx.load(path)
    known = {name for name, _ in model.named_modules() if name}
    values: dict[str, str] = {}
    for node in file.graph.node:
        fused = [each.value for each in node.metadata_props if each.key == tidy.OUTPUT_OF_KEY]
        module = fused[0] if fused else node.name.rpartition("/")[0]
        if module in known and node.output:
            values[module] = node.output[0]
    inside = _run(file, values, capture(model, example).inputs)
    return {module: [inside[name]] for module, name in values.items()}


def _run(file: onnx.ModelProto, values: dict[str, str], inputs: dict[str, Any]) -> dict[str, Any]:
    """Values inside the graph, by name."""
    names = list(dict.fromkeys(values.values()))
    present = {each.name for each in file.graph.output}
    for name in names:
        if name not in present:
            file.graph.output.append(onnx.ValueInfoProto(name=name))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        file.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    wanted = {each.name for each in session.get_inputs()}
    feeds = {name: each.cpu().numpy() for name, each in inputs.items() if name in wanted}
    return dict(zip(names, session.run(names, feeds), strict=True))
