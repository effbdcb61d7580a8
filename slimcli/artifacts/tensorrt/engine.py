"""An engine file and its sidecar: made from an ONNX file, and refused where it does not fit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

import slimcli
from slimcli.artifacts import atomic, lint
from slimcli.artifacts.tensorrt import machine
from slimcli.artifacts.tensorrt.api import TensorRT
from slimcli.artifacts.tensorrt.audit import Audit, audit
from slimcli.artifacts.tensorrt.builder import BuildSpec, Built, Range, build
from slimcli.artifacts.tensorrt.command import trtexec
from slimcli.errors import MissingError, Problem, RecipeError, RunError

DEFAULT_BATCHES = (1, 8, 32)


@dataclass(frozen=True)
class EngineReport:
    """What was built.

    Attributes:
        path: The engine; its sidecar is ``<path>.json``.
        audit: Which layers run in int8.
        warnings: What TensorRT warned of.
        command: The trtexec line that builds the same.
        file_bytes: Size of the engine.
    """

    path: Path
    audit: Audit
    warnings: tuple[str, ...]
    command: str
    file_bytes: int


def batch_sizes(batches: Sequence[int]) -> list[int]:
    """Smallest, typical and largest batch.

    Raises:
        RecipeError: The sizes are not ascending.
    """
    sizes = list(batches) * 3 if len(batches) == 1 else list(batches)
    if len(sizes) != 3 or sizes[0] < 1 or sorted(sizes) != sizes:
        raise RecipeError(
            Problem(
                "E-TRT-BATCH", "--batch takes one size or three ascending ones",
                expected="for example 1,8,32", received=",".join(map(str, batches)),
            )
        )  # fmt: skip
    return sizes


def batch_shapes(path: Path, batches: Sequence[int]) -> dict[str, Range]:
    """Smallest, typical and largest shape of each input with a free batch.

    Args:
        path: The ONNX file.
        batches: One size, or the smallest, the typical and the largest.

    Raises:
        RecipeError: The sizes are not ascending, or another dimension is free as well.
    """
    sizes = batch_sizes(batches)
    shapes: dict[str, Range] = {}
    stored = onnx.load(path, load_external_data=False)
    initializers = {each.name for each in stored.graph.initializer}
    for each in stored.graph.input:
        dims = each.type.tensor_type.shape.dim
        free = [index for index, dim in enumerate(dims) if not dim.HasField("dim_value")]
        if each.name in initializers or not free:
            continue
        if free != [0]:
            raise RecipeError(
                Problem(
                    "E-TRT-SHAPES", f"input {each.name} has more free dimensions than the batch",
                    str(path), received=str([dim.dim_param or dim.dim_value for dim in dims]),
                )
            )  # fmt: skip
        rest = [dim.dim_value for dim in dims][1:]
        low, typical, high = ((size, *rest) for size in sizes)
        shapes[each.name] = (low, typical, high)
    return shapes


def build_engine(
    trt: TensorRT, spec: BuildSpec, path: Path, gpu: machine.Gpu | None
) -> EngineReport:
    """Builds, audits and writes an engine with its sidecar.

    Args:
        trt: The TensorRT module.
        spec: What to build.
        path: Where to write the engine.
        gpu: The GPU of this machine; needed by all but TensorRT-RTX.

    Raises:
        MissingError: No GPU, or no usable builder.
        RunError: The file breaks a rule TensorRT refuses, or it cannot be built.
    """
    if machine.runtime_of(trt) == "tensorrt":
        machine.require_gpu("building a TensorRT engine", gpu)
    model = onnx.load(spec.onnx)
    _refuse_broken_rules(model, spec.onnx)
    built = build(trt, spec)
    found = audit(built.log, model)
    command = trtexec(spec, str(path))
    atomic.write_bytes(path, built.plan)
    content = _sidecar(trt, spec, built, gpu) | {
        "audit": found.summary(),
        "trtexec": command,
        "structure": _structure(model),
    }
    atomic.write_text(sidecar_path(path), json.dumps(content, indent=2, default=str) + "\n")
    return EngineReport(path, found, built.warnings, command, len(built.plan))


def engine_of(
    path: Path,
    engine: Path,
    *,
    runtime: str = "tensorrt",
    batches: Sequence[int] = DEFAULT_BATCHES,
    **options: Any,
) -> EngineReport:
    """Builds the engine of an ONNX file with what this machine has.

    Args:
        path: The ONNX file.
        engine: Where to write.
        runtime: ``tensorrt`` or ``rtx``.
        batches: Smallest, typical and largest batch, where the batch is free.
        options: Further fields of ``BuildSpec``.

    Raises:
        MissingError: TensorRT or a GPU is missing; the message has the command that helps.
        RunError: The engine cannot be built.
    """
    trt = machine.load(runtime)
    spec = BuildSpec(path, batch_shapes(path, batches), **options)
    return build_engine(trt, spec, engine, machine.gpu())


def _refuse_broken_rules(model: onnx.ModelProto, path: Path) -> None:
    """Some broken rules crash TensorRT's parser instead of being refused by it."""
    broken = lint.errors(lint.lint(model))
    if broken:
        raise RunError(
            *(
                Problem("E-LINT", f"rule {each.rule} at {each.node}: {each.message}", str(path),
                        fix=each.fix)
                for each in broken
            )
        )  # fmt: skip


