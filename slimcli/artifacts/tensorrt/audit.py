"""Which heavy layers of an engine really got int8 operands.

Read from the layer table in the builder's verbose log. That table is text without a promise, so
whatever is not understood gives "unavailable", never an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import onnx

HEAVY = ("Conv", "ConvTranspose", "Gemm", "MatMul")
TABLE_HEAD = "Layers:"
ROW = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: (?P<inputs>\[.*?\]), "
    r"(?:Constants: (?P<constants>\[.*?\]), )?Outputs: (?P<outputs>\[.*?\]), .*?"
    r"Metadata: ?(?P<metadata>.*)$"
)
TYPE = re.compile(r"Datatype: (\w+)")
ORIGIN = re.compile(r"\[ONNX Layer: (.*?)\]")
POINTWISE = ("kgen", "shape_call")


@dataclass(frozen=True)
class Audit:
    """The result.

    Attributes:
        int8: Heavy nodes whose kernel reads int8 data and int8 weights.
        other: Heavy nodes that run in another type, node -> types of its operands.
        unavailable: Why there is no result; empty if there is one.
    """

    int8: tuple[str, ...] = ()
    other: dict[str, str] = field(default_factory=dict)
    unavailable: str = ""

    @property
    def heavy(self) -> int:
        """Number of heavy nodes found."""
        return len(self.int8) + len(self.other)

    def summary(self) -> dict[str, Any]:
        """For the sidecar."""
        if self.unavailable:
            return {"unavailable": self.unavailable}
        return {"int8": len(self.int8), "heavy": self.heavy, "other": self.other}

    def __str__(self) -> str:
        """``21 of 21 heavy layers run in int8``."""
        if self.unavailable:
            return f"audit unavailable: {self.unavailable}"
        return f"{len(self.int8)} of {self.heavy} heavy layers run in int8"


@dataclass(frozen=True)
class Row:
    """One kernel of the layer table.

    Attributes:
        name: The kernel's name.
        kind: The kernel's type.
        operands: Datatypes of inputs, then of constants.
        origins: ONNX nodes it was made from.
    """

    name: str
    kind: str
    operands: tuple[str, ...]
    origins: tuple[str, ...]


def audit(log: Iterable[tuple[str, str]], model: onnx.ModelProto) -> Audit:
    """Finds the kernel of each heavy node and the types of its two operands.

    Args:
        log: Severity and text of the builder's messages.
        model: The file that was built.
    """
    heavy = [node.name for node in model.graph.node if node.op_type in HEAVY]
    tables = [text for _, text in log if text.startswith(TABLE_HEAD)]
    if not tables:
        return Audit(unavailable="the builder printed no layer table")
    found = [row for row in map(_row, tables[-1].splitlines()[1:]) if row is not None]
    if not found:
        return Audit(unavailable="the layer table has a form that is not known")
    int8: list[str] = []
    other: dict[str, str] = {}
    for node in heavy:
        row = _kernel(node, found)
        if row is None:
            other[node] = "no kernel found"
        elif row.operands[:1] == ("Int8",) and row.operands.count("Int8") >= 2:
            int8.append(node)
        else:
            other[node] = " x ".join(row.operands[:2]) or "unknown"
    if heavy and all(text == "no kernel found" for text in other.values()) and not int8:
        return Audit(unavailable="the layer table does not name the nodes of the file")
    return Audit(tuple(int8), other)


def _row(line: str) -> Row | None:
    found = ROW.match(line)
    if found is None:
        return None
    operands = TYPE.findall(found["inputs"]) + TYPE.findall(found["constants"] or "")
    return Row(
        found["name"], found["kind"], tuple(operands), tuple(ORIGIN.findall(found["metadata"]))
    )


def _kernel(node: str, rows: list[Row]) -> Row | None:
    """The kernel that multiplies for a node: named after it, else the first of its kernels."""
    candidates = [row for row in rows if node in row.origins and row.kind not in POINTWISE]
    named = [row for row in candidates if row.name.startswith(node)]
    return next(iter(named or candidates), None)
