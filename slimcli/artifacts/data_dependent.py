"""Finds the outputs whose shape depends on data, and what went into the ops that made them so.

After an NMS or a boolean mask two correct models can return another number of boxes, because one
score lies a rounding error beside a threshold. What can be compared are the inputs of such ops.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from slimcli.artifacts import nested

ALSO_DYNAMIC = ("torchvision::nms",)  # carries no tag


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, follows what is computed from the result of a data-dependent op.

    Attributes:
        inputs: Floating point inputs of data-dependent ops that do not follow such an op
            themselves: the last values whose shape is known.
        operators: Names of those ops.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inputs: list[torch.Tensor] = []
        self.operators: list[str] = []
        self._behind: dict[int, torch.Tensor] = {}  # holds them, so that no id is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the op and notes what it means for shapes."""
        result = func(*args, **(kwargs or {}))
        given = _tensors((args, kwargs or {}))
        is_behind = self.is_behind(given)
        if not is_behind and _is_dynamic(func, args):
            self.operators.append(func.name())
            self.inputs += [each.detach().clone() for each in given if each.is_floating_point()]
            is_behind = True
        if is_behind:
            self._behind.update({id(each): each for each in _tensors(result)})
        return result

    def is_behind(self, tensors: Iterable[Any]) -> bool:
        """Whether any of these was computed from the result of a data-dependent op."""
        return any(id(each) in self._behind for each in tensors)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for _, leaf in nested.leaves(value) if isinstance(leaf, torch.Tensor)]


def _is_dynamic(func: Any, args: Any) -> bool:
    if func is torch.ops.aten.index.Tensor:  # tagged, but dynamic only with a mask
        return any(each.dtype in (torch.bool, torch.uint8) for each in _tensors(args[1]))
    return torch.Tag.dynamic_output_shape in func.tags or func.name() in ALSO_DYNAMIC
