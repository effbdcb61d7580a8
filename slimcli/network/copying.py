"""Deep copies of models whose functions belong to the copy.

``copy.deepcopy`` takes a function for an atom: a hook that closes over its model would still write
into the original, and read from there.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, TypeVar

from torch import nn

from slimcli.network.rebinding import FIXED, Rebound, may_lead_on

Value = TypeVar("Value")

Place = tuple[Any, Any, Any]
"""A dictionary or a list, a key, and what is there."""

_CONTAINERS = frozenset({OrderedDict, dict, set})


def deep_copy(value: Value, memo: dict[int, Any] | None = None) -> Value:
    """Like ``copy.deepcopy``; functions that close over what is copied close over the copies.

    They are looked for in the attributes, dictionaries and lists of all that is copied. Functions
    that lead to nothing that is copied stay the same objects.

    >>> net = nn.Identity()
    >>> net.me = lambda it=net: it
    >>> twin = deep_copy(net)
    >>> twin.me() is twin, net.me() is net
    (True, True)

    Args:
        value: A model, or a container of models. It stays as it is.
        memo: As of ``copy.deepcopy``: what stands in for what, by the id of the latter.
    """
    memo = {} if memo is None else memo
    if isinstance(value, nn.Module):
        memo.update({**copies_of_nothing(value), **memo})
    twin = copy.deepcopy(value, memo)
    places = _places(memo)
    if places:
        rebound = Rebound(memo, [held for _, _, held in places])
        for holder, key, held in places:
            # The plain method, because a container of the user's may refuse to be changed.
            (dict if isinstance(holder, dict) else list).__setitem__(holder, key, rebound.of(held))
    return twin


def copies_of_nothing(model: nn.Module) -> dict[int, Any]:
    """For ``deepcopy``: a copy of each empty container that a module has, a dozen for its hooks.

    Left to itself it spends half of its time on them.
    """
    return {
        id(each): type(each)()
        for module in model.modules()
        for each in vars(module).values()
        if type(each) in _CONTAINERS and not each and not getattr(each, "__dict__", None)
    }


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
