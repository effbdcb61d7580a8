"""Shapes of a model as data, and a model given stored shapes so that a state can be loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from slimcli.network import attributes
from slimcli.network.holders import Held, held_tensors, misfit, owner_of, place, planned_attributes
from slimcli.network.selection import Sources, select


def layout(model: nn.Module) -> dict[str, Any]:
    """Shapes and attributes of a model as plain data, for :func:`reshape_to`.

    >>> layout(nn.Linear(3, 2))["shapes"]
    {'weight': [2, 3], 'bias': [2]}
    """
    return {
        "shapes": {name: list(held.tensor.shape) for name, held in held_tensors(model).items()},
        "attributes": {
            path: {name: as_plain(value) for name, value in attributes.known(module).items()}
            for path, module in model.named_modules()
            if attributes.known(module)
        },
    }


def reshape_to(
    model: nn.Module,
    shapes: Mapping[str, Sequence[int]],
    attributes_by_module: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Gives tensors the stored shapes, in place; their values are zeros until a state is loaded.

    Args:
        model: A model with the modules of the one that was stored.
        shapes: Tensor name -> shape; a conv or Linear without a bias gets one if it is named.
            Tensors that are not named stay.
        attributes_by_module: The ``attributes`` of :func:`layout`. Without them they follow from
            the shapes, which is refused where groups are ambiguous.

    Raises:
        RunError: A name or a number of dimensions does not fit, or groups are ambiguous.
    """
    for name, shape in shapes.items():
        _make_missing_bias(model, name, shape)
    held = held_tensors(model)
    changed: dict[int, Held] = {}
    for name, shape in shapes.items():
        each = held.get(name)
        if each is None or each.tensor.dim() != len(shape):
            received = "no such tensor" if each is None else f"shape {tuple(each.tensor.shape)}"
            raise misfit(f"{name} should get shape {tuple(shape)}; this model has {received}")
        if list(each.tensor.shape) != list(shape):
            changed[id(each)] = each
            each.sources = _sources_for(each, shape)
    if attributes_by_module is None:
        for each in changed.values():
            _divide_into_groups(each)
        updates = planned_attributes(model, changed.values())
    else:
        updates = [
            (model.get_submodule(path), {name: as_tuple(value) for name, value in values.items()})
            for path, values in attributes_by_module.items()
        ]
    for each in changed.values():
        place(each, torch.zeros_like(select(each.tensor, each.sources)))
    for module, values in updates:
        for name, value in values.items():
            setattr(module, name, value)


def _make_missing_bias(model: nn.Module, name: str, shape: Sequence[int]) -> None:
    """A conv or Linear whose bias appeared during training has none when it is fresh."""
    path, _, local = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise misfit(f"this model has no module {path}, which should hold {local}") from error
    layers = (*attributes.Convolution, *attributes.Transposed, nn.Linear)
    if local != "bias" or not isinstance(module, layers) or module.bias is not None:
        return
    weight = module.weight
    bias = torch.zeros(tuple(shape), device=weight.device, dtype=weight.dtype)
    module.register_parameter("bias", nn.Parameter(bias, requires_grad=weight.requires_grad))


def _sources_for(held: Held, shape: Sequence[int]) -> dict[int, Sources]:
    """Some selection that leads to a shape; which values it takes does not matter."""
    sources: dict[int, Sources] = {}
    for dim, (size, wanted) in enumerate(zip(held.tensor.shape, shape, strict=True)):
        if size != wanted:
            sources[dim] = tuple((min(index, size - 1),) for index in range(wanted))
    return sources


def _divide_into_groups(held: Held) -> None:
    """Makes the selection of a grouped layer take whole groups, or as many from each group.

    Raises:
        RunError: The shape allows both.
    """
    path, module, local = held.holders[0]
    owner, name = owner_of(path, local)
    grouped = (*attributes.Convolution, *attributes.Transposed, nn.GroupNorm)
    if (
        0 not in held.sources
        or not isinstance(module, grouped)
        or (owner, name) != (path, "weight")
    ):
        return
    groups = module.num_groups if isinstance(module, nn.GroupNorm) else module.groups
    if groups == 1:
        return
    size = len(held.sources[0])
    try:
        after = attributes.groups_from_shape(module, size)
    except ValueError as error:
        raise misfit(f"{held.name}: {error}; its layout must say how many") from error
    old_size, new_size = held.tensor.shape[0] // groups, size // after
    held.sources[0] = tuple(
        (group * old_size + index,) for group in range(after) for index in range(new_size)
    )


def as_plain(value: Any) -> Any:
    """Tuples as lists, which JSON and ``weights_only`` files hold.

    >>> as_plain((3, 3))
    [3, 3]
    """
    return list(value) if isinstance(value, tuple) else value


def as_tuple(value: Any) -> Any:
    """Lists as tuples, which layers hold."""
    return tuple(value) if isinstance(value, list) else value
