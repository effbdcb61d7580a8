"""The optimizer's groups checked, and its state stored by parameter name.

Positions change when a model is cut or rebuilt; names do not.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from slimcli.errors import HookError, Problem, RunError
from slimcli.solver.job import JobHooks


def parameter_names(model: nn.Module) -> dict[int, str]:
    """Name of each parameter by its identity; a shared one has its first name."""
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        names.setdefault(id(parameter), name)
    return names


def check_groups(optimizer: Optimizer, model: nn.Module, hooks: JobHooks) -> None:
    """Every trainable parameter is in exactly one group.

    Raises:
        HookError: One is left out, or is in two.
    """
    counts: dict[int, int] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    names = parameter_names(model)
    trainable = {id(each): names[id(each)] for each in model.parameters() if each.requires_grad}
    wrong = [name for key, name in trainable.items() if counts.get(key, 0) != 1]
    if wrong:
        raise HookError(
            Problem(
                "E-HOOK-OPTIMIZER-GROUPS",
                "hook `optimizer_generator`: parameters are in no group, or in two",
                hooks.where("optimizer_generator"),
                expected="each trainable parameter in exactly one",
                received=", ".join(wrong[:5])
                + (f" and {len(wrong) - 5} more" if wrong[5:] else ""),
                fix="hand `params` to the optimizer as it is; freeze with requires_grad_(False)",
            )
        )


def optimizer_state(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """State and group options, with names instead of positions."""
    names = parameter_names(model)
    state = {
        names[id(parameter)]: dict(values)
        for parameter, values in optimizer.state.items()
        if id(parameter) in names
    }
    groups = [
        {**options, "names": [names[id(parameter)] for parameter in group["params"]]}
        for options, group in zip(group_options(optimizer), optimizer.param_groups, strict=True)
    ]
    return {"state": state, "groups": groups}


def group_options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Learning rate, decay and the rest of each group, without its parameters."""
    hidden = ("params", "names")
    return [
        {key: value for key, value in group.items() if key not in hidden}
        for group in optimizer.param_groups
    ]


def load_optimizer_state(optimizer: Optimizer, model: nn.Module, stored: dict[str, Any]) -> None:
    """Take back what :func:`optimizer_state` gave, on an optimizer made the same way.

    Raises:
        RunError: The groups are not those that were stored.
    """
    names = parameter_names(model)
    current = [[names[id(each)] for each in group["params"]] for group in optimizer.param_groups]
    saved = [group["names"] for group in stored["groups"]]
    if current != saved:
        raise RunError(
            Problem(
                "E-RESUME-OPTIMIZER",
                "the checkpoint's optimizer groups are not those of this run",
                expected=f"{len(saved)} groups of {[len(group) for group in saved]} parameters",
                received=f"{len(current)} groups of {[len(group) for group in current]} parameters",
                fix="resume with the code the run was started with",
            )
        )
    order = [name for group in current for name in group]
    positions = {name: position for position, name in enumerate(order)}
    packed: list[dict[str, Any]] = []
    for group, live in zip(stored["groups"], optimizer.param_groups, strict=True):
        options = {key: value for key, value in group.items() if key != "names"}
        extra = {"names": live["names"]} if "names" in live else {}
        packed.append({**options, **extra, "params": [positions[name] for name in group["names"]]})
    state = {positions[name]: values for name, values in stored["state"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": packed})
