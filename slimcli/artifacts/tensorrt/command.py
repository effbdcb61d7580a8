"""The trtexec line that builds the same engine, for people on another machine."""

from __future__ import annotations

import shlex

from slimcli.artifacts.tensorrt.api import Shape
from slimcli.artifacts.tensorrt.builder import BuildSpec

MEBIBYTE = 1 << 20


def trtexec(spec: BuildSpec, engine: str = "") -> str:
    """A shell line for trtexec of TensorRT 10.12 to 11.

    ``--stronglyTyped`` is needed in 10.x and does nothing in 11; ``--int8``, ``--fp16`` and
    ``--best`` must not be there: types come from the file.
    """
    words = ["trtexec", f"--onnx={spec.onnx}", "--stronglyTyped", "--noTF32"]
    words.append(f"--saveEngine={engine or spec.onnx.with_suffix('.engine')}")
    for flag, index in (("minShapes", 0), ("optShapes", 1), ("maxShapes", 2)):
        parts = [f"{name}:{_text(ranges[index])}" for name, ranges in spec.shapes.items()]
        words += [f"--{flag}={','.join(parts)}"] if parts else []
    if spec.workspace_bytes is not None:
        words.append(f"--memPoolSize=workspace:{max(1, spec.workspace_bytes // MEBIBYTE)}")
    words.append(f"--builderOptimizationLevel={spec.optimization_level}")
    words += [f"--timingCacheFile={spec.timing_cache}"] if spec.timing_cache else []
    words += ["--versionCompatible"] if spec.version_compatible else []
    words += ["--hardwareCompatibilityLevel=ampere+"] if spec.hardware_compatible else []
    return shlex.join(words)


def _text(shape: Shape) -> str:
    return "x".join(str(size) for size in shape)
