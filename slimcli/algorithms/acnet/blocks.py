"""Blocks that train as several convolutions and deploy as one, each with its exact fusion.

The old conv and its norm stay inside a block untouched, as its square branch; side branches are
added to it. The file knows convolutions, not models: which of them are replaced is decided in
``method.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimcli.algorithms.acnet.geometry import (
    Fused,
    Geometry,
    Patch,
    centre_and_corner_patches,
    corner_patches,
    cross_patches,
    embed,
    fuse_scaled,
    pad_as,
    side_geometry,
)
from slimcli.network.fuse import fold_pointwise, has_hooks


@dataclass(frozen=True)
class NewLayers:
    """How the new layers of a block are made.

    Attributes:
        norm: The batch norm whose eps and momentum they take; None for torch's defaults.
        gamma: First scale of their norms: 0 for a warm start.
        generator: Source of the fresh weights, on the CPU.
        like: The weight whose device and dtype they take.
    """

    norm: nn.BatchNorm2d | None
    gamma: float
    generator: torch.Generator
    like: Tensor

    def batch_norm(self, channels: int, gamma: float | None = None) -> nn.BatchNorm2d:
        """A fresh batch norm."""
        eps, momentum = (1e-5, 0.1) if self.norm is None else (self.norm.eps, self.norm.momentum)
        norm = nn.BatchNorm2d(
            channels, eps=eps, momentum=momentum, device=self.like.device, dtype=self.like.dtype
        )
        nn.init.constant_(norm.weight, self.gamma if gamma is None else gamma)
        return norm

    def conv(self, geometry: Geometry, patch: Patch) -> nn.Conv2d:
        """A fresh bias-free conv over one patch; padded only if both sides get the same."""
        left, right, top, bottom = geometry.borders(patch)
        even = left == right >= 0 and top == bottom >= 0
        fresh = nn.Conv2d(
            *geometry.channels,
            (len(patch.rows), len(patch.columns)),
            stride=geometry.stride,
            padding=(top, left) if even else 0,
            dilation=(
                geometry.dilation[0] * abs(patch.rows.step),
                geometry.dilation[1] * abs(patch.columns.step),
            ),
            groups=geometry.groups,
            bias=False,
        )
        self.draw(fresh)
        return fresh.to(self.like)

    def draw(self, conv: nn.Conv2d) -> None:
        """Fresh weights by torch's own rule for convs, from our generator."""
        fresh = torch.empty(conv.weight.shape)
        nn.init.kaiming_uniform_(fresh, a=5**0.5, generator=self.generator)
        with torch.no_grad():
            conv.weight.copy_(fresh)


class PatchBranch(nn.Module):
    """A small conv over one patch of the full kernel, and its norm."""

    def __init__(self, geometry: Geometry, patch: Patch, make: NewLayers) -> None:
        super().__init__()
        self.patch = patch
        self.conv = make.conv(geometry, patch)
        self.norm = make.batch_norm(geometry.channels[1])
        borders = geometry.borders(patch)
        self.borders = () if any(cast(tuple[int, int], self.conv.padding)) else borders

    def forward(self, x: Tensor) -> Tensor:
        """(N, I, H, W) -> (N, O, H', W')."""
        if any(self.borders):
            x = F.pad(x, self.borders)
        result: Tensor = self.norm(self.conv(x))
        return result

    def fused(self, geometry: Geometry) -> Fused:
        """Full-size kernel (O, I / g, kh, kw) and bias (O,) in float64."""
        small, bias = fuse_scaled(self.conv.weight, None, self.norm)
        return embed(small, self.patch, geometry.kernel), bias


