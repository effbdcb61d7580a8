"""A picture of a network: channels and MACs per layer, today and at their smallest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimcli.artifacts import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LAYER_INCHES = 0.28
PANEL_INCHES = 4.5
TODAY, SMALLEST, FROZEN = "#9aa7b5", "#1f6feb", "#d8dee4"


def draw_layers(layers: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw two panels side by side, one row a layer, in network order from the top.

    Args:
        layers: ``name``, ``channels``, ``macs``, ``channels_minimum`` and ``macs_minimum`` (None
            where nothing is planned), ``frozen_reason``.
        path: The picture; its ending says the format.

    Raises:
        RunError: The file can't be written.
    """
    from matplotlib.figure import Figure

    height = max(2.5, 1.2 + LAYER_INCHES * len(layers))
    figure = Figure(figsize=(2 * PANEL_INCHES + 2, height), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _bars(left, layers, "channels")
    _bars(right, layers, "macs")
    left.set_yticks(range(len(layers)), [str(each["name"]) for each in layers], fontsize=7)
    left.set_xlabel("channels")
    right.set_xlabel("MACs of one sample")
    left.invert_yaxis()
    if any(each["channels_minimum"] is not None for each in layers):
        left.legend(loc="best", fontsize=7)
    with atomic.replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=120, metadata=_dateless(path))


def _dateless(path: Path) -> dict[str, None] | None:
    """No time in the file: the same network gives the same bytes."""
    return {"Date": None} if path.suffix == ".svg" else None


def _bars(axes: Axes, layers: Sequence[Mapping[str, Any]], what: str) -> None:
    """Wide bars for today, narrow ones on top for the smallest; frozen layers are hatched."""
    rows = range(len(layers))
    frozen = [bool(each["frozen_reason"]) for each in layers]
    drawn = axes.barh(rows, [each[what] for each in layers], 0.8, color=TODAY, label="today")
    for bar, is_frozen in zip(drawn, frozen, strict=True):
        if is_frozen:
            bar.set(facecolor=FROZEN, hatch="///", edgecolor=TODAY)
    planned = [
        (row, each) for row, each in enumerate(layers) if each["channels_minimum"] is not None
    ]
    if planned:
        axes.barh(
            [row for row, _ in planned],
            [each[f"{what}_minimum"] for _, each in planned],
            0.4,
            color=SMALLEST,
            label="fewest the plan allows",
        )
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.01)
