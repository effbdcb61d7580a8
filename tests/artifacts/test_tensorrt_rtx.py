"""The real parser and builder of TensorRT-RTX, which need no GPU."""

import onnx
import pytest

from slimcli.artifacts import lint
from slimcli.artifacts.tensorrt import builder, engine
from slimcli.artifacts.tensorrt.audit import audit
from slimcli.errors import RunError

from .micro_graphs import MORE_BAD, MORE_GOOD, PAIRS

rtx = pytest.importorskip("tensorrt_rtx", reason="the extra rtx is not installed")

BAD = {rule: (rule, bad) for rule, (bad, _) in PAIRS.items()} | MORE_BAD
GOOD = {rule: good for rule, (_, good) in PAIRS.items()} | MORE_GOOD

# What TensorRT-RTX 1.7 does with each bad graph, target SM80. A release that changes one of these
# is noticed here.
REFUSED = {"Q1", "Q3", "Q4", "Q7", "T4", "Q1 in uint8", "Q3 int16", "Q4 zero"}
FLOAT = {"Q5", "Q6", "Q7 axis", "Q9", "P1", "P1 weight only", "P2", "P6"}
CRASHES = {"Q4 computed"}  # the parser ends the process: a reason to lint before parsing


def outcome(model, path) -> str:
    onnx.save_model(model, path)
    try:
        built = builder.build(rtx, builder.BuildSpec(path, compute_capabilities=("SM80",)))
    except RunError:
        return "refused"
    found = audit(built.log, model)
    assert not found.unavailable
    return "int8" if not found.other else "float"


@pytest.mark.parametrize("name", sorted(set(BAD) - CRASHES))
def test_what_rtx_refuses_or_runs_in_float_breaks_a_rule(name, tmp_path):
    _, make = BAD[name]
    expected = "refused" if name in REFUSED else "float" if name in FLOAT else "int8"
    assert outcome(make(), tmp_path / "model.onnx") == expected
    if expected != "int8":
        assert lint.lint(make())


@pytest.mark.parametrize("name", sorted(set(GOOD) - {"P1", "no quantization"}))
def test_a_clean_graph_runs_in_int8_throughout(name, tmp_path):
    assert outcome(GOOD[name](), tmp_path / "model.onnx") == "int8"


def test_a_refusal_names_node_and_operator(tmp_path):
    onnx.save_model(PAIRS["Q1"][0](), tmp_path / "model.onnx")
    with pytest.raises(RunError, match=r"node QuantizeLinear_3 \(QuantizeLinear\)  parse: .*zero"):
        builder.build(rtx, builder.BuildSpec(tmp_path / "model.onnx"))


def test_an_engine_with_a_free_batch_is_built_and_audited(quantized_file):
    path = quantized_file.with_name("model.engine")
    shapes = engine.batch_shapes(quantized_file, (1, 8, 32))
    spec = builder.BuildSpec(quantized_file, shapes, compute_capabilities=("SM80", "SM89"))
    report = engine.build_engine(rtx, spec, path, None)
    assert report.file_bytes > 1000
    assert str(report.audit) == "4 of 5 heavy layers run in int8"
    assert list(report.audit.other) == ["up/ConvTranspose"]
    assert engine.require_fit(path, rtx, None)["audit"]["int8"] == 4
