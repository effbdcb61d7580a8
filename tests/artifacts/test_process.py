"""Whose run it is: told apart from a process that ended, and from one that got its number."""

from __future__ import annotations

import json
import multiprocessing
import os
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from slimcli.artifacts import process
from slimcli.errors import RecipeError


def write(folder: Path, **changes: object) -> None:
    """What this process would note, with changes."""
    process.claim(folder)
    content = json.loads((folder / process.NAME).read_text())
    (folder / process.NAME).write_text(json.dumps({**content, **changes}))


def test_a_run_whose_process_lives_is_running(tmp_path: Path) -> None:
    process.claim(tmp_path)
    assert process.of(tmp_path).pid == os.getpid()
    assert process.state(tmp_path, "running") == "running"


@pytest.mark.parametrize("change", [{"pid": 2**22 + 1}, {"started": "1"}])
def test_a_run_whose_process_is_gone_has_died(tmp_path: Path, change: dict[str, object]) -> None:
    write(tmp_path, **change)
    assert process.state(tmp_path, "running") == "died"
    assert process.state(tmp_path, "finished") == "finished"


def test_without_a_start_time_the_number_decides(tmp_path: Path) -> None:
    write(tmp_path, started="")
    assert process.state(tmp_path, "running") == "running"
    write(tmp_path, started="", pid=2**22 + 1)
    assert process.state(tmp_path, "running") == "died"


def test_of_a_process_on_another_machine_nothing_is_claimed(tmp_path: Path) -> None:
    write(tmp_path, host="elsewhere", pid=2**22 + 1)
    assert process.state(tmp_path, "running") == "running"
    process.refuse_running(tmp_path)


def test_a_run_that_another_process_is_at_work_on_is_refused(tmp_path: Path) -> None:
    write(tmp_path, pid=os.getppid(), started=process._start_of(os.getppid()))
    with pytest.raises(RecipeError, match="still running"):
        process.claim(tmp_path)
    process.release(tmp_path)
    assert process.of(tmp_path).pid == os.getppid()  # who does not have it can't give it back


def test_a_run_that_is_given_back_is_free(tmp_path: Path) -> None:
    process.claim(tmp_path)
    process.claim(tmp_path)  # the process that has it may ask again
    process.release(tmp_path)
    assert process.of(tmp_path) is None


def claiming(folder: str, ready: Barrier, answers: Queue[str]) -> None:
    ready.wait()
    try:
        process.claim(Path(folder))
        answers.put("claimed")
    except RecipeError:
        answers.put("refused")
    ready.wait()  # nobody has ended before all have asked


def test_of_several_that_claim_a_run_at_once_one_gets_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, answers = context.Barrier(8), context.Queue()
    all_of_them = [
        context.Process(target=claiming, args=(str(tmp_path), ready, answers)) for _ in range(8)
    ]
    for each in all_of_them:
        each.start()
    found = [answers.get(timeout=60) for _ in all_of_them]
    for each in all_of_them:
        each.join()
    assert sorted(found) == ["claimed"] + ["refused"] * 7


def test_a_run_of_an_older_version_has_no_process(tmp_path: Path) -> None:
    assert process.of(tmp_path) is None
    assert process.quiet_seconds(tmp_path) is None
    assert process.state(tmp_path, "running") == "running"
