"""summary.json: what came out of a run, stable and versioned, for machines and the report."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

from slimcli.artifacts import atomic
from slimcli.errors import Problem, RunError

VERSION = 1

FIELDS: dict[str, str] = {
    "version": "format of this file; fields are only added while it stays the same",
    "task_name": "the recipe's task_name",
    "algorithm": "the last stage's algorithm",
    "status": "running, finished, interrupted, failed, goal_missed or not_verified",
    "exit_code": "what the command exited with",
    "seed": "seed of everything random",
    "stages": "one entry a stage: name, algorithm, epochs, best {metric, value, epoch}, goal",
    "baseline": "metrics, macs, params of the model the first compressing stage started from",
    "final": "metrics, macs, params of the best model that meets the goal; file_bytes by artifact",
    "goal": "of the stage the run ended with: name, target (largest allowed value), reached "
    "(true or false), value (of the result; null without one); or null",
    "verification": "one entry a seam: from, to, max_abs, max_rel, limit, ok",
    "layers": "one entry a layer: name, type, channels_before, channels_after, frozen_reason",
    "seconds": "wall-clock time of the run, resumed parts included",
    "changes": "what differs from the defaults: key, default, value, origin (file and line, or the "
    "command line)",
    "environment": "versions, device and thread count of the machine",
    "notes": "sentences the run wants to be read with the result",
}
"""Name and meaning of each field of summary.json."""


def empty(task_name: str, algorithm: str, seed: int) -> dict[str, Any]:
    """A summary of a run that has only started: every field is there."""
    return {
        "version": VERSION,
        "task_name": task_name,
        "algorithm": algorithm,
        "status": "running",
        "exit_code": None,
        "seed": seed,
        "stages": [],
        "baseline": None,
        "final": None,
        "goal": None,
        "verification": [],
        "layers": [],
        "seconds": 0.0,
        "changes": [],
        "environment": {},
        "notes": [],
    }


def write(path: Path, summary: dict[str, Any]) -> None:
    """Write the file atomically; nan and inf become null, which JSON does not know."""
    atomic.write_text(path, json.dumps(_finite(summary), indent=2, ensure_ascii=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value


def status(path: Path) -> str:
    """The status alone; ``unfinished`` where there is no summary that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "unfinished"
    return str(content.get("status", "unfinished")) if isinstance(content, dict) else "unfinished"


def read(path: Path) -> dict[str, Any]:
    """Read a summary.

    Raises:
        RunError: There is none, or it is not one.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        what, fix = "the run has no summary", f"slim resume {shlex.quote(str(path.parent))}"
        raise RunError(Problem("E-SUMMARY-MISSING", what, str(path), fix=fix)) from error
    except ValueError as error:
        raise RunError(
            Problem(
                "E-SUMMARY-DAMAGED",
                f"the summary can't be read: {error}",
                str(path),
                fix="delete the file, then resume the run: it is written again",
            )
        ) from error
    return content
