"""An ONNX file that is called like the module it was made from.

The user's own predict function and metric run on it unchanged, with onnxruntime underneath.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

from slimcli.artifacts.file_model import FileModel
from slimcli.errors import Problem, RunError
from slimcli.network.example import Example

STRUCTURE_KEY = "slim.structure"


class OnnxModel(FileModel):
    """A module without parameters whose forward runs an ONNX file on the CPU.

    Args:
        path: The file.
        threads: Threads onnxruntime may use; 0 leaves it to onnxruntime.

    Raises:
        RunError: The file cannot be read or run.
    """

    def __init__(self, path: str | Path, *, threads: int = 0) -> None:
        made, is_quantized = session(Path(path), threads=threads)
        metadata = made.get_modelmeta().custom_metadata_map
        super().__init__(
            Path(path),
            [each.name for each in made.get_inputs()],
            [each.name for each in made.get_outputs()],
            json.loads(metadata.get(STRUCTURE_KEY, "{}")),
        )
        self.session, self.is_quantized = made, is_quantized

    def run_flat(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Outputs in the order of ``output_names``."""
        feeds = {
            name: np.ascontiguousarray(tensor.detach().cpu().numpy())
            for name, tensor in zip(self.input_names, tensors, strict=True)
        }
        try:
            found = self.session.run(self.output_names, feeds)
        except Exception as error:  # onnxruntime raises a dozen classes of its own
            raise self.failed(f"onnxruntime failed: {_first_line(error)}", feeds) from error
        return [torch.from_numpy(np.array(each)) for each in found]

    def outputs_inside(self, model: nn.Module, example: Example) -> dict[str, Any]:
        """What each module's part of the file computes, module path -> output."""
        from slimcli.artifacts.onnx.locate import outputs_inside

        return outputs_inside(model, self.path, example)

    def expected_inputs(self) -> list[str]:
        """Name, type and shape of each input."""
        return [f"{each.name}: {each.type}{each.shape}" for each in self.session.get_inputs()]


def session(path: Path, *, threads: int = 0) -> tuple[onnxruntime.InferenceSession, bool]:
    """An onnxruntime session on the CPU, and whether the graph is quantized.

    Q/DQ graphs run exactly as written.

    With its optimisations on, onnxruntime replaces some Q/DQ patterns by int8 kernels that
    saturate on CPUs without VNNI, which costs up to 10 dB and is not what the graph says.

    Raises:
        RunError: The file is no model that onnxruntime can load.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    try:
        quantized = is_quantized(onnx.load(path, load_external_data=False))
        if quantized:
            level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.graph_optimization_level = level
        providers = ["CPUExecutionProvider"]
        made = onnxruntime.InferenceSession(str(path), options, providers=providers)
        return made, quantized
    except FileNotFoundError as error:
        raise RunError(Problem("E-ONNX-LOAD", "there is no such file", str(path))) from error
    except Exception as error:  # protobuf and onnxruntime raise classes of their own
        what = f"this is no ONNX file that onnxruntime can load: {_first_line(error)}"
        raise RunError(Problem("E-ONNX-LOAD", what, str(path))) from error


def is_quantized(model: onnx.ModelProto) -> bool:
    """Whether the graph holds Q/DQ nodes."""
    operators: list[str] = [node.op_type for node in model.graph.node]
    return "DequantizeLinear" in operators


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
