"""Whose error it is, in a run of more than one process; the processes themselves are elsewhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import distributed

from slimcli.errors import HookError, Problem
from slimcli.recipe.binding import hook_failed
from slimcli.solver import peers

CLOSED = "[third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]"
OWN = HookError(Problem("E-HOOK-LOSS", "hook `calculate_loss_function` returned the wrong thing"))
ALONE = SimpleNamespace(strategy=SimpleNamespace())


@pytest.fixture(autouse=True)
def _store(monkeypatch: pytest.MonkeyPatch) -> None:
    made: Any = distributed.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", 0, is_master=True, timeout=peers.PATIENCE
    )
    monkeypatch.setattr(peers, "_store", made)


def be(monkeypatch: pytest.MonkeyPatch, number: int | None) -> None:
    monkeypatch.setattr(peers, "rank", lambda: number)


def blamed() -> Exception:
    """A connection that was lost in the user's line."""
    try:
        try:
            raise RuntimeError(CLOSED)
        except RuntimeError as error:
            raise hook_failed("predict_function", error) from error
    except Exception as error:
        return error


def test_a_lost_connection_is_told_as_what_the_other_process_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    be(monkeypatch, 1)
    peers.report(OWN, 3)
    be(monkeypatch, 0)
    failed = peers.another_failed(blamed(), ALONE, None)
    assert failed is not None
    assert failed.exit_code == 3
    assert failed.problems[0].what == "stopped: process 1 failed"
    assert failed.note == f"process 1 failed: {OWN.problems[0].what}"
    assert failed.is_told


def test_the_first_that_failed_is_told_and_not_those_that_followed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for number, text in ((2, "first"), (1, "second")):
        be(monkeypatch, number)
        peers.report(ValueError(text), 1)
    be(monkeypatch, 0)
    failed = peers.another_failed(RuntimeError(CLOSED), ALONE, None)
    assert failed is not None
    assert failed.note == "process 2 failed: ValueError: first"


def test_a_child_that_was_killed_is_named_and_no_longer_watched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    be(monkeypatch, 0)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    child.kill()
    children = [child]
    launcher = SimpleNamespace(procs=children)
    fabric = SimpleNamespace(strategy=SimpleNamespace(launcher=launcher))
    failed = peers.another_failed(RuntimeError(CLOSED), fabric, None)
    assert failed is not None
    assert failed.note == "process 1 was ended by SIGKILL and left no message"
    assert not failed.is_told
    assert children == []


def test_an_error_of_its_own_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    be(monkeypatch, 0)
    assert peers.another_failed(RuntimeError("size 6 and size 8"), ALONE, None) is None
    preamble = "[third_party/gloo/gloo/transport/tcp/pair.cc:450] op.preamble.length <= op.nbytes"
    assert peers.another_failed(RuntimeError(preamble), ALONE, None) is None
    nccl = distributed.DistBackendError("NCCL error: ncclInvalidUsage: two ranks on one GPU")
    assert peers.another_failed(nccl, ALONE, None) is None
    be(monkeypatch, None)
    assert peers.another_failed(RuntimeError(CLOSED), ALONE, None) is None


def test_what_the_first_process_says_too_is_not_said_again(monkeypatch: pytest.MonkeyPatch) -> None:
    be(monkeypatch, 0)
    peers.report(OWN, 3)
    assert not peers.is_told_by_first(OWN)
    be(monkeypatch, 1)
    assert peers.is_told_by_first(OWN)
    assert not peers.is_told_by_first(ValueError("another"))


def test_a_process_beside_the_first_is_silent_once_the_end_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    be(monkeypatch, 1)
    monkeypatch.setattr(peers, "_store", None)  # that of a first process that is gone
    for status, is_told in (("running", False), ("failed", True)):
        (tmp_path / "summary.json").write_text(f'{{"status": "{status}"}}')
        failed = peers.another_failed(RuntimeError(CLOSED), ALONE, tmp_path)
        assert failed is not None
        assert failed.is_told is is_told
