"""``slim lint``: what it prints and how it exits."""

import json

import onnx
import pytest

from slimcli import cli

from ..artifacts.micro_graphs import PAIRS


@pytest.fixture
def run(tmp_path, capsys):
    def call(rule: str, good: bool, *options: str) -> tuple[int, str, str]:
        path = tmp_path / "model.onnx"
        onnx.save_model(PAIRS[rule][good](), path)
        with pytest.raises(SystemExit) as exit_:
            cli.main(["lint", str(path), *options])
        out, err = capsys.readouterr()
        return exit_.value.code, out, err

    return call


@pytest.mark.parametrize(
    ("rule", "good", "options", "code"),
    [
        ("Q1", False, (), 6),
        ("Q1", True, (), 0),
        ("P4", False, (), 0),
        ("P4", False, ("--strict",), 6),
        ("T2", False, ("--strict",), 0),
    ],
)
def test_exit_codes(run, rule, good, options, code):
    assert run(rule, good, *options)[0] == code


def test_findings_go_to_stdout_and_the_verdict_to_stderr(run):
    _, out, err = run("Q1", False)
    assert out.splitlines()[0] == "Q1 error  QuantizeLinear_3  zero point 5"
    assert err.strip() == "2 error"


def test_rules_are_explained_on_demand(run):
    assert "fix: quantize symmetrically" in run("Q1", False, "--rules")[1]


def test_json_is_one_document(run):
    code, out, err = run("Q1", False, "--json")
    content = json.loads(out)
    assert (code, content["ok"], err) == (6, False, "")
    assert content["findings"][0]["rule"] == "Q1"


def test_a_missing_file_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["lint", "nowhere.onnx"])
    assert exit_.value.code == 2
