"""Measures whether two models compute the same, and names the first layer where they do not.

Every seam of the chain trained -> deploy -> ONNX -> engine goes through ``compare``. It knows
models only as callables; it judges nothing but numbers and writes no file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from slimcli.artifacts import nested, noise
from slimcli.artifacts.arithmetic import exact_arithmetic
from slimcli.artifacts.data_dependent import Watch
from slimcli.artifacts.leaf import RELATIVE_LIMIT, Worst, as_tensor, compare_leaf
from slimcli.artifacts.seam import Run, Runner, Seam, runner
from slimcli.network.evaluating import evaluating
from slimcli.network.example import Example

__all__ = [
    "RELATIVE_LIMIT", "Difference", "Run", "Runner", "Seam", "as_tensor", "compare",
    "compare_values", "exact_arithmetic", "first_difference", "locate", "record",
    "runner",
]  # fmt: skip


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
    such a network differ from itself. Outputs whose shape depends on data (NMS) are compared at
    the inputs of the op that made them so, and the notes say it.

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
        model, predict = reference.model, reference.predict
        return noise.compare_quantized(model, candidate, predict, batches, names=names)
    worst, count = Worst(), 0
    with exact_arithmetic():
        for batch in batches:
            _compare_batch(reference, candidate, batch, limit, worst)
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


def _compare_batch(reference: Run, candidate: Run, batch: Any, limit: float, worst: Worst) -> None:
    """Compares outputs; those whose shape depends on data where their shape was last known."""
    with Watch() as seen:
        ours = dict(nested.leaves(reference(batch)))
    if not seen.operators:
        _compare_values(ours, dict(nested.leaves(candidate(batch))), limit, worst)
        return
    with Watch() as also_seen:
        theirs = dict(nested.leaves(candidate(batch)))
    dynamic = {where for where, leaf in ours.items() if seen.is_behind([leaf])}
    if _agree(ours, theirs, dynamic, limit):
        dynamic = set()
    if seen.operators == also_seen.operators:
        names = [f"input {number} of a data-dependent op" for number in range(len(seen.inputs))]
        inputs = dict(zip(names, seen.inputs, strict=True))
        _compare_values(inputs, dict(zip(names, also_seen.inputs, strict=True)), limit, worst)
    else:  # a file does not show its inside: outputs of one shape can still be compared
        dynamic = {where for where in dynamic if _shape(ours[where]) != _shape(theirs.get(where))}
    if dynamic:
        said = f"not compared, their shape depends on data: {', '.join(sorted(dynamic))}"
        worst.notes[f"{said} (after {seen.operators[0]})"] = None
    ours, theirs = (
        {where: leaf for where, leaf in leaves.items() if where not in dynamic}
        for leaves in (ours, theirs)
    )
    _compare_values(ours, theirs, limit, worst)


def _agree(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], places: set[str], limit: float
) -> bool:
    """Whether both have the same values at these places: then nothing has to be left out."""
    direct = Worst()
    left, right = ({each: leaves.get(each) for each in places} for leaves in (ours, theirs))
    _compare_values(left, right, limit, direct)
    return 0 <= direct.ratio <= 1


def _shape(value: Any) -> Any:
    return getattr(value, "shape", None)


def _compare_values(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], limit: float, worst: Worst
) -> None:
    for where in [*ours, *(path for path in theirs if path not in ours)]:
        if where not in theirs:
            worst.differ(where, "is missing in the candidate")
        elif where not in ours:
            worst.differ(where, "is only in the candidate")
        else:
            compare_leaf(where, ours[where], theirs[where], limit, worst)


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

    def __str__(self) -> str:
        """``layer3.0.relu (3.2e-01 apart, limit 1.0e-04; layer3.0.conv2 still agrees)``."""
        before = f"; {self.last_equal} still agrees" if self.last_equal else ""
        return f"{self.module} ({self.max_abs:.1e} apart, limit {self.limit:.1e}{before})"


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
