"""Plain torch layers as data and back: class name and constructor arguments, never a pickle.

Only the classes listed here are ever constructed when a file is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

_CONVOLUTION = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"),
    *("groups", "padding_mode"),
)
_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats")

ARGUMENTS: dict[str, tuple[str, ...]] = {
    "Identity": (),
    "Linear": ("in_features", "out_features"),
    **{f"Conv{n}d": _CONVOLUTION for n in (1, 2, 3)},
    **{f"ConvTranspose{n}d": (*_CONVOLUTION, "output_padding") for n in (1, 2, 3)},
    **{f"BatchNorm{n}d": _NORM for n in (1, 2, 3)},
}
"""Class in ``torch.nn`` -> constructor arguments that are attributes of the same name."""


def class_name(module: nn.Module) -> str:
    """``torch.nn.Conv2d`` for torch's own classes, else the qualified name without the file's.

    The user's file may be imported under another name when the model is loaded.

    >>> class_name(nn.Conv2d(1, 1, 1))
    'torch.nn.Conv2d'
    """
    kind = type(module)
    if kind.__module__.startswith("torch.nn."):
        return f"torch.nn.{kind.__qualname__}"
    return kind.__qualname__


def to_data(module: nn.Module) -> dict[str, Any] | None:
    """A plain layer, or a ``Sequential`` of such, as JSON data; None for anything else.

    >>> to_data(nn.Linear(3, 2))
    {'class': 'Linear', 'arguments': {'in_features': 3, 'out_features': 2, 'bias': True}}
    >>> to_data(nn.LSTM(1, 1)) is None
    True
    """
    name = type(module).__name__
    if type(module) is nn.Sequential:
        children = {key: to_data(child) for key, child in module.named_children()}
        return None if None in children.values() else {"class": name, "children": children}
    if name not in ARGUMENTS or type(module) is not getattr(nn, name):
        return None
    arguments = {key: as_data(getattr(module, key)) for key in ARGUMENTS[name]}
    if "in_channels" in arguments or "in_features" in arguments:
        arguments["bias"] = module.bias is not None
    return {"class": name, "arguments": arguments}


def from_data(data: Mapping[str, Any]) -> nn.Module:
    """The layer :func:`to_data` described, its tensors on the meta device, waiting for values.

    Raises:
        ValueError: The class is not one of the few that may be constructed.

    >>> from_data({"class": "Identity", "arguments": {}})
    Identity()
    """
    name = str(data.get("class"))
    if name == "Sequential":
        built = nn.Sequential()
        for key, child in data["children"].items():
            built.add_module(key, from_data(child))
        return built
    if name not in ARGUMENTS:
        raise ValueError(f"{name} is not a class that is made from a file")
    arguments = {key: from_json(value) for key, value in data["arguments"].items()}
    layer: nn.Module = getattr(nn, name)(**arguments, **({"device": "meta"} if arguments else {}))
    return layer


def as_data(value: Any) -> Any:
    """An attribute as JSON data; tuples become lists.

    Raises:
        ValueError: It is more than numbers, texts and tuples of them.
    """
    if isinstance(value, tuple):
        return [as_data(each) for each in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"{value!r} can't be stored as an attribute")


def from_json(value: Any) -> Any:
    """The attribute again; lists become tuples."""
    return tuple(from_json(each) for each in value) if isinstance(value, list) else value
