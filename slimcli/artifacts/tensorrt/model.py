"""An engine that is called like the module it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from slimcli.artifacts.file_model import FileModel
from slimcli.artifacts.tensorrt import engine, machine
from slimcli.artifacts.tensorrt.runner import Buffers, EngineRunner


class EngineModel(FileModel):
    """A module without parameters whose forward runs an engine.

    Args:
        path: The engine; its sidecar must lie beside it.
        trt: The TensorRT module; default: the one the sidecar names.
        buffers: Device memory; default: torch.

    Raises:
        MissingError: This machine cannot run it; both sides are named.
        RunError: It cannot be loaded.
    """

    def __init__(
        self, path: str | Path, *, trt: Any = None, buffers: Buffers | None = None
    ) -> None:
        path = Path(path)
        sidecar = engine.read_sidecar(path)
        module = machine.load(str(sidecar["runtime"])) if trt is None else trt
        if buffers is None:
            machine.require_gpu("running an engine", machine.gpu())
        engine.require_fit(path, module, machine.gpu())
        runner = EngineRunner(path, module, buffers)
        super().__init__(path, runner.input_names, runner.output_names, sidecar["structure"])
        self.runner = runner

    def run_flat(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Outputs in the order of ``output_names``."""
        found = self.runner.run(dict(zip(self.input_names, tensors, strict=True)))
        return [torch.as_tensor(found[name]).clone() for name in self.output_names]

    def expected_inputs(self) -> list[str]:
        """Names of the inputs."""
        return list(self.input_names)
