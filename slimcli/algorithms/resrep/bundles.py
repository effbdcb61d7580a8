"""State of one coupled group in training: which channels are there, masked, at zero for good."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimcli.algorithms.resrep.budget import strength_to_catch_up
from slimcli.algorithms.resrep.compactor import Norms, bundle_norms
from slimcli.algorithms.resrep.selection import Standing
from slimcli.algorithms.resrep.targets import Target


class Bundles:
    """Channels of one group; channel ``j`` is a bundle of rows in all compactors of the group.

    Args:
        target: The group and its compactors.
        base_strength: Lasso strength of a channel that is not masked.

    Attributes:
        kept: Channels (numbers before anything was cut) that are still in the model, ascending.
        masked: For each of them, whether only the lasso acts on it, shape (n,).
        locked: For each of them, whether it is zero for good, shape (n,).
        strengths: Lasso strength of each, float32, shape (n,).
        speeds: Speed to zero of each masked channel at learning rate 1, float32, shape (n,).
        has_masked: Whether any channel is masked, known without asking the device.
    """

    def __init__(self, target: Target, base_strength: float) -> None:
        size = target.group.size
        self.target = target
        self.kept = list(range(size))
        self.masked = torch.zeros(size, dtype=torch.bool)
        self.locked = torch.zeros(size, dtype=torch.bool)
        self.strengths = torch.full((size,), base_strength)
        self.speeds = torch.zeros(size)
        self.has_masked = False
        self._present: list[list[int]] = [list(range(place.size)) for place in target.places]
        self._indices: list[Tensor] = []
        self._index_rows()

    def _index_rows(self) -> None:
        """Positions of each channel's rows in today's compactors."""
        device = self.masked.device
        self._indices = []
        for rows, present in zip(self.target.rows, self._present, strict=True):
            at = {row: position for position, row in enumerate(present)}
            positions = [[at[row] for row in rows[channel]] for channel in self.kept]
            self._indices.append(torch.tensor(positions, device=device))

    def _move_to(self, device: torch.device) -> None:
        if self.masked.device != device:
            self.masked = self.masked.to(device)
            self.locked = self.locked.to(device)
            self.strengths = self.strengths.to(device)
            self.speeds = self.speeds.to(device)
            self._indices = [each.to(device) for each in self._indices]

    def weights(self, model: nn.Module) -> list[nn.Parameter]:
        """The compactors of the group, one a place; masks follow them to their device."""
        weights = [model.get_parameter(place.weight) for place in self.target.places]
        self._move_to(weights[0].device)
        return weights

    def rows(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The bundles' rows of weights or gradients, each (n, rows of a channel, ...)."""
        return [
            tensor.detach()[index] for tensor, index in zip(tensors, self._indices, strict=True)
        ]

    def write(self, tensors: Sequence[Tensor], rows: Sequence[Tensor]) -> None:
        """Puts rows back where :meth:`rows` took them from."""
        with torch.no_grad():
            for tensor, index, values in zip(tensors, self._indices, rows, strict=True):
                tensor[index] = values

    def norms(self, model: nn.Module) -> Norms:
        """Joint norm of each channel, see :func:`bundle_norms`."""
        return bundle_norms(self.rows(self.weights(model)))

    def mask(self, channels: Sequence[int], strengths: Sequence[float]) -> None:
        """Masks channels (numbers before anything was cut), each with its lasso strength."""
        at = {channel: position for position, channel in enumerate(self.kept)}
        for channel, strength in zip(channels, strengths, strict=True):
            self.has_masked = True
            self.masked[at[channel]] = True
            self.strengths[at[channel]] = strength

    def standing(self, model: nn.Module) -> Standing:
        """What the selector needs to know."""
        norms = self.norms(model).value.tolist()
        rows = zip(self.kept, norms, self.masked.tolist(), strict=True)
        free = {channel: norm for channel, norm, masked in rows if not masked}
        return Standing(self.target.group.size, free)

    def catch_up(self, model: nn.Module, distance: float, coasting: float) -> None:
        """Raises the strength of masked channels that would come too late."""
        norms = self.norms(model).value.tolist()
        for position in (self.masked & ~self.locked).nonzero().flatten().tolist():
            velocity = float(self.speeds[position])
            needed = strength_to_catch_up(norms[position], velocity, distance, coasting)
            if needed > self.strengths[position]:
                self.strengths[position] = needed

    @property
    def unmasked(self) -> int:
        """Channels that are not masked."""
        return len(self.kept) - int(self.masked.sum())

    def zeros(self, model: nn.Module) -> Tensor:
        """Which channels are exactly zero in every compactor, shape (n,)."""
        return self.norms(model).largest == 0

    def project(self, model: nn.Module) -> tuple[int, float]:
        """Sets masked channels to zero and locks them; how many moved, and the largest norm."""
        norms = self.norms(model).value
        moved = self.masked & (norms > 0)
        self.clear(model, self.masked)
        self.locked = self.locked | self.masked
        return int(moved.sum()), float(norms[moved].max()) if bool(moved.any()) else 0.0

    def clear(self, model: nn.Module, which: Tensor) -> None:
        """Sets the channels marked in ``which``, shape (n,), to zero."""
        if bool(which.any()):
            weights = self.weights(model)
            self.write(
                weights, [torch.where(wide(which, rows), 0, rows) for rows in self.rows(weights)]
            )

    def remove(self, kept: Sequence[int]) -> None:
        """Follows a cut: only the channels in ``kept`` are left in the model."""
        gone = set(self.kept) - set(kept)
        stay = torch.tensor([channel not in gone for channel in self.kept])
        stay = stay.to(self.masked.device)
        self.masked, self.locked = self.masked[stay], self.locked[stay]
        self.strengths, self.speeds = self.strengths[stay], self.speeds[stay]
        self.kept = [channel for channel in self.kept if channel not in gone]
        self.has_masked = bool(self.masked.any())

    def refresh(self, present: Sequence[list[int]]) -> None:
        """Takes the rows that are still in each compactor (numbers before anything was cut)."""
        self._present = list(present)
        self._index_rows()

    def state_dict(self) -> dict[str, Any]:
        """Plain values and CPU tensors."""
        return {
            "kept": list(self.kept),
            "masked": self.masked.cpu(),
            "locked": self.locked.cpu(),
            "strengths": self.strengths.cpu(),
            "speeds": self.speeds.cpu(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what :meth:`state_dict` gave; :meth:`refresh` must follow."""
        device = self.masked.device
        self.kept = list(state["kept"])
        self.masked = state["masked"].to(device)
        self.has_masked = bool(self.masked.any())
        self.locked = state["locked"].to(device)
        self.strengths = state["strengths"].to(device)
        self.speeds = state["speeds"].to(device)


def wide(vector: Tensor, rows: Tensor) -> Tensor:
    """A vector of shape (n,) that broadcasts against rows of shape (n, ...)."""
    return vector.view(-1, *(1,) * (rows.dim() - 1))
