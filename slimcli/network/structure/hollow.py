"""Weights without memory: their numbers are made each time an operator asks for them.

A trial runs a model in float64 twice, whole and cut. Copies of its weights would take eight bytes a
parameter, ten times what the activations of one image need. A large parameter of a trial is
therefore one number seen as many (all its strides are zero); what it stands for, *filled*, lives
as long as the operator that reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slimcli.network.selection import Sources, select, shape_after
from slimcli.network.structure.edits import Edit
from slimcli.network.structure.operators import base_name
from slimcli.network.structure.precision import Widened

LARGE = 2**14
"""Parameters of fewer entries are worth no trouble: copies of them are made at once."""

_SAME = frozenset(("detach", "alias"))


@dataclass
class Filling:
    """What a hollow tensor stands for.

    Attributes:
        origin: The parameter whose numbers it has, in its own dtype.
        sources: What stays of each of its dimensions.
        edits: Changes made to the numbers.
        uses: How often the model asked for it in this run.
        kept: The numbers, if they are asked for again and again.
        is_written: The model wrote into ``kept``.
        shell: The hollow tensor, so that its address stays its own.
    """

    origin: Tensor
    shell: Tensor
    sources: Mapping[int, Sources] = field(default_factory=dict)
    edits: list[Edit] = field(default_factory=list)
    uses: int = 0
    kept: Tensor | None = None
    is_written: bool = False


class Hollow(Widened):  # type: ignore[no-untyped-call]
    """Inside its ``with`` block hollow tensors have numbers, and every dtype is a double one."""

    def __init__(self) -> None:
        super().__init__()
        self._fillings: dict[int, Filling] = {}

    def shell(self, origin: Tensor, sources: Mapping[int, Sources] | None = None) -> Tensor:
        """A hollow float64 tensor for what is left of this one."""
        dtype = torch.complex128 if origin.is_complex() else torch.float64
        shape = shape_after(origin.shape, sources or {})
        shell = torch.full((), torch.nan, dtype=dtype, device=origin.device).expand(shape)
        self._fillings[shell.data_ptr()] = Filling(origin, shell, sources or {})
        return shell

    def edit(self, edit: Edit) -> None:
        """Does it now, or, to a hollow tensor, whenever it is filled."""
        filling = self._find(edit.tensor)
        if filling is None:
            edit.apply_to(edit.tensor)
        else:
            filling.edits.append(edit)

    def select(self, tensor: Tensor, sources: Mapping[int, Sources]) -> Tensor:
        """What a cut leaves of a tensor; of a hollow one a hollow one.

        The edits are left behind: what they changed is what the cut takes away.
        """
        filling = self._find(tensor)
        if filling is None:
            return select(tensor, sources)
        if filling.is_written and filling.kept is not None:
            return select(filling.kept, sources)
        return self.shell(filling.origin, sources)

    def forget(self) -> None:
        """A run is over: numbers that were only kept for it are let go."""
        for filling in self._fillings.values():
            filling.uses = 0
            if not filling.is_written:
                filling.kept = None

    def execute(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Executes an operator on what its arguments stand for."""
        name, writes = base_name(func)
        if name not in _SAME:
            args = tuple(
                self._filled(each, writes and place == 0) for place, each in enumerate(args)
            )
            kwargs = {key: self._filled(each, key == "out") for key, each in kwargs.items()}
        return super().execute(func, args, kwargs)

    def _filled(self, value: Any, is_written: bool) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)([self._filled(each, is_written) for each in value])
        filling = self._find(value) if isinstance(value, Tensor) else None
        if filling is None:
            return value
        filling.uses += 1
        numbers = fill(filling) if filling.kept is None else filling.kept
        if is_written and numbers.data_ptr() == filling.origin.data_ptr():
            numbers = numbers.clone()  # the user's own
        if is_written or filling.uses > 1:
            filling.kept = numbers
            filling.is_written |= is_written
        return numbers

    def stands_for(self, tensor: Tensor) -> bool:
        """Is this tensor hollow?"""
        return self._find(tensor) is not None

    def _find(self, tensor: Tensor) -> Filling | None:
        if tensor.layout != torch.strided or tensor.numel() < 2 or any(tensor.stride()):
            return None
        return self._fillings.get(tensor.data_ptr())


def fill(filling: Filling) -> Tensor:
    """The numbers of a hollow tensor; the origin itself if nothing is to be done to it."""
    origin = filling.origin.detach()
    numbers = origin
    if filling.sources:
        numbers = select(origin, filling.sources, filling.shell.dtype)
    numbers = numbers.to(filling.shell.dtype)
    if filling.edits and numbers is origin:
        numbers = numbers.clone()
    for edit in filling.edits:
        edit.apply_to(numbers)
    return numbers


def is_large(parameter: nn.Parameter) -> bool:
    """Is a copy of it worth avoiding? Biases are copied: a cut may add to them."""
    plain = type(parameter) is nn.Parameter and parameter.layout == torch.strided
    return plain and parameter.dim() > 1 and parameter.numel() >= LARGE
