"""Products that are not computed: labels follow shapes, and hardly any model asks for the numbers.

Convolutions and matrix products of activations are most of the time of a forward pass. In their
place come zeros of the same shape, *made up* as is all that is computed from them. As soon as
anything might depend on made up numbers (a branch, an index, an operator that is not torch's own),
:class:`NumbersAsked` ends the run, and the model is followed again with every number computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slimcli.network.structure.memory import memory_of
from slimcli.network.structure.operators import ASKING_FOR_SHAPES, READING, base_name
from slimcli.network.structure.tensor_map import TensorMap

_ASKING = frozenset((torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output))

_ORDINARY = (Tensor, nn.Parameter)


class NumbersAsked(BaseException):
    """What happens next may depend on numbers that were not computed.

    No ``Exception``: code of the user's that catches those must not go on with made up numbers.
    """


class Skipping:
    """Executes operators, but products of activations; knows which tensors are made up.

    Attributes:
        were_asked: Numbers that are made up were asked for.
        has_skipped: There are such numbers.
    """

    def __init__(self) -> None:
        self._made_up: TensorMap[bool] = TensorMap()
        self.were_asked = False
        self.has_skipped = False

    def execute(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        inputs: Sequence[Tensor],
        is_given: bool,
    ) -> tuple[Any, bool]:
        """The output of an operator, and whether it is made up.

        Args:
            func: Any operator.
            args: Its arguments.
            kwargs: More of them.
            inputs: All tensors among them.
            is_given: One of them hangs on the batch. What hangs on nothing but weights is computed:
                the model may keep it.

        Raises:
            NumbersAsked: It needs numbers that there are none of.
        """
        is_shape_enough = base_name(func)[0] in ASKING_FOR_SHAPES
        known = [] if is_shape_enough else [each for each in inputs if each in self._made_up]
        if known and (_asks(func) or not all(map(_has_fractions, known))):
            self.refuse()
        product = _PRODUCTS.get(func) if is_given or known else None
        output = None if product is None else product(args)
        if output is None:
            return func(*args, **kwargs), bool(known)
        self.has_skipped = True
        return output, True

    def mark(self, tensors: Iterable[Tensor]) -> None:
        """These are made up."""
        for tensor in tensors:
            self._made_up[tensor] = True

    def look_at(self, tensor: Tensor) -> None:
        """A tensor that no operator made: it may lie in the memory of one that is made up."""
        memory = memory_of(tensor)
        if memory is not None and any(memory_of(each) == memory for each in self._made_up):
            self._made_up[tensor] = True

    def ask(self, tensor: Tensor) -> None:
        """Something that is no operator reads a tensor.

        Raises:
            NumbersAsked: It is made up.
        """
        self.look_at(tensor)
        if tensor in self._made_up:
            self.refuse()

    def refuse(self) -> None:
        """Ends the run.

        Raises:
            NumbersAsked: Always.
        """
        self.were_asked = True
        raise NumbersAsked


@functools.cache
def _asks(func: Any) -> bool:
    """Does what an operator gives, or whether it does, hang on numbers? Others than torch's may."""
    is_foreign = func.namespace != "aten"
    return is_foreign or base_name(func)[0] in READING or not _ASKING.isdisjoint(func.tags)


def _has_fractions(tensor: Tensor) -> bool:
    """Has it other numbers than whole ones and truth values? Those pick and choose."""
    return tensor.is_floating_point() or tensor.is_complex()


def _are_plain(tensors: Sequence[Tensor]) -> bool:
    """Do they lie in rows in the memory of the CPU, so that a product of them does, too?"""
    return all(
        type(each) in _ORDINARY
        and each.layout == torch.strided
        and each.device.type == "cpu"
        and each.is_floating_point()
        and each.is_contiguous()
        and each.dtype == tensors[0].dtype
        for each in tensors
    )


_BY_NUMPY = {torch.float32: np.float32, torch.float64: np.float64, torch.float16: np.float16}


def _zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory until they are written: torch writes its own at once."""
    if dtype in _BY_NUMPY:
        return torch.from_numpy(np.zeros(tuple(shape), _BY_NUMPY[dtype]))
    return torch.zeros(shape, dtype=dtype)


def _convolution(args: tuple[Any, ...]) -> Tensor | None:
    tensor: Tensor = args[0]
    weight, bias, stride, padding, dilation, is_transposed, more, groups = args[1:9]
    if tensor.dim() != weight.dim() or not _are_plain((tensor, weight)):
        return None
    kernel, image = weight.shape[2:], tensor.shape[2:]
    sizes = []
    for axis, (size, width) in enumerate(zip(image, kernel, strict=True)):
        step, border, spread, extra = (
            each[axis if len(each) > 1 else 0] for each in (stride, padding, dilation, more)
        )
        reach = spread * (width - 1) + 1
        if is_transposed:
            sizes.append((size - 1) * step - 2 * border + reach + extra)
        else:
            sizes.append((size + 2 * border - reach) // step + 1)
    channels = weight.shape[1] * groups if is_transposed else weight.shape[0]
    wanted = weight.shape[0] if is_transposed else weight.shape[1] * groups
    fits = tensor.shape[1] == wanted and channels % groups == 0 and min(sizes) > 0
    if bias is not None:
        fits &= bias.shape == (channels,) and bias.dtype == tensor.dtype
    return _zeros((tensor.shape[0], channels, *sizes), tensor.dtype) if fits else None


def _added_product(args: tuple[Any, ...]) -> Tensor | None:
    product, added = _product(args[1:]), args[0]
    if product is None or added.dtype != product.dtype or added.dim() > product.dim():
        return None
    pairs = zip(reversed(added.shape), reversed(product.shape), strict=False)
    return product if all(size in (1, whole) for size, whole in pairs) else None


def _product(args: tuple[Any, ...]) -> Tensor | None:
    left: Tensor = args[0]
    right: Tensor = args[1]
    if not _are_plain((left, right if right.is_contiguous() else right.mT)):
        return None
    fits = left.shape[-1] == right.shape[-2] and left.shape[:-2] == right.shape[:-2]
    return _zeros((*left.shape[:-1], right.shape[-1]), left.dtype) if fits else None


_PRODUCTS: dict[Any, Callable[[tuple[Any, ...]], Tensor | None]] = {
    torch.ops.aten.convolution.default: _convolution,
    torch.ops.aten.addmm.default: _added_product,
    torch.ops.aten.baddbmm.default: _added_product,
    torch.ops.aten.mm.default: _product,
    torch.ops.aten.bmm.default: _product,
}
"""What gives zeros in the place of a product; None where it is to be computed, or would fail."""
