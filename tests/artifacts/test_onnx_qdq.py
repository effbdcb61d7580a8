"""Quantized files hold int8 weights, and their codes are those of the module."""

import dataclasses

import numpy as np
import onnx as onnx_library
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from slimcli.artifacts import noise, onnx, opsets, verify
from slimcli.artifacts.onnx import codes, qdq, torch_export
from slimcli.artifacts.onnx.half import to_half
from slimcli.errors import RecipeError, RunError, VerificationError
from slimcli.network.example import Example
from slimcli.network.quantize.fake_quant import FakeQuant, Phase

from .micro_graphs import Micro
from .quantized import QuantizedNet, Quantizer


def call(model, batch):
    return model(batch)


EXAMPLE = Example(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)), call)


@pytest.fixture(scope="module", params=[False, True], ids=["tensor", "channel"])
def exported(request, tmp_path_factory):
    model = QuantizedNet(channels=request.param, shape=(1,), clip=0.5)
    path = tmp_path_factory.mktemp("qdq") / "model.onnx"
    return model, onnx.export(model, EXAMPLE, path), onnx_library.load(path).graph


def by_type(graph, operator):
    return [node for node in graph.node if node.op_type == operator]


def test_codes_are_those_of_the_module(exported):
    _, report, _ = exported
    assert report.codes.ok
    assert (report.codes.agreement, report.codes.distance) == (1.0, 0)
    assert report.codes.skipped == ()
    assert sum(row.count for row in report.codes.rows) > 4 * 16 * 64


@pytest.mark.parametrize("samples", [1, 16, 47])
def test_it_runs_with_any_batch(exported, samples):
    model, report, _ = exported
    batch = torch.randn(samples, 3, 8, 8)
    seam = onnx.compare(model, report.path, call, [batch])
    assert seam.ok, str(seam)
    assert "dB" in seam.notes[-1]


def test_the_newest_opset_keeps_the_names_and_one_beyond_it_is_refused(tmp_path):
    model = QuantizedNet(shape=(1,), clip=0.5)
    report = onnx.export(model, EXAMPLE, tmp_path / "model.onnx", opset=opsets.NEWEST)
    assert (report.codes.ok, report.codes.skipped) == (True, ())
    assert sum(row.count for row in report.codes.rows) > 4 * 16 * 64
    for wrong in (opsets.NEWEST + 1, opsets.LOWEST - 1):
        with pytest.raises(RecipeError, match=f"expected 18 to 25, received {wrong}"):
            onnx.export(model, EXAMPLE, tmp_path / "other.onnx", opset=wrong)
    assert not (tmp_path / "other.onnx").exists()


def test_quantizers_may_stand_beside_the_length_of_a_batch(tmp_path):
    class Counted(QuantizedNet):
        def forward(self, x):
            return super().forward(x) + torch.ones(1, 4).expand(len(x), -1)

    model = Counted(shape=(1,))
    report = onnx.export(model, EXAMPLE, tmp_path / "model.onnx")
    assert report.inputs[0]["shape"][0] == "batch"
    assert report.codes.ok
    assert onnx.compare(model, report.path, call, [torch.randn(7, 3, 8, 8)]).ok


def test_weights_are_stored_as_int8_within_127(exported):
    _, _, graph = exported
    stored = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    weights = [each for each in stored.values() if each.dtype == np.int8 and each.ndim > 1]
    assert len(weights) == 5
    assert min(each.min() for each in weights) == -127  # clip=0.5: the codes reach the border
    assert not [name for name in stored if name.endswith("layer.weight")]


def test_scales_of_one_value_have_rank_zero(exported):
    _, _, graph = exported
    stored = {each.name: each for each in graph.initializer}
    pairs = by_type(graph, "QuantizeLinear") + by_type(graph, "DequantizeLinear")
    ranks = {node.name: len(stored[node.input[1]].dims) for node in pairs}
    assert ranks["stem.input_quantizer/Q"] == 0
    axes = {node.name: [a.i for a in node.attribute if a.name == "axis"] for node in pairs}
    assert all(bool(axes[name]) == bool(rank) for name, rank in ranks.items())


def test_readers_of_one_tensor_share_one_pair(exported):
    _, _, graph = exported
    assert len(by_type(graph, "QuantizeLinear")) == 4  # image, relu (two readers), relu, mean
    left, right = (n for n in by_type(graph, "Conv") if n.name in ("left/Conv", "right/Conv"))
    assert left.input[0] == right.input[0]


def test_nodes_are_named_after_modules(exported):
    _, report, graph = exported
    names = {node.name for node in graph.node}
    assert {"stem.input_quantizer/Q", "head.weight_quantizer/DQ", "up/ConvTranspose"} <= names
    rows = {row["name"]: row for row in report.quantizers}
    assert rows["left.input_quantizer"]["scale"] == pytest.approx(0.02)
    assert rows["left.input_quantizer"]["amax"] == pytest.approx(2.54)
    assert rows["head.weight_quantizer"]["kind"] == "weight"


