"""``exit()`` in the user's code: an error of exit code 1 that names the line, never a silent 0."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slimcli import doctor
from slimcli.cli import main
from tests.solver import project

EXITS = {
    "model": "def build_model():\n    raise SystemExit(0)",
    "loss": "def calculate_loss_function(prediction, data):\n    exit()",
    "metric": "def evaluate_function(prediction, data):\n    import sys; sys.exit()",
    "sample": "class Gone(TensorDataset):\n"
    "    def __getitem__(self, index): exit(0)\n"
    "def dataset_generator():\n"
    "    sets = data(40, 1), data(20, 2)\n"
    "    return tuple(Gone(*each.tensors) for each in sets)",
    "gradient": "def calculate_loss_function(prediction, data):\n"
    "    prediction.register_hook(lambda gradient: exit(0))\n"
    "    return nn.functional.cross_entropy(prediction, data[1])",
    "length": "class Gone(TensorDataset):\n"
    "    def __len__(self): exit(0)\n"
    "def dataset_generator():\n"
    "    return Gone(*data(40, 1).tensors), data(20, 2)",
}


@pytest.mark.parametrize("where", EXITS)
def test_an_exit_in_the_users_code_is_exit_1_with_the_line(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    project.write(tmp_path, project.HOOKS + EXITS[where] + "\n")
    with pytest.raises(SystemExit) as caught:
        main.main(["run", "recipe.yaml", "--name", "left"])
    assert caught.value.code == 1
    err = capsys.readouterr().err
    assert "failed: SystemExit" in err
    assert "fix: raise an error in place of exit()" in err
    assert err.rstrip().endswith("[exit 1]  E-HOOK-FAILED")
    text = project.HOOKS + EXITS[where]
    called = ("exit(", "raise SystemExit")
    (line,) = [i for i, each in enumerate(text.splitlines(), 1) if any(c in each for c in called)]
    assert f"hooks.py:{line}" in err
    assert "Traceback" not in err
    summary = tmp_path / "checkpoints" / "toy" / "left" / "summary.json"
    if summary.exists():  # the data sets are made before the folder is
        assert json.loads(summary.read_text())["status"] == "failed"


def test_a_loader_process_that_exits_is_an_error_too(tmp_path: Path) -> None:
    recipe = project.RECIPE.replace("epoch: 2,", "epoch: 2, num_workers: 1,")
    project.write(tmp_path, project.HOOKS + EXITS["sample"] + "\n", recipe)
    done = project.slim(tmp_path, "run", "recipe.yaml")
    assert done.returncode == 1
    assert "hook `dataset_generator` failed" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_exits_of_slim_itself_keep_their_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Check("gpu", "FAIL", "gone")])
    with pytest.raises(SystemExit) as caught:
        main.main(["doctor", "--strict"])
    assert caught.value.code == 5
