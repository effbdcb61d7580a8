"""Deep copies of models whose functions belong to the copy.

``copy.deepcopy`` takes a function for an atom: a hook that closes over its model would still write
into the original, and read from there. And it refuses tensors that have a history, which models
keep of their last run: features that were tapped, losses for the side.
"""

from __future__ import annotations

import copy
import copyreg
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from slimcli.network.rebinding import FIXED, Rebound, may_lead_on

Value = TypeVar("Value")

Place = tuple[Any, Any, Any]
"""A dictionary or a list, a key, and what is there."""

_CONTAINERS = frozenset({OrderedDict, dict, set})

_ATOMS = frozenset({bool, int, float, str, type(None)})

_OWN_WAYS = frozenset(
    ("__deepcopy__", "__getnewargs_ex__", "__getnewargs__", "__slots__", "__reduce_ex__")
)
"""What has one of these is copied in its own way; all classes have the last one."""


class _Detaching(TorchFunctionMode):
    """Inside, ``copy.deepcopy`` gives a tensor with a history a copy without one."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            detached = tensor.detach()
            # Alive as long as the memo: the id of a tensor that is gone would be another's.
            memo.setdefault(id(memo), []).append(detached)
            return detached.__deepcopy__(memo)  # of its memory: what shares it goes on to do so
        return func(*args, **(kwargs or {}))


def deep_copy(
    value: Value, memo: dict[int, Any] | None = None, *, takes_history: bool = True
) -> Value:
    """Like ``copy.deepcopy``; functions that close over what is copied close over the copies.

    They are looked for in the attributes, dictionaries and lists of all that is copied. Functions
    that lead to nothing that is copied stay the same objects. A tensor that was computed from
    parameters has a detached one for a copy.

    >>> net = nn.Identity()
    >>> net.me = lambda it=net: it
    >>> twin = deep_copy(net)
    >>> twin.me() is twin, net.me() is net
    (True, True)

    Args:
        value: A model, or a container of models. It stays as it is.
        memo: As of ``copy.deepcopy``: what stands in for what, by the id of the latter.
        takes_history: False: tensors that were computed from parameters are refused.

    Raises:
        Exception: ``copy.deepcopy`` can't copy something.
    """
    memo = {} if memo is None else memo
    before = dict(memo)
    has_history = False
    try:
        twin = _copied(value, memo)
    except RuntimeError:
        if not takes_history:
            raise
        has_history = True
    if has_history:  # out of the handler, whose traceback holds what was copied until then
        memo.clear()
        memo.update(before)
        with _Detaching():  # not before: every tensor of an ordinary model would pass the mode
            twin = _copied(value, memo)
    places = _places(memo)
    if places:
        rebound = Rebound(memo, [held for _, _, held in places])
        for holder, key, held in places:
            # The plain method, because a container of the user's may refuse to be changed.
            (dict if isinstance(holder, dict) else list).__setitem__(holder, key, rebound.of(held))
    return twin


def _copied(value: Value, memo: dict[int, Any]) -> Value:
    """``copy.deepcopy``, which takes modules attribute by attribute where they leave that to it.

    By itself it asks for the way to copy each flag, number and name of a layer, and each of the
    dozen empty containers for its hooks: most of its time.
    """
    if isinstance(value, nn.Module):
        plain = _plain_parts(value, memo)
        for module in plain:
            memo[id(module)] = type(module).__new__(type(module))
            memo.setdefault(id(memo), []).append(module)
        for module in plain:
            memo[id(module)].__setstate__(_attributes(module, memo))
    return copy.deepcopy(value, memo)


def _plain_parts(model: nn.Module, memo: Mapping[int, Any]) -> list[nn.Module]:
    """Modules that leave it to ``copy.deepcopy``, parts before what they are parts of.

    Nothing below a module that is copied in its own way, which may leave its parts out.
    """
    found: list[nn.Module] = []
    seen: set[int] = set()
    plain_kinds: dict[type[nn.Module], bool] = {}
    todo = [(model, False)]
    while todo:  # without recursion: networks may be deep
        module, is_done = todo.pop()
        if is_done:
            found.append(module)
            continue
        kind = type(module)
        if kind not in plain_kinds:
            plain_kinds[kind] = _is_plain_kind(kind)
        is_plain = plain_kinds[kind] and _OWN_WAYS.isdisjoint(vars(module))
        if is_plain and id(module) not in seen and id(module) not in memo:
            seen.add(id(module))
            todo.append((module, True))
            todo += [(part, False) for part in reversed(list(module.children()))]
    return found


def _is_plain_kind(kind: type[nn.Module]) -> bool:
    """Would ``copy.deepcopy`` make an empty object and give it copies of the attributes?"""
    return (
        kind.__new__ is object.__new__
        and kind.__reduce_ex__ is object.__reduce_ex__
        and kind.__reduce__ is object.__reduce__
        and getattr(kind, "__getstate__", None) is getattr(nn.Module, "__getstate__", None)
        and kind not in copyreg.dispatch_table
        and not any(hasattr(kind, name) for name in _OWN_WAYS - {"__reduce_ex__"})
    )


def _attributes(module: nn.Module, memo: dict[int, Any]) -> dict[str, Any]:
    """Copies of all attributes."""
    copies = {}
    state = getattr(module, "__getstate__", lambda: vars(module))()
    for name, each in state.items():
        kind = type(each)
        if kind in _ATOMS or (kind is tuple and _ATOMS.issuperset(map(type, each))):
            copies[name] = each
        elif id(each) in memo:
            copies[name] = memo[id(each)]
        elif kind in _CONTAINERS and not each and not getattr(each, "__dict__", None):
            copies[name] = memo[id(each)] = kind()
        elif kind is dict and _is_known(each, memo):
            copies[name] = memo[id(each)] = {key: memo.get(id(v)) for key, v in each.items()}
            memo.setdefault(id(memo), []).append(each)
        else:
            copies[name] = copy.deepcopy(each, memo)
    return copies


def _is_known(held: dict[Any, Any], memo: dict[int, Any]) -> bool:
    """Are there names, and for each of them nothing or what stands in for it already?

    Parts and shared parameters are such.
    """
    keys, values = held.keys(), held.values()
    return {str}.issuperset(map(type, keys)) and all(v is None or id(v) in memo for v in values)


def _places(memo: dict[int, Any]) -> list[Place]:
    """Where the copy holds things that may have to be replaced.

    Under its own id a memo lists everything that was copied, so nothing has to be searched.
    """
    found: list[Place] = []
    for original in memo.get(id(memo), ()):
        twin = memo.get(id(original))
        if isinstance(twin, list):
            found += _places_in(twin, twin, enumerate(twin))
        elif isinstance(twin, dict) and "_forward_hooks" not in twin:  # a module's attributes have
            found += _places_in(twin, twin.values(), twin.items())
        if attributes := getattr(twin, "__dict__", None):
            found += _places_in(attributes, attributes.values(), attributes.items())
    return found


def _places_in(
    holder: Any, values: Iterable[Any], items: Iterable[tuple[Any, Any]]
) -> Iterable[Place]:
    if FIXED.isdisjoint(map(type, values)):
        return ()  # nearly always, and known at the speed of C
    return [(holder, key, value) for key, value in items if may_lead_on(value)]
