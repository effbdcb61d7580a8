"""What a model is called with and what it returns, caught while the user's predict function runs.

An ONNX graph has flat named tensors where Python has arguments and nested results. This file makes
one of the other: names, structure as plain data, and a module whose forward is flat.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from slimcli.artifacts import nested, verify
from slimcli.errors import Problem, RunError
from slimcli.network.evaluating import evaluating
from slimcli.network.example import Example, own_copy


@dataclass(frozen=True)
class Capture:
    """One call of a model.

    Attributes:
        args: Positional arguments of its forward.
        kwargs: Keyword arguments of its forward.
        arguments: Structure of the bound arguments (``nested.Spec``).
        result: Structure of what it returned.
        inputs: Tensors among the arguments, name -> tensor.
        outputs: Tensors among the results, name -> tensor.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    arguments: nested.Spec
    result: nested.Spec
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]


class FlatModel(nn.Module):
    """The model as a function of tensors only: tensors in, a tuple of tensors out."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.template = (args, kwargs)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Calls the model with these tensors in the places of those it was captured with."""
        args, kwargs = nested.substitute(self.template, iter(tensors))
        _, found = nested.describe(self.model(*args, **kwargs))
        return tuple(tensor for _, tensor in found)


def capture(model: nn.Module, example: Example) -> Capture:
    """Runs the example once, in eval mode, and keeps the first call of the model's forward.

    Raises:
        RunError: The predict function never calls the model itself, or a tensor can't be reached.
    """
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    results: list[Any] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not calls:
            calls.append(own_copy((args, kwargs)))  # the forward may write into them

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if not results:
            results.append(output)

    handles = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after),
    ]
    try:
        with verify.exact_arithmetic(), evaluating(model):
            example.run(model)
    finally:
        for handle in handles:
            handle.remove()
    if not results:
        raise _refused(
            "the predict function does not call the model",
            "a call model(...), because an ONNX file holds the model's forward",
            "call the model itself: what predict_function does with its parts belongs into forward",
        )
    return _described(model, *calls[0], results[0])


def _described(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> Capture:
    try:
        arguments, inputs = nested.describe(bind(model, args, kwargs))
    except TypeError as error:
        raise _refused(
            f"an argument of the model cannot become an ONNX input: {error}",
            "tensors, numbers, texts, and lists, dicts or dataclasses of them",
            "pass tensors to the model in predict_function",
        ) from error
    try:
        structure, outputs = nested.describe(result)
    except TypeError as error:
        raise _refused(
            f"an output of the model cannot become an ONNX output: {error}",
            "tensors, numbers, texts, and lists, dicts or dataclasses of them",
            "return tensors from the model's forward",
        ) from error
    if not inputs or not outputs:
        what = "gets no tensor" if not inputs else "returns no tensor"
        fix = "pass tensors to the model and return tensors from its forward"
        raise _refused(f"the model {what}", "at least one tensor in and one out", fix)
    in_names = names([path for path, _ in inputs], "input", ())
    out_names = names([path for path, _ in outputs], "output", in_names)
    return Capture(
        args,
        kwargs,
        arguments,
        structure,
        dict(zip(in_names, (tensor for _, tensor in inputs), strict=True)),
        dict(zip(out_names, (tensor for _, tensor in outputs), strict=True)),
    )


def _refused(what: str, expected: str, fix: str) -> RunError:
    return RunError(Problem("E-ONNX-UNSUPPORTED", f"no ONNX file: {what}", "", expected, fix=fix))


def bind(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by parameter name, so that f(x) and f(x=x) are one call."""
    return nested.bind_names(parameter_names(model), args, kwargs)


def parameter_names(model: nn.Module) -> list[str]:
    """Names of the parameters of forward that may be passed by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = inspect.signature(model.forward).parameters.values()
    return [parameter.name for parameter in found if parameter.kind in kinds]


def names(paths: Sequence[str], default: str, taken: Sequence[str]) -> list[str]:
    """A short legal name for each tensor, from its path; none occurs twice.

    >>> names(["", ], "output", ()), names(["0", "1"], "output", ()), names(["a.b"], "x", ["a_b"])
    (['output'], ['output_0', 'output_1'], ['a_b_1'])
    """
    found: list[str] = []
    for path in paths:
        name = re.sub(r"\W+", "_", path).strip("_") or default
        name = f"{default}_{name}" if name[0].isdigit() else name
        unique, count = name, 0
        while unique in found or unique in taken:
            count += 1
            unique = f"{name}_{count}"
        found.append(unique)
    return found


@dataclass(frozen=True)
class Batching:
    """Which inputs grow with the batch.

    Attributes:
        size: Samples in the captured batch; 0 if the first tensor has no dimensions.
        names: Inputs whose first dimension is the batch.
        is_dynamic: Whether the model itself runs with another number of samples.
        reason: Why it does not.
    """

    size: int
    names: tuple[str, ...]
    is_dynamic: bool
    reason: str = ""


def batching(flat: FlatModel, inputs: Mapping[str, torch.Tensor]) -> Batching:
    """Finds the batch dimension by running the model with two and with three samples."""
    first = next(iter(inputs.values()))
    size = first.shape[0] if first.ndim else 0
    which = tuple(name for name, each in inputs.items() if each.ndim and each.shape[0] == size)
    if not size:
        return Batching(0, (), False, "the first input has no batch dimension")
    for samples in (2, 3):
        try:
            with verify.exact_arithmetic(), evaluating(flat):
                flat(*resized(inputs, which, samples).values())
        except Exception as error:  # the user's own code may raise anything
            head = str(error).strip().splitlines()[:1]
            tried = _resized(which, size, samples)
            reason = f"the model does not run with {tried}: {' '.join(head)}"
            return Batching(size, which, False, reason)
    return Batching(size, which, True)


def _resized(names: Sequence[str], size: int, samples: int) -> str:
    """What was tried; where there are several inputs, whether it was the batch is not known.

    >>> _resized(["x"], 4, 2), _resized(["a", "b"], 3, 2)
    ('2 samples', '2 for 3 as the first size of a and b')
    """
    if len(names) == 1:
        return f"{samples} samples"
    word = "and" if len(names) == 2 else "to"
    return f"{samples} for {size} as the first size of {names[0]} {word} {names[-1]}"


def resized(
    inputs: Mapping[str, torch.Tensor], which: Sequence[str], samples: int
) -> dict[str, torch.Tensor]:
    """Copies with ``samples`` samples: the first ones, repeated as often as needed."""

    def resize(tensor: torch.Tensor) -> torch.Tensor:
        times = -(-samples // tensor.shape[0])
        return torch.cat([tensor] * times)[:samples].clone()

    return {n: resize(each) if n in which else each.clone() for n, each in inputs.items()}
