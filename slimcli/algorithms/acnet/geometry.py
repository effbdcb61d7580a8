"""Where a small kernel sits inside a large one, and how both become one kernel. Pure functions.

Every branch of a block is a smaller kernel on some of the taps of the full kernel (a *patch*), so
one rule gives each branch's padding or crop, and one rule fuses them all: scale by the norm, add
onto the patch. Fusing is done in float64. The file knows no block and no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimcli.network.fuse import norm_as_scale

Fused: TypeAlias = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Patch:
    """The taps of the full kernel that a smaller kernel covers.

    Attributes:
        rows: Row indices in the full kernel, evenly spaced.
        columns: Column indices in the full kernel, evenly spaced.
    """

    rows: range
    columns: range


@dataclass(frozen=True)
class Geometry:
    """The sizes of one convolution, padding as numbers.

    Attributes:
        channels: Input and output channels.
        kernel: Height and width.
        stride: Along height and width.
        padding: Rows and columns added on each side.
        dilation: Along height and width.
        groups: Number of groups.
        padding_mode: ``zeros``, ``reflect``, ``replicate`` or ``circular``.
    """

    channels: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    padding_mode: str

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Geometry:
        """The geometry of a conv with odd kernel sizes (``same`` pads such kernels evenly)."""
        kernel = cast(tuple[int, int], conv.kernel_size)
        dilation = cast(tuple[int, int], conv.dilation)
        if conv.padding == "same":
            padding = (dilation[0] * (kernel[0] // 2), dilation[1] * (kernel[1] // 2))
        elif conv.padding == "valid":
            padding = (0, 0)
        else:
            padding = cast(tuple[int, int], conv.padding)
        return cls(
            channels=(conv.in_channels, conv.out_channels),
            kernel=kernel,
            stride=cast(tuple[int, int], conv.stride),
            padding=padding,
            dilation=dilation,
            groups=conv.groups,
            padding_mode=conv.padding_mode,
        )

    @property
    def centre(self) -> Patch:
        """The one tap in the middle."""
        return Patch(middle(self.kernel[0]), middle(self.kernel[1]))

    def borders(self, patch: Patch) -> tuple[int, int, int, int]:
        """Rows and columns to add on the left, right, top and bottom of a branch's input.

        With them a branch's windows keep their place inside the windows of the full kernel. For a
        centred patch this is ACNet's rule ``o = p - d (k // 2)``; less than 0 is a crop.

        >>> conv = nn.Conv2d(4, 4, 3, padding=0)
        >>> Geometry.of(conv).borders(Patch(range(1, 2), range(3)))
        (0, 0, -1, -1)
        """
        top, bottom = _border(self.kernel[0], self.padding[0], self.dilation[0], patch.rows)
        left, right = _border(self.kernel[1], self.padding[1], self.dilation[1], patch.columns)
        return left, right, top, bottom

    def without_padding(self) -> Geometry:
        """The same windows over an input that is padded already."""
        return Geometry(
            self.channels, self.kernel, self.stride, (0, 0), self.dilation, self.groups, "zeros"
        )


def middle(size: int) -> range:
    """The one middle tap of an odd size.

    >>> list(middle(5))
    [2]
    """
    return range(size // 2, size // 2 + 1)


def _border(size: int, padding: int, dilation: int, taps: range) -> tuple[int, int]:
    return padding - dilation * taps[0], padding - dilation * (size - 1 - taps[-1])


def embed(small: Tensor, patch: Patch, kernel: tuple[int, int]) -> Tensor:
    """A full-size kernel that is ``small`` on the patch and 0 elsewhere.

    >>> embed(torch.ones(1, 1, 1, 3), Patch(range(1, 2), range(3)), (3, 3))[0, 0].sum(dim=1)
    tensor([0., 3., 0.])
    """
    full = small.new_zeros(*small.shape[:2], *kernel)
    rows = torch.tensor(list(patch.rows), device=small.device)
    columns = torch.tensor(list(patch.columns), device=small.device)
    full[:, :, rows[:, None], columns] = small
    return full


def scale_of(norm: nn.Module, channels: int) -> Fused:
    """What a norm does in eval mode, ``y = x * scale + shift``; Identity is 1 and 0.

    Returns:
        Scale and shift, float64 (channels,).

    >>> scale_of(nn.Identity(), 1)
    (tensor([1.], dtype=torch.float64), tensor([0.], dtype=torch.float64))
    """
    if isinstance(norm, nn.Identity):
        return torch.ones(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    return norm_as_scale(norm)


def fuse_scaled(kernel: Tensor, bias: Tensor | None, norm: nn.Module) -> Fused:
    """Kernel and bias of the conv that equals a conv and the norm behind it, in float64.

    Args:
        kernel: (O, I / g, kh, kw).
        bias: (O,) or None.
        norm: A batch norm with running statistics, or Identity.

    Returns:
        Kernel (O, I / g, kh, kw) and bias (O,).
    """
    scale, shift = (each.to(kernel.device) for each in scale_of(norm, kernel.shape[0]))
    if bias is not None:
        shift = shift + bias.detach().double() * scale
    return kernel.detach().double() * scale.view(-1, 1, 1, 1), shift


def pad_as(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The input with the padding that is not zeros put on; zero padding is left to the convs."""
    if conv.padding_mode == "zeros":
        return x
    rows, columns = Geometry.of(conv).padding
    return F.pad(x, (columns, columns, rows, rows), mode=conv.padding_mode)


def side_geometry(conv: nn.Conv2d) -> Geometry:
    """The geometry that side branches see: already padded where padding is not zeros."""
    geometry = Geometry.of(conv)
    return geometry if geometry.padding_mode == "zeros" else geometry.without_padding()


def cross_patches(kernel: tuple[int, int]) -> tuple[Patch, ...]:
    """The middle column and the middle row: ACNet's skeleton."""
    height, width = kernel
    return (
        Patch(range(height), middle(width)),
        Patch(middle(height), range(width)),
    )


def corner_patches(kernel: tuple[int, int]) -> tuple[Patch, ...]:
    """The cross, and the four outermost taps as a dilated 2 x 2 kernel."""
    height, width = kernel
    corners = Patch(range(0, height, height - 1), range(0, width, width - 1))
    return (*cross_patches(kernel), corners)


def centre_and_corner_patches(kernel: tuple[int, int]) -> tuple[Patch, ...]:
    """The middle tap and the four quarters, which share the middle row and column."""
    height, width = kernel
    halves_down = (range(height // 2 + 1), range(height // 2, height))
    halves_across = (range(width // 2 + 1), range(width // 2, width))
    quarters = tuple(Patch(rows, columns) for rows in halves_down for columns in halves_across)
    return (Patch(middle(height), middle(width)), *quarters)
