"""What runs leave in attributes and in caches of functions, so that it can be undone."""

from __future__ import annotations

import contextlib
import copy
import functools
import operator
import sys
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from torch import nn

_OF_ALL_MODULES = frozenset(vars(nn.Module()))
_CONTAINERS = (list, dict, OrderedDict, set, deque)
_CACHED = type(functools.lru_cache(len))
_METHODS = (staticmethod, classmethod)
_NOTHING = object()

Space = dict[str, Any]
"""Attributes of an object."""


class Change:
    """What a name stood for before a run, and does not any more.

    Args:
        space: Where the name is.
        name: Of an attribute.
        value: What it stood for.
        content: What was in it, if it is a container.
    """

    def __init__(
        self, space: Space, name: str, value: Any = _NOTHING, content: Any = _NOTHING
    ) -> None:
        self._space, self._name, self._value, self._content = space, name, value, content

    def undo(self) -> None:
        """The name stands again for what it did."""
        if self._value is _NOTHING:
            self._space.pop(self._name, None)
            return
        self._space[self._name] = self._value
        if self._content is not _NOTHING:  # the same object: functions may close over it
            self._value.clear()
            is_row = isinstance(self._value, (list, deque))
            (self._value.extend if is_row else self._value.update)(self._content)


class Memory:
    """What the names in some namespaces stand for now.

    Args:
        spaces: Not changed. What every module has does not count.
    """

    def __init__(self, spaces: Iterable[Space]) -> None:
        self._known = [
            (space, {name: space[name] for name in space if name not in _OF_ALL_MODULES})
            for space in spaces
        ]
        self._contents = {
            id(value): copy.copy(value)
            for _, known in self._known
            for value in known.values()
            if type(value) in _CONTAINERS
        }

    def changes(self) -> list[Change]:
        """What was set, replaced, deleted, or has grown or shrunk since."""
        new: list[Change] = []
        old: list[Change] = []
        for space, known in self._known:
            names = space.keys() - known.keys() - _OF_ALL_MODULES
            new += [Change(space, name) for name in space if name in names] if names else []
            for name, value in known.items():
                content = self._contents.get(id(value), _NOTHING)
                is_same = space.get(name, _NOTHING) is value
                if not is_same or (content is not _NOTHING and not _are_same(content, value)):
                    old.append(Change(space, name, value, content))
        return new + old

    def undo(self) -> None:
        """All names stand again for what they did."""
        for change in self.changes():
            change.undo()


def _are_same(left: Any, right: Any) -> bool:
    """Do two containers hold the same objects?"""
    if isinstance(left, dict):
        left, right = [*left.keys(), *left.values()], [*right.keys(), *right.values()]
    elif isinstance(left, set):
        left, right = sorted(left, key=id), sorted(right, key=id)
    return len(left) == len(right) and all(map(operator.is_, left, right))


def attributes_of(model: nn.Module) -> list[Space]:
    """Of its modules and of plain objects they hold; what is written into tensors is not seen."""
    spaces = [vars(module) for module in model.modules()]
    held = {
        id(each): each
        for space in spaces
        for each in space.values()
        if type(each) is SimpleNamespace
    }
    return spaces + [vars(each) for each in held.values()]


@contextlib.contextmanager
def emptied_caches(model: nn.Module) -> Iterator[None]:
    """Functions in the files of the model's classes that remembered nothing do so afterwards, too.

    A trial runs in float64 and with other widths: what is made then must not come back. What a
    function remembered before can't be told from it, and stays.
    """
    every = {kind for module in model.modules() for kind in type(module).__mro__}
    kinds = [
        kind for kind in every if kind.__module__.partition(".")[0] not in ("torch", "builtins")
    ]
    files = {kind.__module__ for kind in kinds} & sys.modules.keys()
    spaces = [*map(vars, kinds), *(getattr(sys.modules[name], "__dict__", {}) for name in files)]
    functions = {id(each): each for space in spaces for each in _remembering(space)}
    empty = [each for each in functions.values() if not each.cache_info().currsize]
    try:
        yield
    finally:
        for function in empty:
            function.cache_clear()


def _remembering(space: Mapping[str, Any]) -> list[Any]:
    """Functions with a cache; nothing else is asked anything, as it may answer in its own way."""
    wrapped = [v.__func__ if type(v) in _METHODS else v for v in tuple(space.values())]
    return [each for each in wrapped if type(each) is _CACHED]