def test_the_file_is_a_quarter_of_the_float_file(tmp_path):
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(256, 256))
            self.weight_quantizer = Quantizer(0.03, low=-127)
            self.input_quantizer = Quantizer(0.02)

        def forward(self, x):
            return self.input_quantizer(x) @ self.weight_quantizer(self.weight)

    report = onnx.export(Wide(), Example(torch.randn(2, 256), call), tmp_path / "model.onnx")
    assert report.file_bytes < 256 * 256 * 4 / 3.5


def test_a_module_that_rounds_otherwise_is_caught_by_its_codes(tmp_path):
    model = QuantizedNet()
    model.stem.weight_quantizer.skew = 1.05
    with pytest.raises(VerificationError, match=r"int8 codes differ at left.input_quantizer/Q"):
        onnx.export(model, EXAMPLE, tmp_path / "b.onnx")
    assert (tmp_path / "b.onnx.failed").exists()
    assert not (tmp_path / "b.onnx").exists()


def test_a_distance_of_two_is_too_much_however_rare():
    row = codes.CodeRow("a", 0.99999, 2, 100_000)
    assert not codes.CodeReport((row,)).ok
    assert codes.CodeReport((dataclasses.replace(row, distance=1),)).ok
    assert not codes.CodeReport((codes.CodeRow("a", 0.99, 1, 100),)).ok


def test_the_noise_limit_follows_the_models_own_noise():
    class Chaos(nn.Module):
        def forward(self, x):
            return torch.round(x * 1e6 + 0.4) % 7  # a change of 1e-7 flips most of the outputs

    calm, chaos = nn.Linear(4, 4).eval(), Chaos()
    batch = torch.randn(64, 4)
    with torch.no_grad():
        wrong = noise.compare_quantized(calm, lambda b: calm(b) * 1.1, call, [batch])
        right = noise.compare_quantized(calm, lambda b: calm(b) * 1.001, call, [batch])
        loose = noise.compare_quantized(chaos, lambda b: chaos(b * (1 + 1e-6)), call, [batch])
    assert (wrong.ok, right.ok, loose.ok) == (False, True, True)
    assert right.max_abs <= right.limit
    assert loose.limit > right.limit


def test_another_shape_or_missing_output_is_no_noise():
    model = nn.Linear(4, 4).eval()
    batch = torch.randn(2, 4)
    cut = noise.compare_quantized(model, lambda b: model(b)[:, :2], call, [batch])
    named = noise.compare_quantized(model, lambda b: {"a": model(b)}, call, [batch])
    assert not cut.ok
    assert not named.ok


def test_the_linter_runs_inside_every_export(exported, tmp_path):
    _, report, _ = exported
    found = {(finding.rule, finding.node) for finding in report.findings}
    assert found == {("P4", "Add"), ("Q9", "up.weight_quantizer/DQ")}
    model = QuantizedNet()
    model.head.input_quantizer.zero_point.fill_(3)
    with pytest.raises(VerificationError, match=r"breaks rule Q1|codes differ"):
        onnx.export(model, EXAMPLE, tmp_path / "model.onnx")


def test_compare_knows_that_a_file_is_quantized(exported):
    model, report, _ = exported
    pair = [verify.runner(each, call) for each in (model, onnx.OnnxModel(report.path))]
    seam = verify.compare(*pair, [EXAMPLE.batch], names=("deploy", "onnx"))
    assert seam.ok
    assert "dB" in seam.notes[-1]


def test_half_precision_of_a_quantized_file_is_refused(exported, tmp_path):
    _, report, _ = exported
    with pytest.raises(RecipeError, match="not quantized"):
        to_half(report.path, tmp_path / "half.onnx")


class OneQuantizer(nn.Module):
    def __init__(self, phase: Phase) -> None:
        super().__init__()
        self.quantizer = FakeQuant("input")
        self.quantizer.phase = phase

    def forward(self, x):
        return self.quantizer(x)


def test_a_model_in_training_form_is_not_exported_as_float_arithmetic(tmp_path):
    with pytest.raises(RunError, match="became float arithmetic"):
        onnx.export(OneQuantizer(Phase.FROZEN), EXAMPLE, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_the_other_exporter_writes_pairs_too(tmp_path, monkeypatch):
    def fail(*args):
        raise NotImplementedError("no rule")

    monkeypatch.setattr(torch_export, "_dynamo", fail)
    report = onnx.export(OneQuantizer(Phase.EXPORT), EXAMPLE, tmp_path / "model.onnx")
    assert (report.exporter, report.codes.agreement) == ("torchscript", 1.0)
    names = [node.name for node in onnx_library.load(report.path).graph.node]
    assert names == ["quantizer/Q", "quantizer/DQ"]


def test_equal_pairs_on_one_tensor_become_one_and_others_stay():
    net = Micro()
    pairs = [net.qdq("x", 0.05), net.qdq("x", 0.05), net.qdq("x", 0.07)]
    model = net.model(*[net.conv(each) for each in pairs])
    qdq.finish(model)
    activations = [n for n in by_type(model.graph, "QuantizeLinear") if n.input[0] == "x"]
    reads = [n.input[0] for n in by_type(model.graph, "Conv")]
    assert len(activations) == 2
    assert reads[0] == reads[1] != reads[2]
