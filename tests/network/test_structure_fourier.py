"""Fourier transforms and complex numbers: over the image they pass, over channels they freeze."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .paired import Case, check_case, proven
from .proving import prunable
from .structures import Net, conv_bn

FREQUENCIES = torch.randn(16, 9, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
ONE = {"a": 16}

CASES = {
    "there and back": Case(
        lambda x, _: torch.fft.irfft2(torch.fft.rfft2(x) * FREQUENCIES, s=(16, 16)), ONE
    ),
    "real part": Case(lambda x, _: torch.fft.fft2(x).real, ONE),
    "imaginary part": Case(lambda x, _: torch.fft.fft2(x).imag, ONE),
    "amplitude": Case(lambda x, _: torch.fft.fft2(x, norm="ortho").abs(), ONE),
    "phase": Case(lambda x, _: torch.fft.fft2(x).angle(), ONE),
    "conjugate": Case(lambda x, _: torch.fft.ifft2(torch.fft.fft2(x).conj()).real, ONE),
    "along one axis": Case(lambda x, _: torch.fft.ihfft(torch.fft.hfft(x, 16)).real, ONE, width=16),
    "shifted": Case(
        lambda x, _: torch.fft.ifftshift(
            torch.fft.fftshift(torch.fft.fft2(x), (2, 3)), (2, 3)
        ).abs(),
        ONE,
    ),
    "two parts of one number": Case(lambda x, y: torch.fft.ifft2(torch.complex(x, y)).real, ONE),
    "parts side by side": Case(
        lambda x, y: torch.fft.ifft2(torch.view_as_complex(torch.stack((x, y), -1))).real, ONE
    ),
    "parts of a product": Case(
        lambda x, y: torch.view_as_real(torch.fft.rfft2(x) * torch.fft.rfft2(y)).sum(-1), ONE
    ),
    "a shift of all axes": Case(
        lambda x, _: torch.fft.fftshift(torch.fft.fft2(x)).real,
        frozen={"a": "channels are rolled at "},
    ),
    "over channels": Case(
        lambda x, _: torch.fft.fft(x, dim=1).real,
        frozen={"a": "a Fourier transform over channels at "},
    ),
    "over channels and positions": Case(
        lambda x, _: torch.fft.fft2(x.permute(0, 2, 3, 1)).real.permute(0, 3, 1, 2),
        frozen={"a": "a Fourier transform over channels at "},
    ),
    "channels as two parts": Case(
        lambda x, _: (
            torch.view_as_complex(x.view(2, 8, 2, 16, 16).transpose(2, 4).contiguous())
            .abs()
            .transpose(2, 3)
        ),
        frozen={"a": "channels are real and imaginary parts at "},
        width=8,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_group_is_cut_through_a_fourier_transform_exactly_where_the_table_says(name: str) -> None:
    check_case(CASES[name])


class FourierUnit(Net):
    """Real and imaginary parts side by side as channels of a conv, as in LaMa."""

    def __init__(self) -> None:
        super().__init__(12)
        self.a, self.mixed, self.b = conv_bn(8, 16), conv_bn(32, 20, 1), conv_bn(10, 12)

    def body(self, x: Tensor) -> Tensor:
        x = self.a(x)
        n, _, h, w = x.shape
        parts = torch.fft.rfftn(x, dim=(-2, -1), norm="ortho")
        parts = torch.stack((parts.real, parts.imag), -1).permute(0, 1, 4, 2, 3).contiguous()
        parts = self.mixed(parts.view(n, -1, *parts.shape[3:]))
        parts = parts.view(n, -1, 2, *parts.shape[2:]).permute(0, 1, 3, 4, 2).contiguous()
        whole = torch.complex(parts[..., 0], parts[..., 1])
        return self.b(torch.fft.irfftn(whole, s=(h, w), dim=(-2, -1), norm="ortho"))


def test_a_fourier_unit_loses_real_and_imaginary_parts_together() -> None:
    torch.manual_seed(0)
    structure = proven(FourierUnit())
    sizes = {group.name: group.size for group in prunable(structure)}
    assert sizes == {"stem.1": 8, "a.1": 16, "mixed.1": 10, "b.1": 12}


class GlobalFilter(nn.Module):
    """Each frequency of each channel times a weight of its own, as in GFNet."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 5)
        self.filter = nn.Parameter(torch.randn(4, 3, 16, 2))

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, _ = x.shape
        image = self.a(x).view(n, 4, 4, -1)
        spectrum = torch.fft.rfft2(image, dim=(1, 2), norm="ortho")
        spectrum = spectrum * torch.view_as_complex(self.filter)
        image = torch.fft.irfft2(spectrum, s=(4, 4), dim=(1, 2), norm="ortho")
        return self.head(F.relu(self.b(image.reshape(n, tokens, -1)))).mean(1)


