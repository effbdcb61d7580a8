"""Two CPU processes with gloo, through the real command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from slimcli.artifacts import checkpoint
from tests.solver import project

# Gradients of two halves are summed in another order than those of the whole batch.
REORDERED_SUM = 1e-6


def weights(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = checkpoint.load(folder / "checkpoints" / "last.pt")["model"]
    return found


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    project.write(tmp_path)
    one = project.slim(tmp_path, "run", "recipe.yaml", "--name", "one", "-q")
    assert one.returncode == 0, one.stderr
    two = project.slim(tmp_path, "run", "recipe.yaml", "num_processes=2", "--name", "two", "-q")
    assert two.returncode == 0, two.stderr
    assert two.stdout.splitlines() == ["checkpoints/toy/two"]
    assert sorted(each.name for each in (tmp_path / "checkpoints" / "toy").iterdir()) == [
        "latest",
        "one",
        "two",
    ]
    alone, shared = (weights(tmp_path / "checkpoints" / "toy" / name) for name in ("one", "two"))
    for name, value in alone.items():
        assert torch.allclose(value, shared[name], atol=REORDERED_SUM, rtol=0), name
    summary = json.loads((tmp_path / "checkpoints" / "toy" / "two" / "summary.json").read_text())
    assert summary["environment"]["processes"] == 2


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    project.write(tmp_path)
    done = project.slim(tmp_path, "run", "recipe.yaml", "num_processes=2", "batch_size=7")
    assert done.returncode == 2
    assert "config.batch_size" in done.stderr
