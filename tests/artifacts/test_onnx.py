"""An ONNX file does what its module does, or is not written."""

import copy
import errno
import json
import os

import numpy as np
import onnx as onnx_library
import pytest
import torch
from torch import nn

from slimcli.artifacts import onnx, verify
from slimcli.artifacts.onnx import store, torch_export
from slimcli.errors import RunError, VerificationError
from slimcli.network.example import Example

from .conftest import rich_batch, rich_predict


def call(model, batch):
    return model(batch)


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("samples", [1, 16, 47])
def test_the_users_predict_function_runs_on_the_file_unchanged(rich, samples):
    file, batch = onnx.OnnxModel(rich.report.path), rich_batch(samples, seed=samples)
    module = verify.runner(rich.model, rich_predict)
    seam = verify.compare(module, verify.runner(file, rich_predict), [batch])
    assert seam.ok, str(seam)
    assert seam.max_abs < 1e-5
    assert list(rich_predict(file, batch)) == ["logits", "pair", "same", "none"]
    assert isinstance(rich_predict(file, batch)["pair"], tuple)


def test_the_file_quacks_like_a_module(rich):
    file = onnx.OnnxModel(rich.report.path).eval().to("cpu")
    assert list(file.parameters()) == []
    assert not file.training


def test_keyword_and_position_are_the_same_call(rich):
    file, batch = onnx.OnnxModel(rich.report.path), rich_batch(2)
    by_name = file(scale=2.0, image=batch["image"], mask=batch["mask"])
    assert torch.equal(by_name["logits"], rich_predict(file, batch)["logits"])


def test_a_constant_argument_is_part_of_the_file(rich):
    file, batch = onnx.OnnxModel(rich.report.path), rich_batch(2)
    with pytest.raises(RunError, match="made for a call with other arguments"):
        file(batch["image"], mask=batch["mask"], scale=3.0)


def test_another_image_size_is_told_with_both_shapes(rich):
    file, batch = onnx.OnnxModel(rich.report.path), rich_batch(2)
    batch["image"] = torch.zeros(2, 3, 7, 7)
    with pytest.raises(
        RunError, match=r"expected image: tensor\(float\).*received image: \(2, 3, 7"
    ):
        rich_predict(file, batch)


def test_names_come_from_arguments_results_and_modules(rich):
    report, graph = rich.report, onnx_library.load(rich.report.path).graph
    assert [each["name"] for each in report.inputs] == ["image", "mask_pixels", "mask_ids"]
    assert [each["name"] for each in report.outputs] == ["logits", "pair_0", "pair_1", "same"]
    assert report.inputs[0]["shape"] == ["batch", 3, 6, 6]
    names = [node.name for node in graph.node]
    assert {"conv1/Conv", "block.0/Conv", "block.1/Relu", "fc/Gemm"} <= set(names)
    assert len(set(names)) == len(names)
    assert {"conv1.weight", "fc.bias"} <= {each.name for each in graph.initializer}


def test_metadata_and_sidecar_say_what_it_is(rich):
    properties = {p.key: p.value for p in onnx_library.load(rich.report.path).metadata_props}
    assert properties["recipe"] == "abc"
    sidecar = json.loads((rich.folder / "model.onnx.json").read_text())
    assert sidecar["sha256"] == rich.report.sha256
    assert sidecar["seam"]["ok"] is True
    assert (sidecar["exporter"], sidecar["opset"]) == ("dynamo", 19)
    assert sidecar["versions"]["torch"] == torch.__version__.split("+")[0]


def test_nothing_else_is_left_behind_and_the_model_is_untouched(rich):
    assert {each.name for each in rich.folder.iterdir()} == {"model.onnx", "model.onnx.json"}
    assert rich.model.training
    assert all(torch.equal(each, rich.state[n]) for n, each in rich.model.state_dict().items())


def test_the_file_holds_no_path_of_this_machine(rich):
    assert b".py" not in rich.report.path.read_bytes()


def test_export_is_silent(tmp_path, capfd):
    onnx.export(Linear(), Example(torch.randn(3, 4), call), tmp_path / "model.onnx")
    assert capfd.readouterr() == ("", "")


