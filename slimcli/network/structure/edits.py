"""Channels made removable at once, as training makes them removable slowly: zero, or equal.

What has to change is data first, so that a trial cut can put it off until a weight is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimcli.network.cuts import Slot
from slimcli.network.structure.structure import Group


@dataclass(frozen=True)
class Edit:
    """Entries of one dimension of a tensor get other numbers.

    Attributes:
        tensor: Parameter or buffer of a model.
        dim: The dimension.
        targets: Entries that change.
        origins: Entries whose numbers they get, one each; None: they become zero.
    """

    tensor: Tensor
    dim: int
    targets: Sequence[int]
    origins: Sequence[int] | None = None

    def apply_to(self, tensor: Tensor) -> None:
        """Changes a tensor of the same shape in place."""
        targets = torch.tensor(self.targets, device=tensor.device)
        if self.origins is None:
            tensor.index_fill_(self.dim, targets, 0)
            return
        origins = torch.tensor(self.origins, device=tensor.device)
        tensor.index_copy_(self.dim, targets, tensor.index_select(self.dim, origins))


def zeros(model: nn.Module, group: Group, channels: Sequence[int]) -> Iterator[Edit]:
    """What makes channels of a group zero at its sites."""
    if not channels:
        return
    for site in group.sites:
        norm = model.get_submodule(site.norm) if site.norm else None
        has_affine = norm is not None and getattr(norm, "weight", None) is not None
        parts = ("weight", "bias") if has_affine else ()
        owned = [getattr(norm, name, None) for name in (*parts, "running_mean")] if norm else []
        for slot in group.followers:  # by identity: norms may share a weight, which has one name
            if any(each is not None and each is _tensor(model, slot) for each in owned):
                yield _zero(model, slot, channels)
        if not has_affine:
            for slot in group.producers:
                if not site.conv or _inside(slot, site.conv):
                    yield _zero(model, slot, channels)


def equals(model: nn.Module, group: Group, clusters: Sequence[Sequence[int]]) -> Iterator[Edit]:
    """What gives all channels of each cluster the numbers of its first one."""
    pairs = [(first, other) for first, *others in clusters for other in others]
    if not pairs:
        return
    for slot in dict.fromkeys(group.producers + group.followers):
        firsts = [index for first, _ in pairs for index in slot.indices[first]]
        others = [index for _, other in pairs for index in slot.indices[other]]
        yield Edit(_tensor(model, slot), slot.dim, others, firsts)


def zero_channels(model: nn.Module, group: Group, channels: Sequence[int]) -> None:
    """Makes channels of a group zero at its sites, in place: like a compactor row of zeros."""
    carry_out(zeros(model, group, channels))


def carry_out(edits: Iterable[Edit]) -> None:
    """Does them to the tensors they name."""
    with torch.no_grad():
        for edit in edits:
            edit.apply_to(edit.tensor)


def _inside(slot: Slot, path: str) -> bool:
    return slot.tensor.startswith(f"{path}.")


def _zero(model: nn.Module, slot: Slot, channels: Sequence[int]) -> Edit:
    entries = [index for channel in channels for index in slot.indices[channel]]
    return Edit(_tensor(model, slot), slot.dim, entries)


def _tensor(model: nn.Module, slot: Slot) -> Tensor:
    path, _, local = slot.tensor.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(path), local)
    return tensor
