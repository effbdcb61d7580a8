"""Two CPU processes with gloo, through the real command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from slimcli.artifacts import checkpoint

HOOKS = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc = nn.Linear(4, 3)
    def encode(self, x):
        return torch.relu(self.conv(x)).mean((2, 3))
    def forward(self, x):
        return self.fc(self.encode(x))

def build_model():
    return Net()

def data(count, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    images = torch.randn(count, 1, 6, 6, generator=generator) + labels.view(-1, 1, 1, 1)
    return TensorDataset(images, labels)

def dataset_generator():
    return data(40, 1), data(20, 2)

def predict_function(model, data):
    return model(data[0])

def calculate_loss_function(prediction, data):
    return nn.functional.cross_entropy(prediction, data[1])

def evaluate_function(prediction, data):
    return {"acc": (prediction.argmax(1) == data[1]).float().mean().item()}
"""
RECIPE = """
task_name: toy
algorithm: finetune
model: hooks.py:build_model
hooks:
  dataset_generator: hooks.py:dataset_generator
  predict_function: hooks.py:predict_function
  calculate_loss_function: hooks.py:calculate_loss_function
  evaluate_function: hooks.py:evaluate_function
config: {epoch: 2, batch_size: 8, lr: 0.1, devices: cpu}
export: {onnx: false}
"""
# Gradients of two halves are summed in another order than those of the whole batch.
REORDERED_SUM = 1e-6


def slim(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    environment.pop("LOCAL_RANK", None)
    return subprocess.run(
        [sys.executable, "-m", "slimcli", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def weights(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = checkpoint.load(folder / "checkpoints" / "last.pt")["model"]
    return found


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    (tmp_path / "hooks.py").write_text(HOOKS)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    one = slim(tmp_path, "run", "recipe.yaml", "--name", "one", "-q")
    assert one.returncode == 0, one.stderr
    two = slim(tmp_path, "run", "recipe.yaml", "num_processes=2", "--name", "two", "-q")
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
    (tmp_path / "hooks.py").write_text(HOOKS)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    done = slim(tmp_path, "run", "recipe.yaml", "num_processes=2", "batch_size=7")
    assert done.returncode == 2
    assert "config.batch_size" in done.stderr
