"""Watches one real forward pass: which module and which function made and used which tensor.

A *value* is one content of one tensor object: an in-place op makes a new value of the same object.
The user's predict function is run on a real batch, so control flow, dictionaries and several entry
points need no special care; nothing is symbolic.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from slimcli.network.example import Example
from slimcli.network.structure.modes import gpus_of

Path = tuple[int | str, ...]
ROOT = ""


@dataclass(frozen=True)
class Op:
    """One call of a torch function.

    Attributes:
        name: Name of the function without underscores at its ends (``add`` for ``+=``).
        module: Path of the innermost module whose forward was running.
        ordinal: Number of this op among those of that one call of the module.
        call: Number of that call in the record.
        inputs: Values of its tensor arguments, in order.
        outputs: Values it returned.
        time: Position in the record.
        weight: Path of the parameter that was its second argument, or empty.
        shapes: Shapes of the inputs.
    """

    name: str
    module: str
    ordinal: int
    call: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    time: int
    weight: str
    shapes: tuple[tuple[int, ...], ...]


@dataclass
class Call:
    """One call of a module.

    Attributes:
        module: Path of the module.
        number: Position among the calls.
        inputs: Place in ``(args, kwargs)`` -> value.
        outputs: Place in the result -> value.
        start: Position in the record at entry.
        stop: Position at exit.
        ops: Ops that ran directly in its forward so far.
        parent: Number of the call in whose forward it was called; -1 for none.
        ordinal: Number of this call among those of its parent.
        children: Calls that its forward made so far.
    """

    module: str
    number: int
    inputs: dict[Path, int]
    start: int
    outputs: dict[Path, int] = field(default_factory=dict)
    stop: int = -1
    ops: int = 0
    parent: int = -1
    ordinal: int = 0
    children: int = 0


@dataclass
class Record:
    """A forward pass.

    Attributes:
        ops: Calls of torch functions that took or gave tensors, in order.
        calls: Calls of modules, in order of entry.
        stored: Values that are parameters or buffers of the model.
    """

    ops: list[Op] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    stored: set[int] = field(default_factory=set)

    def calls_of(self, module: str) -> list[Call]:
        """All calls of one module."""
        return [call for call in self.calls if call.module == module]

    def producers(self) -> dict[int, Op]:
        """Value -> the op that made it."""
        return {value: op for op in self.ops for value in op.outputs}

    def consumers(self) -> dict[int, list[Op]]:
        """Value -> the ops that used it."""
        found: dict[int, list[Op]] = {}
        for op in self.ops:
            for value in dict.fromkeys(op.inputs):
                found.setdefault(value, []).append(op)
        return found

    def data(self) -> set[int]:
        """Values that no parameter or buffer had a part in: what was fed in, and ops on that."""
        producers = self.producers()
        found: set[int] = set()
        entered = {value for call in self.calls for value in call.inputs.values()}
        read = {value for op in self.ops for value in op.inputs}
        found |= (entered | read) - self.stored - set(producers)
        for op in self.ops:
            if set(op.inputs) <= found:
                found.update(op.outputs)
        return found


def tensors_in(container: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Every tensor in nested tuples, lists and dictionaries, with its place.

    >>> [path for path, _ in tensors_in([torch.ones(1), {"a": torch.ones(1)}])]
    [(0,), (1, 'a')]
    """
    if isinstance(container, Tensor):
        yield path, container
    elif isinstance(container, (tuple, list)):
        for index, each in enumerate(container):
            yield from tensors_in(each, (*path, index))
    elif isinstance(container, dict):
        for key, each in container.items():
            yield from tensors_in(each, (*path, key))


def at(container: Any, path: Path) -> Any:
    """What is at a place of a nest; None where it has no such place.

    >>> at([1, {"a": 2}], (1, "a")), at([1], (1, "a")), at(torch.ones(1), (0, 0))
    (2, None, None)
    """
    for head in path:
        if not isinstance(container, (dict, list, tuple)):
            return None
        inside = container if isinstance(container, dict) else dict(enumerate(container))
        container = inside.get(head)
    return container


