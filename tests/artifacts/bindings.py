"""What the real bindings of TensorRT offer of our description of it: names and signatures.

    python -m tests.artifacts.bindings WHEEL...      writes tensorrt_members.json beside this file

The wheels ``tensorrt-cu13-bindings`` need libraries that no machine without NVIDIA's index has. The
module can be imported all the same: it asks them for nine functions, and empty ones will do as long
as nothing is called. pybind11 writes every signature into the docstrings; we keep names, types and
which parameters may be left out, not the texts.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from slimcli.artifacts.tensorrt import api

RECORDED = Path(__file__).with_name("tensorrt_members.json")
CLASSES = {
    "Builder": api.Builder,
    "BuilderFlag": api.BuilderFlags,
    "IBuilderConfig": api.BuilderConfig,
    "ICudaEngine": api.Engine,
    "IExecutionContext": api.ExecutionContext,
    "IHostMemory": api.HostMemory,
    "INetworkDefinition": api.Network,
    "IOptimizationProfile": api.Profile,
    "ITensor": api.NetworkTensor,
    "ITimingCache": api.TimingCache,
    "OnnxParser": api.Parser,
    "ParserError": api.ParserError,
    "Runtime": api.Runtime,
}
ENUMS = {
    "HardwareCompatibilityLevel": ["AMPERE_PLUS"],
    "MemoryPoolType": ["WORKSPACE"],
    "NetworkDefinitionCreationFlag": ["STRONGLY_TYPED"],
    "ProfilingVerbosity": ["DETAILED"],
    "TensorIOMode": ["INPUT", "OUTPUT"],
}
EMPTY = [
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry", "getNvOnnxParserVersion", "getPluginRegistry",
    "initLibNvInferPlugins",
]  # fmt: skip


def members(protocol: type) -> list[str]:
    """Public names of one of our protocols."""
    names = [*vars(protocol), *protocol.__annotations__]
    return list(dict.fromkeys(name for name in names if not name.startswith("_")))


def described(module) -> dict:
    """Class -> member -> its signatures, for what our protocols name of a module."""
    found = {
        name: {
            member: _signatures(getattr(getattr(module, name), member))
            for member in [*members(protocol), "__init__"]
            if hasattr(getattr(module, name), member)
        }
        for name, protocol in CLASSES.items()
    }
    found["module"] = {name: [] for name in members(api.TensorRT) if hasattr(module, name)}
    found["module"]["__version__"] = module.__version__
    found["enums"] = {
        name: [value for value in values if hasattr(getattr(module, name), value)]
        for name, values in ENUMS.items()
    }
    return found


def _signatures(member) -> list | str:
    """Each overload, its parameters without self; ``value`` for what is not called."""
    if isinstance(member, property):
        return "value" if member.fset else "read-only value"
    if not callable(member) or isinstance(member, (int, type)):
        return "value"
    text = member.__doc__ or ""
    lines = re.findall(rf"{member.__name__}\((.*)\) -> (.*)", text)
    return [
        {"parameters": _parameters(given), "result": result.strip().rstrip(":")}
        for given, result in lines
        if given != "*args, **kwargs"
    ]


def _parameters(text: str) -> list[list]:
    """(name, type, may be left out) of each parameter; commas inside brackets do not part."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[(<{") - (letter in "])>}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    found = []
    for part in filter(None, (each.strip() for each in parts)):
        name, _, kind = part.partition(":")
        kind, _, default = kind.partition(" = ")
        if name != "self":
            found.append([name.strip(), kind.strip(), bool(default)])
    return found


def of_wheel(wheel: Path) -> tuple[str, dict]:
    """Version and description of the bindings in a wheel, which are not installed."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(root)
        version = wheel.name.split("-")[1]
        (root / "empty.c").write_text(
            "".join(f"void *{name}(void) {{return 0;}}\n" for name in EMPTY)
        )
        for library in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
            name = f"lib{library}.so.{version.split('.')[0]}"
            command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", name, "empty.c"]
            subprocess.run(command, cwd=root, check=True)
        code = (
            "import json, sys; sys.path[:0] = sys.argv[1:]; "
            "from tests.artifacts import bindings; import tensorrt_bindings; "
            "print(json.dumps(bindings.described(tensorrt_bindings)))"
        )
        environment = os.environ | {"LD_LIBRARY_PATH": folder}
        command = [sys.executable, "-c", code, folder, str(Path(__file__).parents[2])]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return version, json.loads(done.stdout)


def main() -> None:
    """Records the wheels named on the command line."""
    found = dict(of_wheel(Path(each)) for each in sys.argv[1:])
    RECORDED.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
