"""Which TensorRT there is, whether this machine can use it, and what a plan needs to fit.

Everything is asked before a Builder or Runtime exists: without a driver the full package answers
a Runtime call with a segmentation fault, which no ``except`` survives.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

from slimcli.artifacts.tensorrt.api import TensorRT
from slimcli.errors import MissingError, Problem

MODULES = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
INSTALL = {
    "tensorrt": 'pip install "slimcli[trt]"',
    "rtx": 'pip install "slimcli[rtx]"',
}
OLDEST = (10, 12)


@dataclass(frozen=True)
class Gpu:
    """The GPU of this machine.

    Attributes:
        name: Marketing name.
        capability: ``8.6``.
    """

    name: str
    capability: str


def load(runtime: str) -> TensorRT:
    """The TensorRT module for ``tensorrt`` or ``rtx``.

    Raises:
        MissingError: It is not installed, too old, or its libraries are not there.
    """
    name = MODULES[runtime]
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            what = f"{name} is not installed"
        else:
            what = f"{name} is installed but cannot be loaded: {error}"
        problem = Problem("E-TRT-MISSING", what, received="", fix=INSTALL[runtime])
        raise MissingError(problem) from error
    if runtime == "tensorrt" and version_numbers(module) < OLDEST:
        raise MissingError(
            Problem(
                "E-TRT-OLD",
                "TensorRT is too old for strongly typed Q/DQ networks",
                expected=f"{OLDEST[0]}.{OLDEST[1]} or newer",
                received=str(module.__version__),
                fix=INSTALL[runtime],
            )
        )
    return cast(TensorRT, module)


def version_numbers(module: ModuleType | TensorRT) -> tuple[int, ...]:
    """Leading numbers of a version.

    >>> class Module: __version__ = "10.16.1"
    >>> version_numbers(Module)
    (10, 16, 1)
    """
    return tuple(int(part) for part in re.findall(r"\d+", str(module.__version__))[:3])


def runtime_of(trt: TensorRT) -> str:
    """``rtx`` or ``tensorrt``."""
    return "rtx" if "rtx" in trt.__name__ else "tensorrt"


def gpu() -> Gpu | None:
    """The current GPU; None without one or without a working driver."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return Gpu(torch.cuda.get_device_name(), f"{major}.{minor}")


def require_gpu(what: str, found: Gpu | None) -> Gpu:
    """The GPU.

    Raises:
        MissingError: There is none.
    """
    if found is None:
        raise MissingError(
            Problem(
                "E-TRT-GPU",
                f"{what} needs an NVIDIA GPU with a working driver",
                received="none",
                fix="run this on the GPU machine; to only build an engine here: --runtime rtx",
            )
        )
    return found


def misfit(sidecar: dict[str, Any], trt: TensorRT, found: Gpu | None) -> Problem | None:
    """Why a plan cannot run here, both sides named; None if it can.

    Args:
        sidecar: What was stored when the plan was built.
        trt: The module that would load it.
        found: The GPU of this machine.
    """
    rebuild = "build it here: slim export RUN --trt"
    runtime, version = str(sidecar.get("runtime")), str(sidecar.get("tensorrt_version"))
    if runtime != runtime_of(trt):
        return Problem(
            "E-TRT-RUNTIME", "the engine is for another runtime", "", MODULES.get(runtime, runtime),
            trt.__name__, rebuild + (" --runtime rtx" if runtime_of(trt) == "rtx" else ""),
        )  # fmt: skip
    spec = sidecar.get("spec", {})
    if version != trt.__version__ and not spec.get("version_compatible"):
        return Problem(
            "E-TRT-VERSION", "the engine is for another version of TensorRT", "", version,
            trt.__version__, f"{rebuild}, or with --version-compatible where it was built",
        )  # fmt: skip
    built_for = str((sidecar.get("gpu") or {}).get("capability", ""))
    anywhere = runtime == "rtx" or spec.get("hardware_compatible")
    if found is not None and built_for and built_for != found.capability and not anywhere:
        return Problem(
            "E-TRT-DEVICE", "the engine is for another GPU", "",
            f"compute capability {built_for} ({(sidecar.get('gpu') or {}).get('name', '')})",
            f"{found.capability} ({found.name})",
            f"{rebuild}, or with --hardware-compatible where it was built",
        )  # fmt: skip
    return None
