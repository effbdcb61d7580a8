"""The only file that writes to the terminal: results to stdout, the conversation to stderr.

Commands call the functions below; nothing here knows a model or torch. ``--json`` and ``-q`` leave
only the result on stdout; messages stay on stderr, and so does what the user's code prints.
Colour never carries meaning alone.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from statistics import median
from typing import TYPE_CHECKING, Any, TextIO

from slimcli.artifacts.event_lines import line_of, seconds

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from slimcli.errors import SlimError


@dataclass(frozen=True)
class Settings:
    """How to talk, from the command line's global options.

    Attributes:
        json: The result is JSON: one document, or one line an event.
        quiet: Only the result; no conversation except errors and warnings.
        verbose: More conversation.
        color: False for no escape sequences at all.
        traceback: Show our frames too when something fails.
    """

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    color: bool = True
    traceback: bool = False


FILE_WIDTH = 200  # columns of a table in a file or a pipe: module paths should not be folded

_settings = Settings()
_is_told = False  # a document was written
_results: TextIO | None = None  # stdout, while ``sys.stdout`` is where other code may print


def configure(**changes: bool) -> Settings:
    """Change the settings of this process for what comes next; unknown names raise TypeError."""
    global _settings, _is_told
    _settings, _is_told = replace(_settings, **changes), False
    return _settings


def settings() -> Settings:
    """The settings in force."""
    return _settings


def is_main_process() -> bool:
    """False in the processes that a distributed run starts beside the first: they keep silent."""
    return os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("RANK", "0") == "0"


def terminal(stream: TextIO | None = None) -> Console:
    """A rich console on ``stream``, by default stderr, that obeys ``--no-color`` and NO_COLOR."""
    from rich.console import Console

    stream = stream or sys.stderr
    interactive = stream.isatty() and os.environ.get("TERM") != "dumb"
    colorless = not (_settings.color and interactive) or bool(os.environ.get("NO_COLOR"))
    return Console(
        file=stream,
        no_color=colorless,
        force_terminal=interactive and not colorless,
        color_system=None if colorless else "auto",
        width=None if interactive else FILE_WIDTH,
        highlight=False,
        soft_wrap=True,
        markup=False,
        emoji=False,
    )


@contextmanager
def results_only() -> Iterator[None]:
    """Inside, only the functions here reach stdout: a ``print`` of anybody else goes to stderr.

    A hook that prints would otherwise end up in ``RUN=$(slim run recipe.yaml -q)``. Nothing happens
    inside another one.
    """
    global _results
    if _results is not None:
        yield
        return
    with _own_descriptor() as _results:
        try:
            with redirect_stdout(sys.stderr):
                yield
        finally:
            _results = None


@contextmanager
def _own_descriptor() -> Iterator[TextIO]:
    """Stdout; what C code and other programs write to descriptor 1 goes to stderr meanwhile.

    They know the descriptor and not Python's stream. Where stdout is no real one (a test) or a
    stream is closed, nothing is led elsewhere.
    """
    kept = None
    with suppress(OSError, ValueError, AttributeError):
        screen = sys.__stdout__
        if screen is not None and screen is sys.stdout and screen.fileno() == 1:
            screen.flush()
            os.fstat(2)
            kept = os.dup(1)
    if kept is None:
        yield sys.stdout
        return
    os.dup2(2, 1)
    stream = os.fdopen(kept, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    try:
        yield stream
    finally:
        os.dup2(kept, 1)
        with suppress(OSError):  # of a reader that is gone; it was told where it was written
            stream.close()


def _speaks_unicode() -> bool:
    """Can stdout show any letter? If not, JSON has its own escapes."""
    return (getattr(_stdout(), "encoding", None) or "utf-8").lower().startswith("utf")


def _stdout() -> TextIO:
    return _results or sys.stdout


def _write(text: str) -> None:
    """A line or block to stdout.

    Raises:
        RunError: It goes to a file on a disk that is full.
        BrokenPipeError: Nobody reads it any more.
    """
    try:
        print(text, flush=True, file=_stdout())
    except BrokenPipeError:
        raise
    except OSError as error:
        from slimcli.errors import Problem, RunError

        _abandon_stdout()
        what = f"can't write the result: {error.strerror}"
        fix = "send stdout to a disk with space; what a run made is in its folder"
        raise RunError(Problem("E-STDOUT", what, "stdout", fix=fix)) from error


def _abandon_stdout() -> None:
    """What is still in the buffer must not fail once more when Python ends."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), _stdout().fileno())


def command(*words: object) -> str:
    """A command of slim to paste into a shell.

    >>> command("run", "my recipes/a.yaml")
    "slim run 'my recipes/a.yaml'"
    """
    return shlex.join(("slim", *map(str, words)))


def result(text: str) -> None:
    """One line or block of the result, to stdout."""
    if is_main_process():
        _write(text)


def document(value: Any) -> None:
    """The result as one JSON document, to stdout."""
    global _is_told
    _is_told = True
    if is_main_process():
        _write(json.dumps(value, indent=2, ensure_ascii=not _speaks_unicode()))


def has_document() -> bool:
    """Was a document written? Then nothing else may follow it on stdout."""
    return _is_told


def json_line(value: dict[str, Any]) -> None:
    """One event as one line of JSON, to stdout."""
    if is_main_process():
        _write(json.dumps(value, ensure_ascii=not _speaks_unicode()))


def say(text: str, style: str = "") -> None:
    """One line of conversation, to stderr; silent with ``-q``."""
    if is_main_process() and not _settings.quiet:
        terminal().print(text, style=style or None)


def detail(text: str) -> None:
    """A line only ``-v`` shows."""
    if _settings.verbose:
        say(text, style="dim")


