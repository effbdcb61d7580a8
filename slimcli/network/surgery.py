"""Cuts done to a model in place: parameters, buffers, attributes, optimizer state.

Everything is checked before the first tensor changes. What is shared stays shared, because tensors
are followed by identity and not by name. Nothing here decides *what* is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimcli.network import attributes, constants, optimizer_state
from slimcli.network.cuts import Cut
from slimcli.network.example import Example
from slimcli.network.holders import Held, held_tensors, joined, misfit, place, planned_attributes
from slimcli.network.reshape import layout, reshape_to
from slimcli.network.selection import Sources, compose, select, whole

__all__ = ["apply", "layout", "reshape_to"]

Selecting = Callable[[Tensor, Mapping[int, Sources]], Tensor]


def apply(
    model: nn.Module,
    cuts: Sequence[Cut],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    example: Example | None = None,
    gains: Mapping[str, Tensor] | None = None,
    selecting: Selecting = select,
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
        gains: What biases must take up, if that is known already (``constants.Capture``).
        selecting: Makes what is left of a tensor.

    Raises:
        RunError: A cut does not fit the model or its optimizer. The model is then unchanged.
    """
    held = held_tensors(model)
    counters = attributes.counters(dict(model.named_modules()))
    updates = _planned_counts(counters, cuts)
    _plan_sources(held, cuts, counters)
    _follow_with_biases(held)
    changed = list({id(each): each for each in held.values() if each.sources}.values())
    updates += planned_attributes(model, changed)
    states = [_planned_states(each, optimizer) for each in changed]
    if gains is None:
        gains = _measured_gains(model, cuts, example)
    _check_biases(gains, held)
    for path, gain in gains.items():
        _add_to_bias(model.get_submodule(path), gain, path, held, optimizer)
    for each, state in zip(changed, states, strict=True):
        place(each, selecting(each.tensor, each.sources), optimizer, state)
    for module, values in updates:
        for name, value in values.items():
            setattr(module, name, value)


def _planned_counts(
    counters: Mapping[str, tuple[nn.Module, str]], cuts: Sequence[Cut]
) -> list[tuple[nn.Module, dict[str, Any]]]:
    """The new values of attributes that count channels at layers without tensors."""
    parts: dict[str, list[Sources]] = {}
    for slot in (slot for cut in cuts for slot in cut.slots if slot.tensor in counters):
        parts.setdefault(slot.tensor, []).append(slot.sources)
    updates = []
    for name, sources in parts.items():
        module, attribute = counters[name]
        try:
            stays = compose(sources, getattr(module, attribute))
        except ValueError as error:
            raise misfit(f"{name}: {error}") from error
        updates.append((module, {attribute: len(stays)}))
    return updates


def _plan_sources(held: Mapping[str, Held], cuts: Sequence[Cut], counters: Collection[str]) -> None:
    """Writes into each tensor what stays of it."""
    parts: dict[tuple[int, int], list[Sources]] = {}
    owners: dict[tuple[int, int], Held] = {}
    for cut in cuts:
        for slot in cut.slots:
            if slot.tensor in counters:
                continue
            each = held.get(slot.tensor)
            if each is None or not 0 <= slot.dim < each.tensor.dim():
                raise misfit(
                    f"the cut of {cut.group} names dimension {slot.dim} of {slot.tensor}, "
                    "which this model does not have"
                )
            parts.setdefault((id(each), slot.dim), []).append(slot.sources)
            owners[(id(each), slot.dim)] = each
    composed: dict[tuple[int, ...], Sources] = {}  # a conv and its norm share their selections
    for key, each in owners.items():
        size = each.tensor.shape[key[1]]
        same = (size, *map(id, parts[key]))
        try:
            sources = composed[same] if same in composed else compose(parts[key], size)
        except ValueError as error:
            raise misfit(f"dimension {key[1]} of {each.name}: {error}") from error
        composed[same] = sources
        if sources != whole(size):
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


def _planned_states(held: Held, optimizer: torch.optim.Optimizer | None) -> list[dict[str, Any]]:
    if optimizer is None or not isinstance(held.tensor, nn.Parameter):
        return []
    return optimizer_state.cut_state(optimizer, held.tensor, held.sources, held.name)


def _measured_gains(
    model: nn.Module, cuts: Sequence[Cut], example: Example | None
) -> dict[str, Tensor]:
    """What biases must take up; empty for most cuts, and the model is then not run."""
    if not any(cut.constants for cut in cuts):
        return {}
    if example is None:
        raise misfit(
            "removed channels arrive as constants, and there is no example to measure them"
        )
    return constants.measure(model, cuts, example)


def _check_biases(gains: Collection[str], held: Mapping[str, Held]) -> None:
    """Nothing may add to a bias that several layers share."""
    for path in gains:
        bias = held.get(joined(path, "bias"))
        if bias is not None and len(bias.holders) > 1:
            raise misfit(f"the bias of {path} would take up a constant, but other layers share it")


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