def _sidecar(
    trt: TensorRT, spec: BuildSpec, built: Built, gpu: machine.Gpu | None
) -> dict[str, Any]:
    stored = asdict(spec) | {"onnx": spec.onnx.name}
    return {
        "slim_version": slimcli.__version__,
        "runtime": machine.runtime_of(trt),
        "tensorrt_version": trt.__version__,
        "gpu": asdict(gpu) if gpu is not None else None,
        "onnx_sha256": hashlib.sha256(spec.onnx.read_bytes()).hexdigest(),
        "sha256": hashlib.sha256(built.plan).hexdigest(),
        "file_bytes": len(built.plan),
        "layers": built.layers,
        "spec": stored,
        "warnings": list(built.warnings),
    }


def _structure(model: onnx.ModelProto) -> dict[str, Any]:
    """How the original module is called and what it returns; empty for files of others."""
    found = {each.key: each.value for each in model.metadata_props}
    structure: dict[str, Any] = json.loads(found.get("slim.structure", "{}"))
    return structure


def sidecar_path(path: Path) -> Path:
    """``model.engine`` -> ``model.engine.json``."""
    return path.with_name(path.name + ".json")


def read_sidecar(path: Path) -> dict[str, Any]:
    """What was stored beside an engine, after a check that it belongs to it.

    Raises:
        RunError: There is no sidecar, or the engine is not the file it was written for.
    """
    try:
        content: dict[str, Any] = json.loads(sidecar_path(path).read_text(encoding="utf-8"))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError) as error:
        what = "an engine cannot be loaded without its sidecar, which says where it runs"
        raise RunError(
            Problem("E-TRT-SIDECAR", what, str(sidecar_path(path)), received=str(error),
                    fix="build it again: slim export RUN --trt")
        ) from error  # fmt: skip
    if content.get("sha256") != digest:
        raise RunError(
            Problem(
                "E-TRT-SIDECAR", "the engine is not the file its sidecar was written for",
                str(path), str(content.get("sha256"))[:12], digest[:12],
                "build it again: slim export RUN --trt",
            )
        )  # fmt: skip
    return content


def require_fit(path: Path, trt: TensorRT, gpu: machine.Gpu | None) -> dict[str, Any]:
    """The sidecar of an engine that can run here.

    Raises:
        MissingError: It was built for another runtime, version or GPU; both are named.
    """
    content = read_sidecar(path)
    problem = machine.misfit(content, trt, gpu)
    if problem is not None:
        raise MissingError(problem).at(str(path))
    return content
