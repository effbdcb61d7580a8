"""What a run gave, and whether a cut network gave the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from slimcli.network.nested import tensors_in
from slimcli.network.structure import user_line
from slimcli.network.structure.operators import ORDER_DEPENDENT, base_name

DIFFER = "zeroed and cut differ"

LIMITS = {torch.float64: 1e-11, torch.float32: 1e-3}
"""Largest difference, relative to the largest output: far above rounding, far below an error.

Rounding was seen to reach 3e-14 in float64. Errors are small where a deep network without norms
lets little of its input through.
"""


@dataclass(frozen=True)
class Failure:
    """Why a trial cut failed.

    Attributes:
        what: The error or the difference.
        line: The user's line, if it raised.
        module: Path of the module that was entered last, if it raised.
        is_other_batch: On the example itself nothing was wrong.
        is_no_constant: What a bias should take up is none.
    """

    what: str
    line: str = ""
    module: str = ""
    is_other_batch: bool = False
    is_no_constant: bool = False

    @property
    def differs(self) -> bool:
        """Did both networks give numbers, and others?"""
        return self.what.startswith(DIFFER)

    def __str__(self) -> str:
        """For a frozen reason."""
        return f"a trial cut failed: {self.what}" + (f" at {self.line}" if self.line else "")


def raised(error: BaseException, module: str) -> Failure:
    """What the user's code said, where, and in which module it was."""
    first = str(error).splitlines()[0] if str(error) else ""
    return Failure(f"{type(error).__name__}: {first}", user_line.of_error(error), module)


@dataclass(frozen=True)
class Ran:
    """What a run gave.

    Attributes:
        final: Tensors of the prediction.
        layers: Outputs of uncut layers, in front of the first operator that sorts or picks.
        picks: What such operators picked.
    """

    final: list[Tensor]
    layers: list[Tensor]
    picks: list[Tensor]

    def picks_as(self, other: Ran) -> bool:
        """Did both runs pick the same places?

        Where each channel has places of its own (``x.topk(8, dim=2)``), a cut leaves fewer of them:
        that tells nothing, and what comes behind must be compared.
        """
        return len(self.picks) == len(other.picks) and all(
            map(_picked_alike, self.picks, other.picks)
        )


def _picked_alike(left: Tensor, right: Tensor) -> bool:
    """The same places, or those of more and of fewer channels.

    Another number of places alone (``nonzero``: rows) is a jump.
    """
    if left.shape == right.shape:
        return torch.equal(left, right)
    return left.dim() == right.dim() and left.shape[1:] != right.shape[1:]


class Picks(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the places that sorting and picking operators found."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Executes the operator."""
        output = func(*args, **(kwargs or {}))
        if base_name(func)[0] in ORDER_DEPENDENT:
            self.found += [t for t in tensors_in(output) if not t.is_floating_point()]
        return output


def tells_little(output: Tensor) -> bool:
    """Is it a class number or a mask, which small errors leave as it is?"""
    if output.is_complex():
        return False
    return not output.is_floating_point() or bool((output == output.round()).all())


def is_the_same_for_all(output: Tensor) -> bool:
    """Is each sample's answer the same number, so that nothing of the network arrives here?

    >>> is_the_same_for_all(torch.tensor([[1.0, 2.0], [1.0, 2.0]]))
    True
    >>> is_the_same_for_all(torch.tensor([[1.0, 2.0]]))
    False
    """
    return output.dim() > 0 and output.shape[0] > 1 and bool((output == output[:1]).all())


def compare(zeroed: Ran, cut: Ran, dtype: torch.dtype, *, may_jump: bool) -> Failure | None:
    """Where sorting or suppression makes the output jump, the layers before that count.

    If both runs picked the same, the output counts, too.
    """
    failure = None
    if may_jump:
        failure = _compare_all(zeroed.layers, cut.layers, LIMITS[dtype])
    if failure is None and (not may_jump or zeroed.picks_as(cut)):
        failure = _compare_all(zeroed.final, cut.final, LIMITS[dtype])
    return failure


def _compare_all(zeroed: Sequence[Tensor], cut: Sequence[Tensor], limit: float) -> Failure | None:
    if len(zeroed) != len(cut):
        return Failure("the number of outputs changes")
    is_blind = any(before.numel() for before in zeroed)
    for before, after in zip(zeroed, cut, strict=True):
        if before.shape != after.shape:
            return Failure(f"an output changes its shape {(*before.shape,)} to {(*after.shape,)}")
        if not before.numel():
            continue
        before, after = _numbers(before), _numbers(after)
        finite = torch.isfinite(before)
        if not bool((finite == torch.isfinite(after)).all()):
            return Failure("other outputs are infinite or not a number")
        before, after = before[finite], after[finite]
        if not before.numel():
            continue
        is_blind = False
        size = max(float(before.abs().max()), 1e-30)
        difference = float((before - after).abs().max()) / size
        if not difference <= limit:
            return Failure(f"{DIFFER} by {difference:.1e} of the output")
    return Failure("no output is a finite number") if is_blind else None


def _numbers(tensor: Tensor) -> Tensor:
    """In float64, the imaginary parts too."""
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return real.to(torch.float64)
