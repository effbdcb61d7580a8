"""What an exporter sees: Q/DQ in the right places, and onnxruntime computes the same codes."""

import warnings

import onnx
import pytest
import torch
from onnx import numpy_helper

from slimcli.algorithms.qat.config import QATConfig
from slimcli.algorithms.qat.method import QATCompressor
from slimcli.artifacts.onnx import OnnxModel, export
from slimcli.artifacts.tensorrt import builder, engine
from slimcli.compressor import Schedule

from .qat_networks import NETWORKS, build, example_of

HEAVY = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
TRANSPOSED = {"upsampling": 2, "unet": 1}
MOVES = {"MaxPool", "Reshape", "Flatten", "Transpose"}


def exported(model, folder, example, **keys):
    compressor = QATCompressor(QATConfig(**keys))
    plan = compressor.plan(model, example, Schedule(1, 1, (0.1,)))
    model = compressor.prepare(model, example, plan)
    compressor.calibrate(model, [example])
    deployed = compressor.deploy(model)
    return deployed, plan, export(deployed, example, folder / "model.onnx")


class Graph:
    """An ONNX graph to walk in."""

    def __init__(self, path):
        graph = onnx.load(path).graph
        self.nodes = list(graph.node)
        self.stored = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
        self.maker = {name: node for node in self.nodes for name in node.output}

    def readers(self, name):
        return [node for node in self.nodes if name in node.input]

    def source(self, name):
        """The op type behind moves of values."""
        while name in self.maker and self.maker[name].op_type in MOVES:
            name = self.maker[name].input[0]
        return self.maker[name].op_type if name in self.maker else "stored"


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_onnxruntime_computes_the_codes_of_the_trained_network(name, granularity, tmp_path):
    example = example_of()
    model, plan, report = exported(build(name), tmp_path, example, weight_granularity=granularity)
    assert report.exporter == "dynamo"
    assert report.opset == 19
    assert report.codes.skipped == ()
    assert len(report.codes.rows) == len(plan.private.activations)
    assert report.codes.agreement >= 0.999
    assert report.codes.distance <= 1
    session = OnnxModel(report.path)
    assert session.input_names == ["x"]
    for batch in (1, 16, 47):
        images = torch.randn(batch, 3, 16, 16)
        noise = (session(images) - model(images)).square().sum()
        assert 10 * torch.log10(model(images).square().sum() / noise) > 30, batch
    check_graph(Graph(report.path), len(plan.targets))
    onnx.checker.check_model(str(report.path), full_check=True)
    assert [each.rule for each in report.findings] == ["Q9"] * TRANSPOSED.get(name, 0)
    check_engine(report.path, len(plan.targets), TRANSPOSED.get(name, 0))


def check_engine(path, heavy_count, transposed):
    """TensorRT-RTX builds it for batches 1 to 47, in int8 but for transposed convolutions."""
    rtx = pytest.importorskip("tensorrt_rtx", reason="the extra rtx is not installed")
    shapes = engine.batch_shapes(path, (1, 16, 47))
    spec = builder.BuildSpec(path, shapes, compute_capabilities=("SM80",))
    built = engine.build_engine(rtx, spec, path.with_suffix(".engine"), None)
    assert len(built.audit.int8) == heavy_count - transposed, str(built.audit)
    assert built.audit.heavy == heavy_count
    assert all("ConvTranspose" in node for node in built.audit.other)


def check_graph(graph, heavy_count):
    heavy = [node for node in graph.nodes if node.op_type in HEAVY]
    assert len(heavy) == heavy_count
    for node in heavy:
        assert [graph.source(name) for name in node.input[:2]] == ["DequantizeLinear"] * 2
    for node in graph.nodes:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale, zero = graph.stored[node.input[1]], graph.stored[node.input[2]]
            assert (scale > 0).all()
            assert zero.dtype == "int8"
            assert not zero.any()
            assert scale.ndim == 0 or node.op_type == "DequantizeLinear"
        if node.op_type == "QuantizeLinear":
            before = graph.maker.get(node.input[0])
            after = [
                reader.op_type
                for pair in graph.readers(node.output[0])
                for reader in graph.readers(pair.output[0])
            ]
            if before is not None and before.op_type in ("Conv", "BatchNormalization"):
                assert not {"BatchNormalization", "Relu", "Clip"} & set(after)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_the_torchscript_exporter_sees_the_same_nodes(granularity, tmp_path):
    example = example_of()
    compressor = QATCompressor(QATConfig(weight_granularity=granularity))
    model = build("residual")
    plan = compressor.plan(model, example, Schedule(1, 1, (0.1,)))
    model = compressor.prepare(model, example, plan)
    compressor.calibrate(model, [example])
    deployed, path = compressor.deploy(model), tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that this exporter is the old one
        torch.onnx.export(deployed, (example.batch,), path, dynamo=False, opset_version=17)
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count("QuantizeLinear") == kinds.count("DequantizeLinear") == 8
    difference = OnnxModel(path)(example.batch) - example.run(deployed)
    assert difference.abs().max() <= 1e-5  # float32 sums of 72 products in another order


def test_a_weight_that_outgrew_its_frozen_range_is_clamped_in_the_file_too(tmp_path):
    example, model = example_of(), build("residual")
    compressor = QATCompressor(QATConfig())
    plan = compressor.plan(model, example, Schedule(1, 1, (0.1,)))
    model = compressor.prepare(model, example, plan)
    compressor.calibrate(model, [example])
    with torch.no_grad():
        model.conv2.get_parameter("weight").mul_(-1.5)
    report = export(compressor.deploy(model), example, tmp_path / "model.onnx")
    stored = Graph(report.path).stored
    codes = [values for values in stored.values() if values.dtype == "int8" and values.ndim == 4]
    assert min(values.min() for values in codes) == -127
    assert max(values.max() for values in codes) == 127
    assert report.codes.agreement >= 0.999