def warn(text: str) -> None:
    """A warning, to stderr, shown with ``-q`` too."""
    if is_main_process():
        terminal().print(f"warning: {text}", style="yellow")


def urgent(text: str) -> None:
    """A line from inside a signal handler, where ordinary printing may be under way."""
    if is_main_process() and not _settings.quiet:
        os.write(sys.stderr.fileno(), f"{text}\n".encode())


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, to_stdout: bool = True
) -> None:
    """Aligned columns without borders; numbers go to the right."""
    from rich.table import Table

    listed = [list(row) for row in rows]
    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    for index, column in enumerate(columns):
        numeric = bool(listed) and all(isinstance(row[index], int | float) for row in listed)
        drawn.add_column(
            column, justify="right" if numeric else "left", overflow="fold", header_style="dim"
        )
    for row in listed:
        drawn.add_row(*(str(cell) for cell in row))
    if is_main_process() and (to_stdout or not _settings.quiet):
        screen = terminal(_stdout() if to_stdout else sys.stderr)
        screen.file = drawing = io.StringIO()
        screen.print(drawn)
        text = "\n".join(line.rstrip() for line in drawing.getvalue().splitlines())
        if to_stdout:
            _write(text)
        else:
            print(text, file=sys.stderr)


def error(problem: SlimError, speaker: str = "") -> None:
    """An error in its five parts, to stderr, with its exit code; GitHub annotations when asked.

    Args:
        problem: The error.
        speaker: Which process says it; empty for the first, whose errors need no name. Another
            that does not say which it is keeps silent.
    """
    if not (speaker or is_main_process()):
        return
    out = terminal()
    for each in problem.problems:
        out.print(f"{speaker}{each}")
        if os.environ.get("GITHUB_ACTIONS"):
            out.print(_annotation(each.where, each.what))
    for frame in problem.user_frames:
        out.print(f"    {frame}")
    codes = " ".join(dict.fromkeys(each.code for each in problem.problems))
    out.print(f"[exit {problem.exit_code}]  {codes}", style="bold red")


def _annotation(where: str, what: str) -> str:
    """The line GitHub shows beside the file.

    >>> _annotation("recipe.yaml:3:5", "unknown key")
    '::error file=recipe.yaml,line=3,col=5::unknown key'
    """
    names = ("file", "line", "col")
    place = ",".join(f"{name}={part}" for name, part in zip(names, where.split(":"), strict=False))
    return f"::error {place}::{what}"


class RunDisplay:
    """Listens to a run: a bar on a terminal, plain lines elsewhere, JSON lines with ``--json``."""

    QUIET_SECONDS = 30.0
    WINDOW = 100

    def __init__(self) -> None:
        self._settings = _settings
        self._terminal = terminal()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._last_line = time.monotonic()
        self._last_tick = 0.0
        self._step_seconds: deque[float] = deque(maxlen=self.WINDOW)
        self._warnings = 0
        self._is_heard = True

    def __call__(self, event: dict[str, Any]) -> None:
        """Show one event."""
        if event["event"] == "tick":
            self._tick(event)
            return
        if self._settings.json and self._is_heard:
            self._json_line(event)
        if event["event"] in ("cut", "epoch_end", "stage_start"):
            self._step_seconds.clear()  # steps get faster after a cut; the estimate starts anew
            self._last_tick = 0.0
        is_warning = event["event"] == "notice" and event["level"] == "warning"
        self._warnings += is_warning
        text = line_of(event)
        if text and not self._settings.json and (not self._settings.quiet or is_warning):
            self._line(text)
        if event["event"] == "run_end" and self._warnings and not self._settings.json:
            plural = "warning" if self._warnings == 1 else "warnings"
            self._line(f"{self._warnings} {plural}, see {event['folder']}/log.txt")

    def _json_line(self, event: dict[str, Any]) -> None:
        """A reader that went away (``| head``) must not end hours of training."""
        try:
            json_line(event)
        except BrokenPipeError:
            self._is_heard = False
            _abandon_stdout()
            warn("nobody reads stdout any more: the run goes on, its events are in events.jsonl")

    def _line(self, text: str) -> None:
        self._last_line = time.monotonic()
        self._terminal.print(f"{datetime.now():%H:%M:%S} {text}")

    def _tick(self, tick: dict[str, Any]) -> None:
        now = time.monotonic()
        if self._last_tick:
            self._step_seconds.append(now - self._last_tick)
        self._last_tick = now
        if self._settings.json or self._settings.quiet:
            return
        if self._terminal.is_terminal:
            self._redraw(tick)
        elif now - self._last_line >= self.QUIET_SECONDS:
            self._line(
                f"epoch {tick['epoch']}/{tick['epochs']} step {tick['step']}/{tick['steps']} "
                f"loss {tick['loss']:.4g} lr {tick['lr']:.4g}{self._eta(tick)}"
            )

    def _eta(self, tick: dict[str, Any]) -> str:
        """Time to the end of the stage, from the median of the last steps."""
        if not self._step_seconds:
            return ""
        left = tick["epochs"] * tick["steps"] - (tick["epoch"] - 1) * tick["steps"] - tick["step"]
        return f" · {seconds(left * median(self._step_seconds))} left"

    def _redraw(self, tick: dict[str, Any]) -> None:
        if self._bar is None:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            self._bar = Progress(
                TextColumn("epoch {task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=self._terminal,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task("", numbers="")
        assert self._task is not None
        self._bar.update(
            self._task,
            description=f"{tick['epoch']}/{tick['epochs']}",
            completed=tick["step"],
            total=tick["steps"],
            numbers=f"loss {tick['loss']:.4g} lr {tick['lr']:.4g}{self._eta(tick)}",
        )

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
