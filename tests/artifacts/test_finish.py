"""Trained, deploy and ONNX: each checked against the one before it, and what a failure leaves."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from slimcli.artifacts import checkpoint
from slimcli.errors import RunError, VerificationError
from slimcli.solver.job import Export
from slimcli.solver.stages import run
from tests.solver import toys

FOLDED = 1e-4  # the limit of the chain, in float32


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "toy" / "latest" / "summary.json").read_text())
    return found


@pytest.mark.slow
def test_every_form_agrees_and_has_the_same_metric(tmp_path: Path) -> None:
    from dataclasses import replace

    done = run(replace(toys.job(tmp_path, epoch=2), export=Export(onnx=True)))
    seams = [(each["from"], each["to"], each["ok"]) for each in done.summary["verification"]]
    assert seams == [
        ("trained", "deploy", True),
        ("deploy", "deploy file", True),
        ("deploy", "onnx", True),
    ]
    assert all(each["max_abs"] <= FOLDED for each in done.summary["verification"])
    forms = done.summary["final"]["metrics_by_form"]
    assert forms["trained"]["acc"] == forms["deploy"]["acc"] == forms["onnx"]["acc"]


class Wrong(toys.Counting):
    """Its deploy form computes something else."""

    def deploy(self, model: nn.Module) -> nn.Module:
        plain = super().deploy(model)
        with torch.no_grad():
            plain.get_parameter("conv2.weight").mul_(2)
        return plain


def test_a_deploy_form_that_differs_is_exit_code_6_with_the_layer(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="first differing layer") as caught:
        run(toys.job(tmp_path, Wrong, epoch=1))
    assert caught.value.exit_code == 6
    assert "conv2" in str(caught.value)
    found = summary(tmp_path)
    assert (found["status"], found["exit_code"]) == ("not_verified", 6)
    assert [each["ok"] for each in found["verification"]] == [False]
    assert not list((tmp_path / "toy" / "latest").glob("artifacts/*"))
    assert (tmp_path / "toy" / "latest" / "checkpoints" / "best.pt").is_file()


def test_the_summary_counts_channels_and_macs_after_a_cut(tmp_path: Path) -> None:
    done = run(toys.job(tmp_path, toys.Cutter))
    rows = {row["name"]: row for row in done.summary["layers"]}
    assert (rows["conv1"]["channels_before"], rows["conv1"]["channels_after"]) == (6, 4)
    assert (rows["conv2"]["channels_before"], rows["conv2"]["channels_after"]) == (4, 4)
    pixels = 6 * 6
    macs_after = pixels * 9 * (4 + 4 * 4) + 4 * 3
    assert done.summary["final"]["macs"] == macs_after
    macs_before = pixels * 9 * (6 + 6 * 4) + 4 * 3
    assert done.summary["baseline"]["macs"] == macs_before
    goal = {"name": "macs", "target": macs_before - 1, "reached": True, "value": macs_after}
    assert done.summary["goal"] == goal
    assert done.summary["goal"]["reached"] is True  # 1 == True, and scripts test it with jq -e


def test_without_a_deploy_format_the_best_model_stays_in_training_form(tmp_path: Path) -> None:
    done = run(toys.job(tmp_path, toys.Cutter, save_deploy_format=False))
    assert done.summary["final"]["file_bytes"] == {}
    assert done.summary["verification"] == []
    assert (done.folder / "checkpoints" / "best.pt").is_file()


def test_a_test_set_is_used_once_at_the_end(tmp_path: Path) -> None:
    def three() -> Any:
        return (*toys.datasets(), toys.images(15, 3))

    done = run(toys.with_hooks(toys.job(tmp_path), dataset_generator=three))
    assert set(done.summary["final"]["test_metrics"]) == {"acc", "error"}
    plain = run(toys.job(tmp_path / "two"))
    assert any("validation set also chose" in note for note in plain.summary["notes"])


def test_a_disk_that_is_full_while_deploying_keeps_the_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.replace

    def full(source: Any, target: Any) -> None:
        if "artifacts" in Path(target).parts:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunError, match="no space left"):
        run(toys.job(tmp_path, epoch=0))
    folder = tmp_path / "toy" / "latest"
    assert checkpoint.load(folder / "checkpoints" / "best.pt")["position"]["epoch"] == 0
    assert list((folder / "artifacts").iterdir()) == []
    assert (summary(tmp_path)["status"], summary(tmp_path)["exit_code"]) == ("failed", 1)
