"""Running an engine, with a stand-in for TensorRT and memory of numpy."""

import hashlib
import json
import sys
from types import SimpleNamespace
from unittest.mock import create_autospec

import numpy as np
import onnx
import pytest
import torch

from slimcli.artifacts.tensorrt import api, engine, machine, runner
from slimcli.artifacts.tensorrt.builder import BuildSpec
from slimcli.artifacts.tensorrt.model import EngineModel
from slimcli.errors import MissingError, RunError

from .fake_tensorrt import fake_tensorrt, strict
from .micro_graphs import PAIRS


class HostBuffers:
    """Memory on the host; an address is a number that the stand-in can look up."""

    stream = 7

    def __init__(self) -> None:
        self.memory, self.names, self.waits = {}, {}, 0

    def _place(self, name, array) -> int:
        address = len(self.memory) + 1
        self.memory[address], self.names[name] = array, address
        return address

    def upload(self, name, array, dtype) -> int:
        return self._place(name, np.asarray(array, dtype))

    def reserve(self, name, shape, dtype) -> int:
        return self._place(name, np.empty(shape, dtype))

    def download(self, name):
        self.synchronize()
        return self.memory[self.names[name]]

    def synchronize(self) -> None:
        self.waits += 1


def doubling_engine(buffers, *, runs=True, output_shape=None):
    """An engine with the input x [1..4, 3] and the output y = 2 x."""
    shapes, addresses = {}, {}

    def set_input_shape(name, shape):
        shapes[name] = shape
        return 1 <= shape[0] <= 4

    def execute(stream):
        assert stream == HostBuffers.stream
        buffers.memory[addresses["y"]][:] = 2 * buffers.memory[addresses["x"]]
        return runs

    context = strict(
        api.ExecutionContext,
        set_input_shape=set_input_shape,
        get_tensor_shape=lambda name: output_shape or shapes["x"],
        set_tensor_address=lambda name, address: addresses.update({name: address}) or True,
        execute_async_v3=execute,
    )
    return strict(
        api.Engine,
        num_io_tensors=2,
        get_tensor_name=lambda index: "xy"[index],
        get_tensor_mode=lambda name: {"x": "in", "y": "out"}[name],
        get_tensor_dtype=lambda name: np.float32,
        get_tensor_profile_shape=lambda name, profile: [(1, 3), (2, 3), (4, 3)],
        create_execution_context=context,
    )


@pytest.fixture
def path(tmp_path):
    (tmp_path / "model.engine").write_bytes(b"plan")
    return tmp_path / "model.engine"


def make(path, **changes):
    buffers = HostBuffers()
    trt, _ = fake_tensorrt(engine=doubling_engine(buffers, **changes))
    return runner.EngineRunner(path, trt, buffers)


@pytest.mark.parametrize("samples", [1, 4])
def test_outputs_come_back_by_name(path, samples):
    x = np.arange(samples * 3, dtype=np.float64).reshape(samples, 3)
    found = make(path).run({"x": x})
    assert found["y"].dtype == np.float32
    assert np.array_equal(found["y"], 2 * x)


def test_a_shape_outside_the_profile_is_told_with_the_range(path):
    with pytest.raises(RunError, match=r"expected \(1, 3\) to \(4, 3\), received \(5, 3\)"):
        make(path).run({"x": np.zeros((5, 3))})


def test_a_missing_input_is_named(path):
    with pytest.raises(RunError, match=r"no value for the inputs \['x'\]"):
        make(path).run({})


def test_an_engine_that_fails_or_has_shapes_from_data_is_told(path):
    with pytest.raises(RunError, match="failed to run"):
        make(path, runs=False).run({"x": np.zeros((1, 3))})
    with pytest.raises(RunError, match="depends on data"):
        make(path, output_shape=(-1, 3)).run({"x": np.zeros((1, 3))})


def test_a_plan_that_does_not_load_is_an_error_not_a_none(path):
    trt, _ = fake_tensorrt(engine=None)
    with pytest.raises(RunError, match="cannot load this engine"):
        runner.EngineRunner(path, trt, HostBuffers())


def test_latency_is_measured_after_a_warm_up(path):
    engine_ = make(path)
    found = engine_.latency({"x": np.zeros((1, 3))}, repeats=5, warm_up=2)
    assert engine_.buffers.waits == 7
    assert 0 < found["least"] <= found["median"] <= found["p99"]


