"""What all mixing operators share: who called, what is produced, what is consumed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from slimcli.network.structure.nodes import Kind, Node, NodeTable, State, ZeroStates
from slimcli.network.structure.planes import (
    LABEL_MASK,
    SHIFT,
    Labels,
    distinct,
    entries,
    first_of,
    labels_of,
    squeeze_equal,
)
from slimcli.network.structure.record import Consumer, Producer
from slimcli.network.structure.trace import Op, Planes

MIXING = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding, nn.EmbeddingBag)
"""Modules that can be named as the place of a producer; subclasses included."""

SEVERAL_KINDS = "several kinds of channels are summed over"


def caller(op: Op, weight: Tensor, plane: Tensor | None) -> str:
    """Path of the module whose weight this is, if it is the one running; else ``tensor:NAME``."""
    owner = ""
    if plane is not None:
        first = first_of(plane) & LABEL_MASK
        if not first:
            labels = plane.reshape(-1).numpy() & LABEL_MASK
            first = int(labels[(labels != 0).argmax()])
        owner = op.record.sources.dim_of(first).tensor if first else ""
    else:
        source = op.record.sources.find(weight)
        owner = source.name if source else ""
    path, module = op.tracer.calls.top()
    names = op.record.sources.names_of(owner)
    inside = not owner or any(name.startswith(f"{path}.") if path else True for name in names)
    if isinstance(module, MIXING) and inside:
        return path
    return f"tensor:{owner}"


def of_activations(op: Op, planes: Sequence[Tensor]) -> list[Tensor]:
    """Of several kinds of channels along an axis those of the activations, if there are any.

    Frequencies that a feature is multiplied with, and laid side by side, stay as they are.
    """
    if len(planes) < 2:
        return list(planes)
    is_weight = weights_only(op)
    others = [plane for plane in planes if not is_weight(plane)]
    if not others:
        return list(planes)
    op.freeze_planes([plane for plane in planes if is_weight(plane)], SEVERAL_KINDS)
    return others


def is_made(op: Op, plane: Tensor) -> bool:
    """Is it of a tensor that was made as wide as another one?"""
    return op.record.table.is_made(first_of(plane) >> SHIFT)


def only_plane(op: Op, tensor: Tensor, axis: int) -> Tensor | None:
    """The plane of a weight along an axis; more than one there, or a tilted one, is frozen."""
    found = [plane for plane in op.planes(tensor) if plane.shape[axis] > 1]
    if len(found) == 1 and found[0].numel() != found[0].shape[axis]:
        found = [squeeze_equal(found[0])]
    if any(is_made(op, plane) for plane in found):
        op.freeze_planes(found, "a weight is made in the forward, as wide as its input")
        return None
    if len(found) == 1 and found[0].numel() == found[0].shape[axis]:
        return found[0]
    op.freeze_planes(found, "the weight is computed in a way that mixes its axes")
    return None


def takes_up(op: Op, path: str, weight: Tensor, tensor: Tensor) -> bool:
    """Can the bias of the layer at this path take up a constant?

    What is measured enters the layer, is multiplied with its weight, and goes to its bias: the
    operator must do the same. A layer of the user's own may change any of them on the way.

    Args:
        op: Multiplies.
        path: Of the layer that runs; ``tensor:NAME`` where none does.
        weight: Plane of the operator's weight.
        tensor: The operator's input.
    """
    module = op.tracer.calls.top()[1]
    if path.startswith("tensor:") or module is None:
        return False
    kinds = {op.record.table.nodes[node].kind for node in distinct(weight.numpy().ravel() >> SHIFT)}
    if kinds != {Kind.SOURCE} and not parametrize.is_parametrized(module, "weight"):
        return False
    if _runs_code_of_torch(module):
        return True
    bias, tensors = getattr(module, "bias", None), op.tensors()
    has_own_bias = len(tensors) == 2 if bias is None else any(each is bias for each in tensors)
    return has_own_bias and op.tracer.calls.is_given(tensor)


def _runs_code_of_torch(module: nn.Module) -> bool:
    """Is its forward that of torch, or the user's own?"""
    kind = type(module)
    codes = [getattr(kind, name, kind.forward) for name in ("forward", "_conv_forward")]
    is_plain = all(code.__module__.startswith("torch.nn.") for code in codes)
    return is_plain and "forward" not in vars(module)


