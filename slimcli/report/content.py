"""What a report shows, as plain data read from the files of a run folder; draws nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimcli.artifacts import events, latency, summary
from slimcli.artifacts.event_lines import large, seconds
from slimcli.compressor import registry

CHAIN = "trained, deployed and exported forms"
ENDINGS = {
    "running": "The run has not ended",
    "interrupted": "The run was interrupted; slim resume goes on with it",
    "failed": "The run failed; its numbers are those it had reached",
    "goal_missed": "The goal was missed",
    "not_verified": "An artifact differs from the one it was made from: do not use it",
}


@dataclass(frozen=True)
class Content:
    """Everything the templates need.

    Attributes:
        folder: The run folder.
        summary: Content of summary.json.
        events: Content of events.jsonl.
        verdict: The result in one sentence.
        columns: Heads of the table of results.
        rows: Its rows: a name, then one text a column.
        loading: Lines of Python that load the result; empty if there is none.
        paper: Title and arXiv id of the method; empty for a user's own.
        command: How the run was started.
    """

    folder: Path
    summary: dict[str, Any]
    events: list[dict[str, Any]]
    verdict: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    loading: tuple[str, ...]
    paper: str
    command: str


def read_content(folder: Path) -> Content:
    """Read a run folder; fields that an earlier version did not write yet are empty.

    Raises:
        RunError: It has no summary, or a damaged one.
    """
    found = {**summary.empty("", "", 0), **summary.read(folder / "summary.json")}
    log = folder / "events.jsonl"
    info = registry().get(found["algorithm"])
    command = folder / "command.txt"
    return Content(
        folder=folder.resolve(),
        summary=found,
        events=events.read(log) if log.is_file() else [],
        verdict=verdict_of(found),
        columns=("", "before", *_forms(found)),
        rows=(*_rows(found), *_latencies(found, latency.read(folder))),
        loading=_loading(folder.resolve(), found),
        paper=info.paper if info else "",
        command=command.read_text(encoding="utf-8").strip() if command.is_file() else "",
    )


def metric_of(found: Mapping[str, Any]) -> str:
    """Name of the metric that chose the checkpoint; empty before a stage has ended."""
    return str(found["stages"][-1]["best"]["metric"]) if found["stages"] else ""


def verdict_of(found: Mapping[str, Any]) -> str:
    """The result in one sentence."""
    final, ending = found.get("final"), ENDINGS.get(found["status"], "")
    if not final:
        return f"{ending or 'The run made no model'}."
    parts = [f"{found['task_name']} {_metric_words(found)}".strip()]
    before = found.get("baseline")
    if before and before["macs"]:
        parts.append(f"at {final['macs'] / before['macs']:.1%} of the MACs")
    seams = found["verification"]
    agree = ""
    if seams and all(seam["ok"] for seam in seams):
        agree = f"; {CHAIN} agree within {max(seam['max_abs'] for seam in seams):.1e}"
    head = f"{ending}. " if ending else ""
    return f"{head}{' '.join(parts)}{agree}."


def _metric_words(found: Mapping[str, Any]) -> str:
    name, final, before = metric_of(found), found["final"], found.get("baseline")
    value = final["metrics"].get(name)
    if not isinstance(value, int | float):
        return "has been made"
    start = (before or {}).get("metrics", {}).get(name)
    change = f" ({value - start:+.4g})" if isinstance(start, int | float) else ""
    return f"reaches {name} {value:.4g}{change}"


def _forms(found: Mapping[str, Any]) -> list[str]:
    return list((found.get("final") or {}).get("metrics_by_form", {}))


def _rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Metrics, MACs and parameters before and in every form; sizes stand under their file."""
    final, before = found.get("final") or {}, found.get("baseline") or {}
    forms = final.get("metrics_by_form", {})
    names = dict.fromkeys(
        [*before.get("metrics", {}), *(n for each in forms.values() for n in each)]
    )
    rows: list[tuple[str, ...]] = []
    for name in names:
        after = [_number(each.get(name)) for each in forms.values()]
        rows.append((name, _number(before.get("metrics", {}).get(name)), *after))
    for key, label in (("macs", "MACs"), ("params", "parameters")):
        if key in final:
            after = ["" if form == "trained" else large(final[key]) for form in forms]
            rows.append((label, large(before[key]) if before else "", *after))
    return rows


def _latencies(
    found: Mapping[str, Any], measured: Sequence[Mapping[str, Any]]
) -> list[tuple[str, ...]]:
    """One row a device and batch size; the model before is what the user's hook makes."""
    rows = []
    for each in measured:
        cells = [_milliseconds(each["forms"].get(form)) for form in ("original", *_forms(found))]
        rows.append((f"latency, batch {each['batch']}, {each['device']}", *cells))
    return rows


def _milliseconds(row: Mapping[str, float] | None) -> str:
    return f"{row['median_ms']:.3g} ms (p99 {row['p99_ms']:.3g})" if row else ""


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else ""


def _loading(folder: Path, found: Mapping[str, Any]) -> tuple[str, ...]:
    files = (found.get("final") or {}).get("file_bytes", {})
    if "deploy.json" in files:
        return (
            "import slimcli",
            f"model = slimcli.load_deploy({str(folder)!r})",
            "prediction = model(batch)  # or your predict_function(model, batch)",
        )
    if "model.onnx" in files:
        path = str(folder / "artifacts" / "model.onnx")
        return (
            "import onnxruntime",
            f"session = onnxruntime.InferenceSession({path!r})",
            "prediction = session.run(None, {session.get_inputs()[0].name: batch})",
        )
    return ()


def facts(content: Content) -> dict[str, str]:
    """Seed, time and machine, for a table."""
    found = content.summary
    named = {"seed": str(found["seed"]), "time": seconds(found["seconds"])}
    return named | {name: str(value) for name, value in found["environment"].items()}


def epochs_of(content: Content) -> Sequence[dict[str, Any]]:
    """The epoch_end events of all stages, in order."""
    return [each for each in content.events if each["event"] == "epoch_end"]
