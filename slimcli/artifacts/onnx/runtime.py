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

from slimcli.artifacts import nested
from slimcli.artifacts.onnx.capture import bind_names
from slimcli.errors import Problem, RunError

STRUCTURE_KEY = "slim.structure"


class OnnxModel(nn.Module):
    """A module without parameters whose forward runs an ONNX file on the CPU.

    Args:
        path: The file. Without our metadata its inputs are taken by position or by name and its
            outputs come as one tensor or a tuple.
        threads: Threads onnxruntime may use; 0 leaves it to onnxruntime.

    Raises:
        RunError: The file cannot be read or run.
    """

    def __init__(self, path: str | Path, *, threads: int = 0) -> None:
        super().__init__()
        self.path = Path(path)
        self.session, self.is_quantized = session(self.path, threads=threads)
        self.input_names = [each.name for each in self.session.get_inputs()]
        self.output_names = [each.name for each in self.session.get_outputs()]
        metadata = self.session.get_modelmeta().custom_metadata_map
        self.structure: dict[str, Any] = json.loads(metadata.get(STRUCTURE_KEY, "{}"))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs in the structure of the original module, on the device of the first input.

        Raises:
            RunError: The arguments are not those the file was made for, or onnxruntime fails.
        """
        tensors = self._tensors(args, kwargs)
        device = tensors[0].device if tensors else torch.device("cpu")
        outputs = [torch.from_numpy(each).to(device) for each in self.run_flat(tensors)]
        if self.structure:
            return nested.rebuild(self.structure["result"], outputs)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def run_flat(self, tensors: list[torch.Tensor]) -> list[np.ndarray[Any, Any]]:
        """Output arrays, in the order of ``output_names``, for inputs in that of the file."""
        feeds = {
            name: np.ascontiguousarray(tensor.detach().cpu().numpy())
            for name, tensor in zip(self.input_names, tensors, strict=True)
        }
        try:
            found = self.session.run(self.output_names, feeds)
        except Exception as error:  # onnxruntime raises a dozen classes of its own
            raise self._failed(f"onnxruntime failed: {_first_line(error)}", feeds) from error
        return [np.array(each) for each in found]

    def _tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        if not self.structure:
            bound = bind_names(self.input_names, args, kwargs)
            if set(bound) != set(self.input_names):
                raise self._failed(f"it has the inputs {', '.join(self.input_names)}", bound)
            return [torch.as_tensor(bound[name]) for name in self.input_names]
        bound = bind_names(self.structure["parameters"], args, kwargs)
        spec, tensors = nested.describe(bound)
        if not _same_call(spec, self.structure["arguments"]):
            raise self._failed("it was made for a call with other arguments", bound)
        # An input the exporter found unused is not in the file.
        order = {name: index for index, name in enumerate(self.structure["inputs"])}
        return [tensors[order[name]][1] for name in self.input_names]

    def _failed(self, what: str, received: dict[str, Any]) -> RunError:
        expected = [f"{each.name}: {each.type}{each.shape}" for each in self.session.get_inputs()]
        got = [
            f"{path}: {tuple(leaf.shape)}" if nested.is_tensor(leaf) else f"{path}: {leaf!r:.30}"
            for path, leaf in nested.leaves(received)
        ]
        return RunError(
            Problem(
                "E-ONNX-RUN",
                f"{self.path.name} cannot run this batch: {what}",
                str(self.path),
                ", ".join(expected),
                ", ".join(got),
            )
        )


def _same_call(ours: nested.Spec, theirs: nested.Spec) -> bool:
    """Whether two calls have the same arguments, in any order of keywords."""
    if ours["kind"] != theirs["kind"]:
        return False
    if "items" in ours:
        left, right = dict(ours["items"]), dict(theirs["items"])
        return list(left) == list(right) and all(_same_call(left[k], right[k]) for k in left)
    return ours["kind"] == "tensor" or bool(ours["value"] == theirs["value"])


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
