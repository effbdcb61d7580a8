"""``slim export``, ``eval`` and ``bench`` on a finished run."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from slimcli import cli
from slimcli.artifacts.tensorrt import machine
from tests.solver import project

has_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="the extra rtx is missing"
)


def slim(*words: str) -> int:
    """The exit code of a command run in this process."""
    with pytest.raises(SystemExit) as caught:
        cli.main([str(word) for word in words])
    return int(caught.value.code or 0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run that is finished, without an ONNX file."""
    folder = tmp_path_factory.mktemp("project")
    project.write(folder)
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert slim("run", "recipe.yaml", "--name", "first") == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def run(finished, tmp_path, monkeypatch) -> Path:
    """A copy of the finished run, so that tests do not see each other's files."""
    shutil.copytree(finished, tmp_path / "project", symlinks=True)
    monkeypatch.chdir(tmp_path / "project")
    return Path("checkpoints/toy/first")


@pytest.fixture(scope="module")
def exported(finished) -> Path:
    """The run with model.onnx in it."""
    path = finished / "checkpoints" / "toy" / "first"
    assert slim("export", path) == 0
    return path


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def test_onnx_is_written_verified_and_noted(exported):
    content = summary(exported)
    seam = next(each for each in content["verification"] if each["to"] == "onnx")
    assert (seam["from"], seam["ok"]) == ("deploy", True)
    assert content["final"]["file_bytes"]["model.onnx"] > 0
    forms = content["final"]["metrics_by_form"]
    assert forms["onnx"] == forms["deploy"] == forms["trained"]


def test_exporting_again_replaces_the_seam(exported, tmp_path):
    copy = tmp_path / "project" / "checkpoints" / "toy" / "first"
    shutil.copytree(exported.parents[2], tmp_path / "project", symlinks=True)
    assert slim("export", copy / "artifacts", "--onnx", "--opset", "18") == 0
    found = summary(copy)["verification"]
    assert len([each for each in found if each["to"] == "onnx"]) == 1
    opsets = onnx.load(copy / "artifacts" / "model.onnx").opset_import
    assert [each.version for each in opsets if not each.domain] == [18]


def test_without_tensorrt_the_onnx_file_is_kept_and_the_command_told(run, capsys, monkeypatch):
    monkeypatch.setitem(machine.MODULES, "tensorrt", "tensorrt_that_is_not_there")
    assert slim("export", run, "--trt") == 5
    err = capsys.readouterr().err
    assert 'pip install "slimcli[trt]"' in err
    assert "model.onnx is ready" in err
    assert (run / "artifacts" / "model.onnx").is_file()
    assert not (run / "artifacts" / "model.engine").exists()


@has_rtx
def test_an_engine_for_rtx_needs_no_gpu(exported, tmp_path, capsys):
    shutil.copy(exported / "artifacts" / "model.onnx", tmp_path)
    capsys.readouterr()
    assert slim("export", tmp_path / "model.onnx", "--trt", "--runtime", "rtx", "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert list(content["files"]) == [str(tmp_path / "model.engine")]
    assert "--minShapes=x:1x1x6x6" in content["trtexec"]
    assert json.loads((tmp_path / "model.engine.json").read_text())["runtime"] == "rtx"


@has_rtx
def test_half_precision_makes_its_own_file(exported, tmp_path):
    shutil.copy(exported / "artifacts" / "model.onnx", tmp_path)
    words = ("--trt", "--runtime", "rtx", "--fp16", "--batch", "4")
    assert slim("export", tmp_path / "model.onnx", *words) == 0
    half = onnx.load(tmp_path / "model.fp16.onnx")
    weights = [onnx.numpy_helper.to_array(each) for each in half.graph.initializer]
    assert {each.dtype for each in weights if each.ndim > 1} == {np.dtype("float16")}
    assert (tmp_path / "model.fp16.engine").is_file()


def test_the_newest_run_is_never_guessed_in_a_script(run, capsys):
    assert slim("export") == 2
    assert "name the run" in capsys.readouterr().err


def test_the_newest_run_is_taken_and_named_at_a_terminal(exported, monkeypatch, capsys):
    from slimcli.cli import finished

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(finished.sys.stderr, "isatty", lambda: True, raising=False)
    found = finished.newest(exported.parents[1])
    assert found == exported
    assert "the newest finished one" in capsys.readouterr().err
    monkeypatch.setenv("CI", "true")
    with pytest.raises(finished.RecipeError, match="name the run"):
        finished.newest(exported.parents[1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("export", "."), "neither a run folder nor an ONNX file"),
        (("eval", "hooks.py"), "the file is in no run folder"),
        (("export", "checkpoints/toy/first", "--batch", "many"), "expected numbers such as"),
        (("eval", "checkpoints/toy/first", "--compare", "tflite"), "none of trained, deploy"),
        (("eval", "checkpoints/toy/first", "--compare", "trt"), "slim export RUN --trt"),
    ],
)
def test_wrong_words_are_usage_errors(run, capsys, words, message):
    assert slim(*words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--onnx", "--fp16"), "made with --fp16, and none is asked for"),
        (("--workspace", "3", "--batch", "0,9"), "made with --batch, --workspace, and none"),
        (("--runtime", "rtx"), "made with --runtime, and none is asked for"),
        (("--opset", "30"), "30 is not in the range 18<=x<=25"),
        (("--opset", "26"), "26 is not in the range 18<=x<=25"),
        (("--trt", "--batch", "0,9"), "expected for example 1,8,32, received 0,9"),
        (("--trt", "--compute-capability", "SM89"), "TensorRT has no --compute-capability"),
        (
            ("--trt", "--runtime", "rtx", "--timing-cache", "c"),
            "TensorRT-RTX has no --timing-cache",
        ),
    ],
)
def test_options_without_effect_or_out_of_range_are_refused_before_the_export(
    run, capsys, words, told
):
    (run / "artifacts" / "model.onnx").unlink(missing_ok=True)
    assert slim("export", run, *words) == 2
    assert told in " ".join(capsys.readouterr().err.split())
    assert not (run / "artifacts" / "model.onnx").exists()


