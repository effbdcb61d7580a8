"""A folder with a small recipe whose hooks import nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HOOKS = """
def build_model(width=8):
    return width


def dataset_generator():
    return [1], [2]


def predict_function(model, data):
    return ("prediction", model, data)


def calculate_loss_function(prediction, data):
    return (prediction, data)


def evaluate_function(prediction, data):
    return {"acc": 1.0}
"""

RECIPE = """
algorithm: {algorithm}
model: my_hooks.py:build_model
hooks:
  dataset_generator: my_hooks.py:dataset_generator
  predict_function: my_hooks.py:predict_function
  calculate_loss_function: my_hooks.py:calculate_loss_function
  evaluate_function: my_hooks.py:evaluate_function
"""


class Folder:
    """Writes recipes and hook files into a folder of their own."""

    hooks = HOOKS

    def __init__(self, path: Path) -> None:
        self.path = path
        self.write("my_hooks.py", HOOKS)

    def write(self, name: str, text: str) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def recipe(self, more: str = "", algorithm: str = "finetune") -> Path:
        return self.write("recipe.yaml", RECIPE.format(algorithm=algorithm).lstrip() + more)

    def staged(self, stages: str) -> Path:
        text = RECIPE.partition("\n")[2].partition("\n")[2]
        return self.write("recipe.yaml", text + stages)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that is the current one; the import path and modules are as before afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield Folder(tmp_path)
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if file.startswith(str(tmp_path)):
            del sys.modules[name]
