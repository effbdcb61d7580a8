"""ONNX file -> serialized engine, with the same code for TensorRT 10.12+, 11 and TensorRT-RTX.

The module is handed in. Networks are always strongly typed: types come from the file, int8 from its
Q/DQ nodes. Failures of the builder (None, TypeError, a list of parser errors) become one error that
names the stage, the node and the operator.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slimcli.artifacts.tensorrt.api import (
    Builder,
    BuilderConfig,
    Network,
    Shape,
    TensorRT,
    TimingCache,
)
from slimcli.artifacts.tensorrt.machine import INSTALL, runtime_of
from slimcli.errors import MissingError, Problem, RecipeError, RunError

WARNING, ERROR = "warning", "error"
SEVERITIES = ("internal error", ERROR, WARNING, "info", "verbose")
Range = tuple[Shape, Shape, Shape]

CAUSES = {
    "workspace": "a larger --workspace, or leave it out",
    "Turing": "leave SM75 out of --compute-capability: it lacks kernels this model needs",
    "cudaError": "slim doctor; without a GPU name one to build for: --compute-capability SM89",
    "out ?of ?memory": "free GPU memory, or a smaller --batch",
}
"""Words of TensorRT's last error -> what helps, where the file is not to blame."""


@dataclass(frozen=True)
class BuildSpec:
    """What to build.

    Attributes:
        onnx: The file.
        shapes: Smallest, typical and largest shape of each dynamic input.
        workspace_bytes: Largest scratch memory a kernel may use; None leaves it to TensorRT.
        optimization_level: 0 to 5; more searches longer for fast kernels.
        timing_cache: File that remembers kernel timings between builds.
        version_compatible: The engine also loads in later versions.
        hardware_compatible: The engine also runs on other GPUs from Ampere on.
        compute_capabilities: TensorRT-RTX only: ``SM80`` and the like; empty: Ampere and newer.
    """

    onnx: Path
    shapes: Mapping[str, Range] = field(default_factory=dict)
    workspace_bytes: int | None = None
    optimization_level: int = 3
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    compute_capabilities: tuple[str, ...] = ()


@dataclass(frozen=True)
class Built:
    """A plan and what was said while it was made.

    Attributes:
        plan: The serialized engine.
        log: Severity and text of each message.
        layers: Number of layers after parsing.
    """

    plan: bytes
    log: tuple[tuple[str, str], ...]
    layers: int

    @property
    def warnings(self) -> tuple[str, ...]:
        """Texts of the warnings, each once."""
        return tuple(dict.fromkeys(text for severity, text in self.log if severity == WARNING))


def build(trt: TensorRT, spec: BuildSpec) -> Built:
    """Builds the engine.

    Raises:
        MissingError: There is no usable builder on this machine.
        RecipeError: The options do not go together or a dynamic input has no shapes.
        RunError: The file cannot be parsed or built; names the node and the operator.
    """
    _check_options(trt, spec)
    log: list[tuple[str, str]] = []
    logger = recorder(trt, log)
    builder = _builder(trt, logger)
    flag = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    network = builder.create_network(1 << int(flag))
    _parse(trt, network, logger, spec.onnx)
    config = builder.create_builder_config()
    _configure(trt, config, spec)
    cache = _load_timing_cache(config, spec)
    _add_profile(builder, config, network, spec)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _failed("build", spec.onnx, "TensorRT could not build an engine", log)
    if cache is not None and spec.timing_cache is not None:
        _store_timing_cache(config, spec.timing_cache)
    return Built(bytes(plan), tuple(log), network.num_layers)


def recorder(trt: TensorRT, log: list[tuple[str, str]]) -> Any:
    """A TensorRT logger that appends (severity, text) to a list and prints nothing."""

    def initialise(self: Any) -> None:
        trt.ILogger.__init__(self)

    def keep(self: Any, severity: Any, text: str) -> None:
        log.append((SEVERITIES[min(int(severity), len(SEVERITIES) - 1)], text))

    return type("Recorder", (trt.ILogger,), {"__init__": initialise, "log": keep})()


def _check_options(trt: TensorRT, spec: BuildSpec) -> None:
    refuse_options(
        runtime_of(trt),
        hardware_compatible=spec.hardware_compatible,
        timing_cache=spec.timing_cache is not None,
        compute_capabilities=bool(spec.compute_capabilities),
    )
    if spec.compute_capabilities:
        capability_names(trt, spec.compute_capabilities)


def refuse_options(
    runtime: str, *, hardware_compatible: bool, timing_cache: bool, compute_capabilities: bool
) -> None:
    """Refuses what a runtime does not have; needs neither TensorRT nor a file.

    Args:
        runtime: ``tensorrt`` or ``rtx``.
        hardware_compatible: Whether that is asked for.
        timing_cache: Whether a file for it is named.
        compute_capabilities: Whether GPUs are named.

    Raises:
        RecipeError: The runtime does not have one of those that are asked for.
    """
    is_rtx = runtime == "rtx"
    wrong = {
        "--hardware-compatible": is_rtx and hardware_compatible,
        "--timing-cache": is_rtx and timing_cache,
        "--compute-capability": not is_rtx and compute_capabilities,
    }
    for option in [name for name, is_wrong in wrong.items() if is_wrong]:
        name = "TensorRT-RTX" if is_rtx else "TensorRT"
        reason = {
            "--hardware-compatible": "its engines run on every GPU they are built for",
            "--timing-cache": "it would ask for a GPU; kernels are chosen when the engine loads",
            "--compute-capability": "it builds for the GPU of this machine",
        }[option]
        raise RecipeError(
            Problem("E-TRT-OPTION", f"{name} has no {option}: {reason}", fix=f"drop {option}")
        )