def add_consumer(
    op: Op, path: str, plane: Tensor, pairs: Labels, *, takes_constants: bool, is_plain: bool
) -> None:
    """Records the reading side of a mixing op. ``pairs``: arriving and weight labels, (2, n)."""
    op.record.consumers.append(
        Consumer(
            op.record.next_order(),
            path,
            entries(plane),
            distinct(pairs[1]),
            pairs,
            takes_constants,
            is_plain,
        )
    )


def add_sum(op: Op, plane: Tensor) -> None:
    """Records that these channels are summed up without any weight."""
    add_consumer(op, "", plane, np.zeros((2, 0), np.int64), takes_constants=False, is_plain=False)


def add_producer(
    op: Op,
    key: str,
    labels: Tensor,
    *,
    weight: Tensor,
    is_plain: bool,
    bias: Tensor | None = None,
) -> int:
    """Records the writing side of a mixing op; returns the node of its values.

    Args:
        op: Multiplies.
        key: Path of the layer; ``tensor:NAME`` where none does it.
        labels: Of the outputs.
        weight: Plane of the weight that makes them.
        is_plain: One group.
        bias: What it adds.
    """
    biases = [labels_of(plane).reshape(-1).numpy() for plane in op.planes(bias)]
    outputs = labels.reshape(-1).numpy()
    op.record.layers.setdefault(key, outputs)
    op.record.producers.append(
        Producer(op.record.next_order(), key, outputs, is_plain, tuple(biases))
    )
    nodes = distinct(weight.numpy().ravel() >> SHIFT)
    vanishes = all(_vanishes(op.record.table, int(node)) for node in nodes)
    return op.record.table.add(Node(Kind.PRODUCER, name=key, keeps_zero=vanishes))


def _vanishes(table: NodeTable, number: int) -> bool:
    """Is a weight zero where one of its tensors is? No sum of two, and no exponential."""
    node = table.nodes[number]
    if node.kind == Kind.SOURCE:
        return bool(node.name)
    names = table.names_below(number)
    return any(ZeroStates(table, (name,), {}).of(number) == State.ZERO for name in names)


def note_unfollowed(op: Op, size: int) -> None:
    """The running layer makes channels with a weight that tells nothing about them."""
    path, module = op.tracer.calls.top()
    if isinstance(module, MIXING) and size > 1:
        op.record.layers.setdefault(path, np.zeros(size, dtype=np.int64))


def bias_behind(op: Op) -> Sequence[Planes] | None:
    """What ``added`` gives where a layer adds its own bias behind its product; None elsewhere.

    Torch does so for inputs that don't lie in memory as rows; the bias then belongs to the layer
    as much as one that is added inside the product.
    """
    path, module = op.tracer.calls.top()
    if not isinstance(module, MIXING) or len(op.args) != 2 or op.kwargs:
        return None
    value, bias = op.args
    planes, biases = op.planes(value), op.planes(bias) if isinstance(bias, Tensor) else ()
    node = op.record.table.add(Node(Kind.PRODUCER, name=path))
    if bias is not getattr(module, "bias", None) or len(planes) != 1 or len(biases) != 1:
        return None
    if planes[0].shape[-1] != biases[0].shape[-1] or np.any(planes[0].numpy() >> SHIFT != node):
        return None
    op.record.tie(planes[0], biases[0], "a bias that is shared")
    producers = op.record.producers
    for number in range(len(producers) - 1, -1, -1):
        if producers[number].key == path:
            labels = labels_of(biases[0]).numpy()
            found = producers[number]
            producers[number] = replace(found, biases=(*found.biases, labels))
            return [planes]
    return None


def note_united(op: Op, planes: Sequence[Tensor]) -> None:
    """Remembers weights that become one: of what reads it, only the first would be added up."""
    several = any(not torch.equal(labels_of(planes[0]), labels_of(each)) for each in planes[1:])
    if several and all(map(weights_only(op), planes)):
        reason = f"{op.name} makes one weight of several"
        op.record.not_additive += [(entries(labels_of(plane)), reason) for plane in planes]


def weights_only(op: Op) -> Callable[[Tensor], bool]:
    """Tells planes of weights from planes of activations."""

    def is_weight(plane: Tensor) -> bool:
        first = first_of(plane) >> SHIFT
        if first and not op.record.table.is_weight(first):
            return False
        nodes = distinct(plane.reshape(-1).numpy() >> SHIFT)
        return all(op.record.table.is_weight(int(node)) for node in nodes if node)

    return is_weight
