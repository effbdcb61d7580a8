"""Which process is at work on a run, and whether it still lives: process.json in the run folder."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from slimcli.artifacts import atomic
from slimcli.errors import Problem, RecipeError

NAME = "process.json"


@dataclass(frozen=True)
class Process:
    """The process that trains, or trained, a run.

    Attributes:
        pid: Its number.
        host: The machine it is on.
        started: When it started, in the machine's own count; "" where that is not known. A number
            that was given to another process later has another one.
    """

    pid: int
    host: str
    started: str

    @property
    def is_alive(self) -> bool | None:
        """Whether it still runs; None where that can't be told from here."""
        if self.host != socket.gethostname():
            return None
        if self.started:
            return _start_of(self.pid) == self.started
        if os.name != "posix":
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:
            return True  # it is there and somebody else's
        return True

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}"


def _start_of(pid: int) -> str:
    """Start time of a process from /proc; empty where there is none, or it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    state, *rest = text.rpartition(")")[2].split()
    return "" if state in "ZX" else rest[18]  # a zombie has ended


def claim(folder: Path) -> None:
    """From now on this process, and no other, works on the run.

    Raises:
        RecipeError: Another process on this machine does.
        RunError: The folder can't be written.
    """
    with _alone(folder):
        refuse_running(folder)
        atomic.write_text(folder / NAME, json.dumps(asdict(_own())) + "\n")


def release(folder: Path) -> None:
    """The run has ended, though this process may live on; another's claim stays."""
    if of(folder) == _own():
        with contextlib.suppress(OSError):
            (folder / NAME).unlink(missing_ok=True)


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """The run is this process's meanwhile; see :func:`claim`."""
    claim(folder)
    try:
        yield
    finally:
        release(folder)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time, where the system and the disk can lock folders."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _own() -> Process:
    pid = os.getpid()
    return Process(pid, socket.gethostname(), _start_of(pid))


def of(folder: Path) -> Process | None:
    """The process of a run; None where it is not known, or the run has ended."""
    try:
        return Process(**json.loads((folder / NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def quiet_seconds(folder: Path) -> float | None:
    """Seconds since the run last wrote an event; None where it never did."""
    try:
        return max(0.0, time.time() - (folder / "events.jsonl").stat().st_mtime)
    except OSError:
        return None


def state(folder: Path, status: str) -> str:
    """The status of a summary, or ``died`` where it says running and nobody is."""
    process = of(folder)
    is_dead = process is not None and process.is_alive is False
    return "died" if status == "running" and is_dead else status


def refuse_running(folder: Path) -> None:
    """Two processes must not write into one run folder.

    Raises:
        RecipeError: Another process on this machine is at work on the run.
    """
    process = of(folder)
    if process is not None and process.pid != os.getpid() and process.is_alive:
        raise RecipeError(
            Problem(
                "E-RUN-RUNNING",
                "the run is still running",
                str(folder),
                received=str(process),
                fix=f"wait for it, or stop it: kill {process.pid} (it saves first)",
            )
        )
