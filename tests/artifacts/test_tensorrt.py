"""Building, describing and refusing engines, with a stand-in for TensorRT."""

import json
from pathlib import Path

import onnx
import pytest

from slimcli.artifacts.tensorrt import builder, command, engine, machine
from slimcli.artifacts.tensorrt.audit import audit
from slimcli.artifacts.tensorrt.builder import BuildSpec
from slimcli.errors import MissingError, RecipeError, RunError

from .fake_tensorrt import Severity, fake_tensorrt, parser_error
from .micro_graphs import PAIRS

SHAPES = {"image": ((1, 3, 8, 8), (8, 3, 8, 8), (32, 3, 8, 8))}
SPEC = BuildSpec(Path("model.onnx"), SHAPES)
GPU = machine.Gpu("NVIDIA Test", "8.6")


def spec(**changes) -> BuildSpec:
    return BuildSpec(**{"onnx": Path("model.onnx"), "shapes": SHAPES} | changes)


def test_the_plan_comes_with_its_warnings():
    trt, _ = fake_tensorrt(log=[(Severity.WARNING, "slow"), (Severity.VERBOSE, "chatter")])
    built = builder.build(trt, SPEC)
    assert (built.plan, built.layers, built.warnings) == (b"plan", 7, ("slow",))


def test_options_reach_the_builder():
    trt, seen = fake_tensorrt()
    builder.build(
        trt, spec(workspace_bytes=1 << 20, version_compatible=True, hardware_compatible=True)
    )
    assert seen.shapes == SHAPES
    assert seen.pools == {"WORKSPACE": 1 << 20}
    assert seen.flags == ["VERSION_COMPATIBLE"]
    assert seen.cleared == ["TF32"]
    assert seen.config.hardware_compatibility_level == "AMPERE_PLUS"
    assert seen.config.builder_optimization_level == 3


def test_a_null_builder_means_the_machine_lacks_something():
    trt, _ = fake_tensorrt(builder_is_null=True)
    with pytest.raises(MissingError, match=r"gives no builder .*nullptr") as caught:
        builder.build(trt, SPEC)
    assert caught.value.exit_code == 5


def test_parser_errors_name_node_and_operator():
    errors = [parser_error("conv1/Conv", "Conv", "bad\n  weights"), parser_error("", "", "more")]
    trt, _ = fake_tensorrt(parser_errors=errors)
    with pytest.raises(RunError, match=r"node conv1/Conv \(Conv\)  parse: bad weights") as caught:
        builder.build(trt, SPEC)
    assert len(caught.value.problems) == 2


def test_a_parser_without_words_is_an_error_too():
    trt, _ = fake_tensorrt(parser_errors=[])
    with pytest.raises(RunError, match="the file cannot be read"):
        builder.build(trt, SPEC)


def test_no_plan_is_told_with_the_last_error_of_the_log():
    log = [(Severity.ERROR, "first"), (Severity.INTERNAL_ERROR, "no kernel\nfor node 3")]
    trt, _ = fake_tensorrt(plan=None, log=log)
    with pytest.raises(RunError, match=r"build: .*no kernel for node 3"):
        builder.build(trt, SPEC)


@pytest.mark.parametrize(
    ("said", "fix"),
    [
        ("no tactics to implement the operation within workspace limit", "a larger --workspace"),
        ("Cannot compile operation 'fc/Gemm' for Turing (SM75)", "leave SM75 out"),
        ("Cuda Runtime (cudaError 35: driver version is insufficient)", "slim doctor"),
        ("no kernel for node 3", "slim lint model.onnx"),
    ],
)
def test_the_fix_of_a_build_that_failed_follows_what_tensorrt_said(said, fix):
    trt, _ = fake_tensorrt(plan=None, log=[(Severity.ERROR, said)])
    with pytest.raises(RunError) as caught:
        builder.build(trt, SPEC)
    assert caught.value.problems[0].fix.startswith(fix)


