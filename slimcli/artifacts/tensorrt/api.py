"""The part of TensorRT that slim uses, written down as protocols.

It exists under these names in ``tensorrt`` 10.12 and newer, in 11.x and in ``tensorrt_rtx``. The
builder and the runner are typed against it, so that a call of anything else is a type error, and
tests drive them with a stand-in made from it. Nothing here imports TensorRT.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

Shape = Sequence[int]


class HostMemory(Protocol):
    """A serialized engine in memory; ``bytes()`` copies it."""

    @property
    def nbytes(self) -> int:
        """Size."""
        ...

    def __buffer__(self, flags: int, /) -> memoryview:
        """The bytes themselves."""
        ...


class NetworkTensor(Protocol):
    """A tensor of the parsed network."""

    @property
    def name(self) -> str:
        """As in the ONNX file."""
        ...

    @property
    def shape(self) -> Shape:
        """-1 where it is dynamic."""
        ...


class Network(Protocol):
    """INetworkDefinition."""

    @property
    def num_inputs(self) -> int:
        """Number of inputs."""
        ...

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        ...

    def get_input(self, index: int, /) -> NetworkTensor:
        """Input number ``index``."""
        ...


class ParserError(Protocol):
    """IParserError."""

    def code(self) -> Any:
        """Kind of error."""
        ...

    def node(self) -> int:
        """Index of the node; -1 if it is none."""
        ...

    def node_name(self) -> str:
        """Name of the node."""
        ...

    def node_operator(self) -> str:
        """Its operator."""
        ...

    def desc(self) -> str:
        """What is wrong."""
        ...


class Parser(Protocol):
    """OnnxParser."""

    @property
    def num_errors(self) -> int:
        """Number of errors of the last parse."""
        ...

    def parse_from_file(self, path: str, /) -> bool:
        """Reads a file into the network."""
        ...

    def get_error(self, index: int, /) -> ParserError:
        """Error number ``index``."""
        ...


class Profile(Protocol):
    """IOptimizationProfile."""

    def set_shape(self, name: str, smallest: Shape, typical: Shape, largest: Shape, /) -> None:
        """Range of the shape of one input; raises ValueError if it is inconsistent."""
        ...


class TimingCache(Protocol):
    """ITimingCache."""

    def serialize(self) -> HostMemory:
        """Its bytes."""
        ...


class BuilderConfig(Protocol):
    """IBuilderConfig."""

    builder_optimization_level: int
    profiling_verbosity: Any
    hardware_compatibility_level: Any
    num_compute_capabilities: int

    def set_memory_pool_limit(self, pool: Any, size: int, /) -> None:
        """Largest size of a memory pool in bytes."""
        ...

    def set_flag(self, flag: Any, /) -> None:
        """Sets a BuilderFlag."""
        ...

    def clear_flag(self, flag: Any, /) -> None:
        """Clears a BuilderFlag."""
        ...

    def add_optimization_profile(self, profile: Profile, /) -> int:
        """Index of the profile; -1 if it is not valid."""
        ...

    def create_timing_cache(self, content: bytes, /) -> TimingCache | None:
        """A cache from its bytes; empty bytes for a new one."""
        ...

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool, /) -> bool:
        """Uses a cache."""
        ...

    def get_timing_cache(self) -> TimingCache | None:
        """The cache in use."""
        ...

    def set_compute_capability(self, capability: Any, index: int, /) -> bool:
        """TensorRT-RTX only: the GPU generation to build for."""
        ...


class Builder(Protocol):
    """Builder."""

    def create_network(self, flags: int, /) -> Network:
        """An empty network."""
        ...

    def create_builder_config(self) -> BuilderConfig:
        """Default settings."""
        ...

    def create_optimization_profile(self) -> Profile:
        """An empty profile."""
        ...

    def build_serialized_network(
        self, network: Network, config: BuilderConfig, /
    ) -> HostMemory | None:
        """The plan, or None if the build failed."""
        ...


class ExecutionContext(Protocol):
    """IExecutionContext."""

    def set_input_shape(self, name: str, shape: Shape, /) -> bool:
        """Shape of a dynamic input; False if it is outside the profile."""
        ...

    def get_tensor_shape(self, name: str, /) -> Shape:
        """Shape under the input shapes that were set."""
        ...

    def set_tensor_address(self, name: str, address: int, /) -> bool:
        """Device memory of an input or output."""
        ...

    def execute_async_v3(self, stream: int, /) -> bool:
        """Enqueues the inference."""
        ...


class Engine(Protocol):
    """ICudaEngine."""

    @property
    def num_io_tensors(self) -> int:
        """Inputs and outputs together."""
        ...

    def get_tensor_name(self, index: int, /) -> str:
        """Name of input or output number ``index``."""
        ...

    def get_tensor_mode(self, name: str, /) -> Any:
        """A TensorIOMode."""
        ...

    def get_tensor_dtype(self, name: str, /) -> Any:
        """A DataType."""
        ...

    def get_tensor_shape(self, name: str, /) -> Shape:
        """-1 where it is dynamic."""
        ...

    def get_tensor_profile_shape(self, name: str, profile: int, /) -> Sequence[Shape]:
        """Smallest, typical and largest shape."""
        ...

    def create_execution_context(self) -> ExecutionContext | None:
        """A context, or None if there is no memory for it."""
        ...


class Runtime(Protocol):
    """Runtime."""

    engine_host_code_allowed: bool

    def deserialize_cuda_engine(self, plan: bytes, /) -> Engine | None:
        """The engine, or None if the plan does not fit."""
        ...


class BuilderFlags(Protocol):
    """BuilderFlag."""

    TF32: Any
    VERSION_COMPATIBLE: Any


class TensorRT(Protocol):
    """The module ``tensorrt`` or ``tensorrt_rtx``."""

    __version__: str
    __name__: str
    ILogger: Any
    BuilderFlag: BuilderFlags
    MemoryPoolType: Any
    NetworkDefinitionCreationFlag: Any
    ProfilingVerbosity: Any
    HardwareCompatibilityLevel: Any
    TensorIOMode: Any

    def Builder(self, logger: Any, /) -> Builder:
        """A builder; TypeError where the driver does not work."""
        ...

    def OnnxParser(self, network: Network, logger: Any, /) -> Parser:
        """A parser that fills a network."""
        ...

    def Runtime(self, logger: Any, /) -> Runtime:
        """A runtime; never to be made without a driver."""
        ...

    def nptype(self, dtype: Any, /) -> Any:
        """The numpy dtype of a DataType."""
        ...