def _builder(trt: TensorRT, logger: Any) -> Builder:
    try:
        return trt.Builder(logger)
    except TypeError as error:  # pybind11's words for a null pointer: the driver does not work
        raise MissingError(
            Problem(
                "E-TRT-BUILDER",
                f"{trt.__name__} {trt.__version__} gives no builder on this machine",
                expected="a GPU and a driver that fits this version",
                received=str(error).splitlines()[0],
                fix=f"slim doctor; without a GPU: {INSTALL['rtx']} and --runtime rtx",
            )
        ) from error


def _parse(trt: TensorRT, network: Network, logger: Any, path: Path) -> None:
    parser = trt.OnnxParser(network, logger)
    if parser.parse_from_file(str(path)):
        return
    problems = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        node = f"node {error.node_name() or error.node()} ({error.node_operator()})"
        where = f"{path}: {node}" if error.node_operator() else str(path)
        text = " ".join(str(error.desc()).split())
        problems.append(Problem("E-TRT-PARSE", f"parse: {text}", where, fix=f"slim lint {path}"))
    if not problems:
        problems = [Problem("E-TRT-PARSE", "parse: the file cannot be read", str(path))]
    raise RunError(*problems)


def _configure(trt: TensorRT, config: BuilderConfig, spec: BuildSpec) -> None:
    config.builder_optimization_level = spec.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the audit reads layer types
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32; for speed there is --fp16
    if spec.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, spec.workspace_bytes)
    if spec.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if spec.hardware_compatible:
        level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        config.hardware_compatibility_level = level
    if spec.compute_capabilities:
        capabilities = vars(trt)["ComputeCapability"]
        names = capability_names(trt, spec.compute_capabilities)
        config.num_compute_capabilities = len(names)
        for index, name in enumerate(names):
            config.set_compute_capability(getattr(capabilities, name), index)


def capability_names(trt: TensorRT, wanted: Sequence[str]) -> tuple[str, ...]:
    """The GPUs to build for as this TensorRT-RTX spells them, each once.

    Raises:
        RecipeError: It knows no GPU of that name; lists those it knows.
    """
    known = [name for name in vars(trt)["ComputeCapability"].__members__ if name != "NONE"]
    names = tuple(dict.fromkeys(name.strip().upper() for name in wanted))
    problems = []
    for name in [each for each in names if each not in known]:
        parts = [f"SM{re.sub('[^0-9]', '', part)}" for part in re.split(r"[\s,;]+", name)]
        listed = [f"--compute-capability {part}" for part in parts if part in known]
        problems.append(
            Problem(
                "E-TRT-CAPABILITY",
                f"{trt.__name__} {trt.__version__} builds for no GPU called {name}",
                "--compute-capability",
                expected=f"one of {', '.join(known)}",
                received=name,
                fix=" ".join(listed) or "leave it out: the engine is for Ampere and newer",
            )
        )
    if problems:
        raise RecipeError(*problems)
    return names


def _load_timing_cache(config: BuilderConfig, spec: BuildSpec) -> TimingCache | None:
    if spec.timing_cache is None:
        return None
    content = spec.timing_cache.read_bytes() if spec.timing_cache.exists() else b""
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, False):
        raise RunError(
            Problem(
                "E-TRT-CACHE",
                "the timing cache is damaged or of another TensorRT or GPU",
                str(spec.timing_cache),
                fix="delete the file or name another one",
            )
        )
    return cache


def _store_timing_cache(config: BuilderConfig, path: Path) -> None:
    from slimcli.artifacts import atomic

    cache = config.get_timing_cache()
    if cache is not None:
        atomic.write_bytes(path, bytes(cache.serialize()))


def _add_profile(
    builder: Builder, config: BuilderConfig, network: Network, spec: BuildSpec
) -> None:
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    dynamic = [each for each in inputs if any(size < 0 for size in each.shape)]
    missing = [each.name for each in dynamic if each.name not in spec.shapes]
    unknown = [name for name in spec.shapes if name not in {each.name for each in inputs}]
    if missing or unknown:
        what = f"no shapes for the dynamic inputs {missing}" if missing else f"no input {unknown}"
        received = ", ".join(f"{each.name} {tuple(each.shape)}" for each in inputs)
        raise RecipeError(Problem("E-TRT-SHAPES", what, str(spec.onnx), received=received))
    if not dynamic:
        return
    profile = builder.create_optimization_profile()
    for each in dynamic:
        try:
            profile.set_shape(each.name, *spec.shapes[each.name])
        except ValueError as error:
            raise _wrong_shapes(each.name, spec, str(error)) from error
    if config.add_optimization_profile(profile) < 0:
        raise _wrong_shapes(dynamic[0].name, spec, "TensorRT refuses the profile")


def _wrong_shapes(name: str, spec: BuildSpec, reason: str) -> RecipeError:
    smallest, typical, largest = (tuple(each) for each in spec.shapes[name])
    return RecipeError(
        Problem(
            "E-TRT-SHAPES",
            f"the shapes of input {name} are no profile: {reason}",
            expected="smallest <= typical <= largest",
            received=f"{smallest}, {typical}, {largest}",
        )
    )


def _failed(stage: str, path: Path, what: str, log: list[tuple[str, str]]) -> RunError:
    said = [text for severity, text in log if severity in (ERROR, "internal error")]
    received = " ".join(said[-1].split()) if said else "no message"
    fixes = [fix for pattern, fix in CAUSES.items() if re.search(pattern, received, re.IGNORECASE)]
    fix = fixes[0] if fixes else f"slim lint {path}"
    return RunError(
        Problem("E-TRT-BUILD", f"{stage}: {what}", str(path), received=received, fix=fix)
    )
