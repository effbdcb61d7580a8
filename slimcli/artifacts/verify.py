"""Measures whether two models compute the same, and names the first layer where they do not.

Every seam of the chain trained -> deploy -> ONNX -> engine goes through ``compare``. It knows
models only as callables; it judges nothing but numbers and writes no file.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from slimcli.artifacts import nested
from slimcli.network.example import Example

RELATIVE_LIMIT = 1e-4
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


@dataclass
class _Worst:
    """The running maximum over outputs and batches."""

    ratio: float = -1.0
    max_abs: float = 0.0
    max_rel: float = 0.0
    limit: float = RELATIVE_LIMIT
    where: str = ""
    notes: dict[str, None] = field(default_factory=dict)

    def take(self, where: str, difference: float, magnitude: float, limit: float) -> None:
        ratio = difference / limit if limit > 0 else (math.inf if difference > 0 else 0.0)
        if ratio > self.ratio:
            self.ratio, self.where, self.limit = ratio, where, limit
            self.max_abs = difference
            self.max_rel = difference / magnitude if magnitude > 0 else difference

    def differ(self, where: str, note: str) -> None:
        self.take(where, math.inf, 1.0, RELATIVE_LIMIT)
        self.notes[f"{where or 'output'}: {note}"] = None


@contextlib.contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Float32 that is float32: no TF32, no autocast, no gradients. Settings are put back."""
    precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        cpu, cuda = (torch.autocast(device, enabled=False) for device in ("cpu", "cuda"))
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


def compare(
    reference: Run,
    candidate: Run,
    batches: Iterable[Any],
    *,
    names: tuple[str, str] = ("reference", "candidate"),
    limit: float = RELATIVE_LIMIT,
) -> Seam:
    """How far the candidate's predictions are from the reference's on real batches.

    An output is right if ``max_abs <= limit * max(1, max|y|)``. Integers, booleans and texts must
    be equal. NaN equals NaN, and an infinity equals itself, only at the same place. A quantized
    file is compared with its module by ``noise.compare_quantized`` instead, because rounding makes
    such a network differ from itself.

    Args:
        reference: batch -> prediction, any nesting of tensors.
        candidate: The same for the model under test.
        batches: Real batches, on the device both callables expect.
        names: What to call the two in the result.
        limit: Relative limit.

    Returns:
        The seam at the output with the largest share of its limit. Comparing nothing is not ok.
    """
    if isinstance(reference, Runner) and is_quantized_file(getattr(candidate, "model", None)):
        from slimcli.artifacts import noise

        model, predict = reference.model, reference.predict
        return noise.compare_quantized(model, candidate, predict, batches, names=names)
    worst, count = _Worst(), 0
    with exact_arithmetic():
        for batch in batches:
            _compare_values(reference(batch), candidate(batch), limit, worst)
            count += 1
    if worst.ratio < 0:
        worst.differ("", "nothing was compared" if count else "there was no batch to compare on")
    ok = worst.ratio <= 1.0
    notes = tuple(worst.notes)
    return Seam(*names, worst.max_abs, worst.max_rel, worst.limit, ok, worst.where, count, notes)


def is_quantized_file(model: Any) -> bool:
    """Whether a model is a file with Q/DQ nodes."""
    return bool(getattr(model, "is_quantized", False))


def compare_values(reference: Any, candidate: Any, limit: float = RELATIVE_LIMIT) -> Seam:
    """The seam between two predictions that are already at hand.

    >>> compare_values([torch.ones(2)], [torch.ones(2)]).max_abs
    0.0
    """
    return compare(lambda _: reference, lambda _: candidate, [None], limit=limit)


def _compare_values(reference: Any, candidate: Any, limit: float, worst: _Worst) -> None:
    ours, theirs = dict(nested.leaves(reference)), dict(nested.leaves(candidate))
    for where in [*ours, *(path for path in theirs if path not in ours)]:
        if where not in theirs:
            worst.differ(where, "is missing in the candidate")
        elif where not in ours:
            worst.differ(where, "is only in the candidate")
        else:
            _compare_leaf(where, ours[where], theirs[where], limit, worst)


