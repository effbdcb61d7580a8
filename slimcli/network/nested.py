"""Tensors, and all else, inside lists, tuples and dicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and dicts, in order; anything else is passed over.

    >>> import torch
    >>> [tensor.item() for tensor in tensors_in({"a": [torch.tensor(1)], "b": torch.tensor(2)})]
    [1, 2]
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors_in(each)
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_in(each)


def mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """The same nest with a function done to everything that is no container.

    >>> mapped({"a": [1, (2, 3)]}, lambda each: each + 1)
    {'a': [2, (3, 4)]}
    """
    if isinstance(value, dict):
        return type(value)({key: mapped(each, function) for key, each in value.items()})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(each, function) for each in value))
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(each, function) for each in value)
    return function(value)
