"""bench.json of a run folder: what ``slim bench`` measured, one entry a device and batch size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slimcli.artifacts import atomic

NAME = "bench.json"
VERSION = 1


def read(folder: Path) -> list[dict[str, Any]]:
    """Entries with ``device``, ``batch``, ``repeats`` and ``forms``; none where none was stored."""
    try:
        content = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    known = isinstance(content, dict) and content.get("version") == VERSION
    return list(content["measured"]) if known else []


def note(folder: Path, entry: dict[str, Any]) -> None:
    """Store an entry; it takes the place of one with the same device and batch size.

    Raises:
        RunError: The folder can't be written.
    """
    place = (entry["device"], entry["batch"])
    kept = [each for each in read(folder) if (each["device"], each["batch"]) != place]
    content = {"version": VERSION, "measured": [*kept, entry]}
    atomic.write_text(folder / NAME, json.dumps(content, indent=2) + "\n")