class PointwiseBranch(nn.Module):
    """DBB's 1x1 conv, norm, then a k x k conv or average, norm.

    Differs from the paper: the *input* is padded, not what comes out of the first norm, so the
    border holds that norm's own value for a zero input and the fusion needs no special layer.
    The average also covers dilated and grouped kernels; the 1x1 conv starts as the identity.
    """

    average: Tensor

    def __init__(self, geometry: Geometry, make: NewLayers, averages: bool) -> None:
        super().__init__()
        entering, leaving = geometry.channels
        between = leaving if averages else entering
        pointwise = Geometry(
            (entering, between), (1, 1), (1, 1), (0, 0), (1, 1), geometry.groups, ""
        )
        self.geometry = geometry.without_padding()
        self.padding = (geometry.padding[1],) * 2 + (geometry.padding[0],) * 2
        self.pointwise = make.conv(pointwise, pointwise.centre)
        self.pointwise_norm = make.batch_norm(between, gamma=1.0)
        self.conv: nn.Conv2d | None = None
        if averages:
            taps = geometry.kernel[0] * geometry.kernel[1]
            mean = torch.full((leaving, 1, *geometry.kernel), 1.0 / taps)
            self.register_buffer("average", mean.to(make.like), persistent=False)
        else:
            whole = Patch(range(geometry.kernel[0]), range(geometry.kernel[1]))
            self.conv = make.conv(self.geometry, whole)
            start_as_identity(self.pointwise)
        self.norm = make.batch_norm(leaving)

    def forward(self, x: Tensor) -> Tensor:
        """(N, I, H, W) -> (N, O, H', W')."""
        between = self.pointwise_norm(self.pointwise(F.pad(x, self.padding)))
        result: Tensor = self.norm(
            self.conv(between) if self.conv is not None else self._averaged(between)
        )
        return result

    def _averaged(self, x: Tensor) -> Tensor:
        geometry = self.geometry
        return F.conv2d(
            x,
            self.average.to(x.dtype),
            stride=geometry.stride,
            dilation=geometry.dilation,
            groups=geometry.channels[1],
        )

    def fused(self, geometry: Geometry) -> Fused:
        """Full-size kernel (O, I / g, kh, kw) and bias (O,) in float64."""
        pointwise = fuse_scaled(self.pointwise.weight, None, self.pointwise_norm)
        if self.conv is not None:
            none = self.conv.weight.new_zeros(self.conv.out_channels)
            kernel, bias = fold_pointwise(pointwise, (self.conv.weight, none), geometry.groups)
        else:
            average = self.average.double()
            kernel, bias = pointwise[0] * average, pointwise[1] * average.sum(dim=(1, 2, 3))
        return fuse_scaled(kernel, bias, self.norm)


def start_as_identity(pointwise: nn.Conv2d) -> None:
    """Weights of a 1x1 conv with as many outputs as inputs, such that it passes its input on."""
    with torch.no_grad():
        pointwise.weight.zero_()
        width = pointwise.in_channels // pointwise.groups
        channels = torch.arange(pointwise.out_channels, device=pointwise.weight.device)
        pointwise.weight[channels, channels % width] = 1.0


class BranchBlock(nn.Module):
    """The old conv and its norm, untouched, plus side branches over the same input, summed."""

    def __init__(
        self, square: nn.Conv2d, norm: nn.Module, sides: list[PatchBranch | PointwiseBranch]
    ) -> None:
        super().__init__()
        self.square = square
        self.norm = norm
        self.sides = nn.ModuleList(sides)

    def forward(self, x: Tensor) -> Tensor:
        """(N, I, H, W) -> (N, O, H', W')."""
        if self.training:
            x = in_fast_layout(x, self.square.weight)
        total: Tensor = self.norm(self.square(x))
        padded = pad_as(self.square, x)
        for side in self.sides:
            total = total.add_(side(padded))  # in place: no norm or conv needs its own output
        return total

    def fused(self) -> Fused:
        """Kernel and bias of the one conv with this block's eval function, in float64."""
        kernel, bias = fuse_scaled(self.square.weight, self.square.bias, self.norm)
        geometry = Geometry.of(self.square)
        for side in self.sides:
            side_kernel, side_bias = cast("PatchBranch | PointwiseBranch", side).fused(geometry)
            kernel, bias = kernel + side_kernel, bias + side_bias
        return kernel, bias


def in_fast_layout(x: Tensor, weight: Tensor) -> Tensor:
    """The input in the memory format in which a CPU trains several convs over it fastest.

    Measured on ResNet-18 and ResNet-20: channels-last is up to a third faster for narrow layers
    on large maps, because each conv would reorder its input for itself; for wide layers on small
    maps it is slower. Values do not change. Other devices, and models that were put into
    channels-last, keep what they are given.

    Args:
        x: (N, I, H, W).
        weight: (O, I / g, kh, kw) of the square conv.
    """
    if x.device.type != "cpu" or not weight.is_contiguous():
        return x
    is_narrow = weight.shape[0] <= 256 and x.shape[2] * x.shape[3] >= 64
    return x.contiguous(memory_format=torch.channels_last if is_narrow else torch.contiguous_format)


