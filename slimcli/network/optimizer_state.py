"""What an optimizer knows about a parameter goes with it when the parameter is cut.

Works for every optimizer that keeps, per parameter, tensors of the parameter's shape (or of that
shape with averaged dimensions of size one), numbers, and nothing else. An optimizer may hold
another one that does its steps (SAM, Lookahead): both go along, with one list of groups or two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimcli.errors import Problem, RunError
from slimcli.network.nested import tensors_in
from slimcli.network.selection import Sources, select


def with_inner(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """The optimizer and those that it holds in its attributes, and they in theirs."""
    found = [optimizer]
    for each in found:
        held = [value for value in vars(each).values() if isinstance(value, torch.optim.Optimizer)]
        found += [value for value in held if all(value is not known for known in found)]
    return found


def cut_state(
    optimizer: torch.optim.Optimizer,
    parameter: Tensor,
    sources: Mapping[int, Sources],
    name: str,
) -> list[dict[str, Any]]:
    """The state of one parameter after it is cut, for each of ``with_inner``; nothing is changed.

    Every tensor gets the linear map its parameter gets: dropped entries are dropped, summed entries
    are summed, so momentum goes on moving a sum as it moved its parts. Master weights and averages
    of another dtype keep it.

    Args:
        optimizer: Any optimizer.
        parameter: The parameter before the cut.
        sources: Dimension -> what stays of it.
        name: Name of the parameter for messages.

    Raises:
        RunError: The state holds something that can't be cut along.
    """
    return [_cut_state(each, parameter, sources, name) for each in with_inner(optimizer)]


def _cut_state(
    optimizer: torch.optim.Optimizer,
    parameter: Tensor,
    sources: Mapping[int, Sources],
    name: str,
) -> dict[str, Any]:
    if isinstance(optimizer, torch.optim.LBFGS):
        raise _refused(optimizer, name, "its history mixes all parameters")
    state: dict[str, Any] = {}
    for key, value in optimizer.state.get(parameter, {}).items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            if any(each.dim() for each in tensors_in(value)):
                raise _refused(optimizer, name, f"{key} is a {type(value).__name__} of tensors")
            state[key] = value
            continue
        fits = value.dim() == parameter.dim() and all(
            size in (1, whole) for size, whole in zip(value.shape, parameter.shape, strict=True)
        )
        if not fits:
            reason = f"{key} has shape {tuple(value.shape)}, the parameter {tuple(parameter.shape)}"
            raise _refused(optimizer, name, reason)
        along = {dim: each for dim, each in sources.items() if _has_entries(value, parameter, dim)}
        state[key] = select(value, along)
    return state


def replace(
    optimizer: torch.optim.Optimizer,
    old: nn.Parameter,
    new: nn.Parameter,
    states: Sequence[dict[str, Any]],
) -> None:
    """Puts ``new`` at every place of ``old`` in the groups and gives it what ``cut_state`` gave."""
    for each, state in zip(with_inner(optimizer), states, strict=True):
        for group in each.param_groups:
            group["params"][:] = [new if one is old else one for one in group["params"]]
        each.state.pop(old, None)
        if state:
            each.state[new] = state


def insert_after(
    optimizer: torch.optim.Optimizer, neighbour: Tensor, new: nn.Parameter, name: str
) -> None:
    """Adds ``new`` right behind ``neighbour``, in its group; does nothing if it is in none."""
    for each in with_inner(optimizer):
        _insert_after(each, neighbour, new, name)


def _insert_after(
    optimizer: torch.optim.Optimizer, neighbour: Tensor, new: nn.Parameter, name: str
) -> None:
    for group in optimizer.param_groups:
        if any(each is new for each in group["params"]):
            return  # the groups of the one that holds this optimizer
        for place, each in enumerate(group["params"]):
            if each is neighbour:
                group["params"].insert(place + 1, new)
                has_momentum = "momentum_buffer" in optimizer.state.get(neighbour, {})
                if has_momentum and group.get("fused"):  # one step takes all momenta or none
                    optimizer.state[new]["momentum_buffer"] = torch.zeros_like(new)
                for names in ("names", "param_names"):
                    if names in group:
                        group[names].insert(place + 1, name)
                return


def _has_entries(value: Tensor, parameter: Tensor, dim: int) -> bool:
    return value.shape[dim] == parameter.shape[dim]


def _refused(optimizer: torch.optim.Optimizer, name: str, reason: str) -> RunError:
    kind = type(optimizer).__name__
    return RunError(
        Problem(
            "E-CUT-OPTIMIZER",
            f"{kind}'s state of {name} can't follow a cut: {reason}",
            fix="use an optimizer whose state has the parameter's shape, such as SGD or AdamW",
        )
    )
