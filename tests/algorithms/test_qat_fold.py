"""``bn_export: fold``: the file has no batch norm, the trained codes, and the trained function."""

import warnings

import onnx
import pytest
import torch
from onnx import numpy_helper
from pydantic import ValidationError
from torch import nn
from torch.nn import functional

from slimcli.algorithms.qat.config import QATConfig
from slimcli.algorithms.qat.method import QATCompressor
from slimcli.artifacts.onnx import OnnxModel, export
from slimcli.artifacts.onnx.locate import outputs_inside
from slimcli.artifacts.tensorrt import builder, engine
from slimcli.compressor import Schedule
from slimcli.network.example import Example
from slimcli.network.fuse import norm_as_scale
from slimcli.network.quantize.fake_quant import WEIGHT_LOW, FakeQuant
from slimcli.network.quantize.fold import folded

from .qat_networks import NETWORKS, Residual, build, conv, example_of, predict

# Two float64 sums of a few hundred products of order 1, in another order.
EXACT = 1e-12
# float32 sums of up to 216 products of order 1; a dropped term is off by 0.01 and more.
FLOAT32 = 1e-5
LAYERS = {
    "Conv1d": (nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "Conv2d": (nn.Conv2d(4, 6, 3, bias=False), (2, 4, 9, 9)),
    "Conv3d": (nn.Conv3d(4, 6, 3), (2, 4, 5, 5, 5)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 9, 9)),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6, padding=1), (2, 6, 9, 9)),
    "Linear": (nn.Linear(4, 6), (5, 4)),
}


def spoil(norm):
    """Statistics and factors that are not trivial: one gamma is negative and one is zero."""
    nn.init.normal_(norm.running_mean, std=0.3)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias, std=0.3)
    with torch.no_grad():
        norm.weight[1] *= -1
        norm.weight[2] = 0


def spoiled(model):
    torch.manual_seed(5)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            spoil(module)
    return model.eval()


def calibrated(model, example, **keys):
    compressor = QATCompressor(QATConfig(weight_granularity="channel", **keys))
    plan = compressor.plan(model, example, Schedule(1, 1, (0.1,)))
    model = compressor.prepare(model, example, plan)
    compressor.calibrate(model, [example])
    return compressor, model.eval(), plan


def stored(path):
    return {each.name: numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}


def kinds(path):
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize("kind", sorted(LAYERS))
def test_the_folded_layer_equals_layer_and_norm_in_float64(kind):
    layer, shape = LAYERS[kind]
    torch.manual_seed(1)
    layer = layer.double()
    norm = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(shape) - 2](6)
    spoil(norm.double().eval())
    quantizer = FakeQuant("weight", WEIGHT_LOW, channels=6).double()
    quantizer.set_amax(quantizer.magnitude(layer.weight))
    codes, scale = quantizer.codes(layer.weight.detach()), quantizer.scale
    step = quantizer.for_each_slice(scale, layer.weight)
    new_codes, new_scale, new_bias = folded(codes, scale, layer.bias, norm_as_scale(norm))
    new_step = quantizer.for_each_slice(new_scale, layer.weight)
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(codes * step)
        expected = norm(layer(x))
        layer.weight.copy_(new_codes * new_step)
        layer.bias = nn.Parameter(new_bias)
        assert (layer(x) - expected).abs().max() <= EXACT
    sign = torch.tensor([1, -1, 0, 1, 1, 1]).reshape(-1, *(1,) * (len(shape) - 1))
    assert new_codes.dtype == torch.int8
    assert torch.equal(new_codes, codes * sign)
    assert (new_scale > 0).all()


def test_a_gamma_too_small_for_a_float32_scale_gives_zero_codes_and_a_normal_scale():
    codes, one = torch.full((3, 1), 100, dtype=torch.int8), torch.ones(3)
    gain = torch.tensor([1e-39, -1e-39, 1e-37], dtype=torch.float64)
    found = folded(codes, one, None, (gain, torch.zeros(3, dtype=torch.float64)))
    assert found[0].flatten().tolist() == [0, 0, 100]
    assert found[1].float().tolist() == pytest.approx([1, 1, 1e-37])


