"""What is measured on one network of the zoo: structure, exact cuts, a training step, the peer."""

from __future__ import annotations

import copy
import random
import resource
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimcli.network import surgery
from slimcli.network.example import Example
from slimcli.network.structure import Structure, analyze, zero_channels

# float64 sums of a deep net, reordered by a cut.
EXACT_FLOAT64 = 1e-9
# Over LARGE parameters float32 is used; rounding alone was seen to reach 1e-4 there.
EXACT_FLOAT32 = 1e-3
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
            if parameter.is_floating_point() and parameter.dim() <= 1:
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


def produced_channels(structure: Structure) -> int:
    """Output channels of all layers that belong to a group whose zero channels can be cut."""
    return sum(group.size * len(group.producers) for group in structure.groups if group.exact_zero)


def measure_ours(case: Case, seed: int = 0) -> tuple[dict[str, Any], nn.Module | None]:
    """Analyse, cut half of every group at random, compare with the zeroed model."""
    row: dict[str, Any] = {}
    example = Example(case.batch, case.predict)
    started = cpu_seconds()
    structure = analyze(case.model, example)
    row["analyze_seconds"] = round(cpu_seconds() - started, 3)
    groups = [group for group in structure.groups if group.exact_zero]
    row["groups"] = len(structure.groups)
    row["groups_prunable"] = len(groups)
    row["channels_prunable"] = produced_channels(structure)
    row["reasons"] = sorted({g.zero_reason for g in structure.groups if g.zero_reason})[:6]
    if not groups:
        return row, None
    pick = random.Random(seed)
    zeroed, cut = copy.deepcopy(case.model), copy.deepcopy(case.model)
    cuts = []
    for group in groups:
        keep = sorted(pick.sample(range(group.size), max(1, group.size // 2)))
        removed = sorted(set(range(group.size)) - set(keep))
        zero_channels(zeroed, group, removed)
        zero_channels(cut, group, removed)
        cuts.append(group.cut(keep))
    started = cpu_seconds()
    surgery.apply(cut, cuts, example=example)
    row["cut_seconds"] = round(cpu_seconds() - started, 3)
    expected = run(case, zeroed)
    row["error"] = difference(run(case, cut), expected)
    row["effect"] = difference(run(case, case.model), expected)
    row["exact"] = row["error"] <= case.tolerance
    row["params_kept"] = round(count(cut) / count(case.model), 4)
    return row, cut


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


def measure_peer(case: Case, seconds: float = 240) -> dict[str, Any]:
    """torch-pruning: time to build and cut, and the channels its own cut gets right."""
    import torch_pruning

    row: dict[str, Any] = {}
    started = cpu_seconds()
    model = copy.deepcopy(case.model).eval()
    graph = torch_pruning.DependencyGraph()

    def forward(network: nn.Module, batch: Any) -> Any:
        return case.predict(network, batch)

    graph.build_dependency(model, example_inputs=case.batch, forward_fn=forward)
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    groups = list(graph.get_all_groups(root_module_types=kinds))
    row["graph_seconds"] = round(cpu_seconds() - started, 3)
    row["groups"] = len(groups)
    started = cpu_seconds()
    row["channels_exact"] = 0
    deadline = time.monotonic() + seconds
    together = try_peer_groups(case, range(len(groups)))
    row["cut_seconds"] = round(cpu_seconds() - started, 3)
    if together is not None:
        row["exact"], row["channels_exact"] = True, together
        return row
    row["exact"] = False
    for index in range(len(groups)):
        if time.monotonic() > deadline:
            row["stopped_at"] = index
            break
        row["channels_exact"] += try_peer_groups(case, [index]) or 0
    return row


def try_peer_groups(case: Case, indices: Any) -> int | None:
    """Output channels of these groups if the peer's cut equals its masked model, else None."""
    import torch_pruning

    model, masked = copy.deepcopy(case.model).eval(), copy.deepcopy(case.model).eval()
    twins = dict(masked.named_modules())
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    try:
        graph = torch_pruning.DependencyGraph()
        graph.build_dependency(model, example_inputs=case.batch, forward_fn=case.predict)
        names = {module: name for name, module in model.named_modules()}
        groups = list(graph.get_all_groups(root_module_types=kinds))
        channels, pruned = 0, []
        for index in indices:
            group = groups[index]
            size = len(group[0].idxs)
            whole = graph.get_pruning_group(
                group[0].dep.target.module, group[0].dep.handler, list(range(0, size, 2))
            )
            if size < 2 or not graph.check_pruning_group(whole):
                continue
            mask_inputs(whole, names, twins)
            pruned.append(whole)
            channels += sum(
                len(item.idxs) * 2
                for item in whole
                if isinstance(item.dep.target.module, kinds) and "out" in item.dep.handler.__name__
            )
        for whole in pruned:
            whole.prune()
        error = difference(run(case, model), run(case, masked))
    except Exception:
        return None
    return channels if error <= case.tolerance else None


def mask_inputs(group: Any, names: dict[nn.Module, str], twins: dict[str, nn.Module]) -> None:
    """Zero, in the untouched copy, the weights that read the channels which the peer removes."""
    with torch.no_grad():
        for item in group:
            module = item.dep.target.module
            if "in_channels" not in item.dep.handler.__name__ or module not in names:
                continue
            twin = twins[names[module]]
            if isinstance(twin, (nn.modules.conv._ConvNd, nn.Linear)):
                dim = 0 if getattr(twin, "transposed", False) else 1
                twin.weight.index_fill_(dim, torch.tensor(item.idxs), 0.0)


def quiet() -> None:
    """Third-party warnings are not what this benchmark is about."""
    warnings.filterwarnings("ignore")
