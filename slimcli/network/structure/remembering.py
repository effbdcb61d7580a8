"""What a model keeps in attributes between two runs, so that a run can be undone."""

from __future__ import annotations

import copy
from collections import OrderedDict, deque
from typing import Any

from torch import nn

_OF_ALL_MODULES = frozenset(vars(nn.Module()))
_CONTAINERS = (list, dict, OrderedDict, set, deque)
_NOTHING = object()


class Memory:
    """The attributes and buffers of a model as they are now.

    Numbers that a run writes into a buffer are not noticed.

    Args:
        model: Not changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._attributes = {
            key: Change(*place, copy.copy(place[2]) if type(place[2]) in _CONTAINERS else None)
            for key, place in _attributes(model).items()
        }
        self._buffers = dict(model.named_buffers())

    @property
    def has_changed(self) -> bool:
        """Did a run keep anything that another one may meet?"""
        buffers = dict(self._model.named_buffers())
        is_same = buffers.keys() == self._buffers.keys() and all(
            each is self._buffers[name] for name, each in buffers.items()
        )
        return not is_same or bool(self.changes())

    def changes(self) -> list[Change]:
        """The attributes that were set, replaced, deleted, or have grown or shrunk since."""
        now = _attributes(self._model)
        found = [
            Change(module, name, _NOTHING, None)
            for key, (module, name, _) in now.items()
            if key not in self._attributes
        ]
        return found + [each for each in self._attributes.values() if not each.is_undone]

    def undo(self) -> None:
        """All attributes are again what they were."""
        for change in self.changes():
            change.undo()


class Change:
    """What an attribute was before a run.

    Args:
        module: Has it.
        name: Of the attribute.
        value: What it was.
        content: If that is a container, a copy of it.
    """

    def __init__(self, module: nn.Module, name: str, value: Any, content: Any) -> None:
        self._place = vars(module), name
        self._value, self._content = value, content

    @property
    def is_undone(self) -> bool:
        """Is the attribute what it was?"""
        attributes, name = self._place
        is_same = attributes.get(name, _NOTHING) is self._value
        return is_same and (self._content is None or len(self._content) == len(self._value))

    def undo(self) -> None:
        """The attribute is again what it was."""
        attributes, name = self._place
        if self._value is _NOTHING:
            attributes.pop(name, None)
            return
        attributes[name] = self._value
        if self._content is not None:  # the same object: functions may close over it
            self._value.clear()
            is_row = isinstance(self._value, (list, deque))
            (self._value.extend if is_row else self._value.update)(self._content)


def _attributes(model: nn.Module) -> dict[tuple[int, str], tuple[nn.Module, str, Any]]:
    return {
        (id(module), name): (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if name not in _OF_ALL_MODULES
    }
