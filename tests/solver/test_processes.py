"""Two CPU processes with gloo, through the real command line."""

from __future__ import annotations

import json
import signal
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


CUTTING = project.RECIPE.replace("algorithm: finetune", "algorithm: resrep").replace(
    "config: {epoch: 2, ",
    "config: {epoch: 12, prune_rate: 0.4, lasso_decay: auto, groups_size: 1, min_channels: 1, "
    "warmup_epoch: 1, ",
)


@pytest.mark.slow
def test_a_model_is_cut_in_the_middle_of_a_run_of_two_processes(tmp_path: Path) -> None:
    project.write(tmp_path, recipe=CUTTING)
    done = project.slim(tmp_path, "run", "recipe.yaml", "num_processes=2", "--name", "two")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "checkpoints" / "toy" / "two"
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    cuts = [each for each in events if each["event"] == "cut"]
    assert cuts
    assert max(each["epoch"] for each in cuts) < 12  # training went on with what was left
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["final"]["macs"] <= summary["goal"]["target"]
    assert "Warning" not in done.stderr


@pytest.mark.slow
def test_ctrl_c_stops_both_processes_and_the_run_goes_on_with_both(tmp_path: Path) -> None:
    slow = "\nimport time\n_plain = calculate_loss_function\n" + (
        "def calculate_loss_function(prediction, data):\n"
        "    time.sleep(0.05)\n    return _plain(prediction, data)\n"
    )
    project.write(tmp_path, hooks=project.HOOKS + slow)
    stopped = project.interrupted(tmp_path, signal.SIGINT, "num_processes=2")
    assert stopped.returncode == 130, stopped.stderr
    folder = tmp_path / "checkpoints" / "toy" / "stopped"
    assert 0 < checkpoint.load(folder / "checkpoints" / "last.pt")["position"]["step"] < 10
    resumed = project.slim(tmp_path, "resume", str(folder), "-q")
    assert resumed.returncode == 0, resumed.stderr
    straight = project.slim(tmp_path, "run", "recipe.yaml", "num_processes=2", "--name", "all")
    assert straight.returncode == 0, straight.stderr
    alone = weights(tmp_path / "checkpoints" / "toy" / "all")
    assert all(torch.equal(value, weights(folder)[name]) for name, value in alone.items())


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared_is_refused_by_the_first_process(tmp_path: Path) -> None:
    project.write(tmp_path)
    done = project.slim(tmp_path, "run", "recipe.yaml", "num_processes=2", "batch_size=7")
    assert done.returncode == 2
    assert done.stderr.count("config.batch_size: a batch is shared out equally") == 1
    assert "process 1" not in done.stderr


FAILING = """
import os, signal
from torch import distributed

def is_it(rank):
    return distributed.is_initialized() and distributed.get_rank() == rank

_calls = []
_loss, _data = calculate_loss_function, dataset_generator

def calculate_loss_function(prediction, data):
    _calls.append(1)
    if is_it(WHO) and len(_calls) > 7:
        FAULT
    return _loss(prediction, data)
"""


def failing(folder: Path, rank: int, fault: str, *words: str) -> tuple[int, str, Path]:
    """Exit code, stderr and folder of a run in which one of two processes fails while it trains."""
    hooks = FAILING.replace("WHO", str(rank)).replace("FAULT", fault)
    project.write(folder, hooks=project.HOOKS + hooks)
    done = project.slim(folder, "run", "recipe.yaml", "num_processes=2", "--name", "two", *words)
    return done.returncode, done.stderr, folder / "checkpoints" / "toy" / "two"


@pytest.mark.slow
def test_an_error_of_the_second_process_is_told_once_with_its_number(tmp_path: Path) -> None:
    code, err, folder = failing(tmp_path, 1, 'raise ValueError("no such class")')
    what = "hook `calculate_loss_function` failed: ValueError: no such class"
    assert code == 1
    assert err.count("failed: ValueError: no such class") == 1
    assert "process 1: hooks.py:" in err
    assert err.rstrip().endswith("stopped: process 1 failed  [exit 1]  E-PROCESS-FAILED")
    assert "Traceback" not in err
    assert "gloo" not in err
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["exit_code"]) == ("failed", 1)
    (note,) = summary["notes"]
    assert note.startswith(f"process 1 failed: {what} (hooks.py:")
    assert f"warning: {note}" in (folder / "log.txt").read_text()


@pytest.mark.slow
def test_an_error_of_the_first_process_stays_the_last_word(tmp_path: Path) -> None:
    code, err, folder = failing(tmp_path, 0, 'return _loss(prediction, data) * float("nan")')
    assert code == 1
    assert err.count("loss became nan in epoch ") == 1
    assert err.rstrip().endswith("[exit 1]  E-LOSS-NOT-FINITE")
    assert "process 1" not in err
    assert "Traceback" not in err
    assert json.loads((folder / "summary.json").read_text())["notes"] == []


@pytest.mark.slow
def test_a_process_that_is_killed_is_named_with_its_signal(tmp_path: Path) -> None:
    code, err, folder = failing(tmp_path, 1, "os.kill(os.getpid(), signal.SIGKILL)", "--json")
    assert code == 1
    assert "stopped: process 1 was ended by SIGKILL and left no message" in err
    assert "Traceback" not in err
    assert "hook" not in err
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["notes"] == ["process 1 was ended by SIGKILL and left no message"]


@pytest.mark.slow
def test_no_folder_is_left_where_the_second_process_has_no_data(tmp_path: Path) -> None:
    fault = (
        "\ndef dataset_generator():\n"
        '    if is_it(1):\n        raise OSError("no disk here")\n    return _data()\n'
    )
    project.write(tmp_path, hooks=project.HOOKS + FAILING.replace("WHO", "-1") + fault)
    done = project.slim(tmp_path, "run", "recipe.yaml", "num_processes=2")
    assert done.returncode == 1
    assert "hook `dataset_generator` failed: OSError: no disk here" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "checkpoints").exists()
