"""Walks nested predictions and model inputs: tensors inside lists, dicts, dataclasses and the like.

Shared by verification, which compares leaves, and by ONNX export, whose graphs know flat tensors.
It knows no file and no runtime.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import namedtuple
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

Spec = dict[str, Any]
CONSTANTS = (bool, int, float, str, bytes, type(None))


class Fields(dict[str, Any]):
    """What a dataclass or a model output becomes when its own class is not at hand.

    Fields are reached as attributes, as keys, and by position.

    >>> out = Fields(logits=1, loss=2)
    >>> out.logits, out["loss"], out[0]
    (1, 2, 1)
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int | slice):
            return tuple(self.values())[key]
        return super().__getitem__(key)


def is_tensor(value: Any) -> bool:
    """Whether the value is a leaf that holds numbers in an array."""
    return isinstance(value, torch.Tensor | np.ndarray | np.generic)


def children(value: Any) -> list[tuple[str, Any]] | None:
    """Names and values of the parts of a container; None if it is not one we can look into."""
    if isinstance(value, Mapping):
        return [(str(key), each) for key, each in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, list | tuple):
        return [(str(index), each) for index, each in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    if not isinstance(value, CONSTANTS) and getattr(value, "__dict__", None):
        return [(name, each) for name, each in vars(value).items() if not name.startswith("_")]
    return None


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf with its path, in the order of the containers.

    >>> list(leaves({"boxes": [1, 2], "name": "a"}))
    [('boxes.0', 1), ('boxes.1', 2), ('name', 'a')]
    """
    parts = None if is_tensor(value) else children(value)
    if parts is None:
        yield path, value
        return
    for name, each in parts:
        yield from leaves(each, f"{path}.{name}" if path else name)


def describe(value: Any) -> tuple[Spec, list[tuple[str, torch.Tensor]]]:
    """The structure of a value as plain data, and its tensors with their paths.

    Args:
        value: Nested value; its tensors may have any shape.

    Returns:
        A description that JSON can hold, in which a tensor is its index in the second result.

    Raises:
        TypeError: A part of it is neither a tensor, a constant nor a container we know.
    """
    found: list[tuple[str, torch.Tensor]] = []
    return _describe(value, "", found), found


def _describe(value: Any, path: str, found: list[tuple[str, torch.Tensor]]) -> Spec:
    if isinstance(value, torch.Tensor):
        found.append((path, value))
        return {"kind": "tensor", "index": len(found) - 1}
    if isinstance(value, CONSTANTS) and not isinstance(value, bytes):
        return {"kind": "constant", "value": value}
    parts = None if is_tensor(value) else children(value)
    if parts is None:
        raise TypeError(f"{path or 'the value'} is a {type(value).__name__}")
    items = [
        [name, _describe(each, f"{path}.{name}" if path else name, found)] for name, each in parts
    ]
    return {"kind": _kind(value), "type": type(value).__name__, "items": items}


def _kind(value: Any) -> str:
    if type(value) is list or type(value) is tuple or type(value) is dict:
        return type(value).__name__
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return "namedtuple"
    return "fields"


def rebuild(spec: Spec, tensors: Iterable[Any]) -> Any:
    """A value of the described structure with these tensors in it.

    >>> rebuild({"kind": "tuple", "items": [["0", {"kind": "tensor", "index": 0}]]}, [7])
    (7,)
    """
    flat = list(tensors)

    def build(node: Spec) -> Any:
        kind = node["kind"]
        if kind == "tensor":
            return flat[node["index"]]
        if kind == "constant":
            return node["value"]
        names = [name for name, _ in node["items"]]
        values = [build(each) for _, each in node["items"]]
        if kind == "list":
            return values
        if kind == "tuple":
            return tuple(values)
        if kind == "namedtuple":
            return namedtuple(node["type"], names)(*values)
        pairs = zip(names, values, strict=True)
        return dict(pairs) if kind == "dict" else Fields(pairs)

    return build(spec)


def substitute(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """The same value, same classes, with its tensors taken from ``tensors`` in order."""
    if isinstance(value, torch.Tensor):
        return next(tensors)
    parts = None if is_tensor(value) else children(value)
    if parts is None:
        return value
    new = [substitute(each, tensors) for _, each in parts]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*new)
    if isinstance(value, list | tuple):
        return type(value)(new)
    if type(value) is dict:
        return dict(zip(value, new, strict=True))
    made = copy.copy(value)
    if isinstance(value, Mapping):
        for key, each in zip(value, new, strict=True):
            made[key] = each
        return made
    for (name, _), each in zip(parts, new, strict=True):
        object.__setattr__(made, name, each)
    return made


def bind_names(
    parameters: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments by name; positional ones beyond the named parameters are called ``args.<n>``.

    >>> bind_names(["x", "mask"], [1], {"mask": 2})
    {'x': 1, 'mask': 2}
    """
    extra = [f"args.{index}" for index in range(max(0, len(args) - len(parameters)))]
    bound = dict(zip([*parameters, *extra], args, strict=False))
    bound.update({name: kwargs[name] for name in parameters if name in kwargs})
    bound.update({name: value for name, value in kwargs.items() if name not in bound})
    return bound
