"""Checks an ONNX graph against the rules by which TensorRT turns Q/DQ into int8 kernels.

Most mistakes here raise no error anywhere: the graph loads, runs, and is slow or clipped. Each
finding names the node, the rule and what to change. Needs onnx and numpy only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from slimcli.artifacts.lint.graph import Graph
from slimcli.artifacts.lint.placement import placement_findings
from slimcli.artifacts.lint.quantizers import quantizer_findings
from slimcli.artifacts.lint.rules import RULES, Severity
from slimcli.errors import Problem, RunError


@dataclass(frozen=True)
class Finding:
    """One place where a rule is broken.

    Attributes:
        rule: Id of the rule (``Q5``).
        severity: ``error``: refused or misread; ``warning``: int8 or time is lost; ``info``.
        node: Name of the node, or its first output if it has none.
        message: What is wrong there.
        fix: What to change.
    """

    rule: str
    severity: Severity
    node: str
    message: str
    fix: str

    def __str__(self) -> str:
        """``Q5 warning  conv1/Q  one-element scale vector``."""
        return f"{self.rule} {self.severity}  {self.node}  {self.message}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def lint(model: onnx.ModelProto) -> list[Finding]:
    """All findings in a graph, in the order of its nodes; empty for a graph without faults."""
    graph = Graph(model)
    broken = [*quantizer_findings(graph), *placement_findings(graph)]
    order = {node_name(node): index for index, node in enumerate(graph.nodes)}
    found = {
        Finding(rule, RULES[rule].severity, node_name(node), message, RULES[rule].fix): None
        for rule, node, message in broken
    }
    return sorted(found, key=lambda each: (order.get(each.node, -1), each.rule))


def lint_file(path: str | Path) -> list[Finding]:
    """All findings in a file.

    Raises:
        RunError: The file is no ONNX model.
    """
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except OSError as error:
        what = f"cannot read the file: {error.strerror or error}"
        raise RunError(Problem("E-ONNX-LOAD", what, str(path))) from error
    except Exception as error:  # protobuf and onnx raise classes of their own
        what = f"this is no valid ONNX file: {(str(error).splitlines() or [''])[0]}"
        raise RunError(Problem("E-ONNX-LOAD", what, str(path))) from error
    return lint(model)


def node_name(node: onnx.NodeProto) -> str:
    """Name of a node, or its first output."""
    name: str = node.name or (node.output[0] if node.output else node.op_type)
    return name


def errors(findings: Iterable[Finding]) -> list[Finding]:
    """The findings that a runtime refuses or misreads."""
    return [each for each in findings if each.severity == "error"]


__all__ = ["RULES", "Finding", "errors", "lint", "lint_file", "node_name"]
