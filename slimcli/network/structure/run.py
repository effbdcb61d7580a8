"""One traced run of a model, and the table of all rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimcli.network import fuse
from slimcli.network.example import Example, own_copy
from slimcli.network.nested import tensors_in
from slimcli.network.structure.calls import Calls
from slimcli.network.structure.memory import memory_of
from slimcli.network.structure.modes import output_tensors
from slimcli.network.structure.nodes import Kind, Node
from slimcli.network.structure.operators import Execute, call
from slimcli.network.structure.producing import MIXING
from slimcli.network.structure.record import Hands, Record
from slimcli.network.structure.rules import RULES
from slimcli.network.structure.rules.pointwise import map_nodes
from slimcli.network.structure.shapes import Shapes
from slimcli.network.structure.skipping import NumbersAsked, Skipping
from slimcli.network.structure.trace import Tracer


@dataclass(frozen=True)
class TracedRun:
    """What a traced run gave besides the findings in its record.

    Attributes:
        norm_after: Producer key -> the norm that alone reads it.
        output: The model's prediction.
        ops: Every operator that ran, with the shapes of its results.
    """

    norm_after: dict[str, str]
    output: Any
    ops: tuple[Any, ...]


def run_traced(
    model: nn.Module,
    example: Example,
    record: Record,
    execute: Execute = call,
    skipping: Skipping | None = None,
) -> TracedRun:
    """Runs the model as it is, following its channels.

    Args:
        model: Its modes are left as they are.
        example: The batch.
        record: Findings are added to it.
        execute: How an operator is executed.
        skipping: Does so for what hangs on the batch, and computes no products.

    Raises:
        NumbersAsked: The run hangs on numbers that were not computed.
    """
    record.runs += 1
    batch = own_copy(example.batch)
    calls = Calls()
    tracer = Tracer(record, calls, RULES, execute, skipping)
    tracer.give(batch)
    handles = _watch_modules(model, tracer)
    held = [(each, each.data) for each in model.parameters() if not _is_lazy(each)]
    leaves = [each for each, _ in held if each.is_leaf]
    marks = [(each, each.grad, each.requires_grad) for each in leaves]
    for parameter in leaves:
        parameter.grad = None  # the code may call backward
    try:
        with torch.no_grad(), tracer, Shapes(tracer):
            output = example.predict(model, batch)
        if skipping is not None and skipping.were_asked:
            raise NumbersAsked  # the code went on for all that
        for tensor in output_tensors(output):
            calls.used(tensor)
            record.freeze(tracer.planes_of(tensor), "it is an output of the model")
    finally:
        for handle in handles:
            handle.remove()
        moved = any(memory_of(each) != memory_of(data) for each, data in held)
        record.writes |= moved or bool(tracer.backups) or any(p.grad is not None for p in leaves)
        record.written |= tracer.backups.keys()
        for parameter, data in held:  # the code may have put other numbers in their place
            if memory_of(parameter) != memory_of(data):
                parameter.data = data
        for source, backup in tracer.backups.values():
            with torch.no_grad():
                source.copy_(backup)
        for parameter, grad, requires_grad in marks:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
    return TracedRun(calls.norm_after(), output, tuple(tracer.ops))


def _is_lazy(parameter: nn.Parameter) -> bool:
    """Has it no numbers yet?"""
    return isinstance(parameter, nn.UninitializedParameter)


def _watch_modules(model: nn.Module, tracer: Tracer) -> list[Any]:
    """Hooks that tell the tracer which module is running."""
    handles = []
    counting = tracer.record.sources.counting

    def enter(path: str) -> Any:
        def hook(module: nn.Module, inputs: Any, keywords: Any) -> None:
            tensors = list(tensors_in((inputs, keywords)))
            _take(tracer, tracer.calls.top()[0], tensors)
            tracer.calls.enter(path, module, tensors)
            _take(tracer, path, tensors)
            tracer.calls.mixing_entered += isinstance(module, MIXING)
            if module in counting:
                _count(tracer, counting[module], inputs)

        return hook

    def leave(module: nn.Module, inputs: Any, keywords: Any, output: Any) -> None:
        path = tracer.calls.leave()
        if type(module).__name__ in fuse.PLAIN_NORMS and isinstance(output, Tensor):
            read = next(tensors_in((inputs, keywords)))
            tracer.calls.normed(read, path)
            node = _affine_node(tracer.record, path)
            before = tracer.planes_of(read)
            tracer.relabel(output, tuple(map_nodes(p, node) for p in before))
        _take(tracer, tracer.calls.top()[0], tensors_in(output))

    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        handles.append(
            module.register_forward_pre_hook(enter(path), prepend=True, with_kwargs=True)
        )
        handles.append(module.register_forward_hook(leave, always_call=True, with_kwargs=True))
    return handles


def _affine_node(record: Record, path: str) -> Callable[[int], int]:
    """Node -> the node behind a norm."""
    return lambda node: record.table.add(Node(Kind.AFFINE, (node,), name=path))


def _count(tracer: Tracer, name: str, inputs: tuple[Any, ...]) -> None:
    """A layer without tensors says in an attribute how many channels it is called with."""
    labels = tracer.record.sources.counters[name]
    for tensor in tensors_in(inputs):
        for plane in tracer.planes_of(tensor):
            if plane.numel() == labels.numel():
                tracer.record.join(plane.reshape(-1), labels)


def _take(tracer: Tracer, path: str, tensors: Iterable[Tensor]) -> None:
    """The forward of the module at this path has these tensors in its hands."""
    every = tracer.record.hands
    hands = every[path] if path in every else every.setdefault(path, Hands())
    for tensor in tensors:
        planes = tracer.planes_of(tensor)
        if planes:
            hands.planes.append(planes)
        elif tensor.dim() > 1:  # channels come second, or last where there is no image
            hands.plain_sizes |= {tensor.shape[1], tensor.shape[-1 if tensor.dim() < 4 else 1]}