def test_the_engine_is_called_like_the_module(path):
    model = PAIRS["Q1"][1]()
    structure = (
        '{"parameters": ["image"], "inputs": ["x"], "arguments": {"kind": "dict", "items": '
        '[["image", {"kind": "tensor", "index": 0}]]}, "result": {"kind": "dict", "items": '
        '[["twice", {"kind": "tensor", "index": 0}]]}}'
    )
    onnx.helper.set_model_props(model, {"slim.structure": structure})
    onnx.save_model(model, path.with_name("model.onnx"))
    buffers = HostBuffers()
    trt, _ = fake_tensorrt("tensorrt_rtx", engine=doubling_engine(buffers))
    shapes = {"image": ((1, 3, 8, 8),) * 3}
    engine.build_engine(trt, BuildSpec(path.with_name("model.onnx"), shapes), path, None)
    found = EngineModel(path, trt=trt, buffers=buffers)(image=torch.ones(2, 3))
    assert torch.equal(found["twice"], torch.full((2, 3), 2.0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_no_runtime_is_made(path):
    content = {"runtime": "rtx", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    engine.sidecar_path(path).write_text(json.dumps(content))
    trt, _ = fake_tensorrt("tensorrt_rtx")
    trt.Runtime = lambda logger: pytest.fail("a Runtime without a driver is a crash")
    with pytest.raises(MissingError, match="needs an NVIDIA GPU"):
        EngineModel(path, trt=trt)


def test_pycuda_that_is_not_there_is_told_with_the_command():
    try:
        import pycuda.autoinit  # noqa: F401
    except Exception:
        with pytest.raises(MissingError, match=r'pip install "slimcli\[pycuda\]"'):
            runner.PycudaBuffers()
    else:
        pytest.skip("pycuda works here")


class FakeDriver:
    """The calls of pycuda.driver that are used, with its signatures.

    As with the real one, copies happen when the stream gets to them and not before.
    """

    def __init__(self):
        self.memory, self.queue, self.freed, self.sizes = {}, [], [], []
        self.mem_alloc = create_autospec(lambda bytes: None, side_effect=self._alloc)
        self.memcpy_htod_async = create_autospec(
            lambda dest, src, stream=None: None, side_effect=self._to_device
        )
        self.memcpy_dtoh_async = create_autospec(
            lambda dest, src, stream=None: None, side_effect=self._to_host
        )
        self.Stream = create_autospec(lambda flags=0: None, side_effect=self._stream)

    def _stream(self, flags=0):
        return SimpleNamespace(handle=HostBuffers.stream, synchronize=self.run)

    def run(self):
        while self.queue:
            self.queue.pop(0)()

    def _alloc(self, bytes):
        address = 1000 + len(self.sizes)
        self.sizes.append(bytes)
        self.memory[address] = np.zeros(bytes, np.uint8)

        def free():
            self.freed.append(address)
            del self.memory[address]

        class Allocation:
            def __int__(self):
                return address

        Allocation.free = staticmethod(free)
        return Allocation()

    def _to_device(self, dest, src, stream=None):
        assert stream.handle == HostBuffers.stream
        view = self.memory[int(dest)][: src.nbytes]
        self.queue.append(lambda: view.__setitem__(slice(None), src.reshape(-1).view(np.uint8)))

    def _to_host(self, dest, src, stream=None):
        assert stream.handle == HostBuffers.stream
        view = self.memory[int(src)][: dest.nbytes]
        self.queue.append(lambda: dest.reshape(-1).view(np.uint8).__setitem__(slice(None), view))


@pytest.fixture
def driver(monkeypatch):
    made = FakeDriver()
    autoinit = SimpleNamespace(context=SimpleNamespace())
    package = SimpleNamespace(driver=made, autoinit=autoinit, __path__=[])
    for name, module in (("", package), (".driver", made), (".autoinit", autoinit)):
        monkeypatch.setitem(sys.modules, f"pycuda{name}", module)
    return made


def doubling_on_device(driver):
    """The engine y = 2 x whose addresses are those of the driver."""
    shapes, addresses = {}, {}

    def double():
        size = 4 * int(np.prod(shapes["x"]))
        x, y = (driver.memory[addresses[name]][:size].view(np.float32) for name in "xy")
        y[:] = 2 * x

    context = strict(
        api.ExecutionContext,
        set_input_shape=lambda name, shape: shapes.update({name: shape}) or True,
        get_tensor_shape=lambda name: shapes["x"],
        set_tensor_address=lambda name, address: addresses.update({name: address}) or True,
        execute_async_v3=lambda stream: driver.queue.append(double) or stream == HostBuffers.stream,
    )
    return strict(
        api.Engine,
        num_io_tensors=2,
        get_tensor_name=lambda index: "xy"[index],
        get_tensor_mode=lambda name: {"x": "in", "y": "out"}[name],
        get_tensor_dtype=lambda name: np.float32,
        create_execution_context=context,
    )


def test_pycuda_uploads_runs_and_downloads_in_the_order_of_the_stream(path, driver):
    trt, _ = fake_tensorrt(engine=doubling_on_device(driver))
    engine_ = runner.EngineRunner(path, trt, runner.PycudaBuffers())
    x = np.arange(12, dtype=np.float64).reshape(3, 4).T  # neither float32 nor contiguous
    found = engine_.run({"x": x})["y"]
    assert found.dtype == np.float32
    assert np.array_equal(found, 2 * x)
    assert driver.queue == []
    assert np.array_equal(engine_.run({"x": torch.ones(2, 3)})["y"], np.full((2, 3), 2.0))


def test_pycuda_memory_serves_again_and_is_freed_where_it_is_too_small(path, driver):
    trt, _ = fake_tensorrt(engine=doubling_on_device(driver))
    engine_ = runner.EngineRunner(path, trt, runner.PycudaBuffers())
    for samples in (2, 1, 2, 5):
        values = np.full((samples, 3), samples, np.float32)
        assert np.array_equal(engine_.run({"x": values})["y"], 2 * values)
    assert driver.sizes == [24, 24, 60, 60]
    assert driver.freed == [1000, 1001]
    engine_.enqueue({"x": np.ones((6, 3), np.float32)})  # frees what nothing waits for any more
    assert np.array_equal(engine_.buffers.download("y"), np.full((6, 3), 2.0))


def test_pycuda_without_a_driver_is_told_with_what_it_said(monkeypatch):
    def fail(name, *_):
        raise RuntimeError("cuInit failed: no CUDA-capable device is detected")

    finder = SimpleNamespace(find_spec=lambda name, *_: fail(name) if "pycuda" in name else None)
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    with pytest.raises(MissingError, match="no CUDA-capable device is detected"):
        runner.PycudaBuffers()


def test_the_gpu_is_described_or_none():
    found = machine.gpu()
    assert (found is None) == (not torch.cuda.is_available())
