"""How far two forms of a quantized model may be apart, measured on the model itself.

Rounding makes a quantized network chaotic in the last digit: an input changed by 1e-6 flips some
codes, which flip more codes behind them. A ResNet-18 differs from itself by 35 dB this way, so
a small absolute limit is the wrong test. The limit here is the network's own noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from slimcli.artifacts import nested
from slimcli.artifacts.arithmetic import exact_arithmetic
from slimcli.artifacts.leaf import RELATIVE_LIMIT, as_tensor
from slimcli.artifacts.seam import Run, Seam, runner

DISTURBANCES = (1e-7, 1e-6, 1e-5)
FLOOR_CAP_DECIBEL = 36.0
"""More is never required: one code off by one in an output of full range is about 36 dB."""
MARGIN_DECIBEL = 3.0
PEAK_FACTOR = 10.0
"""Largest single difference, in root mean squares of the noise allowed."""
Predict = Callable[[Any, Any], Any]


@dataclass
class _Energy:
    """Sums over all batches for one output."""

    signal: float = 0.0
    noise: float = 0.0
    floors: dict[float, float] = field(default_factory=dict)
    count: int = 0
    peak: float = 0.0
    largest: float = 0.0

    @property
    def required_decibel(self) -> float:
        floor = decibel(self.signal, max(self.floors.values(), default=0.0))
        return min(floor, FLOOR_CAP_DECIBEL) - MARGIN_DECIBEL

    @property
    def is_ok(self) -> bool:
        is_quiet = decibel(self.signal, self.noise) >= self.required_decibel
        return is_quiet and self.largest <= self.limit

    @property
    def limit(self) -> float:
        """Ten times the root mean square of that much noise, or all of it in one value."""
        allowed = math.sqrt(self.signal / 10 ** (self.required_decibel / 10))
        return allowed * min(1.0, PEAK_FACTOR / math.sqrt(max(1, self.count)))


def decibel(signal: float, noise: float) -> float:
    """Signal-to-noise ratio of two energies; infinite without noise.

    >>> decibel(100.0, 1.0), decibel(1.0, 0.0)
    (20.0, inf)
    """
    if noise == 0.0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def compare_quantized(
    model: nn.Module,
    candidate: Run,
    predict: Predict,
    batches: Iterable[Any],
    *,
    names: tuple[str, str] = ("deploy", "onnx"),
) -> Seam:
    """The seam between a fake-quantized model and a file made from it.

    Right is a signal-to-noise ratio of at least what the model has against itself with its inputs
    changed by up to 1e-5, less 3 dB; more than 33 dB is never asked for. Integer outputs may flip
    and are only noted.

    Args:
        model: The fake-quantized model.
        candidate: batch -> prediction of the file.
        predict: The user's predict function.
        batches: Real batches.
        names: What to call the two.
    """
    energies: dict[str, _Energy] = {}
    notes: dict[str, None] = {}
    count = 0
    with exact_arithmetic():
        for batch in batches:
            count += 1
            ours = dict(nested.leaves(runner(model, predict)(batch)))
            theirs = dict(nested.leaves(candidate(batch)))
            if ours.keys() != theirs.keys():
                return _broken(names, f"outputs {sorted(ours)} became {sorted(theirs)}", count)
            disturbed = {e: dict(nested.leaves(_disturbed(model, predict, batch, e)))
                         for e in DISTURBANCES}  # fmt: skip
            for where, reference in ours.items():
                others = {e: found[where] for e, found in disturbed.items()}
                problem = _add(energies, where, reference, theirs[where], others)
                notes.update({problem: None} if problem else {})
    if not energies:
        return _broken(names, "no floating point output was compared", count)
    return _seam(energies, names, count, tuple(notes))


def _add(
    energies: dict[str, _Energy],
    where: str,
    reference: Any,
    candidate: Any,
    disturbed: dict[float, Any],
) -> str:
    """Adds one output of one batch; returns what could not be compared."""
    left, right = as_tensor(reference), as_tensor(candidate)
    if left is None or right is None or left.shape != right.shape:
        energies.setdefault(where, _Energy()).noise = math.inf
        return f"{where or 'output'}: expected {_form(reference)}, received {_form(candidate)}"
    if not left.is_floating_point():
        unequal = int((left != right).sum())
        return f"{where or 'output'}: {unequal} of {left.numel()} integers differ" * bool(unequal)
    energy, left = energies.setdefault(where, _Energy()), left.double()
    error = right.double() - left
    energy.signal += float(left.square().sum())
    noise = float(error.square().sum())
    energy.noise = energy.noise + noise if math.isfinite(noise) else math.inf
    energy.count += left.numel()
    energy.peak = max(energy.peak, float(left.abs().max()) if left.numel() else 0.0)
    energy.largest = max(energy.largest, float(error.abs().max()) if left.numel() else 0.0)
    for epsilon, other in disturbed.items():
        difference = torch.as_tensor(other).detach().cpu().double() - left
        floor = float(difference.square().sum())
        energy.floors[epsilon] = energy.floors.get(epsilon, 0.0) + floor
    return ""


def _form(value: Any) -> str:
    return str(tuple(value.shape)) if nested.is_tensor(value) else repr(value)[:40]


def _disturbed(model: nn.Module, predict: Predict, batch: Any, epsilon: float) -> Any:
    """The model's prediction with all floating point inputs changed by a factor 1 + epsilon."""

    def change(module: nn.Module, args: Any, kwargs: Any) -> Any:
        tensors = nested.describe((list(args), dict(kwargs)))[1]
        moved = [t * (1 + epsilon) if t.is_floating_point() else t for _, t in tensors]
        return nested.substitute((args, kwargs), iter(moved))

    handle = model.register_forward_pre_hook(change, with_kwargs=True)
    try:
        return runner(model, predict)(batch)
    finally:
        handle.remove()


def _seam(
    energies: dict[str, _Energy], names: tuple[str, str], count: int, notes: tuple[str, ...]
) -> Seam:
    def headroom(item: tuple[str, _Energy]) -> float:
        return decibel(item[1].signal, item[1].noise) - item[1].required_decibel

    where, worst = min(energies.items(), key=headroom)
    measured = decibel(worst.signal, worst.noise)
    said = f"{measured:.1f} dB, at least {worst.required_decibel:.1f} dB required"
    relative = worst.largest / worst.peak if worst.peak else worst.largest
    ok = all(each.is_ok for each in energies.values())
    return Seam(*names, worst.largest, relative, worst.limit, ok, where, count, (*notes, said))


def _broken(names: tuple[str, str], note: str, count: int) -> Seam:
    limit = RELATIVE_LIMIT
    return Seam(*names, math.inf, math.inf, limit, False, "", count, (note,))
