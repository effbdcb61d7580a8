"""What differs from the defaults is part of a run's summary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slimcli.cli import main
from tests.solver import project


def test_the_summary_says_what_differs_from_the_defaults_and_who_said_so_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main.main(["run", "recipe.yaml", "-q", "config.seed=3", "--name", "a"])
    assert caught.value.code == 0
    changes = json.loads(Path("checkpoints/toy/a/summary.json").read_text())["changes"]
    values = {each["key"]: (each["default"], each["value"]) for each in changes}
    assert values["config.seed"] == (0, 3)
    assert values["export.onnx"] == (True, False)
    assert "config.momentum" not in values
    origins = {each["key"]: each["origin"] for each in changes}
    assert origins["config.seed"].startswith("command line")
    assert origins["export.onnx"].startswith("recipe.yaml:")
    words = ["resume", "checkpoints/toy/a", "-q", "epoch=3", "--allow-recipe-change"]
    with pytest.raises(SystemExit) as caught:
        main.main(words)
    assert caught.value.code == 0
    changes = json.loads(Path("checkpoints/toy/a/summary.json").read_text())["changes"]
    later = {each["key"]: each["origin"] for each in changes}
    assert later["config.seed"] == origins["config.seed"]
    assert later["export.onnx"] == origins["export.onnx"]
    assert later["config.epoch"] != origins["config.epoch"]
