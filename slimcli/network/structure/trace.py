"""Runs a model once and follows every channel through it.

A ``TorchDispatchMode`` sees each ATen operation with its tensors. Labels travel beside them
(``planes.py``); what an operation does to them is looked up in a table of rules, one file a family.
An operation without a rule freezes the channels it touches.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from slimcli.network.nested import tensors_in
from slimcli.network.structure import user_line
from slimcli.network.structure.calls import Calls
from slimcli.network.structure.memory import (
    Aliases,
    are_zeros,
    bordered,
    has_gaps,
    lies_like,
    memory_of,
    rewritten,
    same_channels,
    seen_from,
    whole_labels,
    written_through,
)
from slimcli.network.structure.operators import (
    ASKING_FOR_SHAPES,
    LITERAL,
    ORDER_DEPENDENT,
    READING,
    Execute,
    base_name,
    call,
    makes_zeros,
    written,
)
from slimcli.network.structure.planes import is_useful
from slimcli.network.structure.record import Record
from slimcli.network.structure.skipping import Skipping
from slimcli.network.structure.sources import source_planes
from slimcli.network.structure.tensor_map import TensorMap
from slimcli.network.structure.train_mode import dropouts

Planes = tuple[Tensor, ...]
NO_PLANES: Planes = ()

ONE_PICKED = "single channels are picked"


@dataclass
class Op:
    """One call of an ATen operator, for a rule.

    Attributes:
        name: Base name, no overload, no trailing underscore (``add`` for ``add_.Tensor``).
        output: What the call returned.
        size: Of the first tensor among the arguments, before the call (``squeeze_`` changes it).
        signature: Its name and its arguments that are no tensors, once a rule asked for them.
    """

    tracer: Tracer
    func: Any
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    size: torch.Size
    signature: tuple[str, str] | None = field(default=None, init=False)

    @property
    def record(self) -> Record:
        """Where findings go."""
        return self.tracer.record

    def planes(self, tensor: Any) -> Planes:
        """Planes of an argument; none for anything that is no tensor."""
        return self.tracer.planes_of(tensor) if isinstance(tensor, Tensor) else NO_PLANES

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        """An argument given by position or by name."""
        if index < len(self.args):
            return self.args[index]
        return self.kwargs.get(name, default)

    def tensors(self) -> list[Tensor]:
        """All tensor arguments in order."""
        return list(tensors_in((self.args, self.kwargs)))

    def freeze(self, tensors: Sequence[Any], reason: str) -> None:
        """Freezes every channel of these arguments; the user's line is appended to the reason."""
        planes = [plane for tensor in tensors for plane in self.planes(tensor)]
        self.freeze_planes(planes, reason)

    def freeze_planes(self, planes: Sequence[Tensor], reason: str) -> None:
        """Freezes these planes' channels; the user's line is appended to the reason."""
        if planes:
            line = user_line.current()
            self.record.freeze(planes, f"{reason} at {line}" if line else reason)


Rule = Callable[[Op], Sequence[Planes]]


