"""Writes a model to an ONNX file that is checked before it has its name.

Order: catch the forward call, find out whether the batch is free, export, tidy, check the graph,
run it with onnxruntime for two batch sizes, write file and sidecar. A file that disagrees with its
module is kept as ``<name>.failed``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

import slimcli
from slimcli.artifacts import lint, noise, opsets, verify
from slimcli.artifacts.arithmetic import float32_settings
from slimcli.artifacts.onnx import qdq, store, tidy
from slimcli.artifacts.onnx.capture import (
    Batching,
    Capture,
    FlatModel,
    batching,
    capture,
    parameter_names,
    resized,
)
from slimcli.artifacts.onnx.codes import (
    AGREEMENT_MINIMUM,
    DISTANCE_MAXIMUM,
    CodeReport,
    compare_codes,
)
from slimcli.artifacts.onnx.runtime import STRUCTURE_KEY, OnnxModel, is_quantized
from slimcli.artifacts.onnx.torch_export import Graph, check_opset, to_graph
from slimcli.errors import Problem, RunError, VerificationError
from slimcli.network.evaluating import evaluating
from slimcli.network.example import Example, own_copy
from slimcli.network.quantize import fake_quant, fold

DEFAULT_OPSET = opsets.DEFAULT


@dataclass(frozen=True)
class OnnxReport:
    """What was written, and how far it is from the module.

    Attributes:
        path: The ONNX file; its sidecar is ``<path>.json``.
        opset: ONNX opset version.
        exporter: ``dynamo`` or ``torchscript``.
        exporter_reason: Why it is not ``dynamo``.
        is_batch_dynamic: Whether the file takes any number of samples.
        batch_reason: Why it does not.
        is_quantized: Whether it holds Q/DQ nodes.
        inputs: Name, dtype and shape of each input.
        outputs: Name, dtype and shape of each output.
        seam: Module against file, on the example batch.
        file_bytes: Size of the file, external data included.
        sha256: Of the file.
        log: What the exporters said.
        quantizers: Name, tensor, granularity and scale of each quantizer.
        codes: Module against file, code by code; None without quantizers.
        findings: What the linter says; nothing that a runtime would refuse or misread.
        folded_norms: Quantized layer -> the batch norm that its weight scale and bias hold.
    """

    path: Path
    opset: int
    exporter: str
    exporter_reason: str
    is_batch_dynamic: bool
    batch_reason: str
    is_quantized: bool
    inputs: tuple[dict[str, Any], ...]
    outputs: tuple[dict[str, Any], ...]
    seam: verify.Seam
    file_bytes: int
    sha256: str
    log: tuple[str, ...] = ()
    quantizers: tuple[dict[str, Any], ...] = ()
    codes: CodeReport | None = None
    findings: tuple[lint.Finding, ...] = ()
    folded_norms: Mapping[str, str] = field(default_factory=dict)


def export(
    model: nn.Module,
    example: Example,
    path: str | Path,
    *,
    opset: int = DEFAULT_OPSET,
    metadata: Mapping[str, str] | None = None,
) -> OnnxReport:
    """Writes the model's forward, as ``example`` calls it, to an ONNX file.

    Args:
        model: The model; its mode and its tensors are left as they are.
        example: A real batch and the user's predict function. The predict function decides with
            which arguments the model is called; what it does before and after stays in Python.
        path: Where to write.
        opset: ONNX opset version.
        metadata: Texts to store in the file (recipe hash and the like).

    Returns:
        The report; ``report.seam.ok`` is true.

    Raises:
        RecipeError: The opset is not one that is written.
        RunError: The model cannot be exported, with the reason; nothing is left behind.
        VerificationError: The graph computes something else; kept as ``<path>.failed``.
    """
    path = Path(path)
    check_opset(opset)
    call = capture(model, example)
    flat = FlatModel(model, call.args, call.kwargs)
    batch = batching(flat, call.inputs)
    with float32_settings(), evaluating(flat):
        graph = _graph(flat, call, batch, opset)
    tidy.tidy(graph.model, [name for name, _ in model.named_modules() if name])
    norms = fold.folded_norms(model)
    tidy.note_outputs(graph.model, norms)
    _require_pairs(model, graph)
    quantizers = qdq.finish(graph.model) if is_quantized(graph.model) else []
    findings = tuple(lint.lint(graph.model))
    _add_metadata(graph.model, call, parameter_names(model), dict(metadata or {}))
    with store.staged(graph.model, path) as staged:
        _check(staged.path)
        seam = check_numbers(flat, call, batch, OnnxModel(staged.path))
        codes = compare_codes(model, staged.path, example) if quantizers else None
        problem = _problem(path, seam, codes)
        if problem:
            failed = staged.keep_as_failed()
            raise VerificationError(replace(problem, where=str(failed)))
        report = _report(staged, opset, graph, batch, seam)
        report = replace(report, quantizers=tuple(quantizers), codes=codes, findings=findings)
        report = replace(report, folded_norms=norms)
        staged.publish(_sidecar(report))
    return report


def _graph(flat: FlatModel, call: Capture, batch: Batching, opset: int) -> Graph:
    if batch.is_dynamic:
        inputs, batched = resized(call.inputs, batch.names, 2), batch.names
    else:
        inputs, batched = own_copy(call.inputs), ()
    return to_graph(flat, inputs, list(call.outputs), batched, opset)


def _require_pairs(model: nn.Module, graph: Graph) -> None:
    """A trace of fake quantization is float arithmetic: right numbers, but no int8 engine.

    Raises:
        RunError: The model has quantizers and the graph no Q/DQ nodes.
    """
    if fake_quant.quantizers(model) and not is_quantized(graph.model):
        raise RunError(
            Problem(
                "E-ONNX-EXPORT",
                "no ONNX file: the quantizers of the model became float arithmetic",
                expected="QuantizeLinear and DequantizeLinear nodes",
                received=f"none from the {graph.exporter} exporter. {graph.reason}".strip(),
                fix="export what the algorithm's deploy returns",
            )
        )


def _add_metadata(
    model: onnx.ModelProto, call: Capture, parameters: list[str], metadata: dict[str, str]
) -> None:
    structure = {
        "parameters": parameters,
        "arguments": call.arguments,
        "inputs": list(call.inputs),
        "result": call.result,
    }
    entries = {"slim.version": slimcli.__version__, STRUCTURE_KEY: json.dumps(structure)}
    onnx.helper.set_model_props(model, {**entries, **metadata})


def _check(path: Path) -> None:
    """Runs onnx's full check.

    Raises:
        RunError: The graph is not valid ONNX.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # onnx raises classes of its C++ side
        what = f"the exported graph is not valid ONNX: {str(error).splitlines()[0]}"
        raise RunError(Problem("E-ONNX-INVALID", what)) from error


