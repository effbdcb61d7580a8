"""Every block equals the one conv it becomes, whatever the geometry."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from slimcli.algorithms.acnet.blocks import (
    BLOCKS,
    Block,
    NewLayers,
    in_fast_layout,
    plain_conv,
    why_plain,
)

FLOAT64_LIMIT = 1e-11
"""Sums of a few hundred products of order 1 in float64, with two orders of room."""
FLOAT32_LIMIT = 1e-4
"""The limit of the verification chain."""

SQUARE_GEOMETRIES = [
    {"kernel_size": kernel, "padding": padding, "stride": stride, "dilation": dilation}
    for kernel in (3, 5, 7)
    for padding in range(0, kernel, 2)
    for stride, dilation in ((1, 1), (2, 1), (3, 2), (1, 3))
    if (kernel - 1) * dilation < 16 + 2 * padding
]
ODD_GEOMETRIES = [
    {"kernel_size": (3, 5), "padding": (0, 2)},
    {"kernel_size": (5, 3), "padding": (3, 0), "stride": (2, 1), "dilation": (1, 2)},
    {"kernel_size": (1, 7), "padding": (0, 3)},
    {"kernel_size": (7, 1), "padding": (3, 0), "stride": (1, 2)},
    {"kernel_size": (1, 3), "padding": (2, 0)},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": (3, 5), "padding": "same"},
    {"kernel_size": 3, "padding": "valid"},
    {"kernel_size": 3, "padding": 1, "groups": 2},
    {"kernel_size": 3, "padding": 1, "groups": 4},
    {"kernel_size": 3, "padding": 1, "bias": False},
    {"kernel_size": 7, "padding": 3, "stride": 2, "bias": False},
    {"kernel_size": 5, "padding": 2, "groups": 4, "dilation": 2},
    *(
        {"kernel_size": kernel, "padding": padding, "padding_mode": mode, "stride": stride}
        for mode in ("reflect", "replicate", "circular")
        for kernel, padding, stride in ((3, 1, 1), ((3, 5), (2, 1), 2), (5, 0, 1))
    ),
    {"kernel_size": 3, "padding": "same", "padding_mode": "reflect", "dilation": 2},
]


def stir_norms(module: nn.Module) -> None:
    """Statistics, scales and shifts of a trained network instead of those of a fresh one."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.normal_(norm.bias)


def build(name: str, conv: nn.Conv2d, norm: nn.Module | None = None, gamma: float = 0.0) -> Block:
    """A block around a conv; gamma 0 is the warm start."""
    batch_norm = norm if isinstance(norm, nn.BatchNorm2d) else None
    make = NewLayers(batch_norm, gamma, torch.Generator().manual_seed(5), conv.weight)
    return BLOCKS[name](conv, norm if norm is not None else nn.Identity(), make)


def trained(name: str, dtype: torch.dtype = torch.float64, **geometry: object) -> Block:
    """A block as training leaves it: every number moved."""
    torch.manual_seed(1)
    conv = nn.Conv2d(4, 8, **geometry).to(dtype)  # type: ignore[arg-type]
    block = build(name, conv, nn.BatchNorm2d(8).to(dtype))
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    stir_norms(block)
    return block.eval()


def sizes_of_inputs(geometry: dict[str, object]) -> list[Tensor]:
    torch.manual_seed(2)
    return [
        torch.randn(2, 4, height, width, dtype=torch.float64)
        for height, width in ((17, 20), (20, 17))
    ]


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_a_block_equals_its_plain_conv_over_square_geometries(name: str) -> None:
    for geometry in SQUARE_GEOMETRIES:
        assert_equal_to_its_plain_conv(name, geometry)


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_a_block_equals_its_plain_conv_over_odd_geometries(name: str) -> None:
    for geometry in ODD_GEOMETRIES:
        conv = nn.Conv2d(4, 8, **geometry)  # type: ignore[arg-type]
        if not why_plain(conv, name):
            assert_equal_to_its_plain_conv(name, geometry)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (7, 7), (3, 5), (1, 3)])
def test_acnet_equals_its_plain_conv_over_the_whole_grid(
    kernel: tuple[int, int], mode: str
) -> None:
    """Every padding from none (a crop) to the kernel's size, stride and dilation up to three."""
    height, width = kernel
    paddings = range(max(kernel) + 1) if mode == "zeros" else range(0, max(kernel) + 1, 2)
    groups = (1, 2, 4) if mode == "zeros" else (1, 4)
    seen = 0
    for padding, stride, dilation, parts in itertools.product(
        paddings, (1, 2, 3), (1, 2, 3), groups
    ):
        if dilation * (max(kernel) - 1) + 1 > 17 + 2 * padding:
            continue  # the kernel is larger than the padded image: torch refuses it
        geometry = {
            "kernel_size": (height, width),
            "padding": padding,
            "stride": stride,
            "dilation": dilation,
            "groups": parts,
            "padding_mode": mode,
        }
        assert_equal_to_its_plain_conv("acnet_cr", geometry)
        seen += 1
    assert seen >= 36


