"""The other processes of a run: which of them failed, with what, and how the rest learn of it.

A process that fails leaves a line in the store through which the processes found each other, then
goes; the rest lose their connection to it, and find the line. Nothing happens in a run of one.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import distributed

from slimcli.artifacts import summary
from slimcli.errors import AnotherFailed, Problem, SlimError
from slimcli.recipe.frames import describe

CODE = "E-PROCESS-FAILED"
MEETING = timedelta(seconds=30)
PATIENCE = timedelta(seconds=1)
"""How long one process waits for a word of another that may be gone."""

_store: Any = None

_LOST = re.compile(
    r"gloo/.*(closed by peer|reset by peer|broken pipe|timed? ?out|pair closure|connectFullMesh)",
    re.IGNORECASE | re.DOTALL,
)
"""What gloo says in a plain RuntimeError when the other end is gone; other faults are our own."""

_OWN = re.compile("ncclUnhandledCudaError|ncclInvalid|out of memory")
"""What NCCL says of a fault in this process."""


@dataclass(frozen=True)
class Report:
    """What a process failed with.

    Attributes:
        rank: Its number among all processes.
        exit_code: What it exits with.
        what: Its message in one line.
    """

    rank: int
    exit_code: int
    what: str


def rank() -> int | None:
    """The number of this process; None where it is alone, or the others are not known yet."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    return distributed.get_rank() if distributed.get_world_size() > 1 else None


def meet() -> None:
    """Connect to the store through which the processes found each other; once they have.

    A connection of its own, as the process group's waits for half an hour, and an early one, as a
    late one complains on stderr where the first process, whose store it is, has just gone.
    """
    global _store
    _store = None
    if rank() is None:
        return
    connect: Any = distributed.TCPStore  # type: ignore[attr-defined]
    with suppress(Exception):  # without it a failure is told all the same, with less detail
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        _store = connect(address, port, is_master=False, timeout=MEETING)
        _store.set_timeout(PATIENCE)


def report(error: BaseException, exit_code: int) -> None:
    """Leave what this process failed with, for those that will miss it."""
    number = rank()
    if number is None:
        return
    line = json.dumps(asdict(Report(number, exit_code, _what(error))))
    with suppress(Exception):  # there is no store any more
        _store.compare_set(_key(), "", line)
        _store.set(_key(number), line)


def is_told_by_first(error: BaseException) -> bool:
    """Whether the first process fails with the very same, which need not be read twice."""
    if not rank():
        return False
    try:
        _store.wait([_key(0)], PATIENCE)
        return _read(_key(0)).what == _what(error)
    except Exception:
        return False  # better twice than never


def another_failed(error: BaseException, fabric: Any, folder: Path | None) -> AnotherFailed | None:
    """The error as that of another process; None where it is this one's own.

    Args:
        error: What was raised here.
        fabric: The launched Fabric.
        folder: The run folder, where it is known.
    """
    lost = _lost(error) if rank() is not None else None
    if lost is None:
        return None
    children = _release_children(fabric)
    try:
        found, is_first_there = _first_report(), True
    except Exception:
        found, is_first_there = None, False
    if found is not None:
        problem = Problem(CODE, f"stopped: process {found.rank} failed", received=found.what)
        failed = AnotherFailed(problem)
        failed.exit_code, failed.is_told = found.exit_code, True
        failed.note = f"process {found.rank} failed: {found.what}"
        return failed
    failed = AnotherFailed(_without_a_word(lost, children))
    # The first process speaks for all while it lives, or did as it ended the run.
    failed.is_told = rank() != 0 and (is_first_there or (folder is not None and _is_over(folder)))
    failed.note = failed.problems[0].what.removeprefix("stopped: ")
    return failed


def _without_a_word(lost: BaseException, children: list[subprocess.Popen[bytes]]) -> Problem:
    ended = _ended(children)
    if ended:
        what = f"stopped: {ended} and left no message"
        return Problem(CODE, what, fix="a process that is killed may have lacked memory")
    text = str(lost).strip() or type(lost).__name__
    what = "stopped: another process failed"
    return Problem(CODE, what, received=text.splitlines()[0], fix="see what is told above")


def _lost(error: BaseException | None) -> BaseException | None:
    """The lost connection among the causes of an error, which a hook may have been blamed for."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        is_typed = isinstance(error, distributed.DistBackendError | distributed.DistNetworkError)
        is_said = isinstance(error, RuntimeError) and _LOST.search(str(error))
        if is_said or (is_typed and not _OWN.search(str(error))):
            return error
        seen.append(error)
        error = error.__cause__ or error.__context__
    return None


def _release_children(fabric: Any) -> list[subprocess.Popen[bytes]]:
    """The processes that this one started; Fabric forgets them.

    Its observer would kill this process with them, while it writes down how the run ended.
    """
    started = getattr(getattr(fabric.strategy, "launcher", None), "procs", None) or []
    children = list(started)
    del started[:]
    return children


def _ended(children: list[subprocess.Popen[bytes]]) -> str:
    """Which child ended, and how; a signal tells more than the exit codes that it brought about."""
    deadline = time.monotonic() + PATIENCE.total_seconds()
    codes: dict[int, int] = {}
    while children and not codes and time.monotonic() < deadline:
        found = {number: child.poll() for number, child in enumerate(children, 1)}
        codes = {number: code for number, code in found.items() if code}
        time.sleep(0.05)
    if not codes:
        return ""
    number = min(codes, key=lambda each: (codes[each] > 0, each))
    code = codes[number]
    if code > 0:
        return f"process {number} ended with code {code}"
    known = {each.value: each.name for each in signal.Signals}
    return f"process {number} was ended by {known.get(-code, f'signal {-code}')}"


def _is_over(folder: Path) -> bool:
    """Whether the first process wrote how the run ended; then it also said so."""
    return summary.status(folder / "summary.json") not in ("running", "unfinished")


def _what(error: BaseException) -> str:
    if not isinstance(error, SlimError):
        return describe(error).splitlines()[0]
    problem = error.problems[0]
    return f"{problem.what} ({problem.where})" if problem.where else problem.what


def _first_report() -> Report | None:
    return _read(_key()) if _store.check([_key()]) else None


def _read(key: str) -> Report:
    return Report(**json.loads(_store.get(key)))


def _key(number: int | None = None) -> str:
    """Name of the line of one process, or of the first that failed; a restart has its own."""
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return f"slim/failed/{restart}/{'first' if number is None else number}"
