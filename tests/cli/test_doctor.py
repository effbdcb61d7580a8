"""``slim doctor`` tests the machine and says how to mend it."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from slimcli import doctor
from slimcli.cli.doctor import command


def test_every_check_is_a_row_even_one_that_explodes(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode() -> doctor.Check:
        raise OSError("boom")

    monkeypatch.setitem(doctor.CHECKS, "gpu", (explode, "look at the driver"))
    rows = {row.name: row for row in doctor.examine()}
    assert list(rows) == list(doctor.CHECKS)
    assert rows["gpu"] == doctor.Check("gpu", "FAIL", "OSError: boom", "look at the driver")
    assert rows["onnx"].state == "ok"


def test_strict_exits_5_when_something_needed_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Check("trt", "none", "not installed")])
    assert CliRunner().invoke(command, ["--strict"]).exit_code == 0
    assert CliRunner().invoke(command, ["--strict", "--need", "trt"]).exit_code == 5


def test_json_is_one_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Check("torch", "ok", "torch 2")])
    document = json.loads(CliRunner().invoke(command, ["--json"]).stdout)
    assert document["checks"] == [{"name": "torch", "state": "ok", "text": "torch 2", "fix": ""}]
    assert document["packages"]["torch"]


def test_an_unwritable_folder_is_a_failure_with_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "NamedTemporaryFile", refuse)
    row = doctor.check_disk()
    assert row.state == "FAIL"
    assert "config.save_dir" in row.fix
