"""Cuts done to a model in place: parameters, buffers, attributes, optimizer state.

Everything is checked before the first tensor changes. What is shared stays shared, because tensors
are followed by identity and not by name. Nothing here decides *what* is cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slimcli.errors import Problem, RunError
from slimcli.network import attributes, constants, optimizer_state
from slimcli.network.cuts import Cut
from slimcli.network.example import Example
from slimcli.network.selection import Sources, compose, select

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


def apply(
    model: nn.Module,
    cuts: Sequence[Cut],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    example: Example | None = None,
) -> None:
    """Cuts ``model`` in place; every index of every cut means the model as it was before the call.

    Parameters are new objects (same ``requires_grad``, no gradient); the optimizer's groups hold
    the new ones at the same places and its state is cut alike. Any other reference to an old
    parameter is stale afterwards. A consumer that must take up a constant and has no bias gets one,
    right behind its weight in the optimizer.

    Args:
        model: Cut in place.
        cuts: What stays; several cuts may touch one tensor.
        optimizer: Optimizer of ``model``; its state follows.
        example: Needed if a cut has ``constants``: the model is run once, its channels at zero.

    Raises:
        RunError: A cut does not fit the model or its optimizer. The model is then unchanged.
    """
    held = held_tensors(model)
    _plan_sources(held, cuts)
    _follow_with_biases(held)
    changed = list({id(each): each for each in held.values() if each.sources}.values())
    updates = _planned_attributes(model, changed)
    states = [_planned_state(each, optimizer) for each in changed]
    gains = _measured_gains(model, cuts, example, held)
    for path, gain in gains.items():
        _add_to_bias(model.get_submodule(path), gain, path, held, optimizer)
    for each, state in zip(changed, states, strict=True):
        place(each, select(each.tensor, each.sources), optimizer, state)
    for module, values in updates:
        for name, value in values.items():
            setattr(module, name, value)


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
    state: dict[str, Any] | None = None,
) -> None:
    """Puts a new tensor in the place of an old one, at all its holders and in the optimizer."""
    old = held.tensor
    new = value
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(value, requires_grad=old.requires_grad)
        vars(new).update(vars(old))  # marks that users leave on parameters, such as "no decay"
        if optimizer is not None:
            optimizer_state.replace(optimizer, old, new, state or {})
    for _, module, local in held.holders:
        setattr(module, local, new)
    held.tensor = new


def joined(path: str, local: str) -> str:
    """``layer1.conv`` and ``weight`` give ``layer1.conv.weight``; the root's path is empty."""
    return f"{path}.{local}" if path else local


def _plan_sources(held: Mapping[str, Held], cuts: Sequence[Cut]) -> None:
    """Writes into each tensor what stays of it."""
    parts: dict[tuple[int, int], list[Sources]] = {}
    owners: dict[tuple[int, int], Held] = {}
    for cut in cuts:
        for slot in cut.slots:
            each = held.get(slot.tensor)
            if each is None or not 0 <= slot.dim < each.tensor.dim():
                raise misfit(
                    f"the cut of {cut.group} names dimension {slot.dim} of {slot.tensor}, "
                    "which this model does not have"
                )
            parts.setdefault((id(each), slot.dim), []).append(slot.sources)
            owners[(id(each), slot.dim)] = each
    for key, each in owners.items():
        size = each.tensor.shape[key[1]]
        try:
            sources = compose(parts[key], size)
        except ValueError as error:
            raise misfit(f"dimension {key[1]} of {each.name}: {error}") from error
        if sources != tuple((index,) for index in range(size)):
            each.sources[key[1]] = sources


def _follow_with_biases(held: Mapping[str, Held]) -> None:
    """Cuts the biases that no slot names because they appeared after the analysis."""
    for each in {id(each): each for each in held.values() if each.sources}.values():
        for path, module, local in each.holders:
            bias = held.get(joined(path, "bias"))
            if local == "weight" and bias is not None and not bias.sources:
                outputs = attributes.output_sources(module, each.sources)
                if outputs is not None:
                    bias.sources[0] = outputs


def _planned_attributes(
    model: nn.Module, changed: Iterable[Held]
) -> list[tuple[nn.Module, dict[str, Any]]]:
    """The new attributes of every module one of whose tensors is cut."""
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


def _planned_state(held: Held, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    if optimizer is None or not isinstance(held.tensor, nn.Parameter):
        return {}
    return optimizer_state.cut_state(optimizer, held.tensor, held.sources, held.name)


def _measured_gains(
    model: nn.Module, cuts: Sequence[Cut], example: Example | None, held: Mapping[str, Held]
) -> dict[str, Tensor]:
    """What biases must take up; empty for most cuts, and the model is then not run."""
    if not any(cut.constants for cut in cuts):
        return {}
    if example is None:
        raise misfit(
            "removed channels arrive as constants, and there is no example to measure them"
        )
    for path in {constant.module for cut in cuts for constant in cut.constants}:
        bias = held.get(joined(path, "bias"))
        if bias is not None and len(bias.holders) > 1:
            raise misfit(f"the bias of {path} would take up a constant, but other layers share it")
    return constants.measure(model, cuts, example)


def _add_to_bias(
    module: nn.Module,
    gain: Tensor,
    path: str,
    held: Mapping[str, Held],
    optimizer: torch.optim.Optimizer | None,
) -> None:
    """Adds ``gain`` (out_channels,) to an uncut bias, or makes the bias as it is after the cut."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    if isinstance(module.bias, Tensor):
        with torch.no_grad():
            module.bias.add_(gain.to(weight.device, weight.dtype))
        return
    sources = held[joined(path, "weight")].sources if joined(path, "weight") in held else {}
    outputs = attributes.output_sources(module, sources)
    kept = select(gain, {} if outputs is None else {0: outputs})
    bias = nn.Parameter(kept.to(weight.device, weight.dtype), requires_grad=weight.requires_grad)
    module.register_parameter("bias", bias)
    if optimizer is not None:
        optimizer_state.insert_after(optimizer, weight, bias, joined(path, "bias"))


def misfit(what: str) -> RunError:
    """The error of a cut or a shape that does not fit the model."""
    return RunError(Problem("E-CUT-MISFIT", what))
