"""Functions of a deep copy that lead to the original, made anew so that they lead to the copy.

What a function closes over is a graph: functions hold cells, cells hold functions, bound methods,
containers. Everything in it from which something that was copied can be reached is made anew, once.
"""

from __future__ import annotations

import functools
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, MethodWrapperType
from typing import Any


def _content(cell: CellType) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # a variable that has no value yet
        return ()


def _parts_of_function(function: FunctionType) -> tuple[Any, ...]:
    cells, defaults = function.__closure__ or (), function.__defaults__ or ()
    named = function.__kwdefaults__ or {}
    return (*cells, *defaults, *named.values(), *vars(function).values())


Parts = dict[type, Callable[[Any], Iterable[Any]]]

_FIXED: Parts = {
    FunctionType: _parts_of_function,
    MethodType: lambda method: (method.__func__, method.__self__),
    BuiltinFunctionType: lambda method: (method.__self__,),
    MethodWrapperType: lambda method: (method.__self__,),
    functools.partial: lambda call: (call.func, *call.args, *call.keywords.values()),
    weakref.ref: lambda ref: () if ref.__callback__ is not None else (ref(),),
    tuple: iter,
}
_CONTAINERS: Parts = {
    list: iter,
    set: iter,
    dict: lambda values: (*values.keys(), *values.values()),
}
_PARTS: Parts = {**_FIXED, **_CONTAINERS, CellType: _content}

FIXED = frozenset(_FIXED)
"""Types of what leads on to other things and can't be changed, only replaced."""


def may_lead_on(value: Any) -> bool:
    """Could this thing, which a copy holds, have to be replaced?"""
    kind = type(value)
    return kind in FIXED and (kind is not tuple or not FIXED.isdisjoint(map(type, value)))


class Rebound:
    """What takes the place of things.

    Args:
        memo: Of ``copy.deepcopy``, afterwards.
        held: All that :meth:`of` will be asked for.
    """

    def __init__(self, memo: dict[int, Any], held: Iterable[Any]) -> None:
        self._memo = memo
        self._renewed = _renewed(memo, held)
        self._made: dict[int, Any] = {}
        self._unfilled: list[tuple[CellType, CellType]] = []

    def of(self, value: Any) -> Any:
        """The copy of a thing, or one made anew; the thing itself if it leads to no copy."""
        made = self._of(value)
        while self._unfilled:
            old, new = self._unfilled.pop()
            for content in _content(old):
                new.cell_contents = self._of(content)
        return made

    def _of(self, value: Any) -> Any:
        if id(value) not in self._renewed:
            return value
        if id(value) not in self._made:
            twin = self._memo.get(id(value), value)
            made = self._make(value) if twin is value else self._of(twin)
            self._made[id(value)] = made
        return self._made[id(value)]

    def _make(self, value: Any) -> Any:
        make: dict[type, Callable[[Any], Any]] = {
            FunctionType: self._function,
            CellType: self._cell,
            MethodType: lambda method: MethodType(*map(self._of, _FIXED[MethodType](method))),
            BuiltinFunctionType: self._builtin,
            MethodWrapperType: self._builtin,
            functools.partial: self._partial,
            weakref.ref: lambda ref: weakref.ref(self._of(ref())),
            tuple: self._all,
            list: self._list,
            set: lambda values: set(self._all(values)),
            dict: self._dict,
        }
        return make[type(value)](value)

    def _function(self, old: FunctionType) -> FunctionType:
        cells = old.__closure__ and self._all(old.__closure__)
        new = FunctionType(old.__code__, old.__globals__, old.__name__, None, cells)
        self._made[id(old)] = new  # before its defaults are looked at: they may lead back
        functools.update_wrapper(new, old, updated=())
        del vars(new)["__wrapped__"]
        new.__defaults__ = old.__defaults__ and self._all(old.__defaults__)
        new.__kwdefaults__ = self._named(old.__kwdefaults__ or {})
        vars(new).update(self._named(vars(old)))
        return new

    def _cell(self, old: CellType) -> CellType:
        new = CellType()  # filled later: a function may close over itself
        self._unfilled.append((old, new))
        return new

    def _builtin(self, method: Any) -> Any:
        return getattr(self._of(method.__self__), method.__name__)

    def _partial(self, old: functools.partial[Any]) -> functools.partial[Any]:
        new = functools.partial(
            self._of(old.func), *self._all(old.args), **self._named(old.keywords)
        )
        vars(new).update(vars(old))
        return new

    def _list(self, old: list[Any]) -> list[Any]:
        new = self._made[id(old)] = []
        new.extend(self._all(old))
        return new

    def _dict(self, old: dict[Any, Any]) -> dict[Any, Any]:
        new = self._made[id(old)] = {}
        new.update({self._of(key): self._of(each) for key, each in old.items()})
        return new

    def _all(self, values: Iterable[Any]) -> tuple[Any, ...]:
        return tuple(map(self._of, values))

    def _named(self, values: dict[Any, Any]) -> dict[Any, Any]:
        return {key: self._of(each) for key, each in values.items()}


def _renewed(memo: dict[int, Any], held: Iterable[Any]) -> dict[int, Any]:
    """By id, the things that lead to a copy, or that share a variable with such a function."""
    holders, copied = _graph(memo, held)
    renewed, waiting = {}, copied
    while waiting:
        value = waiting.pop()
        if id(value) not in renewed:
            renewed[id(value)] = value
            waiting += holders[id(value)]
            if type(value) is FunctionType:  # all that share a variable must share the new one
                waiting += value.__closure__ or ()
    return renewed


def _graph(memo: dict[int, Any], held: Iterable[Any]) -> tuple[dict[int, list[Any]], list[Any]]:
    """By id of a thing, what holds it, for all that can be reached; and what was copied of it.

    Containers of the copy end it: whoever asks for what they hold changes them in place.
    """
    copies = set(map(id, memo.values()))
    holders: dict[int, list[Any]] = defaultdict(list)
    copied, found, waiting = [], {}, list(held)
    while waiting:
        value = waiting.pop()
        if id(value) in found:
            continue
        found[id(value)] = value  # keeps it alive, so that its id stays its own
        twin = memo.get(id(value), value)
        if twin is not value:
            copied.append(value)
            waiting.append(twin)  # a copied tuple may hold functions
        elif type(value) not in _CONTAINERS or id(value) not in copies:
            for part in _parts(value, memo):
                holders[id(part)].append(value)
                waiting.append(part)
    return holders, copied


def _parts(value: Any, memo: dict[int, Any]) -> list[Any]:
    """What a thing leads to directly, if that was copied or leads on."""
    parts = _PARTS[type(value)](value) if type(value) in _PARTS else ()
    return [part for part in parts if id(part) in memo or type(part) in _PARTS]
