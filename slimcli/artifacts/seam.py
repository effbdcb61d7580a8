"""A model as something to run and compare, and what a comparison says: a seam."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from slimcli.network.nested import mapped

Run = Callable[[Any], Any]


@dataclass(frozen=True)
class Seam:
    """How far two forms of one model are apart, at the output that is furthest from equal.

    Attributes:
        source: Name of the reference (``deploy``).
        target: Name of what was made from it (``onnx``).
        max_abs: Largest absolute difference; inf where no number can be given.
        max_rel: ``max_abs`` over the largest magnitude of that output in the reference.
        limit: Largest ``max_abs`` allowed there.
        ok: Whether every compared output of every batch is within its limit.
        where: Path of that output (``boxes.0``); empty for a bare tensor.
        batches: Number of batches compared.
        notes: What was not compared, and why something can't be equal.
    """

    source: str
    target: str
    max_abs: float
    max_rel: float
    limit: float
    ok: bool
    where: str = ""
    batches: int = 0
    notes: tuple[str, ...] = ()

    def summary(self) -> dict[str, Any]:
        """The entry of ``summary.json``; a difference that is no number becomes null.

        >>> Seam("deploy", "onnx", math.inf, math.inf, 1e-4, False).summary()["max_abs"] is None
        True
        """
        return {
            "from": self.source,
            "to": self.target,
            "max_abs": self.max_abs if math.isfinite(self.max_abs) else None,
            "max_rel": self.max_rel if math.isfinite(self.max_rel) else None,
            "limit": self.limit,
            "ok": self.ok,
        }

    def __str__(self) -> str:
        """``deploy -> onnx: 2.4e-06 (limit 1.0e-04)``."""
        place = f" at output {self.where}" if self.where else ""
        text = f"{self.source} -> {self.target}: {self.max_abs:.1e} (limit {self.limit:.1e}){place}"
        return "; ".join([text, *self.notes])


DEVICES = ("cpu", "cuda")


class WithoutAutocast(TorchFunctionMode):
    """Whatever is called inside runs in float32 where the user's code has switched autocast on.

    So does what the code itself cast to half precision there, because autocast would mix it.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Executes the function."""
        devices, kwargs = list(filter(torch.is_autocast_enabled, DEVICES)), kwargs or {}
        if not devices:
            return func(*args, **kwargs)
        first = args[:1] if _writes(func) else ()
        rest = mapped(args[len(first) :], _in_float32)
        with contextlib.ExitStack() as stack:
            for device in devices:
                stack.enter_context(torch.autocast(device, enabled=False))
            return func(*first, *rest, **mapped(kwargs, _in_float32))


HALVES = (torch.float16, torch.bfloat16)


def _in_float32(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float32 if value in HALVES else value
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in HALVES else value


def _writes(func: Any) -> bool:
    """Does a function write into its first argument?"""
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


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


@contextlib.contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Every module of the models in eval mode; each gets its own mode back."""
    modules = [m for model in models if isinstance(model, nn.Module) for m in model.modules()]
    modes = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


@dataclass(frozen=True)
class Runner:
    """A model as a callable batch -> prediction, run in eval mode.

    Attributes:
        model: A module or a file that is called like one.
        predict: The user's predict function.
    """

    model: Any
    predict: Callable[[Any, Any], Any]

    def __call__(self, batch: Any) -> Any:
        """The prediction for one batch."""
        with evaluating(self.model):
            return self.predict(self.model, batch)


def runner(model: Any, predict: Callable[[Any, Any], Any]) -> Runner:
    """A callable batch -> prediction for ``compare``; the model runs in eval mode."""
    return Runner(model, predict)
