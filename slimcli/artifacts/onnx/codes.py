"""Checks a quantized file quantizer by quantizer: are the int8 codes those of the module?

End to end a quantized network differs from itself by rounding: one code that flips on a tie flips
others behind it. Therefore every quantizer of the file is fed what the module computed before it
(teacher forcing), and its codes are compared with the module's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper
from torch import nn

from slimcli.artifacts import verify
from slimcli.artifacts.onnx import qdq
from slimcli.artifacts.onnx.capture import capture
from slimcli.network.evaluating import evaluating
from slimcli.network.example import Example

AGREEMENT_MINIMUM = 0.999
DISTANCE_MAXIMUM = 1
FORCED, COMPUTED = "_forced", "_computed"


@dataclass(frozen=True)
class CodeRow:
    """How far the codes of one quantizer are apart.

    Attributes:
        module: Path of the quantizer in the model.
        agreement: Share of equal codes, 0 to 1.
        distance: Largest distance of two codes.
        count: Number of codes compared.
    """

    module: str
    agreement: float
    distance: int
    count: int


@dataclass(frozen=True)
class CodeReport:
    """The comparison of all activation quantizers.

    Attributes:
        rows: One a quantizer, in the order of the graph.
        skipped: Quantizers of the file that are no module of the model.
    """

    rows: tuple[CodeRow, ...]
    skipped: tuple[str, ...] = ()

    @property
    def agreement(self) -> float:
        """The smallest share of equal codes; 1 if there is no quantizer."""
        return min((row.agreement for row in self.rows), default=1.0)

    @property
    def distance(self) -> int:
        """The largest distance of two codes."""
        return max((row.distance for row in self.rows), default=0)

    @property
    def ok(self) -> bool:
        """Whether all quantizers agree as much as rounding lets them."""
        return self.agreement >= AGREEMENT_MINIMUM and self.distance <= DISTANCE_MAXIMUM


def compare_codes(
    model: nn.Module, path: Path, example: Example, batches: Iterable[Any] | None = None
) -> CodeReport:
    """Compares the int8 codes of every activation quantizer under teacher forcing.

    Args:
        model: The fake-quantized model the file was made from.
        path: The ONNX file.
        example: A batch and the user's predict function.
        batches: Batches to compare on; default: the example's.
    """
    graph = onnx.load(path)
    sites, skipped = _sites(model, graph)
    session = _forced_session(graph, [site.output for site in sites])
    totals = {site.name: [0, 0, 0] for site in sites}  # equal, count, distance
    for batch in [example.batch] if batches is None else batches:
        one = Example(batch, example.predict)
        expected = _module_codes(model, one, sites)
        feeds = {site.output + FORCED: expected[site.name] for site in sites}
        computed = session.run(
            [site.output + COMPUTED for site in sites], feeds | _inputs(model, one, session)
        )
        for site, got in zip(sites, computed, strict=True):
            distance = np.abs(expected[site.name].astype(np.int16) - got.astype(np.int16))
            total = totals[site.name]
            total[0] += int((distance == 0).sum())
            total[1] += distance.size
            total[2] = max(total[2], int(distance.max(initial=0)))
    rows = tuple(CodeRow(p, e / max(n, 1), d, n) for p, (e, n, d) in totals.items())
    return CodeReport(rows, skipped)


@dataclass(frozen=True)
class _Site:
    """A Q node that is one call of one module."""

    name: str
    module: str
    call: int
    output: str
    scale: qdq.Array
    axis: int | None


def _sites(model: nn.Module, graph: onnx.ModelProto) -> tuple[list[_Site], tuple[str, ...]]:
    """The Q nodes whose name is ``<module path>/Q`` or, from its second call, ``/Q_1``."""
    scales = {each.name: numpy_helper.to_array(each) for each in graph.graph.initializer}
    known = {path for path, _ in model.named_modules() if path}  # the model itself is no quantizer
    sites: list[_Site] = []
    skipped: list[str] = []
    calls: dict[str, int] = {}
    for node in [each for each in graph.graph.node if each.op_type == qdq.QUANTIZE]:
        path = node.name.rpartition("/")[0]
        if path not in known or node.input[1] not in scales:
            skipped.append(node.name)
            continue
        scale, call = scales[node.input[1]], calls.get(path, 0)
        calls[path] = call + 1
        axis = qdq.axis_of(node, scale)
        sites.append(_Site(node.name, path, call, node.output[0], scale, axis))
    return sites, tuple(skipped)


def _module_codes(model: nn.Module, example: Example, sites: list[_Site]) -> dict[str, qdq.Array]:
    """Codes of what each quantizer module gets, by site name."""
    seen: dict[str, list[qdq.Array]] = {}

    def hook(path: str) -> Any:
        def watch(module: nn.Module, args: Any) -> None:
            seen.setdefault(path, []).append(args[0].detach().float().cpu().numpy())

        return watch

    modules, paths = dict(model.named_modules()), {site.module for site in sites}
    handles = [modules[path].register_forward_pre_hook(hook(path)) for path in paths]
    try:
        with verify.exact_arithmetic(), evaluating(model):
            example.run(model)
    finally:
        for handle in handles:
            handle.remove()
    return {
        site.name: qdq.codes(seen[site.module][site.call], site.scale, site.axis, low=-128)
        for site in sites
    }


def _inputs(
    model: nn.Module, example: Example, session: onnxruntime.InferenceSession
) -> dict[str, qdq.Array]:
    inputs = capture(model, example).inputs
    wanted = {each.name for each in session.get_inputs()}
    return {name: each.cpu().numpy() for name, each in inputs.items() if name in wanted}


def _forced_session(model: onnx.ModelProto, outputs: list[str]) -> onnxruntime.InferenceSession:
    """The graph, cut at each quantizer: codes computed are outputs, codes read are inputs."""
    graph = model.graph
    cut = set(outputs)
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = name + FORCED if name in cut else name
        if node.output[0] in cut:
            node.output[0] += COMPUTED
    del graph.output[:], graph.value_info[:]
    kind = onnx.TensorProto.INT8
    for name in sorted(cut):
        graph.input.append(onnx.helper.make_tensor_value_info(name + FORCED, kind, None))
        graph.output.append(onnx.helper.make_tensor_value_info(name + COMPUTED, kind, None))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