def test_a_filter_of_frequencies_goes_with_its_channel() -> None:
    torch.manual_seed(0)
    structure = proven(GlobalFilter(), torch.randn(2, 16, 8))
    assert {group.name: group.size for group in prunable(structure)} == {"a": 16, "b": 12}
    slots = {(slot.tensor, slot.dim) for slot in structure.group("a").followers}
    assert slots == {("filter", 2)}


class MixedTokens(nn.Module):
    """A Fourier transform of tokens and of channels, as in FNet."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 12)
        self.wide, self.head = nn.Linear(12, 20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.fft.fft2(self.a(x)).real
        return self.head(F.relu(self.wide(F.relu(self.b(x))))).mean(1)


def test_channels_that_a_fourier_transform_mixes_stay() -> None:
    torch.manual_seed(0)
    structure = proven(MixedTokens(), torch.randn(2, 16, 8))
    assert {group.name: group.size for group in prunable(structure)} == {"b": 12, "wide": 20}
    assert "a Fourier transform over channels" in structure.group("a").frozen_reason


class BlockDiagonal(nn.Module):
    """Blocks of channels times complex weights in the space of frequencies, as in AFNO."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 5)
        self.weight = nn.Parameter(torch.randn(2, 4, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, _ = x.shape
        spectrum = torch.fft.rfft2(self.a(x).view(n, 4, 4, 16), dim=(1, 2), norm="ortho")
        parts = spectrum.reshape(n, 4, 3, 4, 4)
        real = torch.einsum("...bi,bio->...bo", parts.real, self.weight[0])
        imag = torch.einsum("...bi,bio->...bo", parts.imag, self.weight[1])
        parts = torch.view_as_complex(torch.stack((real, imag), -1)).reshape(n, 4, 3, 16)
        image = torch.fft.irfft2(parts, s=(4, 4), dim=(1, 2), norm="ortho")
        return self.head(F.relu(self.b(image.reshape(n, tokens, 16)))).mean(1)


def test_blocks_of_fixed_size_stay() -> None:
    torch.manual_seed(0)
    structure = proven(BlockDiagonal(), torch.randn(2, 16, 8))
    assert {group.name: group.size for group in prunable(structure)} == {"b": 12}


class FourierOperator(nn.Module):
    """Low frequencies times complex weights, put back among zeros, as in FNO."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.skip = nn.Linear(3, 8), nn.Conv2d(8, 12, 1)
        self.weight = nn.Parameter(torch.rand(8, 12, 4, 4, dtype=torch.complex128))
        self.a, self.head = nn.Linear(12, 10), nn.Linear(10, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x).permute(0, 3, 1, 2)
        spectrum = torch.fft.rfft2(x)
        mixed = torch.zeros(len(x), self.weight.shape[1], 16, 9, dtype=spectrum.dtype)
        low = torch.einsum("nixy,ioxy->noxy", spectrum[:, :, :4, :4], self.weight)
        mixed[:, :, :4, :4] = low
        x = F.gelu(torch.fft.irfft2(mixed, s=x.shape[-2:]) + self.skip(x))
        return self.head(F.gelu(self.a(x.permute(0, 2, 3, 1))))


def test_complex_weights_of_frequencies_are_cut() -> None:
    torch.manual_seed(0)
    structure = proven(FourierOperator(), torch.randn(2, 16, 16, 3))
    groups = {group.name: group for group in prunable(structure)}
    sizes = {name: group.size for name, group in groups.items()}
    assert sizes == {"lift": 8, "weight": 12, "a": 10}
    slots = {(slot.tensor, slot.dim) for slot in groups["weight"].producers}
    assert slots == {("weight", 1), ("skip.weight", 0), ("skip.bias", 0)}
