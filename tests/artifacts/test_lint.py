"""Each rule notices the graph that breaks it and keeps quiet about one that does not."""

import numpy as np
import onnx
import pytest

from slimcli.artifacts import lint
from slimcli.errors import RunError

from .micro_graphs import MORE_BAD, MORE_GOOD, PAIRS, Micro, deconv, residual

BAD = {rule: (rule, bad) for rule, (bad, _) in PAIRS.items()} | MORE_BAD
GOOD = {rule: good for rule, (_, good) in PAIRS.items()} | MORE_GOOD


def rules(model) -> set[str]:
    return {finding.rule for finding in lint.lint(model)}


def test_every_rule_has_a_bad_and_a_good_graph():
    assert set(PAIRS) == set(lint.RULES)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_graph_breaks_its_rule(name):
    rule, make = BAD[name]
    assert rule in rules(make())


@pytest.mark.parametrize("name", GOOD)
def test_a_good_graph_is_clean(name):
    assert [str(finding) for finding in lint.lint(GOOD[name]())] == []


# What a fault brings with it: Q before an activation leaves the next conv without int8 input, and
# a graph without axis attributes has its scales on axis 1.
ALONG = {"P2": {"P1"}, "T1": {"Q7"}, "T4": {"T2"}, "R1": {"T2"}, "Q1": {"Q2"}}


@pytest.mark.parametrize("name", BAD)
def test_no_other_rule_cries_along(name):
    rule, make = BAD[name]
    assert rules(make()) <= {rule} | ALONG.get(rule, set())


def test_a_finding_names_node_message_and_fix():
    (finding,) = lint.lint(residual("float"))
    assert finding.rule == "P4"
    assert finding.node.startswith("Add_")
    assert finding.message == "the skip input is not quantized"
    assert finding.as_dict()["fix"] == lint.RULES["P4"].fix
    assert str(finding).startswith("P4 warning  Add_")


def test_only_what_a_runtime_refuses_or_misreads_is_an_error():
    assert lint.errors(lint.lint(PAIRS["Q2"][0]()))
    assert not lint.errors(lint.lint(deconv(np.float32(0.01))))


def test_a_weight_with_one_channel_may_have_a_vector_of_one():
    net = Micro()
    weight = net.weight(1, 16, 1, 1, scale=[0.01], axis=0)
    assert rules(net.model(net.conv(net.qdq("x"), weight))) == set()


def test_a_sum_with_a_constant_is_no_residual():
    net = Micro()
    total = net.op("Add", net.conv(net.qdq("x")), net.const(np.ones((1, 16, 1, 1))))
    assert rules(net.model(total)) == set()


def test_a_conv_that_others_read_too_is_no_side_that_fuses_with_a_sum():
    net = Micro()
    start = net.conv(net.qdq("x"))  # as the input of a block behind a strided conv without norm
    inner = net.op("Mul", net.conv(net.qdq(start)), net.const(np.ones((1, 16, 1, 1))))
    assert rules(net.model(net.op("Add", inner, start))) == set()


def test_files_that_are_no_model_are_told(tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"nonsense")
    with pytest.raises(RunError, match="no valid ONNX file"):
        lint.lint_file(tmp_path / "a.onnx")
    with pytest.raises(RunError, match="cannot read the file: No such file"):
        lint.lint_file(tmp_path / "b.onnx")


def test_a_file_is_linted_like_its_graph(tmp_path):
    onnx.save_model(PAIRS["Q1"][0](), tmp_path / "a.onnx")
    assert {finding.rule for finding in lint.lint_file(tmp_path / "a.onnx")} == {"Q1"}


def test_a_concat_with_one_float_input_is_no_int8_operand():
    net = Micro()
    joined = net.op("Concat", net.qdq("x"), net.op("Relu", "x"), axis=1)
    assert rules(net.model(net.conv(joined, net.weight(16, 32, 1, 1)))) == {"P1", "P6"}
