"""Analysis of a model: run it twice under the tracer, group, judge, try."""

from __future__ import annotations

from typing import Any

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
from slimcli.network.structure.modes import (
    output_tensors,
    preserved_randomness,
    set_train_mode,
    share_copy,
    without_fast_path,
)
from slimcli.network.structure.record import Record
from slimcli.network.structure.rules_pointwise import map_nodes
from slimcli.network.structure.search import try_cuts
from slimcli.network.structure.sources import Sources
from slimcli.network.structure.structure import Structure
from slimcli.network.structure.trace import Calls, Rule, Tracer, affine_node
from slimcli.network.structure.traced import Traced

RULES: dict[str, Rule] = {
    **rules_pointwise.RULES,
    **rules_spatial.RULES,
    **rules_norm.RULES,
    **rules_matmul.RULES,
    **rules_conv.RULES,
    **rules_movement.RULES,
}


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
    if trial:
        return try_cuts(model, example, traced, samples)
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
        trains = True
        try:
            trained = _run(twin, example, record)
        except Exception as error:  # the user's code: anything can come
            notes.append(f"train mode could not be traced: {type(error).__name__}: {error}")
            trained, trains = {}, False
        record.macs = macs
    clash = {key for key in pairs if trained.get(key, pairs[key]) != pairs[key]}
    merged = {key: norm for key, norm in {**trained, **pairs}.items() if key not in clash}
    notes += [f"not followed: {each}" for each in dict.fromkeys(record.rule_errors)]
    return Traced(record, {key: norm for key, norm in merged.items() if norm}, tuple(notes), trains)


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
