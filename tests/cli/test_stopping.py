"""Signals at awkward moments: the exit code is that of the first one, whatever comes after."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from slimcli.cli import stopping
from tests.solver import project

SLOW = """
import time
_plain = predict_function
def predict_function(model, data):
    time.sleep(0.02)
    return _plain(model, data)
"""
WAITING = """
import pathlib, time
def dataset_generator():
    pathlib.Path("here").touch()
    time.sleep(60)
"""


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "slimcli", *words],
        cwd=folder,
        env=project.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts its background jobs with SIGINT ignored, and so would this process be.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_after_the_first_one_was_obeyed_change_nothing(
    tmp_path: Path, first: signal.Signals, code: int
) -> None:
    project.write(tmp_path, project.HOOKS + SLOW)
    process = start(tmp_path, "run", "recipe.yaml", "--name", "a", "epoch=50")
    folder = tmp_path / "checkpoints" / "toy" / "a"
    events = folder / "events.jsonl"
    wait_for(process, lambda: events.exists() and "epoch_end" in events.read_text())
    os.kill(process.pid, first)
    wait_for(process, lambda: '"interrupted"' in events.read_text())
    while process.poll() is None:  # while the summary and the report are written, and after
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.002)
    _, err = process.communicate()
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert (folder / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_outside_of_training_has_its_exit_code(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    project.write(tmp_path, project.HOOKS + WAITING)
    process = start(tmp_path, "plan", "recipe.yaml")
    wait_for(process, (tmp_path / "here").exists)
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    assert err.splitlines()[-1].endswith(f"[exit {code}]")


@pytest.mark.slow
def test_a_keyboard_interrupt_that_a_hook_raises_is_written_down_as_what_it_exits_with(
    tmp_path: Path,
) -> None:
    fault = "\ndef calculate_loss_function(prediction, data):\n    raise KeyboardInterrupt\n"
    project.write(tmp_path, project.HOOKS + fault)
    done = project.slim(tmp_path, "run", "recipe.yaml", "--name", "a")
    assert done.returncode == 130
    assert done.stderr.rstrip().endswith("interrupted  [exit 130]")
    summary = json.loads((tmp_path / "checkpoints" / "toy" / "a" / "summary.json").read_text())
    assert (summary["status"], summary["exit_code"]) == ("interrupted", 130)


def test_a_signal_changes_nothing_from_when_a_run_obeys_one_until_it_goes_on() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with stopping.signals_unwind():
            stopping.obey()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.raise_signal(number)
            stopping.go_on()
            for number, kind in (
                (signal.SIGINT, KeyboardInterrupt),
                (signal.SIGTERM, stopping.TerminateNow),
            ):
                with pytest.raises(kind):
                    signal.raise_signal(number)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