def test_an_opset_is_for_a_file_that_is_written(exported, tmp_path, capsys):
    shutil.copy(exported / "artifacts" / "model.onnx", tmp_path)
    assert slim("export", tmp_path / "model.onnx", "--trt", "--opset", "20") == 2
    assert "writing ONNX needs the run" in capsys.readouterr().err


def test_with_an_opset_the_file_is_written_again_before_the_engine(exported, tmp_path, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(exported, copy, symlinks=True)
    monkeypatch.chdir(exported.parents[2])
    monkeypatch.setitem(machine.MODULES, "tensorrt", "tensorrt_that_is_not_there")
    assert slim("export", copy, "--trt", "--opset", "20") == 5
    opsets = onnx.load(copy / "artifacts" / "model.onnx").opset_import
    assert [each.version for each in opsets if not each.domain] == [20]


@has_rtx
@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("SM999", "leave it out"),
        ("89", "--compute-capability SM89"),
        ("SM80,sm89", "--compute-capability SM80 --compute-capability SM89"),
    ],
)
def test_an_unknown_gpu_is_refused_with_the_names_there_are(exported, capsys, name, fix):
    words = ("--trt", "--runtime", "rtx", "--compute-capability", name)
    assert slim("export", exported / "artifacts" / "model.onnx", *words) == 2
    err = capsys.readouterr().err
    assert "SM80, SM86, SM89" in err
    assert f"fix: {fix}" in err


@has_rtx
def test_an_engine_for_a_gpu_named_in_lower_case_is_built_and_not_offered_for_a_comparison(
    exported, tmp_path, monkeypatch, capsys
):
    copy = tmp_path / "run"
    shutil.copytree(exported, copy, symlinks=True)
    monkeypatch.chdir(exported.parents[2])
    monkeypatch.setattr(machine, "gpu", lambda: None)
    words = ("--trt", "--runtime", "rtx", "--compute-capability", "sm89")
    assert slim("export", copy, *words) == 0
    assert "Next" not in capsys.readouterr().err  # an engine alone can't run here
    stored = json.loads((copy / "artifacts" / "model.engine.json").read_text())
    assert stored["spec"]["compute_capabilities"] == ["SM89"]


@pytest.mark.parametrize("command", ["export", "report"])
def test_on_a_full_disk_a_command_is_to_be_repeated_and_no_run_resumed(
    run, capsys, monkeypatch, command
):
    fill_the_disk(monkeypatch)
    assert slim(command, run) == 1
    err = capsys.readouterr().err
    assert "no space left on the disk" in err
    assert f"fix: free some space, then slim {command} again" in err
    assert "resume" not in err


def test_on_a_full_disk_what_bench_measured_is_shown_and_not_in_the_report(
    run, capsys, monkeypatch
):
    fill_the_disk(monkeypatch)
    assert slim("bench", run, "--repeats", "3") == 0
    told = capsys.readouterr()
    assert "deploy" in told.out
    assert "not in the report" in told.err
    assert "slim bench again" in told.err
    assert "resume" not in told.err


def fill_the_disk(monkeypatch):
    from slimcli.artifacts import atomic

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic, "_flush", full)


