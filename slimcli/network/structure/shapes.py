"""Where code asks for sizes, inside a trace: it gets numbers that tell what it does with them.

``tensor.shape``, ``tensor.size()`` and the widths that layers keep as attributes are
:class:`Length` then; what is made or viewed with them is looked at, too. Tensors that become arrays
are heard as well: no operator follows.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from slimcli.network.nested import tensors_in
from slimcli.network.structure import user_line
from slimcli.network.structure.lengths import Length, plain, same
from slimcli.network.structure.nodes import MADE_TO_MEASURE, ZEROS_TO_MEASURE, Node
from slimcli.network.structure.planes import LABEL_MASK, NONE, axis_entries, pack
from slimcli.network.structure.record import Record
from slimcli.network.structure.trace import Tracer

_LEAVING = frozenset(
    (
        *(torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.__dlpack__),
        *(torch.Tensor.tolist, torch.Tensor.untyped_storage, torch.Tensor.storage),
        torch.Tensor.data_ptr,
    )
)
"""What a tensor becomes something else by."""

_TAKING = _LEAVING | {torch.Tensor.__deepcopy__, torch.Tensor.__repr__, torch.Tensor.__format__}
"""What looks at the numbers of a tensor where no operator tells of it."""

_COUNTS = frozenset((torch.Tensor.numel, torch.Tensor.nelement, torch.numel, torch.Tensor.__len__))

_TELLING = frozenset((torch.Tensor.stride, vars(torch.Tensor.__base__)["nbytes"].__get__))
"""What tells sizes in a way of its own."""

_WIDTHS = {
    **{"out_channels": 0, "in_channels": 1, "out_features": 0, "in_features": 1},
    **{"num_features": 0, "num_channels": 0},
}
"""Attributes of layers, and which dimension of the weight has this size."""

_BROADCASTS = frozenset({torch.broadcast_to, torch.Tensor.broadcast_to})

RESHAPES = _BROADCASTS | {
    torch.Tensor.view,
    torch.Tensor.reshape,
    torch.reshape,
    torch.Tensor.expand,
}
"""They are told all sizes of their result."""

_OF_NUMBERS = frozenset({torch.tensor, torch.as_tensor, torch.arange})
"""They make tensors of numbers, sizes among them."""

_UNFLATTENS = frozenset({torch.Tensor.unflatten, torch.unflatten})
"""They are told the sizes that one axis becomes."""

_LIKE_ANOTHER = frozenset({torch.Tensor.view_as, torch.Tensor.reshape_as, torch.Tensor.expand_as})
"""They are told another tensor, whose sizes their result gets."""

_MAKING = {
    torch.Tensor.repeat: 1,
    torch.Tensor.expand: 1,
    **dict.fromkeys(_BROADCASTS, 1),
    torch.Tensor.new_ones: 1,
    torch.Tensor.new_full: 1,
    torch.Tensor.new_empty: 1,
    torch.ones: 0,
    torch.full: 0,
    torch.empty: 0,
    torch.Tensor.new_zeros: 1,
    torch.zeros: 0,
}
"""What makes tensors of equal entries, and where its sizes begin."""

_ZEROS = frozenset({torch.zeros, torch.Tensor.new_zeros, torch.empty, torch.Tensor.new_empty})
"""Their entries are zero; in empty memory are none yet that could be missed."""


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
        caller, kwargs = sys._getframe(1), kwargs or {}
        if func in _TAKING:
            self._leave(func, args[0], caller)
        if func is F.affine_grid:  # torch looks for the smallest of these sizes
            args, kwargs = plain(args), {key: plain(value) for key, value in kwargs.items()}
        if func is torch.Tensor.is_same_size:  # asked of the sizes, which tell
            return self._sizes(args[0], caller) == self._sizes(args[1], caller)
        known, checks = self._tracer.checks, func is F.one_hot and _classes(args, kwargs) > 0
        self._tracer.checks = known or checks
        try:
            result = func(*args, **kwargs)
        finally:
            self._tracer.checks = known
        self._hear(func, args, kwargs, result)
        is_asked = bool(args) and isinstance(args[0], Tensor) and not user_line.is_of_slim(caller)
        return self._told_of(func, args, kwargs, result, caller) if is_asked else result

    def _hear(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Notes what a function is told."""
        self._hear_scalars((*args, *kwargs.values()), result)
        for each in tensors_in(result) if type(result) is not Tensor else ():
            if type(each) is not Tensor:  # of a kind of the user's: a new object in torch's place
                self._tracer.planes_of(each)
        if func is torch.Tensor.__deepcopy__:
            self._tracer.relabel(result, self._tracer.planes_of(args[0]))
        if func in _MAKING:
            sizes = list(args[_MAKING[func] :]) or [kwargs.get("size", ())]
            self._measure(result, sizes, ZEROS_TO_MEASURE if func in _ZEROS else MADE_TO_MEASURE)
        self._hear_layout(func, args, kwargs, result)

    def _hear_layout(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        """Notes which channels come to lie where others do."""
        if func in RESHAPES:
            self._tie(result, [*args[1:], *kwargs.values()])
        if func in _OF_NUMBERS:
            self._tell_sizes((args, kwargs))
        if func in _UNFLATTENS:
            told = dict(zip(("input", "dim", "sizes"), args, strict=False)) | kwargs
            sizes, shape = list(told["sizes"]), list(result.shape)
            dim = told["dim"] % (len(shape) - len(sizes) + 1)
            self._tie(result, [*shape[:dim], *sizes, *shape[dim + len(sizes) :]])
        if func in _LIKE_ANOTHER:
            self._lie_like(result, next(iter((*args[1:], *kwargs.values()))))
        if func is torch.broadcast_tensors:
            for each, other in itertools.product(result, tensors_in(args)):
                self._lie_like(each, other)

    def _lie_like(self, result: Tensor, other: Tensor) -> None:
        """A tensor is laid out, or expanded, like another one."""
        lead = result.dim() - other.dim()
        sizes = [1] * lead + [self._length(other, *each) for each in enumerate(other.shape)]
        self._tie(result, sizes)
        if _is_no_index(result):
            strides = zip(sizes, result.stride(), strict=True)
            repeated = [size if stride == 0 else plain(size) for size, stride in strides]
            self._measure(result, repeated, MADE_TO_MEASURE)

    def _tell_sizes(self, value: Any) -> None:
        """As numbers of a tensor, sizes are compared where nobody hears."""
        if isinstance(value, Length):
            self._tracer.record.tell(value.labels)
        elif isinstance(value, (tuple, list, dict)):
            for each in value.values() if isinstance(value, dict) else value:
                self._tell_sizes(each)

    def _told_of(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
        caller: FrameType,
    ) -> Any:
        """What a function says, with sizes that tell."""
        if func in _COUNTS:
            return self._count(func, args[0], result)
        if func is torch.Tensor.size and type(result) is int:
            dim = args[1] if len(args) > 1 else kwargs["dim"]
            return self._told(args[0], dim, result, caller) if isinstance(dim, int) else result
        if isinstance(result, torch.Size) or func in _TELLING:
            sizes = self._sizes(args[0], caller)
            if isinstance(result, torch.Size):
                return sizes
            for each in sizes:
                self._tracer.record.tell(getattr(each, "labels", NONE))
        return result

    def _hear_scalars(self, args: tuple[Any, ...], result: Any) -> None:
        """A size of the batch that a tensor is multiplied with, say, makes other batches others."""
        if not any(type(each) is Length and not len(each.labels) for each in args):
            return
        if isinstance(result, Tensor) and isinstance(args[0], Tensor):
            self._tracer.record.counts_sizes |= result.shape == args[0].shape

    def _sizes(self, tensor: Tensor, caller: FrameType) -> torch.Size:
        sizes = enumerate(tensor.shape)
        return torch.Size([self._told(tensor, dim, n, caller) for dim, n in sizes])

    def _told(self, tensor: Tensor, dim: int, size: int, caller: FrameType) -> Length:
        """A size that the code asks for."""
        length = self._length(tensor, dim, size)
        if not (user_line.is_of_torch(caller) or self._tracer.drops):
            self._tracer.record.asks_sizes = True
            self._tracer.record.ask(length.labels)
        return length

    def _leave(self, func: Any, tensor: Tensor, caller: FrameType) -> None:
        """What becomes of the channels from here on is not seen."""
        if user_line.is_of_slim(caller):
            return  # hooks of a trace
        if self._tracer.skipping is not None:
            self._tracer.skipping.ask(tensor)
        if func not in _LEAVING:
            return
        self._tracer.record.leaves = True
        self._tracer.back_up(tensor)  # an array may be written
        if func is not torch.Tensor.data_ptr:
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
                found = self._length(result, dim, plain(size))
                if len(size.labels) and len(found.labels) and not same(size, found):
                    self._meet(size, found, dim)

    def _meet(self, size: Length, found: Length, dim: int) -> None:
        """Channels come to lie along an axis as wide as others: one row, or several of them."""
        if not size.is_full:
            size.met(found)
            return
        width = torch.from_numpy(size.labels).view(-1, 1)
        for plane in found.tensor:
            if plane.shape[dim] > 1:
                reason = "its width is compared with another"
                self._tracer.record.tie(width, axis_entries(plane, dim), reason)

    def _measure(self, result: Tensor, sizes: list[Any], made: Node) -> None:
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
            if any(plane.shape[dim] > 1 for plane in planes) or not size.is_full:
                continue
            labels = torch.from_numpy(np.repeat(size.labels, result.shape[dim] // plain(size)))
            shape = [-1 if axis == dim else 1 for axis in range(result.dim())]
            node = self._tracer.record.table.add(made)
            planes += (pack(labels, node).view(shape),)
        self._tracer.relabel(result, planes)

    def _count(self, func: Any, tensor: Tensor, count: int) -> int:
        """How many entries, or rows, a tensor has."""
        self._tracer.record.counts_sizes = True
        if func is torch.Tensor.__len__:
            rows = self._length(tensor, 0, count)
            self._tracer.record.ask(rows.labels)
            int(rows)  # python makes a plain number of it
            return count
        length = Length(count)
        length.record, length.tensor = self._tracer.record, self._tracer.planes_of(tensor)
        if length.tensor:
            every = [each.numpy().reshape(-1) & LABEL_MASK for each in length.tensor]
            length.labels, length.is_plain = np.concatenate(every), False
            self._tracer.record.ask(length.labels)
        return length

    def _length(self, tensor: Tensor, dim: int, size: int) -> Length:
        length = Length(size)
        length.record, length.tensor = self._tracer.record, self._tracer.planes_of(tensor)
        found = [plane for plane in length.tensor if plane.shape[dim] > 1]
        if found:
            length.labels = np.concatenate(
                [each.numpy().reshape(-1) & LABEL_MASK for each in found]
            )
            length.is_plain = len(length.labels) == size
        length.is_batch = dim == 0
        return length


def _is_no_index(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool


def _classes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many classes ``one_hot`` is told; it looks for them itself if there are none."""
    return int(plain(args[1] if len(args) > 1 else kwargs.get("num_classes", -1)))


@contextlib.contextmanager
def told_widths(record: Record) -> Iterator[None]:
    """Meanwhile the widths that layers keep as numbers are sizes of their weights."""
    changed: list[tuple[nn.Module, str, int]] = []
    dims = {(each.tensor, each.dim): each for each in record.sources.dims}
    for path, module in record.sources.modules.items():
        own = vars(module)
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for name in own.keys() & _WIDTHS.keys():
            found = dims.get((f"{path}.weight" if path else "weight", _WIDTHS[name]))
            if found is None or type(own[name]) is not int or own[name] != found.size:
                continue
            changed.append((module, name, own[name]))
            length = Length(found.size)
            length.record = record
            length.labels = np.arange(found.first, found.first + found.size)
            own[name] = length
    try:
        yield
    finally:
        for module, name, width in changed:
            vars(module)[name] = width
