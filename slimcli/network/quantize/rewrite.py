"""Gives a module a traced forward, so that a tensor inside it can be quantized.

The module keeps its identity, its children, its names and its other methods: only ``forward`` is
replaced, by the code torch.fx generates with all children taken as they are. The traced code must
run the same functions as the recorded call and give the same result, bit for bit; a module that
branches on ``self.training`` gets one forward for each mode. Other Python attributes that forward
reads are constants from then on.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from slimcli.network.copying import deep_copy
from slimcli.network.example import Example
from slimcli.network.quantize.record import Call, Op, Record, Recorder, tensors_in

Key = tuple[Literal["op", "child"], int]
"""An op, or the call of a child, by its number in one forward."""


class _ChildrenStay(fx.Tracer):
    """Traces one forward function; every child is called as it is."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


class _Matcher(fx.Interpreter):
    """Runs a graph and notes which node ran which op of the module or called which child."""

    def __init__(self, module: nn.Module, graph: fx.Graph, recorder: Recorder) -> None:
        super().__init__(module, graph=graph)
        self.recorder = recorder
        self.nodes: dict[Key, str] = {}

    def run_node(self, n: fx.Node) -> Any:
        frame = self.recorder.stack[-1]
        ops, children = frame.ops, frame.children
        result = super().run_node(n)
        if (frame.ops, frame.children) == (ops + 1, children):
            self.nodes["op", ops] = n.name
        if (frame.ops, frame.children) == (ops, children + 1):
            self.nodes["child", children] = n.name
        return result


class Rewriter:
    """Says which node of a traced forward makes a recorded value.

    Args:
        model: The model that was recorded, in eval mode.
        record: The record.
        example: What was recorded; run once more to get the arguments of a module.

    Attributes:
        reason: Why the last question had no answer.
    """

    def __init__(self, model: nn.Module, record: Record, example: Example) -> None:
        self.model, self.record, self.example = model, record, example
        self.reason = ""
        self.known: dict[str, dict[Key, str] | str] = {}

    def node(self, op: Op) -> str:
        """Name of the node that makes what ``op`` made, or an empty string."""
        return self._node(op.module, ("op", op.ordinal))

    def child_node(self, call: Call) -> tuple[str, str]:
        """The module that made a call, and the node of its forward that is the call, or ``""``."""
        if call.parent < 0:
            return "", ""
        parent = self.record.calls[call.parent].module
        return parent, self._node(parent, ("child", call.ordinal))

    def _node(self, path: str, key: Key) -> str:
        if path not in self.known:
            self.known[path] = self._match(path)
        nodes = self.known[path]
        if isinstance(nodes, str):
            self.reason = nodes
            return ""
        return nodes.get(key, "")

    def _match(self, path: str) -> dict[Key, str] | str:
        """Op or child's call -> its node, or why the module cannot be rewritten."""
        calls = self.record.calls_of(path)
        if len(calls) != 1:
            return f"{path or 'the model'} is called {len(calls)} times"
        module = self.model.get_submodule(path)
        args = self._arguments(module)
        if args is None:
            return f"{path or 'the model'} takes more than positional tensors"
        try:
            with torch.no_grad():
                return self._compare(module, calls[0], args, trace_both(module))
        except Exception as error:  # whatever the user's forward raises under torch.fx
            return f"torch.fx cannot follow {path or 'the model'}: {str(error).splitlines()[0]}"

    def _arguments(self, module: nn.Module) -> tuple[Tensor, ...] | None:
        """Copies of the arguments, if they are one positional tensor a parameter of forward."""
        parameters = inspect.signature(module.forward).parameters.values()
        found: list[tuple[Tensor, ...] | None] = []

        def catch(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = tuple(each.clone() for each in args if isinstance(each, Tensor))
            plain = not kwargs and len(args) == len(tensors) == len(parameters)
            found.append(tensors if plain else None)

        if not all(each.kind is each.POSITIONAL_OR_KEYWORD for each in parameters):
            return None
        handle = module.register_forward_pre_hook(catch, with_kwargs=True)
        with torch.no_grad():
            self.example.run(self.model)
        handle.remove()
        return found[0]

    def _compare(
        self,
        module: nn.Module,
        call: Call,
        args: tuple[Tensor, ...],
        graphs: Mapping[bool, fx.Graph],
    ) -> dict[Key, str] | str:
        expected = [op.name for op in self.record.ops if op.call == call.number]
        clone = deep_copy(module).eval()
        plain = clone(*(each.clone() for each in args))
        with Recorder(clone) as recorder:
            recorder.stack.append(Call(call.module, -1, {}, 0))
            matcher = _Matcher(clone, graphs[False], recorder)
            traced = matcher.run(*args)
            found = [op.name for op in recorder.record.ops if op.call == -1]
        if found != expected or not _equal(plain, traced):
            return f"the traced forward of {call.module or 'the model'} runs other functions"
        training = {node.name: str(node.target) for node in graphs[True].nodes}
        evaluation = {node.name: str(node.target) for node in graphs[False].nodes}
        return {
            key: name
            for key, name in matcher.nodes.items()
            if training.get(name) == evaluation[name]
        }


def _equal(left: Any, right: Any) -> bool:
    """Whether two results hold the same tensors at the same places, bit for bit."""
    first, second = dict(tensors_in(left)), dict(tensors_in(right))
    return first.keys() == second.keys() and all(
        torch.equal(first[path], second[path]) for path in first
    )


def trace_both(module: nn.Module) -> dict[bool, fx.Graph]:
    """The graphs of forward for ``training`` True and False; the module is left as it is."""
    graphs = {}
    for training in (True, False):
        clone = deep_copy(module).train(training)
        graphs[training] = _ChildrenStay().trace(clone)
    return graphs


def rewrite(module: nn.Module, insertions: Mapping[str, str]) -> None:
    """Replaces forward by its traced form with modules called behind some nodes.

    Args:
        module: The module; its class becomes a subclass of its class.
        insertions: Node name -> path, from ``module``, of the module that changes its value.
    """
    forwards = {
        training: _forward(module, graph, insertions)
        for training, graph in trace_both(module).items()
    }

    original = type(module)

    @functools.wraps(original.forward)  # exporters name inputs after its parameters
    def forward(self: nn.Module, *args: Tensor) -> Any:
        return forwards[self.training](self, *args)

    module.__class__ = type(original.__name__, (original,), {"forward": forward})
    module.__class__.__module__ = original.__module__
    module.__class__.slim_original = original  # type: ignore[attr-defined]


def _forward(
    module: nn.Module, graph: fx.Graph, insertions: Mapping[str, str]
) -> Callable[..., Any]:
    for node in list(graph.nodes):
        if node.name in insertions:
            with graph.inserting_after(node):
                changed = graph.call_module(insertions[node.name], (node,))
            node.replace_all_uses_with(
                changed, delete_user_cb=lambda user, keep=changed: user is not keep
            )
    traced = type(fx.GraphModule(module, graph))
    forward: Callable[..., Any] = traced.forward
    return forward