def test_gpus_are_named_in_any_case_and_unknown_ones_are_refused():
    trt, seen = fake_tensorrt("tensorrt_rtx")
    builder.build(trt, spec(compute_capabilities=("sm80", "SM89", "SM80")))
    assert seen.config.num_compute_capabilities == 2
    with pytest.raises(RecipeError, match=r"one of CURRENT, SM80, SM89, received SM999"):
        builder.build(trt, spec(compute_capabilities=("SM999",)))
    for wrong in ("NONE", "SM80,SM89", "89"):
        with pytest.raises(RecipeError, match=f"no GPU called {wrong}"):
            builder.build(trt, spec(compute_capabilities=(wrong,)))


@pytest.mark.parametrize("shapes", [{}, {"other": SHAPES["image"]}])
def test_dynamic_inputs_need_shapes_under_their_name(shapes):
    trt, _ = fake_tensorrt()
    with pytest.raises(RecipeError, match=r"image \(-1, 3, 8, 8\)"):
        builder.build(trt, spec(shapes=shapes))


def test_a_refused_profile_is_told_with_its_shapes():
    trt, _ = fake_tensorrt(profile_is_refused=True)
    with pytest.raises(RecipeError, match=r"smallest <= typical <= largest.*\(1, 3, 8, 8\)"):
        builder.build(trt, SPEC)


@pytest.mark.parametrize(
    ("name", "changes", "option"),
    [
        ("tensorrt_rtx", {"hardware_compatible": True}, "--hardware-compatible"),
        ("tensorrt_rtx", {"timing_cache": Path("cache")}, "--timing-cache"),
        ("tensorrt", {"compute_capabilities": ("SM80",)}, "--compute-capability"),
    ],
)
def test_options_a_runtime_does_not_have_are_refused(name, changes, option):
    trt, _ = fake_tensorrt(name)
    with pytest.raises(RecipeError, match=option):
        builder.build(trt, spec(**changes))


def test_the_timing_cache_is_written_for_the_next_build(tmp_path):
    trt, _ = fake_tensorrt()
    builder.build(trt, spec(timing_cache=tmp_path / "cache"))
    assert (tmp_path / "cache").read_bytes() == b"cache"


def test_a_damaged_timing_cache_is_told(tmp_path):
    trt, seen = fake_tensorrt()
    seen.config.create_timing_cache = lambda content: None
    with pytest.raises(RunError, match="timing cache is damaged"):
        builder.build(trt, spec(timing_cache=tmp_path / "cache"))


