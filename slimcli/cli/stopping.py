"""What is around a command: signals outside of training (130, 143), exits, closed streams."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from slimcli.errors import AnotherFailed

STOPPED = {130: "interrupted", 143: "terminated"}
"""Exit code of a command that a signal ended, and the word for it."""


class TerminateNow(KeyboardInterrupt):
    """SIGTERM, on the way that Ctrl-C takes: half-written files are taken away."""


_OBEYED = threading.Event()
"""A run stops for a signal and has given its own handlers back, or is about to."""


def obey() -> None:
    """A run stops for a signal: to the end of the command others change nothing."""
    _OBEYED.set()


def go_on() -> None:
    """It ended before it could stop: the next signal counts."""
    _OBEYED.clear()


def _stop(number: int, frame: FrameType | None) -> None:
    if _OBEYED.is_set():
        return
    if number == signal.SIGTERM:
        raise TerminateNow
    signal.default_int_handler(number, frame)


@contextmanager
def signals_unwind() -> Iterator[None]:
    """Inside, SIGTERM unwinds the stack as Ctrl-C does; a run has its own way with both.

    SIGINT stays ignored where it is, as in a shell's background jobs.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    go_on()
    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        numbers.append(signal.SIGINT)
    before = {number: signal.signal(number, _stop) for number in numbers}
    try:
        yield
    finally:
        if not _OBEYED.is_set():
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def exits_are_errors() -> Iterator[None]:
    """Inside, ``exit()`` in the user's code is an error like any other, wherever it is called.

    Raises:
        RunError: It was; the command does not end as if all were done.
    """
    from slimcli.recipe.binding import code_failed
    from slimcli.recipe.frames import is_ours

    try:
        yield
    except SystemExit as error:
        if is_ours(error):
            raise
        raise code_failed("your code", error) from error


def open_closed_streams() -> None:
    """A stream that was closed before the start (``2>&-``, some daemons) takes all and keeps none.

    Python has None in its place, which nobody can print to.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            nothing = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, nothing)


def escape_unprintable() -> None:
    """A stream of few letters (``PYTHONIOENCODING=ascii``) gets an escape for each it lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def exit_code_of(error: BaseException) -> int:
    """130, or 143 where SIGTERM was the cause."""
    return 143 if isinstance(error.__cause__, TerminateNow) else 130


def speaker(error: BaseException) -> str | None:
    """How a process beside the first begins its message; None where it has nothing to add."""
    if isinstance(error, AnotherFailed) and error.is_told:
        return None
    number = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))
    if "torch" in sys.modules:
        from slimcli.solver import peers

        if peers.is_told_by_first(error):
            return None
        found = peers.rank()
        if found is not None:
            return f"process {found}: "
    # Under a launcher the first process comes by the same mistake in the same recipe.
    return None if has_launcher() else f"process {number}: "


def has_launcher() -> bool:
    """Whether torchrun or SLURM started this process, and no process of slim."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "SLURM_NTASKS" in os.environ


def ignore_signals() -> None:
    """From here to the end of the process; a second Ctrl-C must not change the exit code."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