def _compare_leaf(where: str, ours: Any, theirs: Any, limit: float, worst: _Worst) -> None:
    left, right = as_tensor(ours), as_tensor(theirs)
    if left is None or right is None:
        if ours is not theirs and ours != theirs:
            worst.differ(where, f"expected {ours!r:.60}, received {theirs!r:.60}")
    elif left.shape != right.shape:
        worst.differ(where, f"shape {tuple(left.shape)} became {tuple(right.shape)}")
    elif not (left.is_floating_point() or left.is_complex()):
        unequal = int((left != right).sum())
        if unequal:
            worst.differ(where, f"{unequal} of {left.numel()} integers differ")
        else:
            worst.take(where, 0.0, 1.0, limit)
    else:
        _compare_floats(where, left, right, limit, worst)


def _compare_floats(
    where: str, left: torch.Tensor, right: torch.Tensor, limit: float, worst: _Worst
) -> None:
    """Compares floating point tensors of one shape, in float64."""
    wide = torch.complex128 if left.is_complex() or right.is_complex() else torch.float64
    left, right = left.to(wide), right.to(wide)
    same = (left == right) | (left.isnan() & right.isnan())
    finite = left.isfinite() & right.isfinite()
    broken = int((~finite & ~same).sum())
    if broken:
        worst.differ(where, f"{broken} of {left.numel()} values are nan or inf on one side only")
        return
    if not bool(left.isfinite().all()):
        worst.notes[f"{where or 'output'}: the reference itself holds nan or inf"] = None
    difference = torch.where(finite, left - right, 0).abs()
    magnitude = torch.where(finite, left, 0).abs()
    peak = float(magnitude.max()) if left.numel() else 0.0
    largest = float(difference.max()) if left.numel() else 0.0
    worst.take(where, largest, peak, limit * max(1.0, peak))


def as_tensor(value: Any) -> torch.Tensor | None:
    """The leaf as a dense CPU tensor; None if it holds no numbers."""
    if isinstance(value, torch.Tensor):
        dense = value.detach().to_dense() if value.layout != torch.strided else value.detach()
        return dense.cpu()
    if nested.is_tensor(value) or isinstance(value, bool | int | float):
        try:
            return torch.as_tensor(value)
        except (TypeError, RuntimeError):
            return None
    return None


@dataclass(frozen=True)
class Difference:
    """The first layer from which two models stay apart.

    Attributes:
        module: Path of the module, the same in both models.
        max_abs: Largest absolute difference of its output.
        limit: Largest that would have been allowed.
        last_equal: Path of the last module before it that agrees; empty if none does.
    """

    module: str
    max_abs: float
    limit: float
    last_equal: str = ""


def first_difference(
    reference: nn.Module,
    candidate: nn.Module,
    example: Example,
    *,
    limit: float = RELATIVE_LIMIT,
) -> Difference | None:
    """The first module, in the order of execution, after which no module agrees any more.

    Folding changes single modules on purpose (the conv of a folded pair differs, its norm agrees
    again), therefore a module that differs counts only if none behind it agrees.

    Args:
        reference: The model that is right.
        candidate: The model, or ONNX file, that should compute the same.
        example: A batch and the way to run a model on it.
        limit: Relative limit, as in ``compare``.

    Returns:
        The place, or None if every common module with a common output shape agrees.
    """
    with exact_arithmetic():
        inside = getattr(candidate, "outputs_inside", None)  # a file knows its layers by name
        theirs = inside(reference, example) if inside else record(candidate, example)
        return locate(record(reference, example), theirs, limit)


def locate(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], limit: float = RELATIVE_LIMIT
) -> Difference | None:
    """``first_difference`` on outputs that are at hand, module path -> output, in order."""
    found: Difference | None = None
    last_equal = ""
    for path, output in ours.items():
        if path not in theirs or not path:
            continue
        seam = compare_values(output, theirs[path], limit)
        if any("shape" in note for note in seam.notes):
            continue  # a cut layer: its channels cannot be compared one by one
        if seam.ok:
            found, last_equal = None, path
        elif found is None:
            found = Difference(path, seam.max_abs, seam.limit, last_equal)
    return found


def record(model: nn.Module, example: Example) -> dict[str, Any]:
    """Output of the first call of each module, path -> output, in the order of completion."""
    outputs: dict[str, Any] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            # A copy, because an in-place op behind the module would change what it returned.
            tensors = (
                leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf
                for _, leaf in nested.leaves(output)
            )
            outputs.setdefault(path, list(tensors))

        return hook

    handles = [module.register_forward_hook(keep(path)) for path, module in model.named_modules()]
    try:
        with evaluating(model):
            example.run(model)
    finally:
        for handle in handles:
            handle.remove()
    return outputs
