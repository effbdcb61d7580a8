"""What is measured on one network of the zoo: structure, exact cuts, deploy files, training."""

from __future__ import annotations

import copy
import random
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimcli.artifacts import deploy
from slimcli.network import surgery
from slimcli.network.example import Example
from slimcli.network.structure import Group, Structure, analyze, zero_channels

# float64: sums of a deep net, reordered by a cut. float32: used over LARGE parameters, and for
# ONNX; rounding alone was seen to reach 1e-4 there.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3}
LARGE = 300_000_000


@dataclass
class Case:
    """A network ready to be measured.

    Attributes:
        model: Random weights, statistics and constants jittered so that no two channels are alike.
        batch: What ``predict`` takes.
        predict: How the model is called.
        tolerance: Largest relative difference that counts as equal.
    """

    model: nn.Module
    batch: Any
    predict: Callable[[nn.Module, Any], Any]
    tolerance: float


def tensors(value: Any) -> list[Tensor]:
    """All floating tensors of a nested prediction."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for each in value for tensor in tensors(each)]
    return tensors(vars(value)) if hasattr(value, "__dict__") else []


def difference(left: Any, right: Any) -> float:
    """Largest difference relative to the largest value; inf where shapes differ."""
    worst = 0.0
    pairs = list(zip(tensors(left), tensors(right), strict=True))
    for a, b in pairs:
        if a.shape != b.shape:
            return float("inf")
        if a.numel():
            scale = b.abs().max().clamp_min(1e-12)
            worst = max(worst, ((a - b).abs().max() / scale).item())
    return worst


def jitter(model: nn.Module, seed: int = 0) -> None:
    """Make every channel different from every other and from zero."""
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: Tensor) -> Tensor:
        drawn = torch.rand(tensor.shape, generator=generator)
        return drawn.to(tensor.dtype)

    with torch.no_grad():
        for module in model.modules():
            for name in ("running_mean", "running_var"):
                buffer = getattr(module, name, None)
                if isinstance(buffer, Tensor):
                    buffer.copy_(noise(buffer) * 0.4 + (0.8 if name == "running_var" else -0.2))
        for parameter in model.parameters():
            is_constant = parameter.dim() <= 1 or not bool(parameter.any())
            if parameter.is_floating_point() and is_constant:
                parameter.add_(noise(parameter) * 0.2 - 0.1)


def cpu_seconds() -> float:
    """User and system time of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def run(case: Case, model: nn.Module) -> Any:
    """Eval-mode prediction, the same random numbers every time."""
    torch.manual_seed(1)
    with torch.no_grad():
        return case.predict(model.eval(), case.batch)


def channels_prunable(structure: Structure) -> int:
    """Output channels of all layers, depthwise ones too, whose zero channels can be cut."""
    left = layers(structure)
    return sum(each.channels for each in structure.layers if not left[each.name])


def measure_ours(case: Case) -> tuple[dict[str, Any], Structure, nn.Module | None]:
    """Analyse, cut half of every group at random, compare with the zeroed model."""
    row: dict[str, Any] = {}
    example = Example(case.batch, case.predict)
    started = cpu_seconds()
    analyze(case.model, example, trial=False)
    row["trace_seconds"] = round(cpu_seconds() - started, 3)
    started = cpu_seconds()
    structure = analyze(case.model, example)
    row["analyze_seconds"] = round(cpu_seconds() - started, 3)
    groups = [group for group in structure.groups if group.exact_zero]
    row["groups"] = len(structure.groups)
    row["groups_prunable"] = len(groups)
    row["channels_prunable"] = channels_prunable(structure)
    row["reasons"] = sorted({g.zero_reason for g in structure.groups if g.zero_reason})[:6]
    if not groups:
        return row, structure, None
    zeroed = copy.deepcopy(case.model)
    kept = zero_half(zeroed, groups)
    cut = copy.deepcopy(zeroed)
    started = cpu_seconds()
    cuts = [group.cut(keep) for group, keep in zip(groups, kept, strict=True)]
    surgery.apply(cut, cuts, example=example)
    row["cut_seconds"] = round(cpu_seconds() - started, 3)
    expected = run(case, zeroed)
    row["error"] = difference(run(case, cut), expected)
    row["effect"] = difference(run(case, case.model), expected)
    row["exact"] = row["error"] <= case.tolerance
    row["params_kept"] = round(count(cut) / count(case.model), 4)
    return row, structure, cut


def layers(structure: Structure) -> dict[str, str]:
    """Every layer -> why its channels stay whole; empty if they can be cut."""
    reasons = {group.name: group.zero_reason for group in structure.groups}
    return {
        each.name: each.frozen_reason or reasons.get(each.group, "") for each in structure.layers
    }


def zero_half(model: nn.Module, groups: Sequence[Group], seed: int = 0) -> list[list[int]]:
    """Zeroes half of every group's channels at their producers; the channels that are left."""
    pick = random.Random(seed)
    kept = []
    for group in groups:
        keep = sorted(pick.sample(range(group.size), max(group.least, group.size // 2)))
        zero_channels(model, group, sorted(set(range(group.size)) - set(keep)))
        kept.append(keep)
    return kept


def save(case: Case, cut: nn.Module, folder: Path) -> None:
    """The deploy files of a cut network, a batch, and what it predicts."""
    deploy.save(folder, cut.eval(), case.model)
    torch.save((case.batch, tensors(run(case, cut))), folder / "prediction.pt")


def reload_error(case: Case, folder: Path) -> float:
    """Difference between what was predicted and what the deploy files give on a fresh network."""
    case.batch, expected = torch.load(folder / "prediction.pt")
    return difference(run(case, deploy.load_deploy(folder, case.model)), expected)


def count(model: nn.Module) -> int:
    """Parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def train_step(case: Case, model: nn.Module) -> str:
    """One SGD step in train mode; ``ok`` or the error."""
    try:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        loss = sum(
            tensor.double().square().mean()
            for tensor in tensors(case.predict(model.train(), case.batch))
        )
        loss.backward()
        optimizer.step()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:80]}"
    return "ok"
