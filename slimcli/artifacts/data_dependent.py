"""Finds the outputs whose shape depends on data, and what went into the ops that made them so.

After an NMS or a boolean mask two correct models can return another number of boxes, because one
score lies a rounding error beside a threshold. What can be compared are the inputs of such ops; of
a mask the values it was made from. Where there are such ops, the same is true of what was ordered
by value on the way to them: two scores that are nearly equal change places, and with them what is
picked by their places, which is compared before it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from slimcli.artifacts import nested

ALSO_DYNAMIC = ("torchvision::nms",)  # carries no tag
PICKING = ("aten::index.Tensor", "aten::gather", "aten::index_select")
ORDERING = ("aten::topk", "aten::sort", "aten::sort.stable", "aten::argsort")


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, follows what is computed from the result of a data-dependent op.

    Attributes:
        inputs: Floating point inputs of data-dependent and ordering ops that do not follow such an
            op themselves: the last values whose shape and place are known.
        operators: Names of the data-dependent ops that follow no other.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inputs: list[torch.Tensor] = []
        self.operators: list[str] = []
        # Both hold the tensors, so that no id is used twice.
        self._behind: dict[int, torch.Tensor] = {}
        self._ordered: dict[int, torch.Tensor] = {}
        self._masks: dict[int, tuple[torch.Tensor, list[torch.Tensor]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the op and notes what it means for shapes."""
        result = func(*args, **(kwargs or {}))
        given = _tensors((args, kwargs or {}))
        made = {id(each): each for each in _tensors(result)}
        is_behind = any(id(each) in self._behind for each in given)
        is_ordered = any(id(each) in self._ordered for each in given)
        is_ordering = func.name() in ORDERING
        if not is_behind and _is_dynamic(func, args):
            self.operators.append(func.name())
            is_behind = is_ordering = True
        if is_ordering and not is_ordered and not (set(made) & set(self._behind)):
            self.inputs += [each.detach().clone() for each in self._values(given)]
        elif is_ordered and func.name() in PICKING and not self.is_behind(given[:1]):
            self.inputs += [each.detach().clone() for each in self._values(given[:1])]
        if is_behind:
            self._behind.update(made)
        if is_ordered or is_ordering:
            self._ordered.update(made)
        for each in made.values():
            if each.dtype is torch.bool:
                self._masks[id(each)] = (each, self._values(given))
        return result

    def _values(self, tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """The floating point tensors, and those that masks among them were made from."""
        found: dict[int, torch.Tensor] = {}
        for each in tensors:
            sources = [each] if each.is_floating_point() else self._masks.get(id(each), (0, []))[1]
            found |= {id(source): source for source in sources}
        return list(found.values())

    def is_behind(self, tensors: Iterable[Any]) -> bool:
        """Whether the shape or the order of any of these depends on data."""
        return any(id(each) in self._behind or id(each) in self._ordered for each in tensors)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for _, leaf in nested.leaves(value) if isinstance(leaf, torch.Tensor)]


def _is_dynamic(func: Any, args: Any) -> bool:
    if func is torch.ops.aten.index.Tensor:  # tagged, but dynamic only with a mask
        return any(each.dtype in (torch.bool, torch.uint8) for each in _tensors(args[1]))
    return torch.Tag.dynamic_output_shape in func.tags or func.name() in ALSO_DYNAMIC
