"""What an ATen operator is called, what it writes into, and whether it makes zeros."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slimcli.network.nested import tensors_in

_BLANK = frozenset(("zeros", "zeros_like", "new_zeros"))

LITERAL = frozenset(("scalar_tensor", "lift_fresh"))
"""They make a tensor of a number in the user's code."""

_AVERAGES = frozenset(("running_mean", "running_var"))
"""Norms write them in train mode, and their schemas don't say so."""

Places = tuple[tuple[int, str], ...]


@functools.cache
def base_name(func: Any) -> tuple[str, bool]:
    """``("add", True)`` for ``aten::add_.Tensor``; other namespaces keep theirs."""
    full = func.name()
    space, _, rest = full.partition("::")
    base = rest.partition(".")[0]
    in_place = base.endswith("_") and not base.startswith("__")
    base = base[:-1] if in_place else base
    return (base if space == "aten" else f"{space}::{base}"), in_place


ORDER_DEPENDENT = frozenset(
    ("nonzero", "masked_select", "topk", "sort", "argsort", "unique2", "torchvision::nms")
)

READING = frozenset(("_local_scalar_dense", "is_nonzero", "equal"))
"""Python gets a value."""

_LIKE = """
empty_like zeros_like ones_like full_like rand_like randn_like randint_like
new_empty new_zeros new_ones new_full
"""
ASKING_FOR_SHAPES = frozenset(_LIKE.split())
"""These ask a tensor for its shape, not for its values."""

Execute = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


def call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Executes an operator as it is."""
    return func(*args, **kwargs)


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Arguments into which an operator writes."""
    told, averages = _writes(func)
    if averages and any(each is True for each in args):
        told = averages
    if not told:
        return []
    found = [args[place] if place < len(args) else kwargs.get(name) for place, name in told]
    return list(tensors_in(found))


@functools.cache
def _writes(func: Any) -> tuple[Places, Places]:
    """Arguments that an operator's schema says it writes, and averages that norms write untold."""
    arguments = list(enumerate(func._schema.arguments))
    told = [(n, a.name) for n, a in arguments if a.alias_info and a.alias_info.is_write]
    return tuple(told), tuple((n, a.name) for n, a in arguments if a.name in _AVERAGES)


def makes_zeros(name: str, output: Any) -> bool:
    """Are these zeros, whatever the model reads?"""
    if name in LITERAL:
        return output.dim() == 0 and not bool(output)
    return name in _BLANK and output.layout == torch.strided
