"""Where every random number of a run comes from: the seed, the epoch and the batch, nothing else.

What happened before does not matter, nor does the number of workers; this is what makes a resumed
run equal to one that never stopped.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor


def derive(seed: int, *parts: int | str) -> int:
    """A seed of 32 bits for one purpose, the same on every machine.

    >>> derive(0, "order", 1) == derive(0, "order", 1) != derive(0, "order", 2)
    True
    """
    text = ":".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


def seed_all(seed: int, *parts: int | str) -> None:
    """Seed Python, NumPy and torch (every device) for one purpose."""
    value = derive(seed, *parts)
    random.seed(value)
    numpy.random.seed(value)
    torch.manual_seed(value)


def epoch_order(seed: int, epoch: int, count: int) -> list[int]:
    """The order in which an epoch visits ``count`` samples.

    >>> sorted(epoch_order(0, 3, 5))
    [0, 1, 2, 3, 4]
    """
    generator = torch.Generator().manual_seed(derive(seed, "order", epoch))
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


def rng_state() -> dict[str, Any]:
    """The generators of Python, NumPy and torch as tensors and plain values."""
    version, words, gauss = random.getstate()
    legacy = numpy.random.get_state(legacy=True)
    assert isinstance(legacy, tuple)
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [legacy[0], torch.from_numpy(legacy[1].astype("int64")), *legacy[2:]],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Take back what :func:`rng_state` gave; a different number of GPUs is no error."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    assert isinstance(keys, Tensor)
    numpy.random.set_state((name, keys.numpy().astype("uint32"), *rest))
    torch.set_rng_state(state["torch"])
    cuda = state.get("cuda", [])
    if torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)


@contextmanager
def untouched_rng() -> Iterator[None]:
    """Whatever is drawn inside does not show outside."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)
