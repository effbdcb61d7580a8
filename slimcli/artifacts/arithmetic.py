"""Float32 that is float32, whatever the settings and the user's code say."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from slimcli.network.nested import mapped

DEVICES = ("cpu", "cuda")
HALVES = (torch.float16, torch.bfloat16)
CASTS = dict.fromkeys((torch.Tensor.half, torch.Tensor.bfloat16), torch.Tensor.float)


@contextlib.contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Float32 that is float32: no TF32, no autocast, no gradients. Settings are put back.

    Not even where the user's code switches autocast on: half precision would hide what a cut or a
    fold changes behind rounding, or take rounding for a change.
    """
    with float32_settings(), WithoutAutocast():
        yield


@contextlib.contextmanager
def float32_settings() -> Iterator[None]:
    """The same as far as settings go, so that what runs inside is called by nobody but the user."""
    precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        cpu, cuda = (torch.autocast(device, enabled=False) for device in DEVICES)
        with cpu, cuda, torch.no_grad():
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = cudnn


class WithoutAutocast(TorchFunctionMode):
    """Whatever is called inside runs in float32 where the user's code has switched autocast on.

    Nothing is cast to half precision there, and what is half already, as a layer may be, is read as
    float32, because autocast would mix it. What is written into stays what it is. TorchScript goes
    its own way.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Executes the function."""
        devices = list(filter(torch.is_autocast_enabled, DEVICES))
        if not devices:
            return func(*args, **(kwargs or {}))
        with contextlib.ExitStack() as stack:
            for device in devices:
                stack.enter_context(torch.autocast(device, enabled=False))
            return _widened(func, args, kwargs or {})


def _widened(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a function gives with float32 for half precision; a cast makes a new tensor still."""
    written = args[:1] if _writes(func, kwargs) else ()
    read = mapped(args[len(written) :], _in_float32)
    place = {key: each for key, each in kwargs.items() if key == "out"}
    result = CASTS.get(func, func)(*written, *read, **{**mapped(kwargs, _in_float32), **place})
    dtypes = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.dtype)]
    is_cast = func in CASTS or any(each in HALVES for each in dtypes)
    return result.clone() if is_cast and any(result is each for each in args) else result


def _in_float32(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float32 if value in HALVES else value
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in HALVES else value


def _writes(func: Any, kwargs: dict[str, Any]) -> bool:
    """Does it write into its first argument, as ``add_``, ``+=``, ``relu(x, inplace=True)`` do?"""
    name = getattr(func, "__name__", "")
    augments = name.startswith("__i") and hasattr(operator, f"__{name[3:]}")
    is_method = name.endswith("_") and not name.endswith("__")
    return is_method or augments or name == "__setitem__" or bool(kwargs.get("inplace"))
