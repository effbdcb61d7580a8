"""What runs leave in attributes, globals and caches of functions, so that it can be undone."""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

_OF_ALL_MODULES = frozenset(vars(nn.Module()))
_CONTAINERS = (list, dict, OrderedDict, set, deque)
_CACHED = type(functools.lru_cache(len))
_NOTHING = object()

Space = dict[str, Any]
"""Names and what they stand for: attributes of an object, or globals."""


class Change:
    """What a name stood for before a run.

    Args:
        space: Where the name is.
        name: Of an attribute, or a global one.
        value: What it stood for.
    """

    def __init__(self, space: Space, name: str, value: Any = _NOTHING) -> None:
        self._space, self._name, self._value = space, name, value
        self._content = copy.copy(value) if type(value) in _CONTAINERS else None

    @property
    def is_undone(self) -> bool:
        """Does it stand for the same, of the same length?"""
        is_same = self._space.get(self._name, _NOTHING) is self._value
        return is_same and (self._content is None or len(self._content) == len(self._value))

    def undo(self) -> None:
        """The name stands again for what it did."""
        if self._value is _NOTHING:
            self._space.pop(self._name, None)
            return
        self._space[self._name] = self._value
        if self._content is not None:  # the same object: functions may close over it
            self._value.clear()
            is_row = isinstance(self._value, (list, deque))
            (self._value.extend if is_row else self._value.update)(self._content)


class Memory:
    """What the names in some namespaces stand for now.

    Args:
        spaces: Not changed. What every module has, and what is Python's own, does not count.
    """

    def __init__(self, spaces: Iterable[Space]) -> None:
        self._spaces = list(spaces)
        self._known = {
            (number, name): Change(space, name, space[name])
            for number, space in enumerate(self._spaces)
            for name in _names(space)
        }

    def changes(self) -> list[Change]:
        """What was set, replaced, deleted, or has grown or shrunk since."""
        new = [
            Change(space, name)
            for number, space in enumerate(self._spaces)
            for name in _names(space)
            if (number, name) not in self._known
        ]
        return new + [each for each in self._known.values() if not each.is_undone]

    def undo(self) -> None:
        """All names stand again for what they did."""
        for change in self.changes():
            change.undo()


def attributes_of(model: nn.Module) -> list[Space]:
    """Of all its modules; numbers that a run writes into a tensor are not noticed."""
    return [vars(module) for module in model.modules()]


@contextlib.contextmanager
def forgotten_by_code(model: nn.Module) -> Iterator[None]:
    """What runs leave in the Python modules of the model's classes is gone afterwards.

    A trial runs in float64, and tensors of that would stay in caches of masks and positions.
    """
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    owners = {kind.__module__ for kind in kinds}
    names = {name for name in owners if name.partition(".")[0] not in ("torch", "builtins")}
    spaces = [vars(sys.modules[name]) for name in sorted(names & sys.modules.keys())]
    classes = [dict(vars(kind)) for kind in kinds if kind.__module__ in names]
    before = [(each, each.cache_info()) for space in (*spaces, *classes) for each in _cached(space)]
    memory = Memory(spaces)
    try:
        yield
    finally:
        memory.undo()
        for function, info in before:
            if function.cache_info().misses != info.misses:
                function.cache_clear()


def _cached(space: Space) -> list[Any]:
    values = [getattr(value, "__func__", value) for value in space.values()]
    return [each for each in values if isinstance(each, _CACHED)]


def _names(space: Space) -> list[str]:
    return [name for name in space if name not in _OF_ALL_MODULES and not name.startswith("__")]
