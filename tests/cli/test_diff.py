"""``slim diff``: what two runs do not share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slimcli.cli import main
from tests.solver import project


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    project.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert slim("run", "recipe.yaml", "-q", "epoch=1", "--name", "a") == 0
    assert slim("run", "recipe.yaml", "-q", "epoch=1", "lr=0.01", "--name", "b") == 0
    return Path("checkpoints") / "toy"


def slim(*words: str) -> int:
    """The exit code of a command run in this process."""
    with pytest.raises(SystemExit) as caught:
        main.main(list(words))
    return int(caught.value.code or 0)


def test_a_changed_setting_is_told_with_both_values(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert slim("diff", str(runs / "a"), str(runs / "b"), "--json") == 0
    document = json.loads(capsys.readouterr().out)
    settings = [each for each in document["differences"] if each["part"] == "settings"]
    lr = {"part": "settings", "name": "config.lr", "first": 0.1, "second": 0.01}
    assert (document["version"], settings) == (1, [lr])
    assert slim("diff", str(runs / "a"), str(runs / "b")) == 0
    assert "config.lr" in capsys.readouterr().out


def test_a_difference_is_exit_code_1_only_where_that_is_asked_for(runs: Path) -> None:
    assert slim("diff", str(runs / "a"), str(runs / "b"), "--exit-code") == 1
    assert slim("diff", str(runs / "a"), str(runs / "a"), "--exit-code") == 0


def test_a_run_equals_itself(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert slim("diff", str(runs / "a"), str(runs / "a")) == 0
    out, err = capsys.readouterr()
    assert (out, err.strip()) == ("", "nothing differs")
