"""Puts quantizers on a network, and takes them off again.

A quantized layer keeps its object, its place and its parameters; its class becomes a subclass that
computes with the quantized weight. Its ``state_dict`` names stay; quantizers add names below the
layer that reads the tensor: ``conv1.weight_quantizer``, ``conv1.input_quantizer``,
``conv2.residual_quantizer``. Quantizers live in layers only, because containers such as Sequential
call all of their children.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Literal, cast

from torch import Tensor, nn

from slimcli.errors import Problem, RunError
from slimcli.network.quantize.fake_quant import (
    WEIGHT_LOW,
    FakeQuant,
    ScalePolicy,
    quantizers,
)
from slimcli.network.quantize.layers import TRANSPOSED
from slimcli.network.quantize.place import Activation, Placement, Point
from slimcli.network.quantize.record import at, replaced
from slimcli.network.quantize.rewrite import rewrite

Granularity = Literal["tensor", "channel"]
_SUBCLASSES: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


class QuantizedWeight(nn.Module):
    """What the class of a quantized layer is given: it computes with the quantized weight.

    Its own forward finds the quantized weight under ``weight``; everybody else finds the parameter.
    """

    weight_quantizer: FakeQuant
    is_computing = False

    @property
    def weight(self) -> Tensor:
        """The parameter; inside forward what the quantizer makes of it."""
        parameter = cast("Tensor", super().__getattr__("weight"))
        return self.weight_quantizer(parameter) if self.is_computing else parameter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward."""
        self.is_computing = True
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.is_computing = False


class InputHook:
    """Quantizes one tensor among a module's arguments; an object, so that copies stay apart."""

    def __init__(self, quantizer: FakeQuant, point: Point) -> None:
        self.quantizer, self.point = quantizer, point

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with that tensor quantized."""
        _require(module, (args, kwargs), self.point, self.quantizer)
        return replaced((args, kwargs), self.point.path, self.quantizer)  # type: ignore[no-any-return]


class OutputHook:
    """Quantizes one tensor of a module's result."""

    def __init__(self, quantizer: FakeQuant, point: Point) -> None:
        self.quantizer, self.point = quantizer, point

    def __call__(self, module: nn.Module, args: Any, result: Any) -> Any:
        """The result with that tensor quantized."""
        _require(module, result, self.point, self.quantizer)
        return replaced(result, self.point.path, self.quantizer)


def _require(module: nn.Module, container: Any, point: Point, quantizer: FakeQuant) -> None:
    """Is the tensor there? Placement saw evaluation mode; training may call or return otherwise."""
    received = at(container, point.path)
    if isinstance(received, Tensor):
        return
    does = "is called" if point.kind == "input" else "returns"
    name = f"{point.module} ({type(module).__name__})" if point.module else type(module).__name__
    raise RunError(
        Problem(
            "E-QUANTIZE-MODES",
            f"{name} {does} in another way than in evaluation mode",
            expected=f"a tensor where evaluation has the {quantizer.label}",
            received="nothing there" if received is None else type(received).__name__,
            fix="let it take and return the same in both modes, or list the layers that read this "
            "tensor in config.skip",
        )
    )


def insert(
    model: nn.Module,
    placement: Placement,
    granularity: Granularity = "tensor",
    policy: ScalePolicy = "frozen",
) -> None:
    """Adds all quantizers, switched off: the network still computes exactly what it did."""
    for name in placement.quantized:
        _quantize_weight(name, model.get_submodule(name), granularity, policy)
    insertions: dict[str, dict[str, str]] = defaultdict(dict)
    for activation in placement.activations:
        _add_activation(model, activation, policy, insertions)
    for path, nodes in insertions.items():
        rewrite(model.get_submodule(path), nodes)


def _quantize_weight(
    name: str, layer: nn.Module, granularity: Granularity, policy: ScalePolicy
) -> None:
    weight = layer.get_parameter("weight")
    single = granularity == "tensor" or isinstance(layer, TRANSPOSED)
    channels = None if single else len(weight)
    quantizer = FakeQuant(f"weight of {name}", WEIGHT_LOW, policy, channels)
    layer.add_module("weight_quantizer", quantizer.to(weight.device))
    become(layer, QuantizedWeight)


def _add_activation(
    model: nn.Module,
    activation: Activation,
    policy: ScalePolicy,
    insertions: dict[str, dict[str, str]],
) -> None:
    layer = model.get_submodule(activation.layer)
    label = f"{activation.role} of {activation.layer}"
    if policy == "lsq" and activation.is_data:
        policy = "frozen"  # learning it would cost the first layer's input gradient
    quantizer = FakeQuant(label, policy=policy).to(layer.get_parameter("weight").device)
    # Only an addition reads it, perhaps `+=` into it; a layer would need it whole as well.
    quantizer.is_overwritten = activation.role == "residual"
    name, number = f"{activation.role}_quantizer", 2
    while hasattr(layer, name):
        name, number = f"{activation.role}_quantizer_{number}", number + 1
    layer.add_module(name, quantizer)
    handles = []
    for point in activation.points:
        module = model.get_submodule(point.module)
        if point.kind == "input":
            hook = InputHook(quantizer, point)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        elif point.kind == "output":
            handles.append(module.register_forward_hook(OutputHook(quantizer, point)))
        else:
            inside = f"{activation.layer}.{name}".removeprefix(f"{point.module}.")
            insertions[point.module][str(point.path[0])] = inside
    quantizer.handles = handles


def become(module: nn.Module, mixin: type[nn.Module]) -> None:
    """Makes a module's class a subclass of ``mixin`` and its class; :func:`restore` undoes it."""
    original = type(module)
    if (mixin, original) not in _SUBCLASSES:
        made = type(original.__name__, (mixin, original), {"slim_original": original})
        made.__module__ = original.__module__
        _SUBCLASSES[mixin, original] = made
    module.__class__ = _SUBCLASSES[mixin, original]


def restore(model: nn.Module) -> None:
    """Gives every module its own class back."""
    for module in model.modules():
        vars(module).pop("is_computing", None)
        while "slim_original" in vars(type(module)):
            module.__class__ = vars(type(module))["slim_original"]


def remove(model: nn.Module) -> None:
    """Takes all quantizers off: what is left is the float network with the trained weights."""
    for path, quantizer in quantizers(model).items():
        for handle in quantizer.handles:
            handle.remove()
        parent, _, name = path.rpartition(".")
        delattr(model.get_submodule(parent), name)
    restore(model)
