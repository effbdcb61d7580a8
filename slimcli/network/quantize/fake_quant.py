"""The fake quantizer: rounds a tensor to int8 codes and back while a network trains.

Symmetric, zero point 0: ``code = clamp(round(x / scale))``, ``y = code * scale``. The division is a
true one and ties go to the even code, as ONNX QuantizeLinear says; torch's own fake-quantize ops
multiply by ``1 / scale`` and differ from it by one code now and then.
"""

from __future__ import annotations

import enum
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from slimcli.network.quantize.nodes import is_traced, quantize_nodes
from slimcli.network.quantize.round_trip import (
    HIGHEST_CODE,
    asks,
    fake_quantize,
    learned_fake_quantize,
    quantize,
)

ScalePolicy = Literal["frozen", "ema", "lsq"]
ACTIVATION_LOW = -128
WEIGHT_LOW = -127
SMALLEST_RANGE = 1e-30
"""A tensor whose largest magnitude is below this is all zeros; any scale represents it."""
AVERAGING = 0.01
"""Weight of the newest batch in a moving range, once 100 batches were seen (torchslim's value)."""


class Phase(enum.IntEnum):
    """What a quantizer does with a tensor."""

    OFF = 0
    """Nothing: the network is the float network."""
    CALIBRATE = 1
    """Looks at it, gives it back unchanged."""
    TRAIN = 2
    """Quantizes; the scale may move."""
    FROZEN = 3
    """Quantizes; the scale stays."""
    EXPORT = 4
    """As FROZEN; an exporter that traces the model sees ONNX Q/DQ nodes."""


def scale_of(amax: Tensor) -> Tensor:
    """The step between two codes for a largest magnitude, elementwise.

    >>> scale_of(torch.tensor([127.0, 0.0]))
    tensor([1.0000, 0.0079])
    """
    return torch.where(amax > SMALLEST_RANGE, amax, torch.ones_like(amax)) / HIGHEST_CODE


