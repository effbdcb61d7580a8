"""The labels: one number for every entry of every dimension of every parameter and buffer."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from slimcli.network import attributes
from slimcli.network.structure.memory import memory_of
from slimcli.network.structure.nodes import Kind, Node, NodeTable
from slimcli.network.structure.planes import SHIFT


@dataclass(frozen=True)
class Source:
    """A parameter or buffer with the first label of each of its dimensions (0: not labelled)."""

    name: str
    tensor: Tensor
    first_labels: tuple[int, ...]


@dataclass(frozen=True)
class SourceDim:
    """One labelled dimension; its labels are ``first`` ... ``first + size - 1``."""

    tensor: str
    dim: int
    first: int
    size: int


class Sources:
    """All labelled tensors of a model, found by identity or by the memory they share.

    Args:
        model: Its parameters and buffers get labels, tied ones the same.

    Attributes:
        modules: All modules of the model by their paths; of a shared one its first path.
        dims: All labelled dimensions.
        seen: Names of tensors that were asked for: operators used them.
        counters: Name of an attribute that counts channels -> labels for what it counts.
        counting: Layer -> the name of such an attribute of it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.dims: list[SourceDim] = []
        self._starts: list[int] = []
        self._next = 1
        self._by_identity: dict[int, Source] = {}
        self._by_memory: dict[tuple[int, int, tuple[int, ...]], Source] = {}
        self._storages: set[int] = set()
        self._names: dict[str, set[str]] = {}
        self.seen: set[str] = set()
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        kernels = _kernels(self.modules.values())
        named: list[tuple[str, Tensor]] = [*model.named_parameters(remove_duplicate=False)]
        named += [*model.named_buffers(remove_duplicate=False)]
        for name, tensor in named:
            self._register(name, tensor, 2 if id(tensor) in kernels else tensor.dim())
        self.counters: dict[str, Tensor] = {}
        self.counting: dict[nn.Module, str] = {}
        for name, (module, attribute) in attributes.counters(self.modules).items():
            size = getattr(module, attribute)
            if size > 1:
                self.counters[name] = torch.arange(size) + self._labelled(name, 0, size)
                self.counting[module] = name

    @property
    def count(self) -> int:
        """Labels in use, label 0 included."""
        return self._next

    def _register(self, name: str, tensor: Tensor, labelled_dims: int) -> None:
        if isinstance(tensor, nn.UninitializedParameter):
            return
        if id(tensor) in self._by_identity:
            self._names[self._by_identity[id(tensor)].name].add(name)
            return
        key = _memory_key(tensor)
        source = self._by_memory.get(key) if tensor.numel() else None
        if source is None:
            first_labels = []
            for dim, size in enumerate(tensor.shape):
                if size <= 1 or dim >= labelled_dims:
                    first_labels.append(0)
                    continue
                first_labels.append(self._labelled(name, dim, size))
            source = Source(name, tensor, tuple(first_labels))
            self._by_memory[key] = source
        self._names.setdefault(source.name, set()).add(name)
        self._by_identity[id(tensor)] = source
        memory = memory_of(tensor)
        if memory is not None:
            self._storages.add(memory)

    def _labelled(self, name: str, dim: int, size: int) -> int:
        """The first of the labels that a dimension gets."""
        first = self._next
        self._starts.append(first)
        self.dims.append(SourceDim(name, dim, first, size))
        self._next += size
        return first

    def find(self, tensor: Tensor) -> Source | None:
        """The source a tensor is, also through ``.data``."""
        source = self._by_identity.get(id(tensor))
        if source is None and memory_of(tensor) in self._storages:
            source = self._by_memory.get(_memory_key(tensor))
        if source is not None:
            self.seen.add(source.name)
        return source

    def names_of(self, name: str) -> set[str]:
        """All names of the tensor that is known by this one."""
        return self._names.get(name, set())

    def shares_memory(self, tensor: Tensor) -> Source | None:
        """A source whose memory the tensor is part of."""
        memory = memory_of(tensor)
        if memory not in self._storages:
            return None
        return next(each for each in self._by_memory.values() if memory_of(each.tensor) == memory)

    def dim_of(self, label: int) -> SourceDim:
        """The tensor dimension a label belongs to."""
        return self.dims[bisect.bisect_right(self._starts, label) - 1]


def source_planes(source: Source, table: NodeTable) -> tuple[Tensor, ...]:
    """One plane for each labelled dimension of a source."""
    shape = source.tensor.shape
    planes = []
    for dim, first in enumerate(source.first_labels):
        if first:
            per_channel = source.tensor.numel() == shape[dim]
            node = table.add(Node(Kind.SOURCE, flags=(per_channel,), name=source.name))
            packed = first + (node << SHIFT)
            plane_shape = [1] * len(shape)
            plane_shape[dim] = shape[dim]
            entries = np.arange(packed, packed + shape[dim]).reshape(plane_shape)
            planes.append(torch.from_numpy(entries))
    return tuple(planes)


def _kernels(modules: Iterable[nn.Module]) -> set[int]:
    """Identities of conv weights (also parametrized ones): only two dimensions carry channels."""
    convs = torch.nn.modules.conv._ConvNd
    found = set()
    for module in modules:
        if isinstance(module, convs):
            tensors = [*module.named_parameters()]
            found |= {id(tensor) for name, tensor in tensors if tensor.dim() > 2}
    return found


def _memory_key(tensor: Tensor) -> tuple[int, int, tuple[int, ...]]:
    memory = memory_of(tensor)
    if memory is None:
        return id(tensor), 0, ()
    return memory, int(tensor.storage_offset()), tuple(tensor.shape)
