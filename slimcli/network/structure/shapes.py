"""Sizes that know whose channels they count, for code that compares shapes.

``if x.shape == y.shape: y = y + x`` takes another branch as soon as a cut makes two widths equal,
and no single trial shows all widths. ``y.view(b, c, -1)`` with the ``c`` of another tensor fits
only as long as both are cut alike, as they are when a trial cuts half of everything.
``if x.shape[2] % 2: x = F.pad(x, (0, 0, 0, 1))`` pads images of other sizes than the example's.
Inside a trace, ``tensor.shape`` and ``tensor.size()`` therefore hold numbers that tell when two of
them are compared or one is given as a size, and when one is divided. Tensors that
become arrays are heard as well: no operator follows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from slimcli.network.structure import user_line
from slimcli.network.structure.nodes import MADE_TO_MEASURE
from slimcli.network.structure.planes import Labels, labels_of, pack
from slimcli.network.structure.record import Record
from slimcli.network.structure.trace import Planes, Tracer

_LEAVING = frozenset(
    (torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.__dlpack__, torch.Tensor.tolist)
)
"""What a tensor becomes something else by."""

_BARE = frozenset((torch.Tensor.data_ptr, torch.Tensor.untyped_storage, torch.Tensor.storage))
"""What looks at memory itself."""

NONE: Labels = np.zeros(0, np.int64)

RESHAPES = frozenset({torch.Tensor.view, torch.Tensor.reshape, torch.reshape, torch.Tensor.expand})
"""They are told all sizes of their result."""

_MAKING = {
    torch.Tensor.repeat: 1,
    torch.Tensor.expand: 1,
    torch.Tensor.new_ones: 1,
    torch.Tensor.new_full: 1,
    torch.ones: 0,
    torch.full: 0,
}
"""What makes tensors of equal entries, and where its sizes begin."""


def _heard(compare: Callable[[int, Any], bool]) -> Any:
    def method(self: Length, other: object) -> bool:
        self._met(other)
        return compare(self, other)

    return method


def _divided(divide: Callable[[int, Any], Any]) -> Any:
    def method(self: Length, other: object) -> Any:
        if not len(self.labels):
            self.record.remainders += [(each, user_line.current()) for each in self.tensor]
        return divide(self, other)

    return method


class Length(int):
    """One size of a tensor.

    Attributes:
        record: Where comparisons go.
        tensor: Planes of the whole tensor.
        labels: Of the channels along this dimension; none where it has none.
        is_plain: One label an entry, in order.
    """

    record: Record
    tensor: Planes = ()
    labels: Labels = NONE
    is_plain: bool = True

    def _met(self, other: object) -> None:
        """Equal widths must stay equal; of unequal ones the larger stays, so they never meet."""
        if not isinstance(other, Length) or other.record is not self.record:
            return  # a number, or kept by the user's code since another trace
        pair: tuple[Length, ...] = (self, other)
        if int(self) != int(other):
            pair = (max(pair, key=int),)
        elif all(each.is_plain and len(each.labels) and each.labels.all() for each in pair):
            self.record.join_labels(self.labels, other.labels)
            return
        for each in pair:
            if len(each.labels):
                reason = f"its width is compared with another at {user_line.current()}"
                each.record.freeze_labels(each.labels, reason)

    __eq__ = _heard(int.__eq__)
    __ne__ = _heard(int.__ne__)
    __lt__ = _heard(int.__lt__)
    __le__ = _heard(int.__le__)
    __gt__ = _heard(int.__gt__)
    __ge__ = _heard(int.__ge__)
    __hash__ = int.__hash__

    __mod__ = _divided(int.__mod__)
    __divmod__ = _divided(int.__divmod__)
    __floordiv__ = _divided(int.__floordiv__)
    __truediv__ = _divided(int.__truediv__)

    def __neg__(self) -> int:
        """``-height % 2`` is a remainder of the height."""
        negative = Length(int.__neg__(self))
        negative.record, negative.tensor, negative.labels = self.record, self.tensor, self.labels
        return negative

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies are plain numbers."""
        return int, (int(self),)


