"""A small project as a user has it, hooks and recipe, and the real command line to run it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

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


def write(folder: Path, hooks: str = HOOKS, recipe: str = RECIPE) -> Path:
    """The recipe's path; the hooks lie beside it."""
    folder.mkdir(exist_ok=True)
    (folder / "hooks.py").write_text(hooks)
    (folder / "recipe.yaml").write_text(recipe)
    return folder / "recipe.yaml"


def environment() -> dict[str, str]:
    found = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK"):
        found.pop(name, None)
    return found


def slim(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "slimcli", *words],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def interrupted(folder: Path, number: int, *words: str) -> subprocess.CompletedProcess[str]:
    """Start a run in its own process, wait for its first epoch, send it a signal."""
    process = subprocess.Popen(
        [sys.executable, "-m", "slimcli", "run", "recipe.yaml", "--name", "stopped", *words],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    events = folder / "checkpoints" / "toy" / "stopped" / "events.jsonl"
    deadline = time.monotonic() + 60
    while not (events.exists() and "epoch_end" in events.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
