"""What is different between two runs: settings, results, channels; read from their files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from slimcli.artifacts import summary
from slimcli.artifacts.run_folder import RunFolder

ABSENT = None
PARTS = ("settings", "results", "channels")


@dataclass(frozen=True)
class Difference:
    """One thing that two runs do not share.

    Attributes:
        part: ``settings``, ``results`` or ``channels``.
        name: Key, number or layer.
        first: Its value in the first run; None where it has none.
        second: Its value in the second run.
    """

    part: str
    name: str
    first: Any
    second: Any


def differences(first: RunFolder, second: RunFolder) -> list[Difference]:
    """Everything that differs, part by part, in the order of the first run.

    Raises:
        RunError: A run has no readable summary.
    """
    pairs = zip(PARTS, _parts(first), _parts(second), strict=True)
    return [
        Difference(part, name, left.get(name, ABSENT), right.get(name, ABSENT))
        for part, left, right in pairs
        for name in dict.fromkeys((*left, *right))
        if left.get(name, ABSENT) != right.get(name, ABSENT)
    ]


def _parts(run: RunFolder) -> tuple[dict[str, Any], ...]:
    found = summary.read(run.summary)
    settings = yaml.safe_load(run.recipe.read_text(encoding="utf-8")) or {}
    layers = {each["name"]: each["channels_after"] for each in found["layers"]}
    return dict(flat(settings)), dict(_results(found)), layers


def _results(found: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    final = found.get("final") or {}
    yield "status", found["status"]
    yield from final.get("metrics", {}).items()
    for name in ("macs", "params"):
        yield name, final.get(name)
    for file, size in final.get("file_bytes", {}).items():
        yield f"{Path(file).name} bytes", size


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings under dotted names; stages by their own name.

    >>> dict(flat({"config": {"lr": 0.1}, "stages": [{"name": "a", "config": {"epoch": 1}}]}))
    {'config.lr': 0.1, 'stages.a.name': 'a', 'stages.a.config.epoch': 1}
    """
    if isinstance(value, Mapping) and value:
        for key, each in value.items():
            yield from flat(each, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        for number, each in enumerate(value):
            yield from flat(each, f"{prefix}.{each.get('name', number)}")
    else:
        yield prefix, value
