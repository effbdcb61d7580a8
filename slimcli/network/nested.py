"""Tensors, and all else, inside lists, tuples and dicts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and dicts, in order; anything else is passed over.

    >>> import torch
    >>> [tensor.item() for tensor in tensors_in({"a": [torch.tensor(1)], "b": torch.tensor(2)})]
    [1, 2]
    """
    found: list[Tensor] = []
    _gather((value,), found)
    return iter(found)


def _gather(values: Iterable[Any], found: list[Tensor]) -> None:
    """Into a list: generators inside generators take several times as long."""
    for each in values:
        if isinstance(each, Tensor):
            found.append(each)
        elif isinstance(each, (tuple, list)):
            if each:
                _gather(each, found)
        elif isinstance(each, dict) and each:
            _gather(each.values(), found)


def mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """The same nest with a function done to everything that is no container.

    >>> mapped({"a": [1, (2, 3)]}, lambda each: each + 1)
    {'a': [2, (3, 4)]}
    """
    if isinstance(value, dict):
        twin = copy.copy(value)  # of its own kind, whatever that is made with
        twin.update({key: mapped(each, function) for key, each in value.items()})
        return twin
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(each, function) for each in value))
    if isinstance(value, list):
        several = copy.copy(value)
        several[:] = [mapped(each, function) for each in value]
        return several
    if isinstance(value, tuple):
        return type(value)(mapped(each, function) for each in value)
    return function(value)
