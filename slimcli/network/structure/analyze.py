"""Analysis of a model: run it twice under the tracer, group, judge, try."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slimcli.network import fuse
from slimcli.network.count import samples_in
from slimcli.network.example import Example
from slimcli.network.structure import (
    rules_conv,
    rules_matmul,
    rules_movement,
    rules_norm,
    rules_pointwise,
    rules_spatial,
)
from slimcli.network.structure.assemble import assemble
from slimcli.network.structure.groups import build, first_choices
from slimcli.network.structure.record import Record
from slimcli.network.structure.rules_pointwise import map_nodes
from slimcli.network.structure.sources import Sources
from slimcli.network.structure.structure import Structure
from slimcli.network.structure.trace import Calls, Rule, Tracer, affine_node

RULES: dict[str, Rule] = {
    **rules_pointwise.RULES,
    **rules_spatial.RULES,
    **rules_norm.RULES,
    **rules_matmul.RULES,
    **rules_conv.RULES,
    **rules_movement.RULES,
}


@dataclass
class Traced:
    """A model that was traced: what was found, and which norm follows which producer."""

    record: Record
    norm_after: dict[str, str]
    notes: tuple[str, ...]


def analyze(model: nn.Module, example: Example, *, trial: bool = True) -> Structure:
    """Finds out which channels of a model belong together, and which can be removed.

    The model is run on the example in eval and in train mode (norms in eval mode), on a copy that
    shares its parameters; modes, buffers and random states are as before afterwards.

    Args:
        model: Any module.
        example: A real batch and the way to run the model on it.
        trial: Also cut every group once, on a copy in float64, and freeze what raises or differs.

    Raises:
        Exception: Whatever the model raises on the example in eval mode.
    """
    traced = trace(model, example)
    try:
        samples = samples_in(example.batch)
    except ValueError:
        samples = 1
    grouping = build(traced.record, first_choices(traced.record), ())
    return assemble(model, traced.record, grouping, traced.norm_after, samples, traced.notes)


def trace(model: nn.Module, example: Example) -> Traced:
    """Runs the model in both modes and records what happens to its channels."""
    twin = share_copy(model)
    record = Record(Sources(twin))
    notes: list[str] = []
    with preserved_randomness(), without_fast_path():
        twin.eval()
        pairs = _run(twin, example, record)
        set_train_mode(twin)
        macs = list(record.macs)
        try:
            trained = _run(twin, example, record)
        except Exception as error:  # the user's code: anything can come
            notes.append(f"train mode could not be traced: {type(error).__name__}: {error}")
            trained = {}
        record.macs = macs
    clash = {key for key in pairs if trained.get(key, pairs[key]) != pairs[key]}
    merged = {key: norm for key, norm in {**trained, **pairs}.items() if key not in clash}
    notes += [f"not followed: {each}" for each in dict.fromkeys(record.rule_errors)]
    return Traced(record, {key: norm for key, norm in merged.items() if norm}, tuple(notes))


def _run(model: nn.Module, example: Example, record: Record) -> dict[str, str]:
    calls = Calls()
    tracer = Tracer(record, calls, RULES)
    handles = _watch_modules(model, tracer)
    try:
        with torch.no_grad(), tracer:
            output = example.run(model)
        for tensor in output_tensors(output):
            calls.used(tensor)
            record.freeze(tracer.planes_of(tensor), "it is an output of the model")
    finally:
        for handle in handles:
            handle.remove()
        for source, backup in tracer.backups.values():
            with torch.no_grad():
                source.copy_(backup)
    return calls.norm_after()


def _watch_modules(model: nn.Module, tracer: Tracer) -> list[Any]:
    """Hooks that tell the tracer which module is running."""
    handles = []
    stack = tracer.calls.stack

    def enter(path: str) -> Any:
        return lambda module, inputs: stack.append((path, module))

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        path = stack.pop()[0]
        if type(module).__name__ in fuse.PLAIN_NORMS and isinstance(output, Tensor):
            tracer.calls.normed(inputs[0], path)
            node = affine_node(tracer.record, path)
            before = tracer.planes_of(inputs[0])
            tracer.relabel(output, tuple(map_nodes(tracer.record, p, node) for p in before))

    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        handles.append(module.register_forward_pre_hook(enter(path), prepend=True))
        handles.append(module.register_forward_hook(leave, always_call=True))
    return handles


def share_copy(model: nn.Module) -> nn.Module:
    """A copy with its own modules and buffers and the same parameters."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, memo)


def set_train_mode(model: nn.Module) -> None:
    """Train mode; norms with running statistics stay in eval mode (a batch may have one sample)."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.training = False


@contextlib.contextmanager
def preserved_randomness() -> Iterator[None]:
    """Random states of torch, numpy and Python are as before afterwards."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


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
    """All tensors in a prediction: nested containers, dataclasses, objects with attributes."""
    seen = set() if seen is None else seen
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
    elif isinstance(value, nn.Module) or not hasattr(value, "__dict__"):
        children = []
    else:
        children = list(vars(value).values())
    for child in children:
        yield from output_tensors(child, seen)
