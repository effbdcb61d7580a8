"""A stand-in for TensorRT, made from our own description of it.

Unknown attributes and wrong numbers of arguments are errors, as with the real module. Failures are
scripted by the arguments of ``fake_tensorrt``.
"""

from __future__ import annotations

import enum
import inspect
from types import SimpleNamespace

from slimcli.artifacts.tensorrt import api


class Strict:
    """An object with exactly the members of a protocol, whose calls have its signatures."""

    def __init__(self, protocol, **values) -> None:
        members = {name for each in protocol.__mro__ for name in vars(each)}
        object.__setattr__(self, "_protocol", protocol)
        object.__setattr__(self, "_allowed", members | set(protocol.__annotations__))
        for name, value in values.items():
            setattr(self, name, self._checked(name, value))

    def _checked(self, name, value):
        declared = vars(self._protocol).get(name)
        if not inspect.isfunction(declared):
            return value
        signature = inspect.signature(declared)

        def call(*args, **kwargs):
            signature.bind(self, *args, **kwargs)
            return value(*args, **kwargs) if callable(value) else value

        return call

    def __setattr__(self, name, value) -> None:
        if name not in self._allowed:
            raise AttributeError(f"{self._protocol.__name__} has no {name}")
        object.__setattr__(self, name, value)


strict = Strict


class Severity(enum.IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class Logger:
    """As ILogger: the subclass must call its constructor."""

    def __init__(self) -> None:
        self.is_ready = True


def parser_error(node_name, operator, text):
    return strict(api.ParserError, code="UNSUPPORTED", node=3, node_name=node_name,
                  node_operator=operator, desc=text)  # fmt: skip


def fake_tensorrt(
    name="tensorrt",
    version="11.4.0.106",
    *,
    builder_is_null=False,
    parser_errors=None,
    plan=b"plan",
    profile_is_refused=False,
    log=(),
    engine=None,
):
    """A module that builds ``plan`` from anything, or fails as told."""
    seen = SimpleNamespace(flags=[], cleared=[], shapes={}, pools={}, config=None, network=None)
    inputs = [strict(api.NetworkTensor, name="image", shape=(-1, 3, 8, 8))]
    network = strict(api.Network, num_inputs=1, num_layers=7, get_input=lambda index: inputs[index])
    config = strict(
        api.BuilderConfig,
        set_flag=seen.flags.append,
        clear_flag=seen.cleared.append,
        set_memory_pool_limit=lambda pool, size: seen.pools.update({pool: size}),
        add_optimization_profile=-1 if profile_is_refused else 0,
        create_timing_cache=strict(api.TimingCache, serialize=b"cache"),
        get_timing_cache=strict(api.TimingCache, serialize=b"cache"),
        set_timing_cache=True,
        set_compute_capability=True,
    )
    profile = strict(api.Profile, set_shape=lambda name, *shape: seen.shapes.update({name: shape}))
    seen.config, loggers = config, []

    def build(net, cfg):
        for severity, text in log:
            loggers[-1].log(severity, text)
        return plan

    def make_builder(logger):
        assert logger.is_ready
        loggers.append(logger)
        if builder_is_null:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return strict(
            api.Builder,
            create_network=lambda flags: network,
            create_builder_config=config,
            create_optimization_profile=profile,
            build_serialized_network=build,
        )

    errors = parser_errors or []
    parser = strict(
        api.Parser,
        num_errors=len(errors),
        parse_from_file=parser_errors is None,
        get_error=lambda index: errors[index],
    )
    module = strict(
        api.TensorRT,
        __version__=version,
        __name__=name,
        ILogger=Logger,
        BuilderFlag=SimpleNamespace(TF32="TF32", VERSION_COMPATIBLE="VERSION_COMPATIBLE"),
        MemoryPoolType=SimpleNamespace(WORKSPACE="WORKSPACE"),
        NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=0),
        ProfilingVerbosity=SimpleNamespace(DETAILED="DETAILED"),
        HardwareCompatibilityLevel=SimpleNamespace(AMPERE_PLUS="AMPERE_PLUS"),
        TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out"),
        Builder=make_builder,
        OnnxParser=lambda network, logger: parser,
        Runtime=lambda logger: strict(api.Runtime, deserialize_cuda_engine=lambda content: engine),
        nptype=lambda dtype: dtype,
    )
    if name == "tensorrt_rtx":  # only there, and therefore no part of what slim describes
        known = enum.Enum("ComputeCapability", ["NONE", "CURRENT", "SM80", "SM89"])
        object.__setattr__(module, "ComputeCapability", known)
    return module, seen
