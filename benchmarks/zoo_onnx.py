"""ONNX files of cut networks, run by onnxruntime."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import zoo_build
from torch import nn
from zoo_measure import Case, zero_half

from slimcli.artifacts import onnx
from slimcli.errors import SlimError
from slimcli.network import surgery
from slimcli.network.example import Example
from slimcli.network.structure import analyze


def measure_onnx(name: str, folder: Path) -> dict[str, Any]:
    """The cut network's file, checked by the exporter; where that fails, the uncut one's."""
    case = zoo_build.build(name, torch.float32)
    example = Example(case.batch, case.predict)
    groups = [group for group in analyze(case.model, example).groups if group.exact_zero]
    row: dict[str, Any] = {"groups": len(groups)}
    if not groups:
        return row
    cut = copy.deepcopy(case.model)
    kept = zero_half(cut, groups)
    cuts = [group.cut(keep) for group, keep in zip(groups, kept, strict=True)]
    surgery.apply(cut, cuts, example=example)
    row["cut"] = exported(case, cut, folder / "cut.onnx")
    if row["cut"] != "equal":
        row["uncut"] = exported(case, case.model, folder / "uncut.onnx")
    return row


def exported(case: Case, model: nn.Module, path: Path) -> str:
    """``equal``, or what the exporter or its check says."""
    try:
        onnx.export(model.eval(), Example(case.batch, case.predict), path)
    except SlimError as error:
        problem = error.problems[0]
        return f"{problem.code}: {problem.what}"[:200]
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    return "equal"
