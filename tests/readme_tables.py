"""The generated parts of the README, and a command that puts them in place.

python -m tests.readme_tables        rewrites README.md
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from slimcli.artifacts.summary import FIELDS
from slimcli.cli.explain import _default
from slimcli.compressor import registry
from slimcli.solver.config import TrainingConfig

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
QUICKSTART = ROOT / "benchmarks" / "quickstart.json"
ZOO = ROOT / "benchmarks" / "zoo.jsonl"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def key_rows(fields: dict[str, FieldInfo]) -> list[tuple[str, ...]]:
    return [(f"`{k}`", f"`{_default(f)}`", f.description or "") for k, f in fields.items()]


def algorithms() -> str:
    rows = [
        (f"`{info.name}`", info.summary, re.sub(r"^none.*", "", info.paper))
        for info in registry().values()
    ]
    return table(("algorithm", "what it does", "paper"), rows)


def algorithm_keys() -> str:
    parts = []
    for info in registry().values():
        fields = info.config.model_fields
        if fields:
            parts.append(f"`{info.name}`\n\n" + table(("key", "default", ""), key_rows(fields)))
    return "\n\n".join(parts)


def exit_codes() -> str:
    page = (ROOT / "slimcli" / "cli" / "pages" / "exit-codes.txt").read_text(encoding="utf-8")
    rows = re.findall(r"^ +(\d+)  (.+)$", page, re.MULTILINE)
    return table(("exit code", "meaning"), rows)


def quickstart() -> str:
    """From the summaries of the benchmark's runs, seed 0 for the table."""
    measured: dict[str, Any] = json.loads(QUICKSTART.read_text(encoding="utf-8"))
    summary = measured["runs"][0]["summary"]
    before, after = summary["baseline"], summary["final"]
    images = measured["images"]
    rows = [
        (
            name,
            f"{each['metrics']['acc'] * 100:.2f} %",
            f"{round((1 - each['metrics']['acc']) * images)}",
            f"{each['macs'] / 1e6:.2f} M ({each['macs'] / before['macs'] * 100:.1f} %)",
            f"{each['params'] / 1e3:.1f} k",
        )
        for name, each in (("as trained", before), ("after ResRep, seed 0", after))
    ]
    head = ("", f"accuracy, {images} images", "errors", "MACs", "parameters")
    seams = [
        f"{seam['from']} → {seam['to']} {seam['max_abs']:.1e} (limit {seam['limit']:.1e})"
        for seam in summary["verification"]
    ]
    onnx_kib = after["file_bytes"]["model.onnx"] / 1024
    text = f"`model.onnx` has {onnx_kib:.0f} KiB. Largest differences: {'; '.join(seams)}."
    seeds = len(measured["runs"])
    lost = measured["points_lost"]
    text += f" Over {seeds} seeds the accuracy changes by {-lost:+.2f} points in the mean"
    return table(head, rows) + f"\n\n{text} (`benchmarks/quickstart.md`)."


def zoo() -> str:
    """Counts over the known networks that were measured."""
    lines = ZOO.read_text(encoding="utf-8").splitlines()
    rows = list({row["name"]: row for row in map(json.loads, lines)}.values())
    cut = [row for row in rows if row.get("ours", {}).get("groups_prunable")]
    exact = sum(row["ours"]["exact"] for row in cut)
    loaded = sum(row.get("deploy_error") == 0.0 for row in cut)
    return (
        f"Tried on {len(rows)} known networks with random weights: {len(cut)} of them have "
        f"channels that can be cut. Half of each group of channels was cut at random; {exact} of "
        f"the {len(cut)} then equal the network with these channels at zero, and {loaded} are the "
        "same, bit for bit, when another process loads their deploy files (`benchmarks/zoo.md`)."
    )


def parts() -> dict[str, str]:
    return {
        "quickstart": quickstart(),
        "algorithms": algorithms(),
        "exit-codes": exit_codes(),
        "zoo": zoo(),
        "summary": table(("field", "meaning"), [(f"`{k}`", v) for k, v in FIELDS.items()]),
        "training-keys": table(("key", "default", ""), key_rows(dict(TrainingConfig.model_fields))),
        "algorithm-keys": algorithm_keys(),
    }


def rendered(text: str) -> str:
    """The README with every generated part as it should be."""
    for name, part in parts().items():
        pattern = rf"<!-- {name} -->\n.*?<!-- /{name} -->"
        block = f"<!-- {name} -->\n{part}\n<!-- /{name} -->"
        text = re.sub(pattern, lambda _, block=block: block, text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    README.write_text(rendered(README.read_text(encoding="utf-8")), encoding="utf-8")