_PLAIN = (bool, int, float, type(None))


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows labels through everything that runs inside its ``with`` block.

    Args:
        record: Findings are added to it.
        calls: Kept by the module hooks.
        rules: Base name of an operator -> its rule; pointwise operators need no entry.
        execute: How an operator is executed.
        skipping: Does so for what hangs on the batch, and computes no products.
    """

    def __init__(
        self,
        record: Record,
        calls: Calls,
        rules: dict[str, Rule],
        execute: Execute = call,
        skipping: Skipping | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.record = record
        self.calls = calls
        self._rules = rules
        self._execute = execute
        self.skipping = skipping
        self._planes: TensorMap[Planes] = TensorMap()
        self._aliases = Aliases()
        self._recent: Sequence[Tensor] = ()
        self._homes: dict[int | None, weakref.ref[Tensor]] = {}
        self._picked: TensorMap[tuple[Tensor, str]] = TensorMap()
        self._given: TensorMap[bool] = TensorMap()
        self._gives_all = True
        self._blank: TensorMap[bool] = TensorMap()
        self.backups: dict[str, tuple[Tensor, Tensor]] = {}
        self.checks = False  # what runs asks for values only to raise
        self.ops: list[Any] = []
        self._dropping = {kind.forward for kind in dropouts()}

    @property
    def drops(self) -> bool:
        """Does the code of a dropout layer run? Not what the user made of one."""
        return getattr(type(self.calls.top()[1]), "forward", None) in self._dropping

    def planes_of(self, tensor: Tensor) -> Planes:
        """The planes of a tensor; those of a parameter or buffer are made when first asked for."""
        known = self._planes.get(tensor)
        if known is None:
            source = self.record.sources.find(tensor)
            known = source_planes(source, self.record.table) if source else self._lent(tensor)
            self._planes[tensor] = known
        return known

    def _lent(self, tensor: Tensor) -> Planes:
        """Planes of a tensor that no operator made, from another one that has the same memory.

        ``nn.Parameter(x)`` and ``x.as_subclass(...)`` are such.
        """
        if self.skipping is not None:
            self.skipping.look_at(tensor)
        memory = memory_of(tensor)
        home = self._homes[memory]() if memory in self._homes else None
        for other in (*self._recent, *([] if home is None else [home])):
            if lies_like(other, tensor):
                tables: tuple[Any, ...] = (self.calls.outputs, self._picked, self._given)
                for table in tables:
                    if other in table:
                        table[tensor] = table[other]
                return self._planes[other]
        if home is None or memory_of(home) != memory:
            return NO_PLANES
        reason = "channels reach a tensor by other means than operators"
        self.record.freeze(self._planes[home], f"{reason} at {user_line.current()}")
        return NO_PLANES

    def is_blank(self, tensor: Tensor) -> bool:
        """Was it made of zeros, and nothing written into it since?"""
        return tensor in self._blank

    def relabel(self, tensor: Tensor, planes: Planes) -> None:
        """Gives a tensor these planes."""
        self._planes[tensor] = planes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Executes the operator, then its rule."""
        kwargs = kwargs or {}
        name, in_place = base_name(func)
        parts = self._taken_apart(func, name, args, kwargs)
        if parts is not NotImplemented:
            return parts
        inputs = list(tensors_in((args, kwargs)))
        labelled = self._look_at(name, inputs)
        targets = written(func, args, kwargs)
        for tensor in targets:
            self.back_up(tensor)
            self.calls.note_write(tensor)
        size = inputs[0].shape if inputs else torch.Size()
        output, is_made_up = self._executed(func, args, kwargs, inputs)
        results = list(tensors_in(output))
        if self.skipping is not None and is_made_up:
            aliases = [other for tensor in targets for other in self._aliases.of(tensor)]
            self.skipping.mark((*results, *targets, *aliases))
        self._note_operator(func, name, (*args, *kwargs.values()), results)
        self._note_origin(func, inputs, results)
        if makes_zeros(name, output):
            self._blank[output] = True
        planes = self._apply(Op(self, func, name, args, kwargs, output, size)) if labelled else ()
        spoiled = self._spoil(inputs[0]) if in_place and inputs else False
        if not labelled:
            self._aliases.note(inputs, results)
            return output
        if in_place and inputs:
            self._write(inputs[0], planes[0] if planes else NO_PLANES, spoiled)
            return output
        for tensor, each in zip(results, planes, strict=False):
            useful = tuple(plane for plane in each if is_useful(plane))
            if useful:
                self._planes[tensor] = useful
                self._homes[memory_of(tensor)] = weakref.ref(tensor)
        self._aliases.note(inputs, results)
        return output

    def _executed(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: Sequence[Tensor]
    ) -> tuple[Any, bool]:
        """The output, and whether its numbers are made up."""
        if self.skipping is None:
            return self._execute(func, args, kwargs), False
        return self.skipping.execute(func, args, kwargs, inputs, self._is_given(inputs))

    def _taken_apart(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """In inference mode operators that are made of others arrive whole."""
        is_known = name in self._rules or torch.Tag.pointwise in func.tags
        if is_known or not torch.is_inference_mode_enabled():
            return NotImplemented
        with self:
            return func.decompose(*args, **kwargs)

    def _look_at(self, name: str, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Notes who is used, and says which of them have channels."""
        for tensor in inputs:
            self.calls.used(tensor)
            if self._picked and tensor in self._picked and name not in ASKING_FOR_SHAPES:
                plane, line = self._picked[tensor]
                self.record.freeze([plane], f"{ONE_PICKED} at {line}")
        if name in ORDER_DEPENDENT and self.record.static_calls is None:
            self.record.static_calls = self.calls.mixing_entered
        is_read = name in READING and not self.checks
        if is_read and self._is_given(inputs) and not user_line.is_of_check():
            self.record.reads.append((self.calls.top()[0], user_line.current()))
        return [tensor for tensor in inputs if self.planes_of(tensor)]

    def pick(self, tensor: Tensor, plane: Tensor) -> None:
        """This is a single channel: its plane freezes as soon as an operator reads its numbers."""
        self._picked[tensor] = plane, user_line.current()

    def give(self, batch: Any) -> None:
        """The tensors of the batch: what is computed from them is another one with the next.

        Of a batch without tensors (arrays, paths) nothing can be told from anything else.
        """
        tensors = list(tensors_in(batch))
        self._gives_all = not tensors
        self.skipping = self.skipping if tensors else None
        for tensor in tensors:
            self._given[tensor] = True

    def _is_given(self, tensors: Sequence[Tensor]) -> bool:
        return self._gives_all or any(each in self._given for each in tensors)

    def _note_origin(self, func: Any, inputs: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """What comes from the batch or from dice gives the same."""
        self._recent = results if inputs else ()  # what is made anew torch copies if it is held
        is_given = torch.Tag.nondeterministic_seeded in func.tags or self._is_given(inputs)
        for result in results:
            if result not in self._planes:
                self._planes[result] = NO_PLANES
            if is_given:
                self._given[result] = True

    def _note_operator(
        self, func: Any, name: str, args: tuple[Any, ...], results: Sequence[Tensor]
    ) -> None:
        """What tells one network from another; what dropout layers do makes no other one."""
        if not self.drops:
            numbers = tuple(each for each in args if isinstance(each, _PLAIN))
            if name in LITERAL:  # a number that the code writes, as a tensor
                numbers += tuple(each.item() for each in results if each.numel() == 1)
            self.ops.append((func.name(), tuple(each.shape for each in results), numbers))

    def _apply(self, op: Op) -> Sequence[Planes]:
        rule = self._rules.get(op.name)
        if rule is None and torch.Tag.pointwise in op.func.tags:
            rule = self._rules["pointwise"]
        if rule is None:
            op.freeze(op.tensors(), f"the operator {op.func.name()} is unknown")
            return ()
        try:
            return rule(op)
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
            self.record.rule_errors.append(f"{op.func.name()}: {error!r} at {user_line.current()}")
            op.freeze(op.tensors(), f"the operator {op.func.name()} could not be followed")
            return ()

    def back_up(self, tensor: Tensor) -> None:
        """Keeps the numbers of a parameter or buffer, which may be written, for afterwards."""
        source = self.record.sources.shares_memory(tensor)
        if source is not None and source.name not in self.backups:
            self.backups[source.name] = (source.tensor, source.tensor.detach().clone())

    def _spoil(self, tensor: Tensor) -> bool:
        """What shares memory with a tensor that was written is not blank any more; was it?"""
        before = len(self._blank)
        memory = memory_of(tensor) if before else None
        if memory is not None:
            for other in list(self._blank):
                if memory_of(other) == memory:
                    del self._blank[other]
        return len(self._blank) < before

    def _write(self, tensor: Tensor, planes: Planes, was_blank: bool) -> None:
        """The tensor was written in place: so were all tensors that share its memory."""
        planes = tuple(plane for plane in planes if is_useful(plane))
        old = self.planes_of(tensor)
        if len(old) == len(planes) and all(map(torch.equal, old, planes)):
            return
        aliases = self._aliases.of(tensor)
        self._planes[tensor] = planes
        if not aliases or (was_blank and self._paint(tensor, planes, aliases)):
            return
        if all(lies_like(tensor, other) for other in aliases):  # ``weight.data *= mask``
            for other in aliases:
                self._overwrite(other, planes)
            return
        if same_channels(old, planes):
            for other in aliases:
                before = self.planes_of(other)
                whole = whole_labels(tensor, other, before)
                self._planes[other] = rewritten(self.record.table, old, planes, before, whole)
            return
        several = len(planes) > 1 or any(len(self.planes_of(other)) > 1 for other in aliases)
        if several or has_gaps(planes, tensor, aliases):
            everything = [*planes, *(p for other in aliases for p in self.planes_of(other))]
            self.record.freeze(
                everything, f"written in place through a view at {user_line.current()}"
            )
            return
        painted = written_through(self.record.table, tensor, aliases, self.planes_of)
        for other, found in zip(aliases, painted, strict=True):
            self._planes[other] = found

    def _overwrite(self, tensor: Tensor, planes: Planes) -> None:
        """All of a tensor is written; a parameter keeps its shape, whatever it is written with."""
        if self.record.sources.find(tensor) is not None:
            for old in self.planes_of(tensor):
                for new in (plane for plane in planes if plane.shape == old.shape):
                    self.record.join(old, new)
        self._planes[tensor] = planes

    def _paint(self, tensor: Tensor, planes: Planes, aliases: Sequence[Tensor]) -> bool:
        """Channels were written into a part of zeros: the other zeros are of these channels, too.

        Returns:
            False where the channels lie otherwise in the memory that is shared.
        """
        if not all(are_zeros(self.record.table, self.planes_of(other)) for other in aliases):
            return False
        views = [[seen_from(plane, tensor, other) for other in aliases] for plane in planes]
        whole = [[v for v in found if v is not None] for found in views if None not in found]
        lost = [p for p, found in zip(planes, views, strict=True) if None in found]
        if not whole:
            return False
        self.record.freeze(lost, f"written in place through a view at {user_line.current()}")
        for number, other in enumerate(aliases):
            self._planes[other] = tuple(
                bordered(self.record.table, found[number]) for found in whole
            )
        self._planes[tensor] = tuple(p for p in planes if all(p is not each for each in lost))
        return True
