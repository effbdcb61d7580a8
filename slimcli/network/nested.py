"""Tensors, and all else, inside lists, tuples, dicts and dataclasses."""

from __future__ import annotations

import contextlib
import copy
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn

_PLAIN = frozenset((bool, int, float, str, type(None)))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples, dicts and dataclasses; anything else is passed over.

    >>> import torch
    >>> [tensor.item() for tensor in tensors_in({"a": [torch.tensor(1)], "b": torch.tensor(2)})]
    [1, 2]
    """
    found: list[Tensor] = []
    _gather((value,), found)
    return iter(found)


def _gather(
    values: Iterable[Any], found: list[Tensor], inside: frozenset[int] = frozenset()
) -> None:
    """Into a list: generators inside generators take several times as long."""
    for each in values:
        if isinstance(each, Tensor):
            found.append(each)
        elif isinstance(each, (tuple, list)):
            if each:
                _gather(each, found, inside)
        elif isinstance(each, (dict, UserDict)):
            if each:
                _gather(each.values(), found, inside)
        elif type(each) not in _PLAIN and holds_fields(each) and id(each) not in inside:
            _gather(fields_of(each).values(), found, inside | {id(each)})


def holds_fields(value: Any) -> bool:
    """Is it a dataclass, and no class or layer?"""
    return is_dataclass(value) and not isinstance(value, (type, nn.Module))


def fields_of(value: Any) -> dict[str, Any]:
    """What a dataclass holds; a field may be a property that can't be read yet."""
    found = {}
    for field in fields(value):
        with contextlib.suppress(Exception):
            found[field.name] = getattr(value, field.name)
    return found


def mapped(value: Any, function: Callable[[Any], Any], inside: frozenset[int] = frozenset()) -> Any:
    """The same nest with a function done to everything that is no container or dataclass.

    >>> mapped({"a": [1, (2, 3)]}, lambda each: each + 1)
    {'a': [2, (3, 4)]}
    """
    if isinstance(value, (dict, UserDict)):
        twin = copy.copy(value)  # of its own kind, whatever that is made with
        twin.update({key: mapped(each, function, inside) for key, each in value.items()})
        return twin
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(each, function, inside) for each in value))
    if isinstance(value, list):
        several = copy.copy(value)
        several[:] = [mapped(each, function, inside) for each in value]
        return several
    if isinstance(value, tuple):
        return type(value)(mapped(each, function, inside) for each in value)
    if type(value) not in _PLAIN and holds_fields(value):
        if id(value) in inside:  # a part that refers to its whole
            return value
        twin = copy.copy(value)
        for name, each in fields_of(value).items():
            changed = mapped(each, function, inside | {id(value)})
            if changed is not each:
                object.__setattr__(twin, name, changed)  # it may be frozen
        return twin
    return function(value)