def test_an_export_that_fails_is_silent_too(tmp_path, capfd):
    class Products(Linear):
        def forward(self, x):
            return super().forward(x).cumprod(1)

    with pytest.raises(RunError, match="cumprod"):
        onnx.export(Products(), Example(torch.randn(3, 4), call), tmp_path / "model.onnx")
    assert capfd.readouterr() == ("", "")
    os.write(1, b"still open")
    assert capfd.readouterr().out == "still open"


def test_a_batch_of_one_sample_still_gives_a_free_batch(tmp_path):
    example = Example(torch.randn(1, 4), call)
    report = onnx.export(Linear(), example, tmp_path / "model.onnx")
    assert report.is_batch_dynamic
    assert onnx.OnnxModel(report.path)(torch.randn(9, 4)).shape == (9, 3)


def test_a_fixed_batch_is_exported_as_such_with_the_reason(tmp_path):
    class Fixed(nn.Module):
        def forward(self, x):
            return x.view(4, -1) * 2

    report = onnx.export(Fixed(), Example(torch.randn(4, 3, 2), call), tmp_path / "model.onnx")
    assert not report.is_batch_dynamic
    assert "does not run with 3 samples" in report.batch_reason
    assert report.inputs[0]["shape"] == [4, 3, 2]


def test_a_branch_on_data_is_refused_with_its_line(tmp_path):
    class Branch(Linear):
        def forward(self, x):
            h = self.layer(x)
            return h if float(h.sum()) > 0 else h * 2

    with pytest.raises(RunError, match=r"test_onnx\.py:\d+  no ONNX file: .*Python value"):
        onnx.export(Branch(), Example(torch.randn(4, 4), call), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


class Counted(Linear):
    """Puts one row of its own before those of each sample, as vision transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.ones(1, 1, 4))

    def forward(self, x):
        rows = torch.cat([self.row.expand(len(x), -1, -1), x[:, None]], 1)
        return self.layer(rows).mean(1)


def test_code_that_asks_for_the_length_of_a_batch_still_gives_a_free_batch(tmp_path):
    model = Counted()
    report = onnx.export(model, Example(torch.randn(3, 4), call), tmp_path / "model.onnx")
    assert report.inputs[0]["shape"] == ["batch", 4]
    batch = torch.randn(9, 4)
    seam = onnx.compare(model, report.path, call, [batch])
    assert seam.ok, str(seam)


def test_a_length_that_cannot_stay_open_is_refused_with_its_line(tmp_path, monkeypatch):
    plain = torch.export.export

    def export(*args, strict=False, **keywords):
        if strict:
            raise NotImplementedError("code that cannot be read")
        return plain(*args, strict=strict, **keywords)

    monkeypatch.setattr(torch.export, "export", export)
    with pytest.raises(RunError, match=r"test_onnx\.py:\d+  no ONNX file: len\(tensor\)") as caught:
        onnx.export(Counted(), Example(torch.randn(3, 4), call), tmp_path / "model.onnx")
    assert caught.value.problems[0].fix == "write tensor.shape[0] in place of len(tensor)"
    assert list(tmp_path.iterdir()) == []


def test_the_other_exporter_is_used_and_the_reason_kept(tmp_path, monkeypatch):
    def fail(*args):
        raise NotImplementedError("no rule for this op")

    monkeypatch.setattr(torch_export, "_dynamo", fail)
    report = onnx.export(Linear(), Example(torch.randn(3, 4), call), tmp_path / "model.onnx")
    assert report.exporter == "torchscript"
    assert report.exporter_reason == "NotImplementedError: no rule for this op"
    assert onnx.OnnxModel(report.path)(torch.randn(9, 4)).shape == (9, 3)
    assert [node.name for node in onnx_library.load(report.path).graph.node] == ["layer/Gemm"]


def test_when_both_exporters_fail_both_reasons_are_told(tmp_path, monkeypatch):
    def fail(*args):
        raise NotImplementedError("no rule")

    monkeypatch.setattr(torch_export, "_dynamo", fail)
    monkeypatch.setattr(torch_export, "_torchscript", fail)
    with pytest.raises(RunError, match=r"torch.export says .*no rule.*TorchScript.*no rule"):
        onnx.export(Linear(), Example(torch.randn(3, 4), call), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_random_forward_is_kept_as_failed(tmp_path):
    class Random(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    with pytest.raises(VerificationError, match="computes something else") as caught:
        onnx.export(Random(), Example(torch.randn(3, 4), call), tmp_path / "model.onnx")
    assert caught.value.exit_code == 6
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx.failed"]


class Halving(Linear):
    """Its forward switches autocast on."""

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.layer(x)


def test_autocast_of_the_forward_is_not_in_the_file(tmp_path):
    model, batch = Halving().eval(), torch.rand(2, 4)
    report = onnx.export(model, Example(batch, call), tmp_path / "m.onnx")
    assert (report.seam.ok, report.seam.max_abs < 1e-6) == (True, True)
    torch.testing.assert_close(onnx.OnnxModel(report.path)(batch), model.layer(batch))


class Scaling(Linear):
    """Its forward writes into the batch."""

    def forward(self, x):
        x *= 255
        return self.layer(x)


def test_a_forward_that_writes_into_its_batch_is_exported_and_the_batch_stays(tmp_path):
    batch = torch.rand(2, 4)
    before, model = batch.clone(), Scaling().eval()
    report = onnx.export(model, Example(batch, call), tmp_path / "m.onnx")
    assert report.seam.ok
    assert torch.equal(batch, before)
    expected = torch.nn.functional.linear(before * 255, model.layer.weight, model.layer.bias)
    torch.testing.assert_close(onnx.OnnxModel(report.path)(before.clone()), expected)


def test_a_predict_function_that_avoids_the_model_is_refused(tmp_path):
    example = Example(torch.randn(3, 4), lambda model, batch: model.layer(batch))
    with pytest.raises(RunError, match="does not call the model"):
        onnx.export(Linear(), example, tmp_path / "model.onnx")


def test_an_argument_that_is_no_tensor_is_refused_by_name(tmp_path):
    example = Example(torch.randn(3, 4), lambda model, batch: model(x={"deep": object()}))

    class Odd(Linear):
        def forward(self, x):
            return self.layer(torch.ones(2, 4))

    with pytest.raises(RunError, match=r"x.deep is a object"):
        onnx.export(Odd(), example, tmp_path / "model.onnx")


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store.onnx, "save_model", full)
    with pytest.raises(RunError, match="no space left on the disk"):
        onnx.export(Linear(), Example(torch.randn(3, 4), call), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_large_weights_lie_beside_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "PROTOBUF_LIMIT_BYTES", 10)
    model = nn.Linear(64, 64)
    report = onnx.export(model, Example(torch.randn(3, 64), call), tmp_path / "model.onnx")
    names = {each.name for each in tmp_path.iterdir()}
    assert names == {"model.onnx", "model.onnx.data", "model.onnx.json"}
    assert report.file_bytes > 64 * 64 * 4
    assert onnx.OnnxModel(report.path)(torch.randn(9, 64)).shape == (9, 64)


def test_a_file_of_somebody_else_runs_too(tmp_path):
    helper = onnx_library.helper
    kind = onnx_library.TensorProto.FLOAT
    x, y = (helper.make_tensor_value_info(name, kind, ["n", 2]) for name in "xy")
    node = helper.make_node("Relu", ["x"], ["y"])
    model = helper.make_model(
        helper.make_graph([node], "g", [x], [y]), opset_imports=[helper.make_opsetid("", 19)]
    )
    model.ir_version = 9
    onnx_library.save_model(model, tmp_path / "other.onnx")
    output = onnx.OnnxModel(tmp_path / "other.onnx")(torch.tensor([[-1.0, 2.0]]))
    assert np.array_equal(output, [[0.0, 2.0]])


@pytest.mark.parametrize("content", [None, b"", b"no protobuf"])
def test_a_file_that_is_no_model_is_told(tmp_path, content):
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunError, match="no such file" if content is None else "no ONNX file"):
        onnx.OnnxModel(path)


def test_the_first_differing_layer_of_a_file_is_named(rich):
    other = copy.deepcopy(rich.model)
    with torch.no_grad():
        other.block[0].bias += 0.5
    example, file = Example(rich_batch(3), rich_predict), onnx.OnnxModel(rich.report.path)
    found = verify.first_difference(other, file, example)
    assert found is not None
    assert found.module == "block.0"
    assert verify.first_difference(rich.model, file, example) is None