def extremes(x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of a tensor, or of each slice along ``axis``; NaN stays visible.

    >>> extremes(torch.tensor([[1.0, -2.0], [3.0, 4.0]]), axis=0)
    (tensor([-2.,  3.]), tensor([1., 4.]))
    """
    x = x.detach()
    if axis is None:
        smallest, largest = torch.aminmax(x)
    else:
        smallest, largest = torch.aminmax(x.movedim(axis, 0).flatten(1), dim=1)
    return smallest, largest


class FakeQuant(nn.Module):
    """Rounds one tensor to int8 codes and back.

    Buffers: ``amax`` (largest magnitude that is represented), ``scale``, ``zero_point`` (int8
    zeros), ``batches_seen`` and ``phase_code``. ``scale`` is a parameter with the ``lsq`` policy.
    ``folded_scale`` is what exporters see instead of ``scale``, where something was folded in.
    All shapes are fixed from the start, so that a state loads before the first forward.

    Args:
        label: What the tensor is, for messages (``input of layer1.0.conv1``).
        low: Smallest code: -128 for activations, -127 for weights.
        policy: What moves the scale in the TRAIN phase.
        channels: Number of scales along ``axis``; None for one scale of rank 0.
        axis: Dimension that ``channels`` counts.
    """

    amax: Tensor
    scale: Tensor
    zero_point: Tensor
    batches_seen: Tensor
    phase_code: Tensor
    folded_scale: Tensor | None

    def __init__(
        self,
        label: str,
        low: int = ACTIVATION_LOW,
        policy: ScalePolicy = "frozen",
        channels: int | None = None,
        axis: int = 0,
    ) -> None:
        super().__init__()
        self.label, self.low, self.policy, self.axis = label, low, policy, axis
        self.channels = channels
        self.is_overwritten = False
        self.collector: Any = None
        self.handles: list[RemovableHandle] = []
        shape = () if channels is None else (channels,)
        self.register_buffer("amax", torch.zeros(shape))
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int8))
        self.register_buffer("batches_seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("phase_code", torch.zeros((), dtype=torch.int8))
        if policy == "lsq":
            self.scale = nn.Parameter(torch.ones(shape))
        else:
            self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("folded_scale", None)
        self._phase = Phase.OFF
        self.register_load_state_dict_post_hook(_restore_phase)  # type: ignore[no-untyped-call]

    @property
    def phase(self) -> Phase:
        """What forward does; stored with the state."""
        return self._phase

    @phase.setter
    def phase(self, value: Phase) -> None:
        self._phase = Phase(value)
        self.phase_code.fill_(int(value))

    @property
    def is_weight(self) -> bool:
        """Whether this quantizes a weight rather than an activation."""
        return self.low == WEIGHT_LOW

    @torch.no_grad()
    def set_amax(self, amax: Tensor) -> None:
        """Takes a range: the largest magnitude of the whole tensor or of each channel."""
        self.amax.copy_(amax)
        self.scale.copy_(scale_of(self.amax))

    @torch.no_grad()
    def magnitude(self, x: Tensor) -> Tensor:
        """Largest magnitude of ``x``, in the shape of ``amax``; NaN and inf stay visible."""
        smallest, largest = extremes(x, None if self.channels is None else self.axis)
        return torch.maximum(-smallest, largest)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` on the int8 grid, in the dtype it came in; computed in at least float32."""
        if self._phase is Phase.OFF:
            return x
        if self._phase is Phase.CALIBRATE:
            self.collector.update(x.detach())
            return x
        if self._phase is Phase.EXPORT and is_traced():
            axis = None if self.channels is None else self.axis
            scale = self.scale if self.folded_scale is None else self.folded_scale
            return quantize_nodes(x, scale.detach(), self.zero_point, axis)
        if self._phase is Phase.TRAIN and self.training and self.policy == "ema":
            self._follow(x)
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        return self._round_trip(wide).to(x.dtype)

    def codes(self, x: Tensor) -> Tensor:
        """The int8 codes of ``x``."""
        return quantize(x, self._scale_for(x), self.low).to(torch.int8)

    def for_each_slice(self, scale: Tensor, x: Tensor) -> Tensor:
        """A scale of this quantizer in the dtype of ``x`` and in a shape that multiplies it."""
        scale = scale.to(x.dtype)
        if self.channels is None:
            return scale
        return scale.reshape([-1 if dim == self.axis else 1 for dim in range(x.dim())])

    def _scale_for(self, x: Tensor) -> Tensor:
        return self.for_each_slice(self.scale, x)

    def _round_trip(self, x: Tensor) -> Tensor:
        scale = self._scale_for(x)
        if self._phase is not Phase.TRAIN:
            scale = scale.detach()
        if not (torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad)):
            return quantize(x, scale, self.low).mul_(scale)
        if not scale.requires_grad:
            return fake_quantize(x, scale, self.low, self._fits(x))
        features = x.numel() / (len(x) if not self.is_weight else self.channels or 1)
        factor = (features * HIGHEST_CODE) ** -0.5
        return learned_fake_quantize(x, scale, self.low, factor, self.is_overwritten)

    def _fits(self, x: Tensor) -> bool:
        """Whether no code leaves the range, so that clamping and masking can be left out."""
        if not asks(x):
            return False
        smallest, largest = extremes(x, None if self.channels is None else self.axis)
        scale = self.scale.detach().to(x.dtype)
        low, high = (smallest / scale).round(), (largest / scale).round()
        return bool(((low >= self.low) & (high <= HIGHEST_CODE)).all())

    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        """Moves the range with the data: a weight's is its own, an activation's an average.

        The first 100 batches count equally, then the newest one with weight 0.01.
        """
        newest = self.magnitude(x).to(self.amax.dtype)
        if self.is_weight:
            self.set_amax(newest)
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(newest, torch.distributed.ReduceOp.MAX)
        self.batches_seen.add_(1)
        share = (1.0 / self.batches_seen).clamp(min=AVERAGING).to(self.amax.dtype)
        self.set_amax(self.amax + share * (newest - self.amax))

    def extra_repr(self) -> str:
        """``input of conv1, [-128, 127], frozen, FROZEN``."""
        return f"{self.label}, [{self.low}, {HIGHEST_CODE}], {self.policy}, {self._phase.name}"


def _restore_phase(module: nn.Module, _incompatible: Any) -> None:
    """Makes a quantizer do what the loaded state says."""
    assert isinstance(module, FakeQuant)
    module.phase = Phase(int(module.phase_code))


def quantizers(model: nn.Module) -> dict[str, FakeQuant]:
    """All quantizers of a model by module path."""
    return {name: each for name, each in model.named_modules() if isinstance(each, FakeQuant)}


def set_phase(model: nn.Module, phase: Phase) -> None:
    """Puts every quantizer of a model in one phase."""
    for each in quantizers(model).values():
        each.phase = phase