def check_numbers(
    flat: FlatModel, call: Capture, batch: Batching, onnx_model: OnnxModel
) -> verify.Seam:
    """Compares file and module on the captured inputs; if the batch is free, for three sizes."""
    sizes = (1, 2, 3) if batch.is_dynamic else ()
    trials = [resized(call.inputs, batch.names, size) for size in sizes] or [call.inputs]
    index = {name: position for position, name in enumerate(call.inputs)}

    def module(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        with evaluating(flat):
            return dict(zip(call.outputs, flat(*own_copy(list(inputs.values()))), strict=True))

    def file(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        tensors = list(inputs.values())
        ordered = [tensors[index[name]] for name in onnx_model.input_names]
        return dict(zip(onnx_model.output_names, onnx_model.run_flat(ordered), strict=True))

    if onnx_model.is_quantized:

        def predict(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
            return dict(zip(call.outputs, model(*inputs.values()), strict=True))

        return noise.compare_quantized(flat, file, predict, trials, names=("module", "onnx"))
    return verify.compare(module, file, trials, names=("module", "onnx"))


def _problem(path: Path, seam: verify.Seam, codes: CodeReport | None) -> Problem | None:
    """What is wrong with the numbers of a file; None if nothing is."""
    what = f"{path.name} computes something else than the model it was made from"
    if codes is not None and not codes.ok:
        worst = max(codes.rows, key=lambda row: (row.distance, 1 - row.agreement))
        return Problem(
            "E-VERIFY-CODES",
            f"{what}: int8 codes differ at {worst.module}",
            expected=f"{AGREEMENT_MINIMUM:.1%} equal and never more than {DISTANCE_MAXIMUM} apart",
            received=f"{worst.agreement:.2%} equal, {worst.distance} apart",
        )
    if not seam.ok:
        return Problem(
            "E-VERIFY-ONNX",
            what,
            expected=f"a difference of at most {seam.limit:.1e} at {seam.where or 'the output'}",
            received="; ".join([f"{seam.max_abs:.1e}", *seam.notes]),
            fix="a forward that draws random numbers in eval mode can't be exact",
        )
    return None


def _broken_rule(path: Path, findings: tuple[lint.Finding, ...]) -> Problem | None:
    """The first finding that a runtime would refuse or misread."""
    for each in lint.errors(findings):
        what = f"{path.name} breaks rule {each.rule} at {each.node}: {each.message}"
        return Problem("E-LINT", what, expected=lint.RULES[each.rule].title, fix=each.fix)
    return None


def _report(
    staged: store.Staged, opset: int, graph: Graph, batch: Batching, seam: verify.Seam
) -> OnnxReport:
    return OnnxReport(
        staged.final,
        opset,
        graph.exporter,
        graph.reason,
        batch.is_dynamic,
        batch.reason,
        is_quantized(graph.model),
        tuple(_tensor_type(each) for each in graph.model.graph.input),
        tuple(_tensor_type(each) for each in graph.model.graph.output),
        seam,
        staged.file_bytes,
        staged.sha256,
        graph.log,
    )


def _tensor_type(value: onnx.ValueInfoProto) -> dict[str, Any]:
    tensor = value.type.tensor_type
    shape = [each.dim_param or each.dim_value for each in tensor.shape.dim]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    return {"name": value.name, "dtype": str(dtype), "shape": shape}


def _sidecar(report: OnnxReport) -> dict[str, Any]:
    content = asdict(report)
    content["path"] = report.path.name
    del content["log"]  # holds paths of this machine; the caller has it in the report
    content["seam"] = report.seam.summary()
    packages = ("torch", "onnx", "onnxruntime", "onnxscript")
    content["versions"] = {"slim": slimcli.__version__} | {n: version(n) for n in packages}
    return content
