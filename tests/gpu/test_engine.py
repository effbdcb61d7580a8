"""Engines on a real GPU: built, run, compared. Skipped where there is none."""

import pytest
import torch
from torch import nn

from slimcli.artifacts import onnx, verify
from slimcli.artifacts.onnx.half import HALF_LIMIT, to_half
from slimcli.artifacts.tensorrt import builder, engine, machine
from slimcli.artifacts.tensorrt.model import EngineModel
from slimcli.artifacts.tensorrt.runner import EngineRunner, PycudaBuffers
from slimcli.errors import MissingError, RunError
from slimcli.network.example import Example

from ..artifacts.quantized import QuantizedNet

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
QUANTIZED_LIMIT = 5e-2  # one int8 step of an output of full range is 8e-3


def call(model, batch):
    return model(batch)


@pytest.fixture(params=["tensorrt", "rtx"])
def trt(request):
    try:
        return machine.load(request.param)
    except MissingError as error:
        pytest.skip(str(error))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 4),
    ).eval()  # fmt: skip


def exported(model, tmp_path):
    example = Example(torch.randn(4, 3, 8, 8), call)
    return onnx.export(model, example, tmp_path / "model.onnx").path


def built(trt, source, **changes):
    path = source.with_suffix(".engine")
    spec = builder.BuildSpec(source, engine.batch_shapes(source, (1, 8, 32)), **changes)
    engine.build_engine(trt, spec, path, machine.gpu())
    return path


@pytest.mark.parametrize("samples", [1, 5, 32])
def test_a_float_engine_agrees_with_onnx(trt, tmp_path, samples):
    source = exported(net(), tmp_path)
    model = EngineModel(built(trt, source), trt=trt)
    seam = verify.compare(
        verify.runner(onnx.OnnxModel(source), call),
        verify.runner(model, call),
        [torch.randn(samples, 3, 8, 8, device="cuda")],
    )
    assert seam.ok, str(seam)


def test_a_half_engine_agrees_within_half_precision(trt, tmp_path):
    source = exported(net(), tmp_path)
    half = to_half(source, tmp_path / "model.fp16.onnx")
    model = EngineModel(built(trt, half), trt=trt)
    batch = torch.randn(8, 3, 8, 8)
    found = verify.compare(onnx.OnnxModel(source), model, [batch], limit=HALF_LIMIT)
    assert found.ok, str(found)


def test_a_quantized_engine_agrees_within_its_steps(trt, tmp_path):
    source = exported(QuantizedNet(channels=True), tmp_path)
    model = EngineModel(built(trt, source), trt=trt)
    batch = torch.randn(8, 3, 8, 8)
    found = verify.compare(onnx.OnnxModel(source), model, [batch], limit=QUANTIZED_LIMIT)
    assert found.ok, str(found)


def test_a_batch_outside_the_profile_is_told(trt, tmp_path):
    model = EngineModel(built(trt, exported(net(), tmp_path)), trt=trt)
    with pytest.raises(RunError, match="not built for"):
        model(torch.randn(33, 3, 8, 8))


def test_latency_is_measured(trt, tmp_path):
    runner = EngineRunner(built(trt, exported(net(), tmp_path)), trt)
    found = runner.latency({"input": torch.randn(8, 3, 8, 8).cuda()}, repeats=20)
    assert 0 < found["least"] <= found["median"] <= found["p99"]


def test_pycuda_gives_the_same(trt, tmp_path):
    path = built(trt, exported(net(), tmp_path))
    batch = torch.randn(8, 3, 8, 8)
    expected = EngineModel(path, trt=trt)(batch)
    try:
        buffers = PycudaBuffers()
    except MissingError as error:
        pytest.skip(str(error))
    found = EngineRunner(path, trt, buffers).run({"input": batch.numpy()})
    assert torch.equal(torch.from_numpy(next(iter(found.values()))), expected)


def test_an_engine_of_another_version_is_refused(trt, tmp_path):
    path = built(trt, exported(net(), tmp_path))
    sidecar = engine.sidecar_path(path)
    sidecar.write_text(sidecar.read_text().replace(trt.__version__, "1.0.0"))
    with pytest.raises(MissingError, match="another version"):
        EngineModel(path, trt=trt)
