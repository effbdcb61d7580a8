"""Turns a flat module into an ONNX graph with torch's exporters, quietly.

The dynamo exporter comes first. Where it cannot follow the model, the TorchScript one is tried and
the reason is kept.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from torch import nn

from slimcli.artifacts import opsets
from slimcli.artifacts.arithmetic import WithoutAutocast
from slimcli.artifacts.onnx.capture import FlatModel
from slimcli.errors import Problem, RecipeError, RunError

TORCHSCRIPT_OPSET_MAXIMUM = 20
LOGGERS = ("torch", "torch.onnx", "torch.export", "onnxscript", "onnx_ir")


def check_opset(opset: int) -> None:
    """Whether the exporters write this opset, names of modules included.

    Raises:
        RecipeError: It is older or newer; says which ones are written.
    """
    if opsets.LOWEST <= opset <= opsets.NEWEST:
        return
    problem = Problem(
        "E-ONNX-OPSET",
        f"opset {opset} can't be written",
        "--opset",
        expected=f"{opsets.LOWEST} to {opsets.NEWEST}",
        received=str(opset),
        fix=f"--opset {opsets.LOWEST if opset < opsets.LOWEST else opsets.NEWEST}",
    )
    raise RecipeError(problem)


@dataclass(frozen=True)
class Graph:
    """An ONNX model as an exporter made it.

    Attributes:
        model: The model, in memory.
        exporter: ``dynamo`` or ``torchscript``.
        reason: Why it is not ``dynamo``; else empty.
        log: What the exporters printed, warned and logged.
    """

    model: onnx.ModelProto
    exporter: str
    reason: str
    log: tuple[str, ...]


def to_graph(
    flat: FlatModel,
    inputs: Mapping[str, torch.Tensor],
    outputs: Sequence[str],
    batched: Sequence[str],
    opset: int,
) -> Graph:
    """The graph of the module.

    Args:
        flat: The model with flat tensors, in eval mode.
        inputs: Example tensors, name -> tensor; at least two samples where the batch is dynamic.
        outputs: Names of the outputs.
        batched: Inputs whose first dimension is free.
        opset: ONNX opset version.

    Raises:
        RunError: Neither exporter can export the model; holds both reasons.
    """
    log: list[str] = []
    try:
        with _quiet(log), WithoutAutocast():
            return Graph(_dynamo(flat, inputs, outputs, batched, opset), "dynamo", "", tuple(log))
    except Exception as error:  # the exporter wraps whatever the user's code raises
        reason = _reason(error)
    try:
        with _quiet(log) as warned:
            model = _torchscript(flat, inputs, outputs, batched, opset)
    except Exception as error:
        what = f"no ONNX file: torch.export says {reason!r}, the TorchScript exporter says "
        raise RunError(
            Problem(
                "E-ONNX-EXPORT",
                what + repr(_reason(error)),
                fix="change what forward computes there",
            )
        ) from error
    _refuse_frozen_branches(warned, reason)
    return Graph(model, "torchscript", reason, tuple(log))


def _refuse_frozen_branches(warned: list[warnings.WarningMessage], reason: str) -> None:
    """A trace keeps one branch of an ``if`` that depends on data and is silently wrong in others.

    In the same way it keeps one batch size for ``len(x)``.

    torch and torchvision know when they are traced; warnings from their files are harmless.

    Raises:
        RunError: A line of anybody else turned a tensor into a Python value.
    """
    installed = Path(torch.__file__).parents[1]
    trusted = tuple(str(installed / name) for name in ("torch/", "torchvision/"))
    for each in warned:
        if each.category.__name__ != "TracerWarning" or each.filename.startswith(trusted):
            continue
        message = str(each.message)
        what, fix = "", ""
        if "Using len" in message:
            what = "len(tensor) gives a plain number here, so that it would hold for one batch size"
            fix = "write tensor.shape[0] in place of len(tensor)"
        elif "to a Python" in message:
            what = (
                "the model turns a tensor into a Python value here, so that what it computes "
                "depends on data in a way a graph cannot hold"
            )
            fix = "use torch.where instead of if, or leave this part out of forward"
        if what:
            where = f"{each.filename}:{each.lineno}"
            what = f"no ONNX file: {what}"
            raise RunError(Problem("E-ONNX-BRANCH", what, where, received=reason, fix=fix))


def _dynamo(
    flat: FlatModel,
    inputs: Mapping[str, torch.Tensor],
    outputs: Sequence[str],
    batched: Sequence[str],
    opset: int,
) -> onnx.ModelProto:
    batch = torch.export.Dim("batch", min=1)
    shapes = (tuple({0: batch} if name in batched else None for name in inputs),)
    arguments = tuple(inputs.values())

    def exported(what: nn.Module | torch.export.ExportedProgram) -> onnx.ModelProto:
        program = torch.onnx.export(
            what,
            () if isinstance(what, torch.export.ExportedProgram) else arguments,
            dynamo=True,
            dynamic_shapes=shapes,
            opset_version=opset,
            input_names=list(inputs),
            output_names=list(outputs),
            external_data=False,
            verbose=False,
        )
        if program is None:
            raise RuntimeError("the exporter returned nothing")
        model: onnx.ModelProto = program.model_proto
        return model

    model = exported(flat)
    if _fixed(model, batched):
        # Running the code makes a plain number of ``len(x)``, and the exporter goes on with that as
        # if nothing but the example's batch had been asked for. Reading the code keeps it open; the
        # operator of the quantizers is not to be read but taken as it is.
        torch.compiler.allow_in_graph(torch.onnx.ops.symbolic)  # type: ignore[no-untyped-call]
        model = exported(torch.export.export(flat, arguments, dynamic_shapes=shapes, strict=True))
    if fixed := _fixed(model, batched):
        raise RuntimeError(f"the batch of {', '.join(fixed)} became a constant")
    found = next((each.version for each in model.opset_import if not each.domain), 0)
    if found != opset:
        raise RuntimeError(f"the exporter wrote opset {found} instead of {opset}")
    return model


def _fixed(model: onnx.ModelProto, batched: Sequence[str]) -> list[str]:
    """Inputs whose batch should be free, and is not."""
    return [
        each.name
        for each in model.graph.input
        if each.name in batched and not each.type.tensor_type.shape.dim[0].dim_param
    ]


def _torchscript(
    flat: FlatModel,
    inputs: Mapping[str, torch.Tensor],
    outputs: Sequence[str],
    batched: Sequence[str],
    opset: int,
) -> onnx.ModelProto:
    if opset > TORCHSCRIPT_OPSET_MAXIMUM:
        raise RuntimeError(f"it writes at most opset {TORCHSCRIPT_OPSET_MAXIMUM}, not {opset}")
    free = (*batched, *(outputs if batched else ()))
    with tempfile.TemporaryDirectory(prefix="slim-onnx-") as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            flat,
            tuple(inputs.values()),
            path,
            dynamo=False,
            dynamic_axes={name: {0: "batch"} for name in free},
            opset_version=opset,
            input_names=list(inputs),
            output_names=list(outputs),
        )
        return onnx.load(path)


def _reason(error: BaseException) -> str:
    """The innermost message of a chain of exceptions, one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


