"""torch-pruning on the same network: time, and the groups that its own cut gets right."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch_pruning
from torch import nn
from zoo_measure import Case, cpu_seconds, difference, run

Row = dict[str, Any]
KINDS = (nn.modules.conv._ConvNd, nn.Linear)


def measure_peer(case: Case, layers: dict[str, str], norms: list[str]) -> Iterator[Row]:
    """Times its analysis and a cut of all its groups, and tries what it cuts and we do not.

    A group counts as ours if we cut every layer that produces its channels. The others are cut
    alone, by torch-pruning itself, and compared with the network in which these channels are zero
    at the layers that make them: what is equal is ``missed`` by us.

    Args:
        case: The network.
        layers: Every layer -> why we leave its channels whole; empty if we cut them.
        norms: Those that directly follow a layer, where its channels are made zero.

    Yields:
        What is known so far: it may not come to an end. ``untried`` counts groups it had no time
        for.
    """
    row: Row = {"graph_started_seconds": round(cpu_seconds(), 3)}
    yield row
    started = cpu_seconds()
    graph, groups = dependencies(case, copy.deepcopy(case.model).eval())
    row["graph_seconds"] = round(cpu_seconds() - started, 3)
    names = {module: name for name, module in graph.model.named_modules()}
    produced = [producers(group, names) for group in groups]
    sizes = [len(group[0].idxs) for group in groups]
    row["channels_claimed"] = sum(
        size * len(each) for size, each in zip(sizes, produced, strict=True)
    )
    foreign = [i for i, each in enumerate(produced) if any(layers.get(n, "-") for n in each)]
    row |= {"groups": len(groups), "missed": [], "untried": len(foreign)}
    yield row
    row["cut_seconds"] = cut_seconds(graph, groups)
    row["pruner_started_seconds"] = round(cpu_seconds(), 3)
    yield row
    row["pruner_seconds"] = pruner_seconds(case, layers)
    yield row
    for index in foreign:
        row["untried"] -= 1
        if is_exact(case, index, norms):
            reasons = [layers.get(name, "no layer of ours") for name in produced[index]]
            row["missed"].append(
                {
                    "layers": produced[index],
                    "channels": sizes[index] * len(produced[index]),
                    "reason": next(reason for reason in reasons if reason),
                }
            )
        yield row


def cut_seconds(graph: Any, groups: list[Any]) -> float | str:
    """Half of each group cut, one after the other, nothing ranked."""
    started = cpu_seconds()
    try:
        for group in groups:
            halve(graph, group).prune()
    except Exception as error:
        return f"fails: {type(error).__name__}"
    return round(cpu_seconds() - started, 3)


def pruner_seconds(case: Case, layers: dict[str, str]) -> float | str:
    """Its own way for users: a pruner built, half of every group cut, the smallest channels."""
    model = copy.deepcopy(case.model).eval()
    outputs = [name for name, reason in layers.items() if reason == "it is an output of the model"]
    started = cpu_seconds()
    try:
        torch_pruning.pruner.BasePruner(
            model,
            case.batch,
            torch_pruning.importance.GroupMagnitudeImportance(p=1),
            pruning_ratio=0.5,
            ignored_layers=[model.get_submodule(name) for name in outputs],
            forward_fn=case.predict,
        ).step()
    except Exception as error:
        return f"fails: {type(error).__name__}"
    return round(cpu_seconds() - started, 3)


def dependencies(case: Case, model: nn.Module) -> tuple[Any, list[Any]]:
    """Its graph of a model, and all its groups with at least two channels that it agrees to cut."""
    graph = torch_pruning.DependencyGraph()
    graph.build_dependency(model, example_inputs=case.batch, forward_fn=case.predict)
    groups = list(graph.get_all_groups(root_module_types=KINDS))
    return graph, [g for g in groups if len(g[0].idxs) > 1 and halve_is_allowed(graph, g)]


def halve(graph: Any, group: Any) -> Any:
    """Its group for every second channel."""
    target = group[0].dep.target.module
    return graph.get_pruning_group(
        target, group[0].dep.handler, list(range(0, len(group[0].idxs), 2))
    )


def halve_is_allowed(graph: Any, group: Any) -> bool:
    """Does it agree that something would be left?"""
    return bool(graph.check_pruning_group(halve(graph, group)))


def producers(group: Any, names: dict[nn.Module, str]) -> list[str]:
    """Layers whose outputs the group removes."""
    return [
        names[item.dep.target.module]
        for item in group
        if isinstance(item.dep.target.module, KINDS) and "out_channels" in item.dep.handler.__name__
    ]


def is_exact(case: Case, index: int, norms: list[str]) -> bool:
    """Does its cut of one group, on a fresh copy, equal the zeroed network?"""
    model, zeroed = copy.deepcopy(case.model).eval(), copy.deepcopy(case.model).eval()
    twins = dict(zeroed.named_modules())
    try:
        graph, groups = dependencies(case, model)
        names = {module: name for name, module in model.named_modules()}
        whole = halve(graph, groups[index])
        zero_outputs(whole, names, twins, norms)
        whole.prune()
        expected = run(case, zeroed)
        if difference(run(case, case.model), expected) <= case.tolerance:
            return False  # the zeros change nothing: no test of a cut
        return difference(run(case, model), expected) <= case.tolerance
    except Exception:
        return False


def zero_outputs(
    group: Any, names: dict[nn.Module, str], twins: dict[str, nn.Module], norms: list[str]
) -> None:
    """Zero, in the untouched copy, the layers that make the channels, and the norms behind them."""
    with torch.no_grad():
        for item in group:
            module = item.dep.target.module
            if "out_channels" not in item.dep.handler.__name__ or module not in names:
                continue
            twin = twins[names[module]]
            if not isinstance(twin, KINDS) and names[module] not in norms:
                continue
            index = torch.tensor(item.idxs)
            for name in ("weight", "bias"):
                tensor = getattr(twin, name, None)
                if isinstance(tensor, torch.Tensor):
                    is_kernel = getattr(twin, "transposed", False) and name == "weight"
                    tensor.index_fill_(1 if is_kernel else 0, index, 0.0)
