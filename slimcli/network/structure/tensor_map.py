"""What is known of tensors, for as long as they live."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

from torch import Tensor

Value = TypeVar("Value")


class TensorMap(Generic[Value]):
    """A dictionary whose keys are tensors, told apart by identity and held weakly.

    ``torch.utils.weak.WeakIdKeyDictionary`` makes an object for each look, which was a tenth of
    the time of a trace: several of these are asked for every argument of every operator.

    >>> import torch
    >>> known, x = TensorMap(), torch.zeros(2)
    >>> known[x] = "zeros"
    >>> known[x], known.get(x.clone()), len(known)
    ('zeros', None, 1)
    >>> del x
    >>> len(known)
    0
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Tensor], Value]] = {}

    def __getitem__(self, tensor: Tensor) -> Value:
        return self._entries[id(tensor)][1]

    def get(self, tensor: Tensor) -> Value | None:
        """What is known of it, or None."""
        entry = self._entries.get(id(tensor))
        return None if entry is None else entry[1]

    def __contains__(self, tensor: object) -> bool:
        return id(tensor) in self._entries

    def __setitem__(self, tensor: Tensor, value: Value) -> None:
        key, entries = id(tensor), self._entries
        # The id is free for another tensor only after the entry is gone.
        entries[key] = weakref.ref(tensor, lambda _: entries.pop(key, None)), value

    def __delitem__(self, tensor: Tensor) -> None:
        del self._entries[id(tensor)]

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Tensor]:
        entries = list(self._entries.values())  # of their own: another one may end meanwhile
        living = [reference() for reference, _ in entries]
        return iter([each for each in living if each is not None])