class _Keep(logging.Handler):
    """A log handler that only remembers."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        """Adds the message to the list."""
        self.lines.append(f"{record.levelname.lower()}: {record.getMessage()}")


@contextlib.contextmanager
def _quiet(log: list[str]) -> Iterator[list[warnings.WarningMessage]]:
    """Collects what is printed, warned and logged instead of showing it."""
    printed, keep = io.StringIO(), _Keep(log)
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(each.handlers[:], each.propagate) for each in loggers]
    for each in loggers:
        each.handlers, each.propagate = [keep], False
    try:
        with (
            warnings.catch_warnings(record=True) as warned,
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
            _hearing_cpp(log),
        ):
            warnings.simplefilter("always")
            yield warned
    finally:
        for each, (handlers, propagate) in zip(loggers, before, strict=True):
            each.handlers, each.propagate = handlers, propagate
        log += [f"warning: {each.message}" for each in warned]
        log += [line for line in printed.getvalue().splitlines() if line.strip()]


@contextlib.contextmanager
def _hearing_cpp(log: list[str]) -> Iterator[None]:
    """Collects what C++ prints, which knows the descriptor and not Python's stream.

    The TorchScript exporter prints its whole graph where it fails; on stdout only results belong.
    """
    try:
        stdout = os.dup(1)
    except OSError:  # closed: nobody hears
        yield
        return
    if sys.__stdout__ is not None:
        sys.__stdout__.flush()  # what is in its buffer is not C++'s
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
            file.seek(0)
            log += file.read().decode("utf-8", "replace").splitlines()