def replaced(container: Any, path: Path, change: Callable[[Tensor], Tensor]) -> Any:
    """``container`` with the tensor at ``path`` changed; everything on the way is copied.

    >>> replaced([1, (torch.ones(1), 3)], (1, 0), lambda x: x * 2)
    [1, (tensor([2.]), 3)]
    """
    if not path:
        return change(container)
    head, rest = path[0], path[1:]
    inner = replaced(container[head], rest, change)
    if isinstance(container, dict):
        copy = container.copy()
        copy[head] = inner
        return copy
    items = [inner if index == head else each for index, each in enumerate(container)]
    if hasattr(container, "_fields"):
        return type(container)(*items)
    return type(container)(items)


class Recorder(TorchFunctionMode):
    """A context in which torch functions and the modules of one model are written down.

    Args:
        model: The model; its modules get hooks, which leave with the context.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.record = Record()
        self.stack: list[Call] = []
        self.values: dict[int, int] = {}
        self.guards: dict[int, weakref.ref[Tensor]] = {}
        self.count = 0
        self.clock = 0
        self.model = model
        self.hooks: list[Any] = []
        self.names = {id(each): name for name, each in model.named_parameters()}
        for each in (*model.parameters(), *model.buffers()):
            self.record.stored.add(self._value(each))

    def __enter__(self) -> Recorder:
        for name, module in self.model.named_modules():
            self.hooks.append(module.register_forward_pre_hook(self._entry(name), with_kwargs=True))
            self.hooks.append(module.register_forward_hook(self._exit))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)  # type: ignore[no-untyped-call]
        for hook in self.hooks:
            hook.remove()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs the function and writes it down if tensors came out."""
        kwargs = kwargs or {}
        given = [each for _, each in tensors_in((args, kwargs))]
        inputs = tuple(self._value(each) for each in given)
        result = func(*args, **kwargs)
        made = [each for _, each in tensors_in(result)]
        if made:
            self._write(func, args, given, inputs, made)
        return result

    def _write(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        given: list[Tensor],
        inputs: tuple[int, ...],
        made: list[Tensor],
    ) -> None:
        call = self.stack[-1] if self.stack else Call(ROOT, -1, {}, 0)
        weight = self.names.get(id(args[1]), "") if len(args) > 1 else ""
        self.clock += 1
        self.record.ops.append(
            Op(
                name=getattr(func, "__name__", str(func)).strip("_"),
                module=call.module,
                ordinal=call.ops,
                call=call.number,
                inputs=inputs,
                outputs=tuple(self._new_value(each) for each in made),
                time=self.clock,
                weight=weight,
                shapes=tuple(tuple(each.shape) for each in given),
            )
        )
        call.ops += 1

    def _value(self, tensor: Tensor) -> int:
        return self.values[id(tensor)] if id(tensor) in self.values else self._new_value(tensor)

    def _new_value(self, tensor: Tensor) -> int:
        """A number for what the tensor holds now; forgotten with the tensor, whose id is reused."""
        key = id(tensor)
        self.count += 1
        self.values[key] = self.count
        self.guards[key] = weakref.ref(tensor, lambda _: self.values.pop(key, None))
        return self.count

    def _entry(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.clock += 1
            inputs = {path: self._value(each) for path, each in tensors_in((args, kwargs))}
            call = Call(name, len(self.record.calls), inputs, self.clock)
            if self.stack:
                above = self.stack[-1]
                call.parent, call.ordinal = above.number, above.children
                above.children += 1
            self.record.calls.append(call)
            self.stack.append(call)

        return enter

    def _exit(self, module: nn.Module, args: Any, result: Any) -> None:
        self.clock += 1
        call = self.stack.pop()
        call.stop = self.clock
        call.outputs = {path: self._value(each) for path, each in tensors_in(result)}


def record_forward(model: nn.Module, example: Example) -> Record:
    """Runs the model once on the example, in eval mode and without gradients, and writes it down.

    ``model`` gets and loses hooks and is put in eval mode: hand in a copy.
    """
    model.eval()
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.random.fork_rng(gpus_of(model)), torch.no_grad(), Recorder(model) as recorder:
            example.run(model)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_attention)
    return recorder.record
