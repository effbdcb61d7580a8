"""Layers that nothing is done to, and the channels beside them that must stay because of it.

Recurrent layers keep one width inside all their gates; a wrapper of DDP would not hear of new
parameters, and a TorchScript module gives none away; layers that did not run on the example may
read or make channels as soon as the user's code takes another branch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from slimcli.network.attributes import Convolution
from slimcli.network.holders import owner_of
from slimcli.network.structure.groups import components, first_choices
from slimcli.network.structure.planes import Labels, entries, labels_of
from slimcli.network.structure.record import Hands, Record
from slimcli.network.structure.sources import SourceDim

RECURRENT = (nn.RNNBase, nn.RNNCellBase)
DISTRIBUTED = (
    "DistributedDataParallel would not share the gradients of the parameters that a cut makes: "
    "give slim the module inside and wrap it afterwards"
)
SCRIPTED = "TorchScript modules can't be cut: give slim the Python module it was made from"
NOT_RUN = "it did not run on the example"
LISTED = 4
"""So many layers are named in a note."""


def freeze_uncuttable(record: Record) -> None:
    """Freezes every channel of the modules that can't be cut, whatever runs."""
    for path, module in record.sources.modules.items():
        if isinstance(module, RECURRENT):
            reason = f"recurrent layers are left alone ({path or type(module).__name__})"
            _freeze_below(path, record, reason)
        elif isinstance(module, nn.parallel.DistributedDataParallel):
            _freeze_below(path, record, DISTRIBUTED)
        elif isinstance(module, torch.jit.ScriptModule):
            _freeze_below(path, record, SCRIPTED)


def _freeze_below(path: str, record: Record, reason: str) -> None:
    prefix = f"{path}." if path else ""
    for dim in record.sources.dims:
        if any(name.startswith(prefix) for name in record.sources.names_of(dim.tensor)):
            record.freeze_labels(np.arange(dim.first, dim.first + dim.size), reason)


def freeze_unseen(model: nn.Module, record: Record) -> list[str]:
    """Freezes what may meet a layer that did not run, and notes such layers in the record.

    Such a layer is called, if ever, by the nearest module around it that did run. Of the channels
    that the forward of that module has in its hands or makes with its own parameters, those must
    stay that have the width of one of the layer's dimensions.

    Returns:
        Notes for the user.
    """
    by_caller: dict[str, list[str]] = defaultdict(list)
    widths: dict[str, set[int]] = defaultdict(set)
    parameters = {name for name, _ in model.named_parameters()}
    for dim in record.sources.dims:
        if dim.tensor in parameters and dim.tensor not in record.sources.seen:
            if _joined_with_weight(model, record, dim):
                continue
            path = owner_of(*_divided(dim.tensor))[0]
            path = dim.tensor if path in record.hands else path
            if path not in widths:
                by_caller[_caller(path, record)].append(path)
            widths[path].add(dim.size)
    record.unseen = list(widths)
    for caller, paths in by_caller.items():
        for path in paths:
            _freeze_widths(record, caller, path, widths[path])
    return [_note(record.unseen)] if record.unseen else []


def _joined_with_weight(model: nn.Module, record: Record, dim: SourceDim) -> bool:
    """Joins the bias of a layer whose weight other code reads with that weight; was it one?"""
    path, local = _divided(dim.tensor)
    if local != "bias" or not isinstance(model.get_submodule(path), (nn.Linear, Convolution)):
        return False
    for other in record.sources.dims:
        is_weight = other.tensor == f"{path}.weight".removeprefix(".") and other.dim == 0
        if is_weight and other.size == dim.size and other.tensor in record.sources.seen:
            labels, weights = (np.arange(d.first, d.first + d.size) for d in (dim, other))
            record.join_labels(labels, weights)
            return True
    return False


def freeze_rewired(record: Record) -> None:
    """Freezes channels that another path through the user's code may lay upon others.

    Where Python reads a value of a tensor, the next batch may take another way: the layers that
    ran may then read each other's outputs. Only channels of one width can be meant, so that a width
    that a single group has in the hands of that code is safe.
    """
    reads = dict(record.reads)
    component = components(record, first_choices(record)) if reads else np.zeros(1, np.int64)
    for path, line in reads.items():
        hands = record.hands.get(path, Hands())
        by_width: dict[int, list[Labels]] = defaultdict(list)
        for plane in (plane for planes in hands.planes for plane in planes):
            labels = labels_of(plane).reshape(-1).numpy()
            for size in {size for size in plane.shape if size > 1}:
                by_width[size].append(labels)
        for size, found in by_width.items():
            kinds = {component[labels].tobytes() for labels in found}
            if len(kinds) > 1 or size in hands.plain_sizes:
                reason = f"the next batch may take another way at {line}"
                for labels in found:
                    record.freeze_labels(labels, reason)


def other_ways(record: Record) -> list[str]:
    """A note on where values of the batch are read, so that the next one may take another way."""
    lines = list(dict.fromkeys(line for _, line in record.reads if line))
    if not lines:
        return []
    more = f" and in {len(lines) - 1} more lines" if len(lines) > 1 else ""
    return [
        f"the code reads values of the batch, or dice, at {lines[0]}{more}: "
        "what it does with other values was tried only as far as the example takes it"
    ]


def outputs_of(model: nn.Module, path: str) -> int:
    """Output channels of a layer, or the first size of a bare parameter."""
    modules = dict(model.named_modules())
    layer = modules.get(path)
    if layer is None:
        return int(model.get_parameter(path).shape[0])
    for name in ("out_channels", "out_features", "embedding_dim"):
        if hasattr(layer, name):
            return int(getattr(layer, name))
    return 0


def _divided(name: str) -> tuple[str, str]:
    path, _, local = name.rpartition(".")
    return path, local


def _caller(path: str, record: Record) -> str:
    """The nearest module around this one that ran, or itself."""
    while path and path not in record.hands:
        path = path.rpartition(".")[0]
    return path


def _freeze_widths(record: Record, caller: str, path: str, widths: Iterable[int]) -> None:
    reason = f"{path} did not run on the example: it may read or make these channels"
    for planes in record.hands.get(caller, Hands()).planes:
        fitting = [plane for plane in planes if any(size in widths for size in plane.shape)]
        for plane in fitting:
            record.freeze_labels(entries(labels_of(plane)), reason)
    sources = record.sources
    for dim in sources.dims:
        is_its_own = any(_divided(name)[0] == caller for name in sources.names_of(dim.tensor))
        if dim.size in widths and dim.tensor in sources.seen and is_its_own:
            record.freeze_labels(np.arange(dim.first, dim.first + dim.size), reason)


def _note(paths: list[str]) -> str:
    named = ", ".join(paths[:LISTED]) + (f" and {len(paths) - LISTED} more" * (len(paths) > LISTED))
    return (
        f"did not run on the example: {named}; channels that fit them are left alone. "
        "Use a batch that runs them, or take them out of the model"
    )
