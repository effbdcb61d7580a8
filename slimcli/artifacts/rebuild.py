"""A fresh user model turned into the compressed one by a description and its tensors.

The counterpart of ``difference``. Everything is checked before the model changes; the only classes
constructed are torch's own plain layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimcli.artifacts.difference import ATTRIBUTES, FORMAT, VERSION
from slimcli.artifacts.plain_modules import class_name, from_data, from_json
from slimcli.errors import Problem, RunError
from slimcli.network.holders import joined, own_tensors
from slimcli.network.selection import in_memory_order

SECTIONS = (
    *("kept", "modules", "removed_modules", "removed", "attributes", "tensors", "aliases"),
    *("untouched", "reference_shapes"),
)
"""What a description must have."""

COPY_AGAIN = "copy it again, or delete it: slim export RUN makes it from checkpoints/best.pt"


def apply(
    fresh_model: nn.Module, description: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> nn.Module:
    """Turns a fresh user model into the compressed one, in place, and returns it in eval mode.

    Args:
        fresh_model: What the user's ``model`` hook returns; its device is kept.
        description: JSON data of :func:`describe`.
        tensors: The tensors of :func:`describe`.

    Raises:
        RunError: The model is not built as the one that was compressed; the first difference is
            named and the model unchanged.
    """
    check_version(description)
    before = dict(fresh_model.named_modules(remove_duplicate=False))
    try:
        _check_fits(before, description)
        _check_tensors(description, tensors)
        _check_attributes(description)
        replacements = _replacements(before, description)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise unreadable(Path("deploy.json"), str(error)) from error
    device = _device_of(fresh_model)
    for path, module in replacements.items():
        fresh_model.set_submodule(path, module)
    for path in description["removed_modules"]:
        parent, _, child = path.rpartition(".")
        delattr(fresh_model.get_submodule(parent), child)
    for path, attributes in description["attributes"].items():
        for name, value in attributes.items():
            setattr(fresh_model.get_submodule(path), name, from_json(value))
    _place_tensors(fresh_model, description, tensors, device)
    _clear(replacements, description)
    return fresh_model.eval()


def _replacements(
    before: Mapping[str, nn.Module], description: Mapping[str, Any]
) -> dict[str, nn.Module]:
    """The modules to put in, path -> plain layer, module from elsewhere, or one put in already."""
    found: dict[str, nn.Module] = {}
    made: dict[str, nn.Module] = {}
    for path, data in description["modules"].items():
        if "share" in data:
            found[path] = made[data["share"]] if data["share"] in made else before[data["share"]]
            continue
        found[path] = before[data["reuse"]] if "reuse" in data else from_data(data)
        made.update(found[path].named_modules(prefix=path))
    return found


def _place_tensors(
    model: nn.Module,
    description: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    device: torch.device,
) -> None:
    """Puts every stored tensor at all its names and takes away what the stored model had not."""
    names: dict[str, list[str]] = {name: [name] for name in description["tensors"]}
    for alias, name in description["aliases"].items():
        names[name].append(alias)
    for name, places in names.items():
        entry = description["tensors"][name]
        order = entry.get("memory_order", range(len(entry["shape"])))
        value = in_memory_order(tensors[name].to(device), order)
        if entry["kind"] == "parameter":
            value = nn.Parameter(value, requires_grad=entry["trainable"])
        for each in places:
            _set(model, each, value, persistent=entry["kind"] == "buffer")
    for name in description["removed"]:
        path, _, local = name.rpartition(".")
        _remove(model.get_submodule(path), local)


def _clear(replacements: Mapping[str, nn.Module], description: Mapping[str, Any]) -> None:
    """Takes from new layers what they have and the stored ones had not."""
    known = {*description["tensors"], *description["aliases"], *description["untouched"]}
    for path, replacement in replacements.items():
        for child, module in replacement.named_modules(prefix=path):
            for local, _ in list(own_tensors(module)):
                if joined(child, local) not in known:
                    _remove(module, local)


def _set(model: nn.Module, name: str, value: Tensor, persistent: bool) -> None:
    path, _, local = name.rpartition(".")
    module = model.get_submodule(path)
    own = dict(own_tensors(module))
    is_parameter = isinstance(value, nn.Parameter)
    if local in own and isinstance(own[local], nn.Parameter) is is_parameter:
        if is_parameter:
            vars(value).update(vars(own[local]))  # the user's marks on the fresh parameter
        setattr(module, local, value)
        return
    if hasattr(module, local):
        delattr(module, local)
    if is_parameter:
        module.register_parameter(local, value)  # type: ignore[arg-type]
    else:
        module.register_buffer(local, value, persistent=persistent)


def _remove(module: nn.Module, local: str) -> None:
    """Leaves None, as layers without bias have it."""
    if isinstance(getattr(module, local), nn.Parameter):
        module.register_parameter(local, None)
    else:
        setattr(module, local, None)


def _device_of(model: nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type != "meta":
            return tensor.device
    return torch.device("cpu")


def check_version(description: Mapping[str, Any]) -> None:
    """Refuses a description of another version, or one that lacks a section.

    Raises:
        RunError: It can't be used by this slim.
    """
    if description.get("format") != FORMAT:
        raise unreadable(Path("deploy.json"), f"it is not in the format {FORMAT}")
    if description.get("version") != VERSION:
        raise RunError(
            Problem(
                "E-DEPLOY-VERSION",
                "this deploy file was written by another version of slim",
                expected=f"version {VERSION}",
                received=f"version {description.get('version')}",
                fix=f"install slimcli {description.get('slimcli', 'of that time')}",
            )
        )
    missing = [name for name in SECTIONS if name not in description]
    if missing:
        raise unreadable(Path("deploy.json"), f"it has no {missing[0]}")


def _check_fits(before: Mapping[str, nn.Module], description: Mapping[str, Any]) -> None:
    """The fresh model must have the modules and shapes of the one that was compressed."""
    for path, kind in description["kept"].items():
        received = class_name(before[path]) if path in before else "nothing"
        if received != kind:
            raise _other_model(path or "the model", kind, received)
    made = (*description["modules"], *description["removed_modules"])
    for path, module in before.items():
        replaced = any(path == top or path.startswith(f"{top}.") for top in made)
        if path not in description["kept"] and not replaced:
            raise _other_model(path, "nothing", class_name(module))
    shapes = description["reference_shapes"]
    received_shapes = {
        joined(path, local): list(tensor.shape)
        for path in description["kept"]
        for local, tensor in own_tensors(before[path])
    }
    for name in (*shapes, *received_shapes):
        if shapes.get(name) != received_shapes.get(name):
            raise _other_model(name, _shape(shapes.get(name)), _shape(received_shapes.get(name)))


def _check_tensors(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    for name, entry in description["tensors"].items():
        if name not in tensors or list(tensors[name].shape) != entry["shape"]:
            raise ValueError(f"the tensor {name} is missing or has another shape")
    for alias, name in description["aliases"].items():
        if name not in description["tensors"]:
            raise ValueError(f"{alias} stands for {name}, which is not stored")


def _check_attributes(description: Mapping[str, Any]) -> None:
    for path, attributes in description["attributes"].items():
        unknown = [name for name in attributes if name not in ATTRIBUTES]
        if unknown or path not in description["kept"]:
            raise ValueError(f"{path} has no attribute {unknown} that may be set")


def _shape(shape: list[int] | None) -> str:
    return "nothing" if shape is None else f"shape {tuple(shape)}"


def _other_model(where: str, expected: str, received: str) -> RunError:
    return RunError(
        Problem(
            "E-DEPLOY-OTHER-MODEL",
            f"this is not the model that was compressed; the first difference is {where}",
            expected=expected,
            received=received,
            fix="give the model exactly as the run's `model:` hook makes it",
        )
    )


def unreadable(place: Path, reason: str) -> RunError:
    """The error of a file that is not what was written."""
    return RunError(Problem("E-DEPLOY-DAMAGED", f"{place} can't be used: {reason}", fix=COPY_AGAIN))
