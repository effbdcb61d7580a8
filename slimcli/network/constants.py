"""Channels that reach a consumer as a constant: its bias takes them up before they are cut.

A depthwise conv and its BN turn an all-zero channel into the same number everywhere. Cutting that
channel is exact if the next layer adds ``weight * number`` itself. The number is measured, because
only running the model knows what happens on the way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimcli.errors import Problem, RunError
from slimcli.network.attributes import Convolution, Transposed
from slimcli.network.cuts import Cut
from slimcli.network.evaluating import evaluating
from slimcli.network.example import Example
from slimcli.network.nested import tensors_in

REFUSED = "E-CUT-CONSTANT"

ROUNDINGS = 64
"""Largest spread of a 'constant' in roundings of its dtype: different kernels round differently."""


def measure(model: nn.Module, cuts: Sequence[Cut], example: Example) -> dict[str, Tensor]:
    """What each consumer's bias must take up, module path -> float64 (out_channels,).

    Runs the model once in eval mode; the producers' channels must already be zero. Afterwards the
    model's modes are as they were.

    Raises:
        RunError: A value isn't constant, or a bias can't stand for it in that layer.
    """
    capture = Capture(model, cuts)
    with evaluating(model), torch.no_grad(), capture:
        example.run(model)
    return capture.gains()


class Capture:
    """Inside its ``with`` block, reads what arrives at consumers that must take up constants.

    Args:
        model: Is run inside the block, in eval mode, the producers' channels at zero.
        cuts: Their ``constants`` are read.

    Attributes:
        is_single: One that was read is a single number, which can't be another one elsewhere.
    """

    def __init__(self, model: nn.Module, cuts: Sequence[Cut]) -> None:
        self._model = model
        self._entries: dict[str, list[int]] = {}
        for cut in cuts:
            for constant in cut.constants:
                known = self._entries.setdefault(constant.module, [])
                known += [each for each in constant.entries if each not in known]
        self._values: dict[str, Tensor] = {}
        self._refused: RunError | None = None
        self.is_single = False
        self._other = "it is used several times with different constants"
        self._handles: list[Any] = []

    def __enter__(self) -> Capture:
        """Watches the consumers."""
        self._handles = [
            self._model.get_submodule(path).register_forward_pre_hook(
                self._reader(path), with_kwargs=True
            )
            for path in self._entries
        ]
        return self

    def __exit__(self, *error: object) -> None:
        """Watches no more."""
        for handle in self._handles:
            handle.remove()

    @contextlib.contextmanager
    def of_another_batch(self) -> Iterator[None]:
        """Reads once more; what is another number then is no constant."""
        known, self._other = self._other, "with another batch they are others"
        try:
            with self:
                yield
        finally:
            self._other = known

    def gains(self) -> dict[str, Tensor]:
        """Module path -> what its bias must take up, float64 (out_channels,).

        Raises:
            RunError: A value isn't constant, or a bias can't stand for it in that layer.
        """
        if self._refused is not None:
            raise self._refused
        for path in self._entries:
            if path not in self._values:
                raise _refused(path, "it did not run on the example")
        return {
            path: bias_change(self._model.get_submodule(path), entries, self._values[path], path)
            for path, entries in self._entries.items()
        }

    def _reader(self, path: str) -> Any:
        def hook(
            module: nn.Module, inputs: tuple[Tensor, ...], keywords: dict[str, Tensor]
        ) -> None:
            try:
                self._read(path, module, next(tensors_in((inputs, keywords))))
            except RunError as error:  # the model's own code may be in between: told later
                self._refused = self._refused or error

        return hook

    def _read(self, path: str, module: nn.Module, inputs: Tensor) -> None:
        dim = inputs.dim() - 1 - _spatial_dimensions(module)
        value = constant_value(inputs, self._entries[path], dim)
        if value is None:
            raise _refused(path, "the removed channels do not arrive as constants")
        self.is_single |= inputs.numel() == inputs.shape[dim]
        before = self._values.setdefault(path, value)
        limit = _rounding(inputs.dtype) * value.abs().clamp_min(1.0)
        if bool(((before - value).abs() > limit).any()):
            raise _refused(path, self._other)


def bias_change(module: nn.Module, entries: Sequence[int], values: Tensor, path: str) -> Tensor:
    """What a layer's output gains everywhere from constants at some of its inputs.

    Args:
        module: Conv, transposed conv or Linear.
        entries: Input channels (of the layer, not of one group) that are constant.
        values: Their values, float64, shape (len(entries),).
        path: Name of the module for messages.

    Returns:
        Float64 tensor (out_channels,) on the CPU.

    Raises:
        RunError: The gain isn't the same everywhere, or the layer's type isn't supported.

    >>> layer = nn.Conv1d(2, 1, 3)
    >>> _ = layer.weight.data.fill_(1.0)
    >>> bias_change(layer, [1], torch.tensor([2.0], dtype=torch.float64), "layer")
    tensor([6.], dtype=torch.float64)
    """
    reason = _why_not(module)
    if reason:
        raise _refused(path, reason)
    is_transposed = isinstance(module, Transposed)
    weight: Tensor = module.weight.detach().to("cpu", torch.float64)  # type: ignore[operator]
    weight = weight.flatten(2).sum(2) if weight.dim() > 2 else weight  # kernel summed
    groups: int = getattr(module, "groups", 1)
    if not is_transposed:  # to (in_channels, out_channels / groups), as transposed ones have it
        weight = weight.reshape(groups, -1, weight.shape[1]).transpose(1, 2).flatten(0, 1)
    picked = torch.tensor(list(entries), dtype=torch.int64)
    gains = weight[picked] * values.to("cpu", torch.float64)[:, None]
    change = gains.new_zeros(groups, weight.shape[1])
    change.index_add_(0, picked // (weight.shape[0] // groups), gains)
    return change.flatten()


def constant_value(inputs: Tensor, entries: Sequence[int], dim: int) -> Tensor | None:
    """The value at some entries of a dimension if it is the same everywhere else, or None.

    >>> constant_value(torch.tensor([[1.0, 5.0], [2.0, 5.0]]), [1], dim=1)
    tensor([5.], dtype=torch.float64)
    >>> constant_value(torch.tensor([[1.0, 5.0], [2.0, 5.0]]), [0], dim=1) is None
    True
    """
    picked = inputs.detach().movedim(dim, 0)[list(entries)].flatten(1).to("cpu", torch.float64)
    low, high = picked.amin(1), picked.amax(1)
    size = picked.abs().amax(1).clamp_min(1.0)
    if bool(((high - low) > _rounding(inputs.dtype) * size).any()):
        return None
    return picked[:, 0].clone()  # a view would hold the whole activation


def _rounding(dtype: torch.dtype) -> float:
    return ROUNDINGS * torch.finfo(dtype).eps


def _spatial_dimensions(module: nn.Module) -> int:
    return 0 if isinstance(module, nn.Linear) else len(module.kernel_size)  # type: ignore[arg-type]


def _why_not(module: nn.Module) -> str:
    """Why a constant input doesn't give a constant output, or an empty string."""
    if isinstance(module, nn.Linear):
        return ""
    if isinstance(module, Transposed):
        simple = all(each == 1 for each in (*module.kernel_size, *module.stride))
        plain = not any((*module.padding, *module.output_padding))
        return "" if simple and plain else "a transposed conv gives a pattern, not a constant"
    if isinstance(module, Convolution):
        if module.padding_mode != "zeros" or not _is_padded(module):
            return ""
        return "it pads with zeros, so its border sees no constant"
    return f"{type(module).__name__} is no conv or Linear"


def _is_padded(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> bool:
    if isinstance(module.padding, str):
        return module.padding == "same" and any(size > 1 for size in module.kernel_size)
    return any(module.padding)


def _refused(path: str, reason: str) -> RunError:
    return RunError(
        Problem(
            REFUSED,
            f"the bias of {path} can't take up removed channels: {reason}",
            fix="leave this group out of the cut",
        )
    )
