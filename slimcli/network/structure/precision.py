"""A model in float64, all of it: what its code casts or makes in float32 is widened, too.

Code that says ``.float()`` (norms and softmax do so for half precision) would end float64 half way:
rounding would then look like a difference, or hide one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from slimcli.network.copying import deep_copy
from slimcli.network.example import Example
from slimcli.network.nested import mapped

WIDE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}


@contextlib.contextmanager
def in_double() -> Iterator[None]:
    """What is made without a dtype is made in float64."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


class Widened(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside its ``with`` block every dtype that an operator is given is a double one.

    >>> with Widened():
    ...     torch.ones(2).float().dtype, torch.zeros(2, dtype=torch.float16).dtype
    (torch.float64, torch.float64)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __enter__(self) -> Any:
        """What says no dtype is made in float64."""
        self._default = in_double()
        self._default.__enter__()
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        """As before."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._default.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Executes the operator."""
        return self.execute(func, args, kwargs or {})

    def execute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Executes an operator, for this mode or for another one that sees its arguments first."""
        if kwargs.get("dtype") in WIDE:
            kwargs = {**kwargs, "dtype": WIDE[kwargs["dtype"]]}
        if any(each in WIDE for each in args if isinstance(each, torch.dtype)):
            args = tuple(
                WIDE.get(each, each) if isinstance(each, torch.dtype) else each for each in args
            )
        return func(*args, **kwargs)


def run_inside(mode: TorchDispatchMode, example: Example) -> Example:
    """The same example; the user's code, and nothing else, runs in this mode."""

    def predict(model: nn.Module, batch: Any) -> Any:
        with mode:
            return example.predict(model, batch)

    return Example(example.batch, predict)


def copy_as(
    model: nn.Module,
    dtype: torch.dtype,
    stand_in: Callable[[nn.Parameter], Tensor | None] = lambda parameter: None,
) -> nn.Module:
    """A deep copy in another dtype, without gradients; never two copies at once.

    Args:
        model: Not changed.
        dtype: Of its real tensors; complex ones get the like.
        stand_in: What takes the place of a parameter, already in this dtype; None: a copy.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter and _is_real_or_complex(parameter):
            values = stand_in(parameter)
            if values is None:
                values = parameter.detach().to(_like(parameter, dtype), copy=True)
            memo[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        if type(buffer) is Tensor and _is_real_or_complex(buffer):
            memo[id(buffer)] = buffer.detach().to(_like(buffer, dtype), copy=True)
    twin = deep_copy(model, memo)
    if not any(each.is_complex() for each in [*twin.parameters(), *twin.buffers()]):
        twin.to(dtype)  # modules may keep more that follows; complex numbers would lose a half
    for parameter in twin.parameters():
        parameter.grad = None
    return twin


def to_dtype(value: Any, dtype: torch.dtype) -> Any:
    """A nested batch with its floating tensors in another dtype, complex ones in the like."""

    def converted(each: Any) -> Any:
        is_number = isinstance(each, Tensor) and _is_real_or_complex(each)
        return each.to(_like(each, dtype)) if is_number else each

    return mapped(value, converted)


def _like(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype.to_complex() if tensor.is_complex() else dtype


def _is_real_or_complex(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
