"""What ``slim export`` can be told about the engine, and what it refuses at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from slimcli.errors import MissingError, Problem, RecipeError

GIBIBYTE = 1 << 30
OPTIONS = {
    "runtime": "--runtime",
    "fp16": "--fp16",
    "batch": "--batch",
    "workspace": "--workspace",
    "timing_cache": "--timing-cache",
    "version_compatible": "--version-compatible",
    "hardware_compatible": "--hardware-compatible",
    "compute_capability": "--compute-capability",
}
"""Parameter -> option, for all that is about the engine alone."""


@dataclass(frozen=True)
class EngineOptions:
    """What the engine is to be like."""

    runtime: str
    fp16: bool
    batch: tuple[int, ...]
    workspace_bytes: int | None
    timing_cache: Path | None
    version_compatible: bool
    hardware_compatible: bool
    compute_capabilities: tuple[str, ...]


def is_given(name: str) -> bool:
    """Whether the user wrote this option of the command that runs."""
    source = click.get_current_context().get_parameter_source(name)
    return source not in (None, ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)


def engine_options(values: Mapping[str, Any], want_trt: bool) -> EngineOptions:
    """The options as they were given; what can be refused is refused here, before the export.

    Raises:
        RecipeError: No engine is built, the runtime has no such option, or a value is wrong.
    """
    unused = [option for name, option in OPTIONS.items() if is_given(name)]
    if unused and not want_trt:
        raise RecipeError(
            Problem(
                "E-EXPORT-OPTION",
                f"only an engine is made with {', '.join(unused)}, and none is asked for",
                "command line",
                fix=f"add --trt, or leave {'it' if len(unused) == 1 else 'them'} out",
            )
        )
    workspace, cache = values["workspace"], values["timing_cache"]
    options = EngineOptions(
        runtime=values["runtime"],
        fp16=values["fp16"],
        batch=values["batch"],
        workspace_bytes=None if workspace is None else int(workspace * GIBIBYTE),
        timing_cache=cache.absolute() if cache else None,  # hooks may change the current folder
        version_compatible=values["version_compatible"],
        hardware_compatible=values["hardware_compatible"],
        compute_capabilities=tuple(each.upper() for each in values["compute_capability"]),
    )
    if want_trt:
        _check(options)
    return options


def _check(options: EngineOptions) -> None:
    """What the builder would refuse too, but only behind the export of model.onnx."""
    from slimcli.artifacts.tensorrt import builder, machine
    from slimcli.artifacts.tensorrt.engine import batch_sizes

    batch_sizes(options.batch)
    builder.refuse_options(
        options.runtime,
        hardware_compatible=options.hardware_compatible,
        timing_cache=options.timing_cache is not None,
        compute_capabilities=bool(options.compute_capabilities),
    )
    if not options.compute_capabilities:
        return
    try:
        trt = machine.load(options.runtime)
    except MissingError:
        return  # told when model.onnx is there, from which another machine builds the engine
    builder.capability_names(trt, options.compute_capabilities)
