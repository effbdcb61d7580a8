"""Everything a run has to say, once: events.jsonl, metrics.csv, TensorBoard, log.txt, listeners.

An event is a flat dictionary with ``v``, ``t`` and ``event``. The terminal is only one listener.
"""

from __future__ import annotations

import csv
import io
import json
import math
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from slimcli.artifacts import atomic
from slimcli.artifacts.event_lines import line_of
from slimcli.artifacts.run_folder import shown
from slimcli.errors import Problem, RunError

VERSION = 1
Event = dict[str, Any]
Listener = Callable[[Event], None]

EVENTS: dict[str, str] = {
    "run_start": "folder, version, seed, device, stages, resumed",
    "stage_start": "stage, algorithm, epochs, steps_per_epoch",
    "prepared": "stage, targets, macs, params, reachable_macs, goal, budget, settings",
    "notice": "text, level (note or warning)",
    "baseline": "metrics, macs, params",
    "step": "stage, epoch, step, loss, lr, metrics, status; every log_interval steps",
    "cut": "stage, epoch, group, before, after",
    "epoch_end": "stage, epoch, epochs, train, val, status, lr, seconds, may_save",
    "best": "stage, epoch, metric, value",
    "saved": "path, stage, epoch, step",
    "interrupted": "signal, path",
    "verified": "from, to, max_abs, max_rel, limit, ok",
    "artifact": "path, bytes",
    "run_end": "status, exit_code, seconds, folder",
}
"""Name and fields of each event; ``v``, ``t`` and ``event`` are in all of them."""

PATHS = frozenset({"path", "folder"})
"""Fields that hold a path."""


class EventLog:
    """The one place a run reports to.

    Args:
        folder: The run folder; None in processes that keep silent.
        listeners: Called with each event.
        length: Bytes of events.jsonl to keep from before; 0 for a new run.
        started_in: Paths below it are told as they are called from there; None: as they are.
    """

    def __init__(
        self,
        folder: Path | None,
        listeners: Sequence[Listener] = (),
        length: int = 0,
        started_in: Path | None = None,
    ) -> None:
        self.folder = folder
        self.started_in = started_in
        self.listeners = listeners if folder is not None else ()
        self.length = 0
        self._rows: list[dict[str, Any]] = []
        self._board: Any = None
        if folder is not None:
            self._keep(folder / "events.jsonl", length)

    def _keep(self, path: Path, length: int) -> None:
        """Forget what was written after the checkpoint that the run goes on from."""
        kept = path.read_bytes()[:length] if path.exists() else b""
        with _disk(path):
            path.write_bytes(kept)
        self.length = len(kept)
        for line in kept.decode("utf-8").splitlines():
            event = json.loads(line)
            if event["event"] == "epoch_end":
                self._rows.append(flat(event))

    def emit(self, event: str, **fields: Any) -> None:
        """Record an event and tell the listeners.

        Raises:
            KeyError: The event is not in :data:`EVENTS`.
            RunError: The disk is full.
        """
        record = self.keep(event, **fields)
        for listener in self.listeners:
            listener(record)

    def keep(self, event: str, **fields: Any) -> Event:
        """Record an event that the listeners need not hear of; see :meth:`emit`."""
        if event not in EVENTS:
            raise KeyError(event)
        if self.folder is None:
            return {}
        for name in PATHS & fields.keys():
            path = Path(fields[name])
            fields[name] = shown(path, self.started_in) if self.started_in else str(path)
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        record = {"v": VERSION, "t": now, "event": event, **_plain(fields)}
        self._append(self.folder / "events.jsonl", json.dumps(record, ensure_ascii=False) + "\n")
        text = line_of(record)
        if text:
            self._append(self.folder / "log.txt", f"{datetime.now():%H:%M:%S} {text}\n")
        if event == "epoch_end":
            self._rows.append(flat(record))
            atomic.write_text(self.folder / "metrics.csv", as_csv(self._rows))
        if event in ("step", "epoch_end"):
            self._scalars(record)
        return record

    def tick(self, **fields: Any) -> None:
        """Tell the listeners where training is; nothing is recorded."""
        for listener in self.listeners:
            listener({"event": "tick", **fields})

    @contextmanager
    def hearing_warnings(self) -> Iterator[None]:
        """Python warnings, most of them other packages', go to log.txt and not to the screen."""
        if self.folder is None:
            yield
            return
        log = self.folder / "log.txt"

        def note(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: object = None,
            line: str | None = None,
        ) -> None:
            text = " ".join(str(message).split())
            self._append(log, f"{category.__name__} {filename}:{lineno}: {text}\n")

        with warnings.catch_warnings():
            warnings.showwarning = note
            yield

    def _append(self, path: Path, text: str) -> None:
        encoded = text.encode("utf-8")
        with _disk(path), path.open("ab") as stream:
            stream.write(encoded)
        if path.name == "events.jsonl":
            self.length += len(encoded)

    def _scalars(self, record: Event) -> None:
        """TensorBoard's file, written here and now: a thread could not tell of a full disk."""
        from tensorboardX.proto.event_pb2 import Event as BoardEvent
        from tensorboardX.record_writer import RecordWriter
        from tensorboardX.summary import scalar

        assert self.folder is not None
        folder = self.folder / "tensorboard"
        x = record["step"] if record["event"] == "step" else record["epoch"]
        with _disk(folder):
            if self._board is None:
                folder.mkdir(exist_ok=True)
                name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
                self._board = RecordWriter(str(folder / name))
                head = BoardEvent(wall_time=time.time(), file_version="brain.Event:2")
                self._board.write(head.SerializeToString())
            for name, value in flat(record).items():
                numeric = isinstance(value, int | float) and not isinstance(value, bool)
                if numeric and name not in ("step", "epoch", "epochs"):
                    summary = scalar(f"{record['stage']}/{record['event']}/{name}", value)
                    event = BoardEvent(wall_time=time.time(), step=x, summary=summary)
                    self._board.write(event.SerializeToString())
            if record["event"] != "step":
                self._board.flush()

    def close(self) -> None:
        """Close what is open.

        Raises:
            RunError: The disk is full.
        """
        board, self._board = self._board, None
        if board is not None:
            assert self.folder is not None
            with _disk(self.folder / "tensorboard"):
                try:
                    board.flush()
                finally:
                    board.close()


class _disk:
    """Turns an OSError while writing into the error a user understands."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            fix = "free some space, then go on: slim resume RUN"
            problem = Problem("E-DISK", f"can't write: {error.strerror}", str(self.path), fix=fix)
            raise RunError(problem) from error


def _plain(value: Any) -> Any:
    """Values JSON knows; nan and inf become null."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int | str | bool | type(None)):
        return value
    return str(value)


def flat(event: Event) -> dict[str, Any]:
    """Nested numbers under one name: ``{"val": {"acc": 0.5}}`` is ``{"val.acc": 0.5}``.

    >>> flat({"v": 1, "t": "", "event": "epoch_end", "epoch": 2, "val": {"acc": 0.5}})
    {'epoch': 2, 'val.acc': 0.5}
    """
    return dict(_flatten({k: v for k, v in event.items() if k not in ("v", "t", "event")}, ""))


def _flatten(value: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, each in value.items():
        if isinstance(each, dict):
            yield from _flatten(each, f"{prefix}{name}.")
        else:
            yield prefix + name, each


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Rows under the union of their columns, in the order the columns first appear."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def read(path: Path) -> list[Event]:
    """The events of a run; a last line that was cut off by a crash is left out."""
    events: list[Event] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            break
    return events
