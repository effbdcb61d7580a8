"""Which layers of a network become int8, and why the others stay float."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from slimcli.errors import Problem, RecipeError
from slimcli.network.quantize.record import Call, Op, Record

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
HEAVY = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)
HEAVY_OPS = frozenset(
    [
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "linear",
    ]
)


@dataclass(frozen=True)
class Layer:
    """One convolution or linear layer.

    Attributes:
        name: Module path.
        type: Class name.
        channels: Output channels.
        reason: Why it stays float; empty if its weight and its input are quantized.
    """

    name: str
    type: str
    channels: int
    reason: str = ""


def heavy_layers(model: nn.Module, record: Record, skip: Sequence[str]) -> list[Layer]:
    """All layers with a weight to quantize, in the order of their first call.

    Raises:
        RecipeError: An entry of ``skip`` matches none of them.
    """
    modules: dict[str, nn.Module] = {
        name: each for name, each in model.named_modules() if isinstance(each, HEAVY)
    }
    order = list(dict.fromkeys(call.module for call in record.calls if call.module in modules))
    skipped = _skipped(modules, order, skip)
    ops = {(op.module, op.call): op for op in record.ops if op.name in HEAVY_OPS}
    found = []
    for name in [*order, *(each for each in modules if each not in order)]:
        module = modules[name]
        reason = skipped.get(name) or _reason(name, record.calls_of(name), ops)
        channels = int(getattr(module, "out_channels", 0) or getattr(module, "out_features", 0))
        found.append(Layer(name, type(module).__name__, channels, reason))
    return found


def _reason(name: str, calls: Sequence[Call], ops: dict[tuple[str, int], Op]) -> str:
    """Why a layer that nobody skipped stays float, or an empty string."""
    if not calls:
        return "not called on the example batch in eval mode"
    for call in calls:
        op = ops.get((name, call.number))
        if op is None:
            return "its forward calls no convolution or linear function itself"
        if op.weight != f"{name}.weight":
            shared = f"shared with {op.weight}" if op.weight else "computed from other tensors"
            return f"its weight is {shared}"
        if input_path(call) is None:
            return "it is called with something other than one tensor"
    return ""


def input_path(call: Call) -> tuple[int | str, ...] | None:
    """Where a layer's one activation stands among its arguments."""
    first = [path for path in call.inputs if path in ((0, 0), (1, "input"))]
    return first[0] if first and len(call.inputs) == 1 else None


def first_in_float64(model: nn.Module, layers: Sequence[Layer]) -> str:
    """The first quantized weight in float64, or an empty string: QuantizeLinear takes float32."""
    weights = (f"{layer.name}.weight" for layer in layers if not layer.reason)
    return next((each for each in weights if model.get_parameter(each).dtype == torch.float64), "")


def other_weights(model: nn.Module, layers: Sequence[Layer]) -> list[str]:
    """Layers of other kinds that hold a matrix of weights, such as GRU and Embedding."""
    known = {each.name for each in layers}
    return [
        f"{name} ({type(module).__name__})"
        for name, module in model.named_modules()
        if name not in known and any(each.dim() > 1 for each in module.parameters(recurse=False))
    ]


def _skipped(
    modules: dict[str, nn.Module], order: Sequence[str], skip: Sequence[str]
) -> dict[str, str]:
    """Layer -> the entry of ``skip`` that names it."""
    found: dict[str, str] = {}
    for entry in skip:
        hits = _hits(entry, modules, order)
        if not hits:
            near = difflib.get_close_matches(entry, list(modules), 3, 0.4)
            raise RecipeError(
                Problem(
                    "E-QUANTIZE-SKIP",
                    f"config.skip: {entry!r} matches no convolution or linear layer",
                    expected="a module name, a pattern, a type name, `first` or `last`",
                    received=entry,
                    fix=f"did you mean {', '.join(near)}?" if near else "see `slim plan`",
                )
            )
        for name in hits:
            found.setdefault(name, f"skip: {entry}")
    return found


def _hits(entry: str, modules: dict[str, nn.Module], order: Sequence[str]) -> list[str]:
    if entry == "first":
        return list(order[:1])
    if entry == "last":
        return list(order[-1:])
    entry = entry.removeprefix("self.")
    return [
        name
        for name, module in modules.items()
        if fnmatch.fnmatchcase(name, entry)
        or name.startswith(f"{entry}.")
        or type(module).__name__ == entry
    ]
