"""Who holds which tensor: parameters and buffers followed by identity, not by name.

A tensor may have several names: a module used at two paths, a weight tied to another. Whoever
changes it must change it for all of them at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slimcli.errors import Problem, RunError
from slimcli.network import attributes, optimizer_state
from slimcli.network.selection import Sources

PARAMETRIZATIONS = "parametrizations."
"""Below this child ``torch.nn.utils.parametrize`` keeps the tensors a weight is computed from."""


@dataclass
class Held:
    """One tensor of a model with everybody who holds it.

    Attributes:
        tensor: Parameter or buffer.
        holders: (path of the module, module, local name); a shared tensor has several.
        sources: Dimension -> what stays of it; empty where nothing is cut.
    """

    tensor: Tensor
    holders: list[tuple[str, nn.Module, str]] = field(default_factory=list)
    sources: dict[int, Sources] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The first name it is known by."""
        path, _, local = self.holders[0]
        return joined(path, local)


def held_tensors(model: nn.Module) -> dict[str, Held]:
    """Every name of every parameter and buffer; the names of one tensor lead to one object."""
    by_identity: dict[int, Held] = {}
    names: dict[str, Held] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for local, tensor in own_tensors(module):
            held = by_identity.setdefault(id(tensor), Held(tensor))
            if not any(other is module and name == local for _, other, name in held.holders):
                held.holders.append((path, module, local))
            names[joined(path, local)] = held
    return names


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers (also those that aren't saved) of a module without its children."""
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    yield from module.named_buffers(recurse=False, remove_duplicate=False)


def place(
    held: Held,
    value: Tensor,
    optimizer: torch.optim.Optimizer | None = None,
    states: Sequence[dict[str, Any]] = (),
) -> None:
    """Puts a new tensor in the place of an old one, at all its holders and in the optimizer."""
    old = held.tensor
    new = value
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(value, requires_grad=old.requires_grad)
        vars(new).update(vars(old))  # marks that users leave on parameters, such as "no decay"
        _hand_over_hooks(old, new)
        if optimizer is not None:
            optimizer_state.replace(optimizer, old, new, states)
    for _, module, local in held.holders:
        setattr(module, local, new)
    held.tensor = new


def _hand_over_hooks(old: nn.Parameter, new: nn.Parameter) -> None:
    """Gradient hooks go on with the new parameter, and their handles still remove them.

    torch has no public list of them; where it keeps none under these names there are none to lose.
    """
    for name in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        hooks = getattr(old, name, None)
        if hooks:
            setattr(new, name, hooks)


def joined(path: str, local: str) -> str:
    """``layer1.conv`` and ``weight`` give ``layer1.conv.weight``; the root's path is empty."""
    return f"{path}.{local}" if path else local


def planned_attributes(
    model: nn.Module, changed: Iterable[Held]
) -> list[tuple[nn.Module, dict[str, Any]]]:
    """The new attributes of every module one of whose tensors is cut.

    Raises:
        RunError: A module can't be cut like that.
    """
    selections: dict[str, dict[str, Mapping[int, Sources]]] = {}
    for each in changed:
        for path, _, local in each.holders:
            owner, name = owner_of(path, local)
            selections.setdefault(owner, {})[name] = each.sources
    updates = []
    for path, chosen in selections.items():
        module = model.get_submodule(path)
        try:
            updates.append((module, attributes.planned(module, chosen)))
        except ValueError as error:
            raise misfit(f"{path or 'the model'} ({type(module).__name__}): {error}") from error
    return updates


def owner_of(path: str, local: str) -> tuple[str, str]:
    """The layer a tensor belongs to, and its name there.

    >>> owner_of("conv.parametrizations.weight", "original")
    ('conv', 'parametrizations.weight.original')
    >>> owner_of("conv", "weight")
    ('conv', 'weight')
    """
    padded = f".{path}."
    if f".{PARAMETRIZATIONS}" not in padded:
        return path, local
    owner, _, inner = padded.rpartition(f".{PARAMETRIZATIONS}")
    return owner.removeprefix("."), f"{PARAMETRIZATIONS}{inner}{local}"


def misfit(what: str) -> RunError:
    """The error of a cut or a shape that does not fit the model."""
    return RunError(Problem("E-CUT-MISFIT", what))
