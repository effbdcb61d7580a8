"""Curves of a run as SVG that takes its text colour from the page it stands in."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from slimcli.report.content import Content, epochs_of, metric_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#010203"  # no colour of ours: replaced by the text colour of the page
METRIC, LOSS, MACS = "#3b82f6", "#d9730d", "#2a9d60"


def training_curve(content: Content) -> str:
    """Metric and loss per epoch with cuts marked; empty without two epochs."""
    epochs, metric = epochs_of(content), metric_of(content.summary)
    if len(epochs) < 2:
        return ""
    with _settings("training"):
        figure = _figure()
        left = figure.subplots()
        right = left.twinx()
        metrics = [_value(each["val"], metric) for each in epochs]
        losses = [_value(each["train"], "loss") for each in epochs]
        left.plot(range(1, len(epochs) + 1), metrics, color=METRIC, marker=".")
        right.plot(range(1, len(epochs) + 1), losses, color=LOSS, linestyle="--")
        left.set_ylabel(metric, color=METRIC)
        right.set_ylabel("training loss", color=LOSS)
        left.set_xlabel("epoch (dotted: channels cut)")
        for place in _cut_places(content, epochs):
            left.axvline(place, color=INK, linewidth=0.6, linestyle=":")
        return _svg(figure)


def macs_curve(content: Content) -> str:
    """MACs per epoch towards the goal; empty where nothing is known of them."""
    epochs, macs = epochs_of(content), macs_per_epoch(content)
    if len(epochs) < 2 or not any(macs):
        return ""
    goals = {
        each["stage"]: each["goal"]["target"]
        for each in content.events
        if each["event"] == "prepared" and (each["goal"] or {}).get("name") == "macs"
    }
    with _settings("macs"):
        figure = _figure()
        axes = figure.subplots()
        known = [float("nan") if each is None else each for each in macs]
        axes.step(range(1, len(macs) + 1), known, color=MACS, where="mid")
        for stage, target in goals.items():
            inside = [n for n, each in enumerate(epochs, 1) if each["stage"] == stage]
            if inside:
                axes.hlines(target, inside[0], inside[-1], color=INK, linestyle="--", linewidth=1)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("MACs of one sample", color=INK)
        axes.set_xlabel("epoch (masked channels count as gone; dashed: the goal)")
        return _svg(figure)


def macs_per_epoch(content: Content) -> list[float | None]:
    """MACs of the model as it would be deployed after each epoch.

    A share that the algorithm reports as ``macs`` counts; where it reports none, the last cut of
    the last stage leaves the final number.
    """
    epochs, final = epochs_of(content), content.summary.get("final") or {}
    full = {each["stage"]: each["macs"] for each in content.events if each["event"] == "prepared"}
    cuts = [(each["stage"], each["epoch"]) for each in content.events if each["event"] == "cut"]
    found: list[float | None] = []
    for each in epochs:
        start, share = full.get(each["stage"]), (each.get("status") or {}).get("macs")
        if isinstance(share, int | float) and start:
            found.append(share * start)
        elif cuts and (each["stage"], each["epoch"]) >= cuts[-1] and final:
            found.append(final["macs"])
        else:
            found.append(start)
    return found


def _cut_places(content: Content, epochs: Sequence[dict[str, Any]]) -> list[float]:
    """Left ends of the epochs that began with a cut, each once."""
    number = {(each["stage"], each["epoch"]): n for n, each in enumerate(epochs, 1)}
    cuts = {(e["stage"], e["epoch"]) for e in content.events if e["event"] == "cut"}
    return sorted(number[each] - 0.5 for each in cuts if each in number)


def _value(values: dict[str, Any] | None, name: str) -> float:
    value = (values or {}).get(name)
    return float(value) if isinstance(value, int | float) else float("nan")


def _settings(salt: str) -> Any:
    """Text stays text, dollar signs stay dollar signs, the same run gives the same bytes."""
    import matplotlib

    return matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": salt,
            "text.parse_math": False,
            "text.color": INK,
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "font.size": 9,
        }
    )


def _figure() -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(6.4, 2.8), layout="constrained")


def _svg(figure: Figure) -> str:
    """The drawing alone, ready to stand inside a page."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return text.replace(INK, "currentColor")