def assert_equal_to_its_plain_conv(name: str, geometry: dict[str, object]) -> None:
    block = trained(name, **geometry)
    plain = plain_conv(block)
    assert type(plain) is nn.Conv2d
    assert plain.bias is not None
    for x in sizes_of_inputs(geometry):
        difference = (block(x) - plain(x)).abs().max().item()
        assert difference < FLOAT64_LIMIT, (geometry, difference)


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_fusing_in_float32_stays_within_the_limit(name: str) -> None:
    block = trained(name, torch.float32, kernel_size=3, padding=1)
    x = torch.randn(2, 4, 15, 16)
    expected = block(x)
    actual = plain_conv(block)(x)
    assert actual.dtype == torch.float32
    assert (expected - actual).abs().max() < FLOAT32_LIMIT * expected.abs().max()


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_half_precision_weights_are_fused_in_float64(name: str) -> None:
    block = trained(name, torch.float32, kernel_size=3, padding=1).half()
    kernel, bias = block.fused()
    assert kernel.dtype == bias.dtype == torch.float64
    assert plain_conv(block).weight.dtype == torch.float16


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_fusing_changes_nothing_and_repeats_itself(name: str) -> None:
    block = trained(name, kernel_size=3, padding=1)
    before = copy.deepcopy(block.state_dict())
    first, second = plain_conv(block), plain_conv(block)
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)
    assert all(torch.equal(before[key], value) for key, value in block.state_dict().items())


@pytest.mark.parametrize(
    ("name", "has_norm", "mode"),
    [
        (name, has_norm, mode)
        for name, has_norm, mode in itertools.product(
            sorted(BLOCKS), (True, False), ("train", "eval")
        )
    ],
)
def test_a_warm_start_leaves_every_bit_as_it_was(name: str, has_norm: bool, mode: str) -> None:
    torch.manual_seed(3)
    for geometry in ({"padding": 1}, {"padding": 2, "stride": 2, "padding_mode": "reflect"}):
        conv = nn.Conv2d(4, 8, 3, **geometry)  # type: ignore[arg-type]
        norm = nn.BatchNorm2d(8) if has_norm else nn.Identity()
        stir_norms(norm)
        old = copy.deepcopy(nn.Sequential(conv, norm)).train(mode == "train")
        block = build(name, conv, norm).train(mode == "train")
        x = torch.randn(3, 4, 12, 11)
        torch.testing.assert_close(block(x), old(x), rtol=1e-5, atol=1e-5)
        if name != "merged":  # it calls another function of the library, which may round otherwise
            in_format = in_fast_layout(x, conv.weight) if mode == "train" else x
            assert torch.equal(block(x), old(in_format))


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [(1, "1x1"), (2, "even"), (4, "even"), ((3, 2), "even"), ((4, 1), "even"), ((1, 4), "even")],
)
def test_even_and_pointwise_kernels_stay_plain_with_a_reason(
    kernel: int | tuple[int, int], reason: str
) -> None:
    for name in BLOCKS:
        assert reason in why_plain(nn.Conv2d(4, 4, kernel), name)


def test_corners_need_a_kernel_with_four_of_them() -> None:
    assert "four corners" in why_plain(nn.Conv2d(4, 4, (1, 7)), "acb_corner")
    assert why_plain(nn.Conv2d(4, 4, (1, 7)), "acnet_cr") == ""


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_a_norm_without_statistics_is_refused_not_misfused(name: str) -> None:
    norm = nn.BatchNorm2d(8, track_running_stats=False)
    block = build(name, nn.Conv2d(4, 8, 3), norm).eval()
    with pytest.raises(ValueError, match="no running statistics"):
        plain_conv(block)


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_norms_without_scale_are_fused(name: str) -> None:
    torch.manual_seed(4)
    norm = nn.BatchNorm2d(8, affine=False).double()
    block = build(name, nn.Conv2d(4, 8, 3).double(), norm, gamma=0.7)
    stir_norms(block)
    block.eval()
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    assert (block(x) - plain_conv(block)(x)).abs().max() < FLOAT64_LIMIT


def test_the_gradient_of_the_fused_kernel_is_that_of_the_branches() -> None:
    """With BN frozen the block is linear in its kernels, so both ways must agree."""
    block = trained("acnet_cr", kernel_size=3, padding=1)
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    plain = plain_conv(block)
    target = torch.randn_like(plain(x))
    ((block(x) - target) ** 2).sum().backward()
    ((plain(x) - target) ** 2).sum().backward()
    column, row = block.sides
    for conv, norm, part in (
        (block.square, block.norm, plain.weight.grad),
        (column.conv, column.norm, plain.weight.grad[:, :, :, 1:2]),
        (row.conv, row.norm, plain.weight.grad[:, :, 1:2, :]),
    ):
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        torch.testing.assert_close(conv.weight.grad, part * scale.view(-1, 1, 1, 1))
        torch.testing.assert_close(norm.bias.grad, plain.bias.grad)
        unscaled = part * conv.weight.detach()  # gamma scales the kernel, and shifts by the mean
        gamma = unscaled.sum((1, 2, 3)) + plain.bias.grad * ((bias_of(conv)) - norm.running_mean)
        torch.testing.assert_close(norm.weight.grad, gamma / (norm.running_var + norm.eps).sqrt())


def bias_of(conv: nn.Conv2d) -> Tensor | float:
    return 0.0 if conv.bias is None else conv.bias.detach()


def test_depthwise_with_more_outputs_than_inputs_is_fused() -> None:
    for name in BLOCKS:
        block = trained(name, kernel_size=3, padding=1, groups=4)
        assert block.square.out_channels == 2 * block.square.in_channels
        x = torch.randn(1, 4, 6, 7, dtype=torch.float64)
        assert (block(x) - plain_conv(block)(x)).abs().max() < FLOAT64_LIMIT