@pytest.mark.parametrize(
    ("stored", "trt", "gpu", "code"),
    [
        ({}, ("tensorrt", "11.4.0"), GPU, None),
        ({}, ("tensorrt", "11.3.0"), GPU, "E-TRT-VERSION"),
        ({"version_compatible": True}, ("tensorrt", "11.5.0"), GPU, None),
        ({}, ("tensorrt_rtx", "11.4.0"), GPU, "E-TRT-RUNTIME"),
        ({}, ("tensorrt", "11.4.0"), machine.Gpu("Other", "9.0"), "E-TRT-DEVICE"),
        ({"hardware_compatible": True}, ("tensorrt", "11.4.0"), machine.Gpu("O", "9.0"), None),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_before_loading(stored, trt, gpu, code):
    sidecar = {
        "runtime": "tensorrt", "tensorrt_version": "11.4.0", "spec": stored,
        "gpu": {"name": "NVIDIA Test", "capability": "8.6"},
    }  # fmt: skip
    problem = machine.misfit(sidecar, fake_tensorrt(*trt)[0], gpu)
    assert (problem.code if problem else None) == code
    if code == "E-TRT-DEVICE":
        assert ("8.6" in problem.expected, "9.0 (Other)" in problem.received) == (True, True)


@pytest.fixture
def conv(tmp_path) -> Path:
    model = PAIRS["Q1"][1]()
    onnx.save_model(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_engine_and_sidecar_are_written_together(conv):
    trt, _ = fake_tensorrt()
    path = conv.with_name("model.engine")
    report = engine.build_engine(trt, spec(onnx=conv), path, GPU)
    content = engine.require_fit(path, trt, GPU)
    assert path.read_bytes() == b"plan"
    assert (content["tensorrt_version"], content["gpu"]["capability"]) == ("11.4.0.106", "8.6")
    assert content["trtexec"] == report.command
    assert "unavailable" in content["audit"]
    assert content["spec"]["onnx"] == "model.onnx"


def test_an_engine_is_not_built_without_a_gpu_except_with_rtx(conv):
    with pytest.raises(MissingError, match="needs an NVIDIA GPU"):
        engine.build_engine(fake_tensorrt()[0], spec(onnx=conv), conv.with_name("e"), None)
    assert not conv.with_name("e").exists()
    trt, _ = fake_tensorrt("tensorrt_rtx")
    engine.build_engine(trt, spec(onnx=conv), conv.with_name("e"), None)
    assert json.loads(conv.with_name("e.json").read_text())["runtime"] == "rtx"


def test_a_file_with_a_broken_rule_never_reaches_the_parser(tmp_path):
    onnx.save_model(PAIRS["Q4"][0](), tmp_path / "bad.onnx")
    trt, _ = fake_tensorrt(builder_is_null=True)
    with pytest.raises(RunError, match="rule Q4 at Quantize"):
        engine.build_engine(trt, spec(onnx=tmp_path / "bad.onnx"), tmp_path / "e", GPU)


def test_a_changed_engine_or_a_lost_sidecar_is_noticed(conv):
    trt, _ = fake_tensorrt()
    path = conv.with_name("model.engine")
    engine.build_engine(trt, spec(onnx=conv), path, GPU)
    path.write_bytes(b"other")
    with pytest.raises(RunError, match="not the file its sidecar was written for"):
        engine.read_sidecar(path)
    engine.sidecar_path(path).unlink()
    with pytest.raises(RunError, match="without its sidecar"):
        engine.read_sidecar(path)


def test_missing_packages_come_with_the_command_that_installs_them(monkeypatch):
    monkeypatch.setitem(machine.MODULES, "tensorrt", "tensorrt_that_is_not_there")
    with pytest.raises(MissingError, match=r'pip install "slimcli\[trt\]"'):
        machine.load("tensorrt")


def test_an_old_tensorrt_is_refused(monkeypatch, tmp_path):
    (tmp_path / "old_trt_for_a_test.py").write_text("__version__ = '10.9.0.34'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(machine.MODULES, "tensorrt", "old_trt_for_a_test")
    with pytest.raises(MissingError, match=r"expected 10.12 or newer, received 10.9"):
        machine.load("tensorrt")


@pytest.mark.parametrize(("batches", "smallest", "largest"), [((4,), 4, 4), ((1, 8, 32), 1, 32)])
def test_batch_sizes_become_shapes(tmp_path, batches, smallest, largest):
    value = onnx.helper.make_tensor_value_info
    x, y = (value(name, onnx.TensorProto.FLOAT, ["batch", 3]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    onnx.save_model(onnx.helper.make_model(graph), tmp_path / "m.onnx")
    low, _, high = engine.batch_shapes(tmp_path / "m.onnx", batches)["x"]
    assert (low, high) == ((smallest, 3), (largest, 3))


@pytest.mark.parametrize("batches", [(), (1, 2), (8, 4, 2), (0, 1, 2)])
def test_batch_sizes_that_are_no_range_are_refused(conv, batches):
    with pytest.raises(RecipeError, match="one size or three ascending"):
        engine.batch_shapes(conv, batches)


def test_the_trtexec_line_says_the_same():
    line = command.trtexec(
        spec(workspace_bytes=1 << 30, timing_cache=Path("c"), version_compatible=True,
             hardware_compatible=True), "model.engine",
    )  # fmt: skip
    assert line == (
        "trtexec --onnx=model.onnx --stronglyTyped --noTF32 --saveEngine=model.engine "
        "--minShapes=image:1x3x8x8 --optShapes=image:8x3x8x8 --maxShapes=image:32x3x8x8 "
        "--memPoolSize=workspace:1024 --builderOptimizationLevel=3 --timingCacheFile=c "
        "--versionCompatible --hardwareCompatibilityLevel=ampere+"
    )


@pytest.mark.parametrize(
    ("log", "reason"),
    [([], "no layer table"), ([("verbose", "Layers:\nsomething new")], "form that is not known")],
)
def test_the_audit_fails_softly(log, reason):
    found = audit(log, PAIRS["Q1"][1]())
    assert reason in str(found)
    assert reason in found.summary()["unavailable"]
