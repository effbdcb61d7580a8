"""Copies, modes and randomness: how a model is run without leaving a trace."""

from __future__ import annotations

import contextlib
import gc
import itertools
import random
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slimcli.network.copying import deep_copy

_NUMBERS = frozenset(map(np.dtype, ("?", "b", "B", "h", "i", "q", "e", "f", "d", "F", "D")))
"""What arrays hold that torch can hold as well."""


def share_copy(model: nn.Module) -> nn.Module:
    """A copy with its own modules and buffers and the same parameters."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    return deep_copy(model, memo)


def gpus_of(model: nn.Module) -> list[int]:
    """Numbers of the GPUs that a model lies on: others must not be woken."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return []
    tensors = itertools.chain(model.parameters(), model.buffers())
    return sorted({each.get_device() for each in tensors if each.is_cuda})


@contextlib.contextmanager
def preserved_randomness(model: nn.Module) -> Iterator[None]:
    """Random states of torch (CPU and the model's GPUs), numpy and Python are as before after."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(gpus_of(model)):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def random_states(model: nn.Module) -> list[Tensor]:
    """Of torch's generators, on the CPU and on the model's GPUs."""
    return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, gpus_of(model))]


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """No pass of the garbage collector over all of torch's objects meanwhile.

    Copies of models are many small objects, which make it think of a pass over everything that was
    ever imported: a third of the time of a small network's analysis.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def without_fast_path() -> Iterator[None]:
    """Attention is taken apart into single operators; compiled models run eagerly."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def output_tensors(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """All tensors in a prediction: nested containers, dataclasses, objects with attributes.

    Arrays of numbers count as tensors.
    """
    seen = set() if seen is None else seen
    if isinstance(value, np.ndarray) and value.dtype in _NUMBERS:
        value = torch.from_numpy(value.copy())
    if isinstance(value, Tensor):
        yield value
        return
    if id(value) in seen or value is None or isinstance(value, (str, int, float, bool)):
        return
    seen.add(id(value))
    if isinstance(value, dict):
        children: list[Any] = list(value.values())
    elif isinstance(value, (list, tuple, set)):
        children = list(value)
    elif is_dataclass(value) and not isinstance(value, type):
        children = [getattr(value, each.name) for each in fields(value)]
    elif isinstance(value, nn.Module):
        children = []
    else:
        slots = [name for kind in type(value).__mro__ for name in vars(kind).get("__slots__", ())]
        children = [getattr(value, name, None) for name in slots if isinstance(name, str)]
        children += vars(value).values() if hasattr(value, "__dict__") else []
    for child in children:
        yield from output_tensors(child, seen)
