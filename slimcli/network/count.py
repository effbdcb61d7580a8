"""Multiply-accumulates and parameters of a model, counted by torch's own counter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from slimcli.network.evaluating import evaluating
from slimcli.network.example import Example
from slimcli.network.nested import fields_of, holds_fields


@dataclass(frozen=True)
class MacCount:
    """Multiply-accumulates of one sample.

    Attributes:
        total: Of the whole model: convs, matrix products, attention; nothing point-wise.
        by_module: Of each module that has any, path -> MACs, submodules included.
    """

    total: int
    by_module: dict[str, int]


def count_macs(model: nn.Module, example: Example, samples: int | None = None) -> MacCount:
    """Runs the model once in eval mode and counts half the FLOPs of torch's ``FlopCounterMode``.

    Args:
        model: Any module; modes are as before afterwards.
        example: The batch to run; costs of one sample are an even share of it.
        samples: Samples in the batch; None reads it from the batch (see :func:`samples_in`).

    Raises:
        ValueError: No tensor in the batch says how many samples there are.
    """
    samples = samples_in(example.batch) if samples is None else samples
    counter = FlopCounterMode(display=False)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        # Plain matrix products, because not every fused attention kernel is known to the counter.
        with evaluating(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            example.run(model)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    macs = {
        path: sum(counts.values()) // 2 // samples
        for path, counts in counter.get_flop_counts().items()
    }
    root = type(model).__name__
    by_module = {
        path.removeprefix(root).removeprefix("."): number
        for path, number in macs.items()
        if path != "Global" and number
    }
    return MacCount(counter.get_total_flops() // 2 // samples, by_module)


def count_params(model: nn.Module) -> int:
    """Numbers in all parameters; shared ones count once.

    >>> count_params(nn.Linear(3, 2))
    8
    """
    return sum(parameter.numel() for parameter in model.parameters())


def samples_in(batch: Any) -> int:
    """How many samples a batch holds: the leading size of its first tensor or array.

    A batch is a tensor or a tuple, list, dict or dataclass of inputs. A list inside it is a number
    of inputs where a tensor or dict beside it says how many samples there are (two views and a
    label), and one entry a sample where there is none (images of different sizes and their
    targets).

    Raises:
        ValueError: There is no tensor in it.

    >>> samples_in((torch.zeros(8, 3, 4, 4), torch.zeros(8)))
    8
    >>> samples_in(((torch.zeros(8, 3), torch.zeros(8, 3)), torch.zeros(8)))
    8
    >>> samples_in(([torch.zeros(3, 5, 5), torch.zeros(3, 7, 7)], [{}, {}]))
    2
    """
    values = list(batch.values()) if isinstance(batch, Mapping) else batch
    if holds_fields(batch):
        values = list(fields_of(batch).values())
    if not isinstance(values, (list, tuple)):
        values = [values]
    for value in values:
        if isinstance(value, (Tensor, np.ndarray)) and value.ndim > 0:
            return int(value.shape[0])
    for value in values:
        if (isinstance(value, Mapping) and value) or holds_fields(value):
            return samples_in(value)
    for value in values:
        if isinstance(value, (list, tuple)) and value and not isinstance(value[0], (int, float)):
            return len(value)
    raise ValueError("no tensor in the batch says how many samples it has")
