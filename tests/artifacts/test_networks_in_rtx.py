"""Known networks, quantized by our own QAT, in onnxruntime and in TensorRT-RTX, all in int8."""

import pytest
import torch
from onnx import checker as onnx_checker

from slimcli.algorithms.qat.config import QATConfig
from slimcli.algorithms.qat.method import QATCompressor
from slimcli.artifacts import onnx
from slimcli.artifacts.tensorrt import builder, engine
from slimcli.compressor import Schedule
from slimcli.network.example import Example

torchvision = pytest.importorskip("torchvision")

RESNET18_BYTES = 12_000_000  # 44.7 MB in float32
BATCHES = (1, 16, 47)


def quantized(name: str, granularity: str) -> tuple[torch.nn.Module, Example]:
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)()
    example = Example(torch.randn(4, 3, 64, 64), lambda m, batch: m(batch))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # after one batch its statistics are the stored ones
    with torch.no_grad():
        model.train()(torch.randn(32, 3, 64, 64))  # as initialized, mobilenet_v2 answers 0
    model.eval()
    compressor = QATCompressor(QATConfig(weight_granularity=granularity, calibration_batches=1))
    plan = compressor.plan(model, example, Schedule(1, 1, (0.001,)))
    model = compressor.prepare(model, example, plan)
    compressor.calibrate(model, [example])
    return compressor.deploy(model.eval()), example


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "granularity", "heavy"), [("resnet18", "channel", 21), ("mobilenet_v2", "tensor", 53)]
)
def test_all_heavy_layers_run_in_int8_with_a_free_batch(name, granularity, heavy, tmp_path):
    model, example = quantized(name, granularity)
    report = onnx.export(model, example, tmp_path / "model.onnx")
    assert report.exporter == "dynamo"
    assert report.codes.ok
    assert [str(finding) for finding in report.findings] == []
    onnx_checker.check_model(str(report.path), full_check=True)
    if name == "resnet18":
        assert report.file_bytes < RESNET18_BYTES
    batches = [torch.randn(size, 3, 64, 64) for size in BATCHES]
    seam = onnx.compare(model, report.path, example.predict, batches)
    assert seam.ok, str(seam)
    rtx = pytest.importorskip("tensorrt_rtx", reason="the extra rtx is not installed")
    spec = builder.BuildSpec(
        report.path, engine.batch_shapes(report.path, BATCHES), compute_capabilities=("SM80",)
    )
    built = engine.build_engine(rtx, spec, tmp_path / "model.engine", None)
    assert str(built.audit) == f"{heavy} of {heavy} heavy layers run in int8"
    assert built.warnings == ()