@pytest.mark.parametrize("name", ["residual", "depthwise", "upsampling"])
def test_the_file_holds_the_trained_codes_and_no_norm(name, tmp_path):
    example, files, made = example_of(), {}, {}
    for choice in ("keep", "fold"):
        compressor, model, _ = calibrated(spoiled(build(name)), example, bn_export=choice)
        deployed = compressor.deploy(model)
        assert torch.equal(example.run(deployed), example.run(model))
        files[choice] = export(deployed, example, tmp_path / f"{choice}.onnx")
        made[choice] = stored(files[choice].path)
    report = files["fold"]
    norms = kinds(files["keep"].path).count("BatchNormalization")
    assert len(report.folded_norms) == norms - (name == "upsampling") > 0
    assert kinds(report.path).count("BatchNormalization") == (name == "upsampling")
    scales = {each["name"]: each["scale"] for each in report.quantizers}
    changed, count = 0, 0
    for layer in report.folded_norms:
        before = made["keep"][f"{layer}.weight_int8"].copy()
        after = made["fold"][f"{layer}.folded_weight_int8"]
        assert len(scales[f"{layer}.weight_quantizer"]) == len(after)
        assert min(scales[f"{layer}.weight_quantizer"]) > 0
        assert not after[2].any()
        before[1] *= -1
        before[2] = 0
        changed += int((before != after).sum())
        count += after.size
    assert (changed, count > 200) == (0, True)
    assert (report.codes.agreement, report.codes.distance) == (1.0, 0)
    assert len(report.codes.rows) == len(files["keep"].codes.rows)
    assert [each.rule for each in report.findings] == [each.rule for each in files["keep"].findings]
    for batch in (1, 47):
        images = torch.randn(batch, 3, 16, 16)
        differences = [
            OnnxModel(files[choice].path)(images) - model(images) for choice in ("keep", "fold")
        ]
        noise = [float(each.square().sum()) for each in differences]
        # One code that falls the other way on a tie is about 50 dB in these networks.
        assert max(noise) <= 1e-4 * float(model(images).square().sum()), batch


def test_tensorrt_runs_as_many_layers_in_int8_as_with_the_norms(tmp_path):
    rtx = pytest.importorskip("tensorrt_rtx", reason="the extra rtx is not installed")
    found = []
    for choice in ("keep", "fold"):
        example = example_of()
        compressor, model, _ = calibrated(spoiled(build("residual")), example, bn_export=choice)
        path = export(compressor.deploy(model), example, tmp_path / f"{choice}.onnx").path
        shapes = engine.batch_shapes(path, (1, 16, 47))
        spec = builder.BuildSpec(path, shapes, compute_capabilities=("SM80",))
        audit = engine.build_engine(rtx, spec, path.with_suffix(".engine"), None).audit
        found.append((len(audit.int8), audit.heavy))
    assert found == [(4, 4), (4, 4)]


