"""How wide the range of an activation should be, from batches of it.

``max`` loses nothing and resolves least; the others clip rare large values for finer steps. The
last three choose from a histogram of magnitudes ("Integer quantization for deep learning
inference", arXiv 2004.09602, section 5.1).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from slimcli.errors import Problem, RunError
from slimcli.network.quantize.fake_quant import AVERAGING
from slimcli.network.quantize.round_trip import HIGHEST_CODE

BINS = 8192
LEVELS = HIGHEST_CODE + 1
CANDIDATES = 256
ENTROPY_BINS = 2048
Counts = np.ndarray[tuple[int], np.dtype[np.float64]]


class Collector(Protocol):
    """Sees batches of one tensor, then says its range."""

    def update(self, x: Tensor) -> None:
        """Looks at one batch."""

    def amax(self) -> Tensor:
        """The largest magnitude to represent, rank 0."""


def finite_magnitude(x: Tensor, label: str) -> Tensor:
    """Largest magnitude of a batch.

    Raises:
        RunError: It is NaN or inf; the message names the tensor.
    """
    largest = x.detach().abs().amax().float() if x.numel() else torch.zeros(())
    if not torch.isfinite(largest):
        raise RunError(not_finite(label, float(largest)))
    return largest


def not_finite(label: str, value: float) -> Problem:
    """The problem of a quantizer that met NaN or inf."""
    return Problem(
        "E-QUANTIZE-NOT-FINITE",
        f"the {label} is not finite, so it has no range to quantize",
        label,
        expected="finite values",
        received=str(value),
        fix="train the float model until it is stable, lower config.lr, or list the layer in "
        "config.skip",
    )


class MaxCollector:
    """The largest magnitude of all batches."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.largest: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Looks at one batch."""
        newest = finite_magnitude(x, self.label)
        self.largest = newest if self.largest is None else torch.maximum(self.largest, newest)

    def amax(self) -> Tensor:
        """The largest magnitude seen."""
        return seen(self.largest, self.label)


class AverageCollector:
    """The mean of the batches' largest magnitudes; beyond 100 batches a moving average."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.average: Tensor | None = None
        self.batches = 0

    def update(self, x: Tensor) -> None:
        """Looks at one batch."""
        newest = finite_magnitude(x, self.label)
        self.batches += 1
        share = max(1.0 / self.batches, AVERAGING)
        before = newest if self.average is None else self.average
        self.average = before + share * (newest - before)

    def amax(self) -> Tensor:
        """The average magnitude seen."""
        return seen(self.average, self.label)


class HistogramCollector:
    """A histogram of magnitudes, and one of three ways to choose a range from it."""

    def __init__(self, label: str, method: str, percentile: float) -> None:
        self.label, self.method, self.percentile = label, method, percentile
        self.counts: Tensor | None = None
        self.top = 0.0

    def update(self, x: Tensor) -> None:
        """Looks at one batch; the histogram doubles its range until the batch fits."""
        largest = float(finite_magnitude(x, self.label))
        if self.counts is None:
            self.counts = torch.zeros(BINS, dtype=torch.float64, device=x.device)
        if self.top == 0.0:
            self.counts[0] += 0.0 if largest else x.numel()
            self.top = largest
            if not largest:
                return
        while largest > self.top:
            pairs = self.counts.reshape(-1, 2).sum(1)
            self.counts = torch.cat([pairs, torch.zeros_like(pairs)])
            self.top *= 2
        magnitudes = x.detach().abs().float()
        self.counts += torch.histc(magnitudes, BINS, 0, self.top).to(torch.float64)

    def amax(self) -> Tensor:
        """The range the method chooses."""
        counts = seen(self.counts, self.label).cpu().numpy()
        width = self.top / BINS
        if self.top == 0.0:
            return torch.zeros(())
        if self.method == "percentile":
            return torch.tensor(percentile_amax(counts, width, self.percentile))
        choose = mse_amax if self.method == "mse" else entropy_amax
        return torch.tensor(choose(counts, width))


def seen(value: Tensor | None, label: str) -> Tensor:
    """``value``, unless calibration never came by.

    Raises:
        RunError: No batch reached the tensor.
    """
    if value is None:
        raise RunError(
            Problem(
                "E-QUANTIZE-NOT-REACHED",
                f"no calibration batch reached the {label}",
                label,
                fix="raise config.calibration_batches, or list the layer in config.skip",
            )
        )
    return value


def collector(method: str, label: str, percentile: float) -> Collector:
    """A fresh collector for one tensor."""
    if method == "max":
        return MaxCollector(label)
    if method == "ema":
        return AverageCollector(label)
    return HistogramCollector(label, method, percentile)


def percentile_amax(counts: Counts, width: float, percentile: float) -> float:
    """Upper edge of the first bin up to which at least ``percentile`` % of the values lie.

    >>> percentile_amax(np.array([90.0, 9.0, 0.0, 1.0]), 0.5, 99.0)
    1.0
    """
    reached = np.cumsum(counts) >= counts.sum() * (percentile / 100.0) - 1e-9
    return float(width * (int(np.argmax(reached)) + 1))


def mse_amax(counts: Counts, width: float) -> float:
    """The range with the smallest expected squared error of quantizing the bins' centres.

    Of 256 ranges between 1/16 of the histogram and all of it.
    """
    centres = (np.arange(len(counts)) + 0.5) * width
    best, best_error = 0.0, np.inf
    for edge in np.linspace(len(counts) / 16, len(counts), CANDIDATES):
        scale = edge * width / HIGHEST_CODE
        rounded = np.minimum(np.round(centres / scale), HIGHEST_CODE) * scale
        error = float(np.dot(counts, (centres - rounded) ** 2))
        if error < best_error:
            best, best_error = float(edge * width), error
    return best


def entropy_amax(counts: Counts, width: float) -> float:
    """The range whose 128-level histogram is closest to the clipped one (Kullback-Leibler).

    The first bin counts like the second: zeros after a ReLU are exact at any scale and would
    outvote all others.
    """
    merge = max(1, len(counts) // ENTROPY_BINS)
    coarse = counts.reshape(-1, merge).sum(1)
    coarse[0] = coarse[1]
    best, best_divergence = len(coarse), np.inf
    for edge in range(LEVELS, len(coarse) + 1, merge * 2):
        divergence = _divergence(coarse, edge)
        if divergence < best_divergence:
            best, best_divergence = edge, divergence
    return float(best * merge * width)


def _divergence(counts: Counts, edge: int) -> float:
    """KL divergence of the first ``edge`` bins from themselves in 128 levels."""
    inside = counts[:edge]
    wanted = inside.copy()
    wanted[-1] += counts[edge:].sum()
    if inside.sum() == 0:
        return float("inf")
    level = np.arange(edge) * LEVELS // edge
    filled = inside > 0
    mass = np.bincount(level, weights=inside, minlength=LEVELS)
    bins = np.bincount(level, weights=filled.astype(np.float64), minlength=LEVELS)
    spread = np.where(filled, mass[level] / np.maximum(bins[level], 1.0), 0.0)
    p, q = wanted / wanted.sum(), spread / spread.sum()
    if np.any((p > 0) & (q == 0)):
        return float("inf")
    positive = p > 0
    return float(np.sum(p[positive] * np.log(p[positive] / q[positive])))
