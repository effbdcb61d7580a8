"""Runs an engine on device memory that torch or pycuda owns.

Torch is the default: one CUDA context, no further package. pycuda serves machines without torch;
therefore nothing here imports torch at the top.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np

from slimcli.artifacts.tensorrt.api import TensorRT
from slimcli.artifacts.tensorrt.builder import recorder
from slimcli.errors import MissingError, Problem, RunError


class Buffers(Protocol):
    """Device memory for inputs and outputs, and a stream."""

    @property
    def stream(self) -> int:
        """Handle of the CUDA stream."""
        ...

    def upload(self, name: str, array: Any, dtype: Any) -> int:
        """Puts an input on the device; its address."""
        ...

    def reserve(self, name: str, shape: tuple[int, ...], dtype: Any) -> int:
        """Memory for an output; its address."""
        ...

    def download(self, name: str) -> Any:
        """The values of an output, after everything on the stream is done."""
        ...

    def synchronize(self) -> None:
        """Waits for the stream."""
        ...


class TorchBuffers:
    """Torch tensors; inputs that are on the GPU already are used where they are."""

    def __init__(self, device: str = "cuda") -> None:
        import torch

        self.device = torch.device(device)
        self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._kept: dict[str, Any] = {}

    @property
    def stream(self) -> int:
        """Handle of the CUDA stream."""
        return int(self._stream.cuda_stream)

    def upload(self, name: str, array: Any, dtype: Any) -> int:
        """Puts an input on the device; its address."""
        import torch

        wanted = torch.from_numpy(np.empty(0, dtype)).dtype
        tensor = torch.as_tensor(array).detach().to(self.device, wanted).contiguous()
        tensor.record_stream(self._stream)
        self._kept[name] = tensor
        # The copy ran on the current stream; the engine runs on another one.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return tensor.data_ptr()

    def reserve(self, name: str, shape: tuple[int, ...], dtype: Any) -> int:
        """Memory for an output; its address."""
        import torch

        wanted = torch.from_numpy(np.empty(0, dtype)).dtype
        self._kept[name] = torch.empty(shape, dtype=wanted, device=self.device)
        self._kept[name].record_stream(self._stream)
        return int(self._kept[name].data_ptr())

    def download(self, name: str) -> Any:
        """The output as a torch tensor on the device."""
        self.synchronize()
        return self._kept[name]

    def synchronize(self) -> None:
        """Waits for the stream."""
        self._stream.synchronize()


class PycudaBuffers:
    """pycuda allocations; arrays are numpy on both sides.

    Raises:
        MissingError: pycuda is not installed or finds no device.
    """

    def __init__(self) -> None:
        try:
            import pycuda.autoinit  # makes the context
            import pycuda.driver as driver
        except Exception as error:  # pycuda raises its own classes without a driver
            raise MissingError(
                Problem(
                    "E-PYCUDA-MISSING", "pycuda cannot be used here", received=str(error),
                    fix='pip install "slimcli[pycuda]" (compiles; needs the CUDA toolkit), or leave'
                    " `buffers` out: torch needs no pycuda",
                )
            ) from error  # fmt: skip
        self._driver = driver
        self._context = pycuda.autoinit.context
        self._stream = driver.Stream()
        self._device: dict[str, Any] = {}
        self._bytes: dict[str, int] = {}
        self._host: dict[str, Any] = {}

    @property
    def stream(self) -> int:
        """Handle of the CUDA stream."""
        return int(self._stream.handle)

    def upload(self, name: str, array: Any, dtype: Any) -> int:
        """Copies an input to the device; its address."""
        host = np.ascontiguousarray(array, dtype)
        self._host[name] = host
        address = self._allocate(name, host.nbytes)
        self._driver.memcpy_htod_async(self._device[name], host, self._stream)
        return address

    def reserve(self, name: str, shape: tuple[int, ...], dtype: Any) -> int:
        """Memory for an output; its address."""
        self._host[name] = np.empty(shape, dtype)
        return self._allocate(name, self._host[name].nbytes)

    def _allocate(self, name: str, size: int) -> int:
        """Device memory of at least ``size`` bytes; what is there already serves again."""
        if self._bytes.get(name, 0) < max(1, size):
            if name in self._device:
                self.synchronize()  # something on the stream may still use it
                self._device.pop(name).free()
            self._bytes[name] = max(1, size)
            self._device[name] = self._driver.mem_alloc(self._bytes[name])
        return int(self._device[name])

    def download(self, name: str) -> Any:
        """The output as a numpy array."""
        self._driver.memcpy_dtoh_async(self._host[name], self._device[name], self._stream)
        self.synchronize()
        return self._host[name]

    def synchronize(self) -> None:
        """Waits for the stream."""
        self._stream.synchronize()


class EngineRunner:
    """An engine with its context.

    Args:
        path: The engine file; whether it fits this machine must have been checked
            (``engine.require_fit``).
        trt: The TensorRT module.
        buffers: Device memory; default: torch.

    Raises:
        RunError: TensorRT cannot load the plan or has no memory for it.
    """

    def __init__(self, path: Path, trt: TensorRT, buffers: Buffers | None = None) -> None:
        self.path, self.trt = path, trt
        self.buffers: Buffers = TorchBuffers() if buffers is None else buffers
        self.log: list[tuple[str, str]] = []
        self._logger = recorder(trt, self.log)
        self._runtime = trt.Runtime(self._logger)
        if self._built_version_compatible():
            self._runtime.engine_host_code_allowed = True
        engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise self._failed("TensorRT cannot load this engine")
        context = engine.create_execution_context()
        if context is None:
            raise self._failed("there is no memory for this engine")
        self._engine, self._context = engine, context
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        modes = {name: engine.get_tensor_mode(name) for name in names}
        self.input_names = [n for n in names if modes[n] == trt.TensorIOMode.INPUT]
        self.output_names = [n for n in names if modes[n] == trt.TensorIOMode.OUTPUT]

    def _built_version_compatible(self) -> bool:
        from slimcli.artifacts.tensorrt.engine import read_sidecar, sidecar_path

        if not sidecar_path(self.path).exists():
            return False
        return bool(read_sidecar(self.path).get("spec", {}).get("version_compatible"))

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs by name, as the buffers hold them.

        Args:
            inputs: Arrays or tensors by input name.

        Raises:
            RunError: An input is missing or has a shape outside the profile.
        """
        self.enqueue(inputs)
        return {name: self.buffers.download(name) for name in self.output_names}

    def enqueue(self, inputs: Mapping[str, Any]) -> None:
        """Starts one inference on the stream without waiting for it."""
        missing = [name for name in self.input_names if name not in inputs]
        if missing:
            raise self._failed(f"no value for the inputs {missing}")
        for name in self.input_names:
            self._set_input(name, inputs[name])
        for name in self.output_names:
            shape = tuple(self._context.get_tensor_shape(name))
            if any(size < 0 for size in shape):
                raise self._failed(f"output {name} has a shape that depends on data: {shape}")
            dtype = self.trt.nptype(self._engine.get_tensor_dtype(name))
            self._context.set_tensor_address(name, self.buffers.reserve(name, shape, dtype))
        if not self._context.execute_async_v3(self.buffers.stream):
            raise self._failed("the engine failed to run")

    def _set_input(self, name: str, value: Any) -> None:
        shape = tuple(int(size) for size in value.shape)
        if not self._context.set_input_shape(name, shape):
            low, _, high = self._engine.get_tensor_profile_shape(name, 0)
            raise RunError(
                Problem(
                    "E-TRT-SHAPE", f"input {name} has a shape this engine was not built for",
                    str(self.path), f"{tuple(low)} to {tuple(high)}", str(shape),
                    "build it with another --batch",
                )
            )  # fmt: skip
        dtype = self.trt.nptype(self._engine.get_tensor_dtype(name))
        self._context.set_tensor_address(name, self.buffers.upload(name, value, dtype))

    def latency(
        self, inputs: Mapping[str, Any], repeats: int = 100, warm_up: int = 10
    ) -> dict[str, float]:
        """Seconds an inference takes, upload and download included: median, p99 and least."""
        for _ in range(warm_up):
            self.run(inputs)
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            self.run(inputs)
            seconds.append(time.perf_counter() - start)
        seconds.sort()
        p99 = seconds[min(len(seconds) - 1, int(len(seconds) * 0.99))]
        return {"median": median(seconds), "p99": p99, "least": seconds[0]}

    def _failed(self, what: str) -> RunError:
        said = [text for severity, text in self.log if severity in ("error", "internal error")]
        received = " ".join(said[-1].split()) if said else ""
        return RunError(Problem("E-TRT-RUN", what, str(self.path), received=received))