def _plain(value: Any) -> Any:
    """The same with sizes that don't tell."""
    if isinstance(value, Length):
        return int.__int__(value)
    return tuple(map(_plain, value)) if isinstance(value, (tuple, list)) else value


def _same(left: Length, right: Length) -> bool:
    """Do they count the same channels, perhaps in another order (a shuffle)?"""
    return np.array_equal(np.unique(left.labels), np.unique(right.labels))


def _is_full(size: Length) -> bool:
    """Is it the number of some channels, all of them known?"""
    return len(size.labels) > 1 and size.is_plain and bool(size.labels.all())


class Shapes(TorchFunctionMode):
    """Inside its ``with`` block sizes of tensors are :class:`Length`.

    Args:
        tracer: Knows the channels of tensors.
    """

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Executes the function; sizes are looked at."""
        if func in _LEAVING or func in _BARE:
            self._leave(func, args[0], sys._getframe(1))
        if func is F.affine_grid:  # torch looks for the smallest of these sizes
            args, kwargs = _plain(args), {k: _plain(v) for k, v in (kwargs or {}).items()}
        result = func(*args, **(kwargs or {}))
        if func in _MAKING:
            self._measure(result, list(args[_MAKING[func] :]))
        if func in RESHAPES:
            self._tie(result, [*args[1:], *(kwargs or {}).values()])
        if func is torch.Tensor.size and type(result) is int:
            dim = args[1] if len(args) > 1 else (kwargs or {})["dim"]
            return self._length(args[0], dim, result) if isinstance(dim, int) else result
        if isinstance(result, torch.Size) and args and isinstance(args[0], Tensor):
            return torch.Size([self._length(args[0], dim, size) for dim, size in enumerate(result)])
        return result

    def _leave(self, func: Any, tensor: Tensor, caller: FrameType) -> None:
        """What becomes of the channels from here on is not seen."""
        if user_line.is_of_slim(caller):
            return  # hooks of a trace
        self._tracer.record.leaves = True
        if func in _LEAVING:
            reason = f"channels leave torch at {user_line.current()}"
            self._tracer.record.freeze(self._tracer.planes_of(tensor), reason)

    def _tie(self, result: Tensor, sizes: list[Any]) -> None:
        """A width given as a size ties its channels to those that come to lie along that axis."""
        if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
            sizes = list(sizes[0])
        if result.dim() != len(sizes):
            return
        for dim, size in enumerate(sizes):
            if isinstance(size, Length) and size.record is self._tracer.record:
                found = self._length(result, dim, int(size))
                if len(size.labels) and len(found.labels) and not _same(size, found):
                    size._met(found)

    def _measure(self, result: Tensor, sizes: list[Any]) -> None:
        """What is made of equal entries, as many as there are channels, has these channels.

        ``blur.repeat(x.shape[1], 1, 1, 1)`` is cut with ``x``.
        """
        if sizes and isinstance(sizes[0], (tuple, list)):
            sizes = list(sizes[0])
        if result.dim() != len(sizes):
            return
        planes = self._tracer.planes_of(result)
        for dim, size in enumerate(sizes):
            if not isinstance(size, Length) or size.record is not self._tracer.record:
                continue
            if any(plane.shape[dim] > 1 for plane in planes) or not _is_full(size):
                continue
            labels = torch.from_numpy(np.repeat(size.labels, result.shape[dim] // int(size)))
            shape = [-1 if axis == dim else 1 for axis in range(result.dim())]
            node = self._tracer.record.table.add(MADE_TO_MEASURE)
            planes += (pack(labels, node).view(shape),)
        self._tracer.relabel(result, planes)

    def _length(self, tensor: Tensor, dim: int, size: int) -> Length:
        length = Length(size)
        length.record, length.tensor = self._tracer.record, self._tracer.planes_of(tensor)
        found = [plane for plane in length.tensor if plane.shape[dim] > 1]
        if found:
            length.labels = np.concatenate([labels_of(each).reshape(-1).numpy() for each in found])
            length.is_plain = len(length.labels) == size
        return length