def test_what_is_trained_and_handed_over_keeps_its_norms():
    compressor, model, _ = calibrated(build("residual"), example_of(), bn_export="fold")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compressor.deploy(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    handed = compressor.handover(model, [])
    assert sum(isinstance(each, nn.BatchNorm2d) for each in handed.modules()) == 3
    assert handed.state_dict().keys() == Residual().state_dict().keys()


class Stubborn(nn.Module):
    """One norm that can be folded, behind the first layer, and one of each kind that can't."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = conv(3, 6), nn.BatchNorm2d(6)
        self.twice, self.first, self.second = conv(6, 6), nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.left, self.right, self.common = conv(6, 6), conv(6, 6), nn.BatchNorm2d(6)
        self.read, self.read_norm = conv(6, 6), nn.BatchNorm2d(6)
        self.seen, self.seen_norm = conv(6, 6), nn.BatchNorm2d(6)
        self.untracked = conv(6, 6)
        self.untracked_norm = nn.BatchNorm2d(6, track_running_stats=False)
        self.up, self.up_norm = nn.ConvTranspose2d(6, 6, 2, 2), nn.BatchNorm2d(6)
        self.plain, self.function_norm = conv(6, 6), nn.BatchNorm2d(6)
        self.skipped, self.skipped_norm = conv(6, 6), nn.BatchNorm2d(6)
        self.tokens, self.tokens_norm = nn.Linear(6, 6), nn.BatchNorm1d(9)

    def forward(self, x):
        x = functional.relu(self.stem_norm(self.stem(x)))
        x = functional.relu(self.second(self.twice(functional.relu(self.first(self.twice(x))))))
        x = self.common(self.left(x)) + self.common(self.right(x))
        y = self.read(x)
        x = functional.relu(self.read_norm(y)) + y
        seen = self.seen(x)
        x = functional.relu(self.untracked_norm(self.untracked(self.seen_norm(seen))))
        x = functional.relu(self.up_norm(self.up(x)))
        norm = self.function_norm
        x = functional.batch_norm(self.plain(x), norm.running_mean, norm.running_var, norm.weight)
        x = self.skipped_norm(self.skipped(functional.relu(x)))
        x = functional.adaptive_avg_pool2d(x, 3).flatten(2).transpose(1, 2)
        return self.tokens_norm(self.tokens(x)), seen


def test_the_plan_says_which_norms_stay_and_why_and_the_file_has_them(tmp_path):
    example = example_of(8)
    keys = {"bn_export": "fold", "skip": ("skipped",)}
    compressor, model, plan = calibrated(spoiled(Stubborn()), example, **keys)
    notes = [each for each in plan.notes if "norm" in each]
    stays = "keeps its batch norm in model.onnx: "
    assert notes == [
        "bn_export: fold: 1 of 10 batch norms behind quantized layers are folded in model.onnx",
        f"{stays}twice: the layer is called more than once",
        f"{stays}left, right: the norm is called more than once",
        f"{stays}read, seen: the layer's output is read elsewhere too",
        f"{stays}untracked: BatchNorm2d has no running statistics",
        f"{stays}up: transposed convolutions have one weight scale, so their codes would change",
        f"{stays}plain: Stubborn is no batch norm that can be folded",
        f"{stays}tokens: the norm's channels are not the layer's outputs",
    ]
    report = export(compressor.deploy(model), example, tmp_path / "model.onnx")
    assert report.folded_norms == {"stem": "stem_norm"}
    assert report.codes.ok
    assert report.seam.ok


def test_without_a_norm_to_fold_the_plan_says_that_the_key_does_nothing():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    _, _, plan = calibrated(model, example_of(), bn_export="fold")
    expected = "bn_export: fold changes nothing: no batch norm reads a quantized layer's output"
    assert plan.notes == [expected]


def test_one_scale_for_a_whole_layer_is_refused_with_both_ways_out():
    with pytest.raises(ValidationError, match="int8 codes would not be those that were") as caught:
        QATConfig(bn_export="fold")
    assert "fix: weight_granularity: channel, or bn_export: keep" in str(caught.value)


class Activated(nn.Module):
    """A norm that activates as well, and a linear layer with a norm; both are folded."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = conv(3, 8), BatchNormAct2d(8)
        self.fc, self.last = nn.Linear(8, 5), nn.BatchNorm1d(5)

    def forward(self, x):
        return self.last(self.fc(self.norm(self.conv(x)).mean((2, 3))))


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm writes it, to be known by its name."""

    def __init__(self, width):
        super().__init__(width)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


def test_the_activation_inside_a_norm_stays_and_a_linear_layer_takes_up_its_norm(tmp_path):
    example = example_of()
    compressor, model, _ = calibrated(spoiled(Activated()), example, bn_export="fold")
    deployed = compressor.deploy(model)
    report = export(deployed, example, tmp_path / "model.onnx")
    assert report.folded_norms == {"conv": "norm", "fc": "last"}
    assert [each for each in kinds(report.path) if "Linear" not in each] == [
        "Conv",
        "Relu",
        "ReduceMean",
        "Gemm",
    ]
    assert report.codes.ok
    difference = OnnxModel(report.path)(example.batch) - example.run(deployed)
    assert difference.abs().max() <= FLOAT32


def test_a_node_with_a_folded_norm_is_compared_with_the_norm(tmp_path):
    example = example_of()
    compressor, model, _ = calibrated(spoiled(build("residual")), example, bn_export="fold")
    deployed = compressor.deploy(model)
    path = export(deployed, example, tmp_path / "model.onnx").path
    seen = {}
    deployed.bn1.register_forward_hook(lambda module, args, result: seen.update(bn1=result))
    example.run(deployed)
    found = outputs_inside(deployed, path, example)
    assert (torch.from_numpy(found["bn1"][0]) - seen["bn1"]).abs().max() <= FLOAT32
    assert "conv1" not in found


def test_the_torchscript_exporter_sees_the_folded_network_too(tmp_path):
    example = example_of()
    compressor, model, _ = calibrated(spoiled(build("residual")), example, bn_export="fold")
    deployed, path = compressor.deploy(model), tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that this exporter is the old one
        torch.onnx.export(deployed, (example.batch,), path, dynamo=False, opset_version=17)
    assert kinds(path).count("QuantizeLinear") == 8
    assert "BatchNormalization" not in kinds(path)
    assert (OnnxModel(path)(example.batch) - example.run(deployed)).abs().max() <= FLOAT32


def test_learned_scales_and_frozen_statistics_fold_as_well(tmp_path):
    example = Example(torch.randn(4, 3, 16, 16), predict)
    keys = {"scale": "lsq", "freeze_bn_epoch": 0}
    compressor, model, _ = calibrated(
        spoiled(NETWORKS["residual"]()), example, bn_export="fold", **keys
    )
    report = export(compressor.deploy(model), example, tmp_path / "model.onnx")
    assert len(report.folded_norms) == 3
    assert report.codes.agreement == 1.0
