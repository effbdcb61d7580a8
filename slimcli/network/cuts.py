"""Cuts are data: an algorithm says what stays and what merges, ``surgery`` does it.

A *slot* is one dimension of one tensor of a model; a *cut* is what happens to all slots of one
group of coupled channels. Names are those of ``model.named_parameters()`` and
``model.named_buffers()``; no tensor is held here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Slot:
    """One dimension of one tensor that carries the channels of a group.

    Attributes:
        tensor: Name of a parameter or buffer, e.g. ``layer1.0.conv1.weight``, or of an attribute
            that counts channels (``norm.num_features``, see ``attributes.counters``).
        dim: The dimension whose entries are channels.
        indices: For each channel of the group, the entries of that dimension which belong to it
            (one entry for a plain conv, H*W for a Linear after flatten).
        size: Entries of the whole dimension, those of other groups included; None: none beyond the
            last one in ``indices``.
    """

    tensor: str
    dim: int
    indices: tuple[tuple[int, ...], ...]
    size: int | None = None


@dataclass(frozen=True)
class SlotCut:
    """What is left of one dimension of one tensor.

    Attributes:
        tensor: Name of a parameter or buffer, or of an attribute that counts channels.
        dim: The dimension that gets shorter.
        sources: For each entry that stays, in order, the old entries it is made of.
            ``((0,), (2,))`` keeps entries 0 and 2. ``((0, 1), (2,))`` stores the *sum* of 0 and 1,
            then 2: how a consumer takes up merged duplicates.
    """

    tensor: str
    dim: int
    sources: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Constant:
    """A removed channel that reaches a consumer as a constant, not as zero.

    The consumer's bias takes it up: ``bias += weight[:, index] * value`` (summed over the kernel).
    The value is measured by running the model with the producers' channels at zero.

    Attributes:
        module: Path of the consuming Conv or Linear module.
        entries: Entries of its input-channel dimension that are removed.
    """

    module: str
    entries: tuple[int, ...]


@dataclass(frozen=True)
class Cut:
    """All that happens to one group of coupled channels.

    Attributes:
        group: Name of the group, for messages (``layer1.0.bn1``).
        before: Channels before.
        after: Channels after.
        slots: One entry a tensor dimension that changes.
        constants: Consumers whose bias takes up a constant; empty for most groups.
    """

    group: str
    before: int
    after: int
    slots: tuple[SlotCut, ...]
    constants: tuple[Constant, ...] = ()

    def __str__(self) -> str:
        """``layer1.0.bn1 (64 -> 56)``."""
        return f"{self.group} ({self.before} -> {self.after})"
