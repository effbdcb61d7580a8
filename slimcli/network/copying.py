"""Deep copies of models whose functions belong to the copy.

``copy.deepcopy`` takes a function for an atom: a hook that closes over its model would still write
into the original, and read from there. And it refuses tensors that have a history, which models
keep of their last run: features that were tapped, losses for the side.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from slimcli.network.rebinding import FIXED, Rebound, may_lead_on

Value = TypeVar("Value")

Place = tuple[Any, Any, Any]
"""A dictionary or a list, a key, and what is there."""

_CONTAINERS = frozenset({OrderedDict, dict, set})


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
    if isinstance(value, nn.Module):
        memo.update({**copies_of_nothing(value), **memo})
    before = dict(memo)
    has_history = False
    try:
        twin = copy.deepcopy(value, memo)
    except RuntimeError:
        if not takes_history:
            raise
        has_history = True
    if has_history:  # out of the handler, whose traceback holds what was copied until then
        memo.clear()
        memo.update(before)
        with _Detaching():  # not before: every tensor of an ordinary model would pass the mode
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
