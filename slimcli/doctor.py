"""What this machine can do, tested rather than listed, and the fix for what it cannot.

Each check runs in isolation: one that fails, even by an unexpected exception, is a row of the
result and never stops the others.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

State = Literal["ok", "warn", "FAIL", "none"]

LEAST_FREE_GIB = 1.0
LEAST_SHARED_MIB = 512


@dataclass(frozen=True)
class Check:
    """One row: what was looked at, how it is, and what to do about it.

    Attributes:
        name: Short name, also the value of ``--need``.
        state: ``ok``, ``warn``, ``FAIL``; ``none`` where something optional is not there.
        text: What was found.
        fix: What to type; empty if nothing is needed.
    """

    name: str
    state: State
    text: str
    fix: str = ""


def version_of(distribution: str) -> str:
    """The installed version, or an empty string."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def check_python() -> Check:
    """The interpreter and where slim itself lies."""
    from slimcli import __version__

    text = f"python {platform.python_version()} · slim {__version__} · {platform.platform()}"
    return Check("python", "ok" if sys.version_info >= (3, 10) else "FAIL", text)


def check_torch() -> Check:
    """Imports torch and runs one convolution forwards and backwards."""
    import torch

    started = time.perf_counter()
    layer = torch.nn.Conv2d(3, 4, 3)
    layer(torch.randn(1, 3, 8, 8)).sum().backward()
    milliseconds = 1000 * (time.perf_counter() - started)
    text = f"torch {torch.__version__} · {torch.get_num_threads()} threads"
    return Check("torch", "ok", f"{text} · conv step {milliseconds:.1f} ms")


def check_gpu() -> Check:
    """Runs a convolution on every CUDA device."""
    import torch

    if not torch.cuda.is_available():
        return Check("gpu", "none", "no CUDA GPU: training works, `export --trt` does not")
    rows = []
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        torch.nn.Conv2d(3, 4, 3, device=device)(torch.randn(1, 3, 8, 8, device=device))
        free_bytes, _ = torch.cuda.mem_get_info(device)
        rows.append(f"cuda:{index} {torch.cuda.get_device_name(device)}, {free_bytes / 1e9:.0f} GB")
    return Check("gpu", "ok", f"CUDA {torch.version.cuda} · " + " · ".join(rows))


def check_onnx() -> Check:
    """Writes a small graph, checks it and runs it in onnxruntime."""
    import numpy
    import onnx
    import onnxruntime

    tensor = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])],
        "relu",
        [tensor("x", onnx.TensorProto.FLOAT, [2])],
        [tensor("y", onnx.TensorProto.FLOAT, [2])],
    )
    opset = [onnx.helper.make_opsetid("", 19)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (result,) = session.run(None, {"x": numpy.array([-1, 2], numpy.float32)})
    good = result.tolist() == [0.0, 2.0]
    text = f"onnx {onnx.__version__} · onnxruntime {onnxruntime.__version__}"
    text += f" · onnxscript {version_of('onnxscript') or 'missing'}"
    return Check("onnx", "ok" if good else "FAIL", text, "" if good else "pip install onnxruntime")


def check_tensorrt() -> Check:
    """Whether TensorRT is installed; it is never loaded here, since it needs a driver."""
    found = version_of("tensorrt") or version_of("tensorrt-cu13") or version_of("tensorrt-cu12")
    if not found:
        return Check("trt", "none", "tensorrt not installed", 'pip install "slimcli[trt]"')
    return Check("trt", "ok", f"tensorrt {found}")


def check_rtx() -> Check:
    """Imports TensorRT-RTX, which builds engines without a GPU."""
    found = version_of("tensorrt-rtx")
    if not found:
        return Check("rtx", "none", "tensorrt-rtx not installed", 'pip install "slimcli[rtx]"')
    module = importlib.import_module("tensorrt_rtx")
    return Check("rtx", "ok", f"tensorrt-rtx {module.__version__}")


def check_shared_memory() -> Check:
    """Data loader workers pass batches through /dev/shm."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Check("shm", "none", "no /dev/shm on this system")
    size_mib = shutil.disk_usage(folder).total / 2**20
    if size_mib < LEAST_SHARED_MIB:
        fix = "docker run --shm-size=8g ..., or config.num_workers=0"
        return Check("shm", "warn", f"/dev/shm {size_mib:.0f} MB: data workers may die", fix)
    return Check("shm", "ok", f"/dev/shm {size_mib:.0f} MB")


def check_disk() -> Check:
    """Whether run folders can be written here, and how much room is left."""
    try:
        with tempfile.NamedTemporaryFile(dir=Path.cwd()):
            pass
    except OSError as error:
        fix = "change to a folder you may write, or set config.save_dir"
        return Check("disk", "FAIL", f"this folder is not writable: {error.strerror}", fix)
    free_gib = shutil.disk_usage(Path.cwd()).free / 2**30
    state: State = "ok" if free_gib >= LEAST_FREE_GIB else "warn"
    fix = "" if state == "ok" else "free some space, or set config.save_dir to another disk"
    return Check("disk", state, f"this folder is writable, {free_gib:.0f} GB free", fix)


CHECKS: dict[str, tuple[Callable[[], Check], str]] = {
    "python": (check_python, "install Python 3.10 or newer"),
    "torch": (check_torch, "pip install torch"),
    "gpu": (check_gpu, "look at the driver: nvidia-smi"),
    "onnx": (check_onnx, "pip install onnx onnxscript onnxruntime"),
    "trt": (check_tensorrt, 'pip install "slimcli[trt]"'),
    "rtx": (check_rtx, 'pip install "slimcli[rtx]"'),
    "shm": (check_shared_memory, ""),
    "disk": (check_disk, ""),
}


def examine() -> list[Check]:
    """Runs every check."""
    rows = []
    for name, (run, fix) in CHECKS.items():
        try:
            rows.append(run())
        except Exception as error:
            rows.append(Check(name, "FAIL", f"{type(error).__name__}: {error}", fix))
    return rows


def as_json(rows: list[Check]) -> dict[str, Any]:
    """The rows and the versions of all packages slim depends on, as plain values."""
    packages = (
        "torch torchvision numpy lightning-fabric pydantic PyYAML click rich onnx onnxscript "
        "onnxruntime safetensors tensorboardX scikit-learn matplotlib Jinja2 timm tensorrt "
        "tensorrt-rtx"
    )
    return {
        "version": 1,
        "checks": [asdict(row) for row in rows],
        "packages": {name: version_of(name) for name in packages.split() if version_of(name)},
        "cpu_count": os.cpu_count(),
    }
