"""To int8 codes and back, with gradients, in few passes over memory.

On a CPU the cost of a fake quantizer is memory traffic. So a tensor is walked through in blocks
that stay in the cache, and only blocks in which a code leaves the range are clamped and get a
gradient mask; a range that training has outgrown in a few places costs next to nothing. Elsewhere a
block is the whole tensor and nothing is asked, because the answer would have to be waited for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

HIGHEST_CODE = 127
BLOCK_VALUES = 65_536
"""Values a thread works on at a time: 256 kB of float32, several of which fit in a second cache."""


def quantize(x: Tensor, scale: Tensor, low: int) -> Tensor:
    """Codes of ``x`` as floats: divided, rounded half to even, clamped to [low, 127].

    >>> quantize(torch.tensor([0.5, 1.5, -300.0]), torch.tensor(1.0), -128).tolist()
    [0.0, 2.0, -128.0]
    """
    return torch.div(x, scale).round_().clamp_(low, HIGHEST_CODE)


def asks(x: Tensor) -> bool:
    """Whether looking at the values of ``x`` costs no waiting."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and x.numel() > 0


def in_memory_order(x: Tensor) -> Tensor:
    """``x`` itself if its values lie side by side, else a copy of which that is true."""
    formats = [torch.contiguous_format]
    if x.dim() in (4, 5):
        formats.append(torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    if any(x.is_contiguous(memory_format=each) for each in formats):
        return x
    return x.contiguous()


def blocks(scale: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Parts of the scale and of tensors of one shape and memory layout, as views.

    Args:
        scale: Rank 0, or as many dimensions as the tensors, all of size 1 but one.
        tensors: Their values must lie side by side in memory.

    >>> [len(part) for _, part in blocks(torch.tensor(1.0), torch.zeros(3, 4))]
    [12]
    """
    first = tensors[0]
    by_row = scale.dim() > 0
    if not asks(first) or (by_row and len(scale) != len(first)):
        yield scale, *tensors
        return
    rows = len(first) if by_row else first.numel()
    shape = (rows, first.numel() // rows) if by_row else (rows,)
    strides = (first.numel() // rows, 1) if by_row else (1,)
    values = BLOCK_VALUES * torch.get_num_threads()
    size = max(1, values // strides[0])
    flat = [torch.split(each.as_strided(shape, strides), size) for each in tensors]
    scales = torch.split(scale.reshape(-1, 1), size) if by_row else (scale,) * len(flat[0])
    yield from zip(scales, *flat, strict=True)


def is_within(codes: Tensor, low: int) -> bool:
    """Whether no code leaves the range; False where asking would cost waiting.

    >>> is_within(torch.tensor([-128.0, 127.0]), -128), is_within(torch.tensor([-128.0]), -127)
    (True, False)
    """
    if not asks(codes):
        return False
    smallest, largest = torch.aminmax(codes)
    return float(smallest) >= low and float(largest) <= HIGHEST_CODE


def fake_quantize(x: Tensor, scale: Tensor, low: int, fits: bool) -> Tensor:
    """``x`` on the int8 grid; its gradient is 1 where the code is in range and 0 elsewhere.

    Args:
        x: Any shape, at least float32.
        scale: Rank 0, or as many dimensions as ``x``, all of size 1 but one.
        low: Smallest code.
        fits: Whether it is known that no code leaves the range.
    """
    return _FakeQuantize.apply(x, scale, low, fits)  # type: ignore[no-any-return]


def learned_fake_quantize(
    x: Tensor, scale: Tensor, low: int, factor: float, is_overwritten: bool
) -> Tensor:
    """The same values; the scale gets the gradient of LSQ times ``factor``.

    ``is_overwritten`` says that the result may be changed in place before the backward pass.
    """
    return _LearnedFakeQuantize.apply(  # type: ignore[no-any-return]
        x, scale, low, factor, is_overwritten
    )


def _rounded(ctx: Any, x: Tensor, scale: Tensor, low: int) -> tuple[Tensor, list[Tensor]]:
    """``x`` quantized and back, and for each block that was clamped where; noted in ``ctx``."""
    y, outside = torch.empty_like(x), []
    ctx.clipped, ctx.layout = [], (scale, x.stride())
    for number, (step, source, result) in enumerate(blocks(scale, x, y)):
        torch.div(source, step, out=result).round_()
        if is_within(result, low):
            result.mul_(step)
            continue
        codes = result.clamp(low, HIGHEST_CODE)
        outside.append(codes != result)
        ctx.clipped.append(number)
        torch.mul(codes, step, out=result)
    return y, outside


def _laid_out(ctx: Any, gradient: Tensor) -> Tensor:
    """The gradient in the memory order of x."""
    if gradient.stride() == ctx.layout[1]:
        return gradient
    return _like_x(ctx, gradient)


def _like_x(ctx: Any, gradient: Tensor) -> Tensor:
    """A copy of the gradient in the memory order of x."""
    made = torch.empty_strided(
        gradient.shape, ctx.layout[1], dtype=gradient.dtype, device=gradient.device
    )
    return made.copy_(gradient)


def _masked(ctx: Any, gradient: Tensor, outside: Sequence[Tensor]) -> Tensor:
    """The gradient of x: that of y, and zero where the code was clamped."""
    if not outside:
        return gradient
    masked, clipped = _like_x(ctx, gradient), dict(zip(ctx.clipped, outside, strict=True))
    for number, (_, part) in enumerate(blocks(ctx.layout[0], masked)):
        if number in clipped:
            part.masked_fill_(clipped[number], 0.0)
    return masked


class _FakeQuantize(torch.autograd.Function):
    """Quantize and back; the gradient is 1 where the code is in range and 0 elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, fits: bool) -> Tensor:
        if fits:
            return torch.div(x, scale).round_().mul_(scale)
        y, outside = _rounded(ctx, in_memory_order(x), scale, low)
        ctx.save_for_backward(*outside)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _masked(ctx, gradients[0], ctx.saved_tensors), None, None, None


class _LearnedFakeQuantize(torch.autograd.Function):
    """As above, with the gradient of the scale (LSQ, arXiv 1902.08153, equations 3 and 5).

    d y / d scale is ``round(x/scale) - x/scale`` inside the range and the clamped code outside:
    ``(y - x) / scale`` and ``y / scale``. So nothing is kept but x and y, which the layer that
    reads y keeps as well.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, low: int, factor: float, is_overwritten: bool
    ) -> Tensor:
        x = in_memory_order(x)
        ctx.factor = factor
        y, outside = _rounded(ctx, x, scale.detach(), low)
        ctx.save_for_backward(x, y.clone() if is_overwritten else y, *outside)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, y, *outside = ctx.saved_tensors
        scale, clipped = ctx.layout[0], dict(zip(ctx.clipped, outside, strict=True))
        gradient = _laid_out(ctx, gradients[0])
        sums = []
        for number, (step, source, result, each) in enumerate(blocks(scale, x, y, gradient)):
            slope = result - source
            if number in clipped:
                torch.where(clipped[number], result, slope, out=slope)
            sums.append(_product(each, slope, step) / step)
        of_scale = torch.cat(sums).reshape(scale.shape) if scale.dim() else torch.stack(sums).sum()
        return _masked(ctx, gradient, outside), of_scale * ctx.factor, None, None, None


def _product(gradient: Tensor, slope: Tensor, scale: Tensor) -> Tensor:
    """Sum of gradient times slope, in the shape of the scale."""
    if scale.dim() == 0:
        return torch.dot(gradient.flatten(), slope.flatten())
    return (gradient * slope).sum_to_size(scale.shape)