class MergedBlock(nn.Module):
    """Branches that are scaled, not normalised, so that their kernels add up before one conv.

    In the manner of OREPA (CVPR 2022): one convolution and one norm a step, whatever the branches.
    """

    def __init__(
        self, square: nn.Conv2d, norm: nn.Module, patches: tuple[Patch, ...], make: NewLayers
    ) -> None:
        super().__init__()
        self.square = square
        self.norm = norm
        self.patches = patches
        geometry = Geometry.of(square)
        plain = geometry.without_padding()
        self.kernels = nn.ParameterList([make.conv(plain, patch).weight for patch in patches])
        scale = torch.full((square.out_channels, 1, 1, 1), make.gamma).to(make.like)
        self.scales = nn.ParameterList([nn.Parameter(scale.clone()) for _ in patches])

    def forward(self, x: Tensor) -> Tensor:
        """(N, I, H, W) -> (N, O, H', W')."""
        square = self.square
        geometry = Geometry.of(square)
        padding = geometry.padding if geometry.padding_mode == "zeros" else (0, 0)
        result: Tensor = self.norm(
            F.conv2d(
                pad_as(square, x),
                self.kernel(),
                square.bias,
                geometry.stride,
                padding,
                geometry.dilation,
                geometry.groups,
            )
        )
        return result

    def kernel(self) -> Tensor:
        """The square kernel plus every scaled branch on its patch, (O, I / g, kh, kw)."""
        total = self.square.weight
        height, width = total.shape[2:]
        for patch, small, scale in zip(self.patches, self.kernels, self.scales, strict=True):
            rows, columns = patch.rows, patch.columns
            borders = (columns[0], width - 1 - columns[-1], rows[0], height - 1 - rows[-1])
            total = total + F.pad(small * scale, borders)
        return total

    def fused(self) -> Fused:
        """Kernel and bias of the one conv with this block's eval function, in float64."""
        kernel = self.square.weight.detach().double()
        for patch, small, scale in zip(self.patches, self.kernels, self.scales, strict=True):
            scaled = small.detach().double() * scale.detach().double()
            kernel = kernel + embed(scaled, patch, (kernel.shape[2], kernel.shape[3]))
        return fuse_scaled(kernel, self.square.bias, self.norm)


Block: TypeAlias = BranchBlock | MergedBlock


def _from_patches(patches: Callable[[tuple[int, int]], tuple[Patch, ...]]) -> BlockMaker:
    def make_block(conv: nn.Conv2d, norm: nn.Module, make: NewLayers) -> Block:
        geometry = side_geometry(conv)
        sides = [PatchBranch(geometry, patch, make) for patch in patches(geometry.kernel)]
        return BranchBlock(conv, norm, list(sides))

    return make_block


def _make_dbb(conv: nn.Conv2d, norm: nn.Module, make: NewLayers) -> Block:
    geometry = side_geometry(conv)
    sides: list[PatchBranch | PointwiseBranch] = [
        PatchBranch(geometry, geometry.centre, make),
        PointwiseBranch(geometry, make, averages=False),
        PointwiseBranch(geometry, make, averages=True),
    ]
    return BranchBlock(conv, norm, sides)


def _make_merged(conv: nn.Conv2d, norm: nn.Module, make: NewLayers) -> Block:
    kernel = Geometry.of(conv).kernel
    return MergedBlock(conv, norm, cross_patches(kernel), make)


BlockMaker: TypeAlias = Callable[[nn.Conv2d, nn.Module, NewLayers], Block]


BLOCKS: dict[str, BlockMaker] = {
    "acnet_cr": _from_patches(cross_patches),
    "acb_corner": _from_patches(corner_patches),
    "cnc": _from_patches(centre_and_corner_patches),
    "dbb": _make_dbb,
    "merged": _make_merged,
}


"""Every value of ``acnet_type``: from the old conv, its norm and the maker of new layers."""


def why_plain(conv: nn.Conv2d, block: str) -> str:
    """Why no block can take this conv's place; empty if one can."""
    if has_hooks(conv):  # inside a block they would read one branch of it
        return "forward hooks read it"
    height, width = cast(tuple[int, int], conv.kernel_size)
    if (height, width) == (1, 1):
        return "1x1 kernel: it has no rows or columns to strengthen"
    if height % 2 == 0 or width % 2 == 0:
        return f"even kernel {height}x{width}: it has no middle row or column"
    if block == "acb_corner" and 1 in (height, width):
        return f"kernel {height}x{width} has no four corners"
    return ""


def plain_conv(block: Block) -> nn.Conv2d:
    """One plain conv with bias and the block's eval function; the block stays as it is.

    The sums are made in float64 and stored in the dtype of the weights.
    """
    old = block.square
    kernel, bias = block.fused()
    conv = nn.Conv2d(
        old.in_channels,
        old.out_channels,
        cast(tuple[int, int], old.kernel_size),
        stride=cast(tuple[int, int], old.stride),
        padding=cast("tuple[int, int] | str", old.padding),
        dilation=cast(tuple[int, int], old.dilation),
        groups=old.groups,
        padding_mode=old.padding_mode,
    ).to(old.weight)
    with torch.no_grad():
        conv.weight.copy_(kernel)
        assert conv.bias is not None
        conv.bias.copy_(bias)
    return conv.train(old.training)