def test_an_unfinished_run_is_refused(run, capsys):
    content = summary(run) | {"status": "interrupted"}
    (run / "summary.json").write_text(json.dumps(content))
    assert slim("export", run) == 2
    assert "slim resume" in capsys.readouterr().err


def test_a_file_that_disagrees_loses_its_name_and_exits_6(run, capsys, monkeypatch):
    from slimcli.cli import finished

    plain = finished.FinishedRun.deployed
    calls = []

    def other(self):
        model = plain(self)
        model.register_forward_hook(lambda m, a, out: out + len(calls) // 4 * 0.5)
        return model

    monkeypatch.setattr(finished.FinishedRun, "deployed", other)
    from slimcli.artifacts import onnx as ours

    compare = ours.compare

    def late(*args, **kwargs):
        calls.extend("1234")  # from here on the module computes something else than the file
        return compare(*args, **kwargs)

    monkeypatch.setattr(ours, "compare", late)
    assert slim("export", run) == 6
    assert (run / "artifacts" / "model.onnx.failed").is_file()
    assert not (run / "artifacts" / "model.onnx").exists()
    seam = next(each for each in summary(run)["verification"] if each["to"] == "onnx")
    assert (seam["ok"], round(seam["max_abs"], 3)) == (False, 0.5)


def test_eval_compares_every_form(exported, capsys):
    assert slim("eval", exported, "--compare", "trained,deploy,onnx", "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert list(content["metrics"]) == ["trained", "deploy", "onnx"]
    assert len({values["acc"] for values in content["metrics"].values()}) == 1
    assert [(each["from"], each["to"]) for each in content["verification"]] == [
        ("trained", "deploy"),
        ("deploy", "onnx"),
    ]


def test_eval_finds_the_run_around_a_file(exported, capsys):
    assert slim("eval", exported / "artifacts" / "model.onnx", "--json") == 0
    stored = summary(exported)["final"]["metrics_by_form"]["onnx"]
    assert json.loads(capsys.readouterr().out)["metrics"]["model.onnx"] == stored


def test_eval_exits_6_where_forms_differ(exported, tmp_path, capsys):
    shutil.copytree(exported.parents[2], tmp_path / "project", symlinks=True)
    copy = tmp_path / "project" / "checkpoints" / "toy" / "first"
    path = copy / "artifacts" / "model.onnx"
    model = onnx.load(path)
    bias = next(each for each in model.graph.initializer if each.name == "fc.bias")
    moved = onnx.numpy_helper.to_array(bias) + np.float32(0.25)
    bias.CopyFrom(onnx.numpy_helper.from_array(moved, bias.name))
    onnx.save_model(model, path)
    assert slim("eval", copy, "--compare", "deploy,onnx", "--json") == 6
    assert json.loads(capsys.readouterr().out)["verification"][0]["ok"] is False


def test_bench_measures_the_forms_in_turns(exported, capsys):
    threads = torch.get_num_threads()
    assert slim("bench", exported, "--batch", "30", "--repeats", "3", "--json") == 0
    assert "latency, batch 30, cpu" in (exported / "report.html").read_text()
    content = json.loads(capsys.readouterr().out)
    assert list(content["forms"]) == ["original", "deploy", "onnx"]
    assert all(row["median_ms"] > 0 for row in content["forms"].values())
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("lost", [("deploy.json",), ("deploy.json", "deploy.safetensors")])
def test_lost_deploy_files_are_made_again_from_the_best_checkpoint(run, lost, capsys):
    artifacts = run / "artifacts"
    before = artifacts.joinpath("deploy.safetensors").read_bytes()
    for name in lost:
        (artifacts / name).unlink()
    assert slim("eval", run) == 1
    assert "slim export RUN makes it again" in capsys.readouterr().err
    assert slim("export", run, "--onnx") == 0
    assert "made again from checkpoints/best.pt" in capsys.readouterr().err
    assert artifacts.joinpath("deploy.safetensors").read_bytes() == before
    pairs = [(each["from"], each["to"]) for each in summary(run)["verification"]]
    assert sorted(pairs) == [("deploy", "deploy file"), ("deploy", "onnx"), ("trained", "deploy")]
    assert slim("eval", run, "-q") == 0


@pytest.mark.parametrize("command", ["eval", "lint", "bench", "export"])
def test_a_path_that_is_not_there_is_told_with_the_name_that_is_near(command, run, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "checkpoints/toy/frist"])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "there is no checkpoints/toy/frist: expected a" in said
    assert "did you mean checkpoints/toy/first?" in said
    assert "E-FILE-MISSING" in said


def test_lint_of_a_folder_says_which_file_to_name(exported, capsys):
    assert slim("lint", exported) == 2
    assert str(exported / "artifacts" / "model.onnx") in capsys.readouterr().err
