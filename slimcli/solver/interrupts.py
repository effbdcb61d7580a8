"""Ctrl-C and SIGTERM: the first one asks to stop at the next safe place, the second stops now."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from slimcli.errors import Interrupted, Problem, Terminated


class StopRequested(Exception):
    """Raised at a safe place between two steps; the loop saves and ends."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Signals:
    """Catches SIGINT and SIGTERM while it is entered.

    Args:
        notify: Called once, from the handler, when the first signal arrives.

    Attributes:
        received: Number of the first signal; 0 before.
        is_ending: How the run ended is being written down; signals change nothing any more.
    """

    def __init__(self, notify: Callable[[str], None] = lambda name: None) -> None:
        self.notify = notify
        self.received = 0
        self.is_ending = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.is_ending:
            return
        if self.received:
            raise StopNow(self.received)
        self.received = number
        self.notify(signal.Signals(number).name)

    def check(self) -> None:
        """Raise StopRequested if a signal has arrived."""
        if self.received:
            raise StopRequested(self.received)


class StopNow(BaseException):
    """The second signal: no saving, the previous checkpoint stays. No hook can swallow it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def as_error(number: int, what: str, fix: str) -> Interrupted:
    """The error that carries the exit code of a signal: 130 or 143."""
    kind = Terminated if number == signal.SIGTERM else Interrupted
    return kind(Problem("E-INTERRUPTED", what, fix=fix))
