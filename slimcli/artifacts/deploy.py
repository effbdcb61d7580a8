"""The deploy format: ``deploy.safetensors`` and ``deploy.json``, applied to a fresh user model.

Loading constructs no class of the user and unpickles nothing: the user's own ``model`` hook makes
the model, and the file says which of its layers get other shapes or give way to plain ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimcli import __version__
from slimcli.artifacts import atomic
from slimcli.artifacts.difference import FORMAT, VERSION, describe
from slimcli.artifacts.plain_modules import class_name, from_data, from_json
from slimcli.errors import Problem, RunError
from slimcli.network.holders import joined, own_tensors

TENSORS = "deploy.safetensors"
DESCRIPTION = "deploy.json"

__all__ = ["apply", "describe", "load", "load_deploy", "save"]


def save(folder: Path, model: nn.Module, reference: nn.Module) -> list[Path]:
    """Writes both files into ``folder``, atomically, the description last.

    Args:
        folder: An existing folder.
        model: The compressed model.
        reference: A fresh model from the user's ``model`` hook.

    Returns:
        The two paths.

    Raises:
        RunError: The model can't be described, or the disk is full.
    """
    from safetensors.torch import save as to_bytes

    tensors, description = describe(model, reference)
    data = to_bytes(tensors)
    atomic.write_bytes(folder / TENSORS, data)
    description |= {
        "tensors_file": TENSORS,
        "sha256": hashlib.sha256(data).hexdigest(),
        "slimcli": __version__,
        "torch": torch.__version__,
    }
    atomic.write_text(folder / DESCRIPTION, json.dumps(description, indent=1) + "\n")
    return [folder / TENSORS, folder / DESCRIPTION]


def load(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors, checked against each other.

    Args:
        path: A run folder, its ``artifacts`` folder, or a ``deploy.json``.

    Raises:
        RunError: A file is missing, damaged, or of a version this slim does not know.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    place = find(path)
    description = _read_description(place)
    file = place.parent / str(description.get("tensors_file", TENSORS))
    if file.parent != place.parent or not file.is_file():
        raise _unreadable(place, f"its tensors, {file.name}, are missing")
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != description.get("sha256"):
        raise _unreadable(file, "its content is not what was written (sha256 differs)")
    try:
        return description, from_bytes(data)
    except SafetensorError as error:
        raise _unreadable(file, str(error)) from error


def find(path: Path) -> Path:
    """The ``deploy.json`` that a run folder, an ``artifacts`` folder or a file name stands for.

    Raises:
        RunError: There is none.
    """
    path = Path(path)
    for candidate in (path, path / DESCRIPTION, path / "artifacts" / DESCRIPTION):
        if candidate.is_file():
            return candidate
    raise RunError(
        Problem(
            "E-DEPLOY-MISSING",
            f"there is no {DESCRIPTION} in {path}",
            expected="a finished run folder, its artifacts folder, or a deploy.json",
        )
    )


def load_deploy(
    run: Path | str,
    model: nn.Module | None = None,
    *,
    build_model: Callable[[Path], nn.Module] | None = None,
) -> nn.Module:
    """The compressed model of a run, in eval mode.

    Args:
        run: Run folder, its artifacts folder, or a ``deploy.json``.
        model: A fresh model as the run's ``model`` hook makes it; changed in place.
        build_model: Makes that model from the folder that holds the run, if ``model`` is None.

    Raises:
        RunError: A file can't be used, or the model is not the one the run started from.
    """
    description, tensors = load(Path(run))
    if model is None:
        if build_model is None:
            raise RunError(Problem("E-DEPLOY-MODEL", "no model was given to load into"))
        place = find(Path(run)).parent
        model = build_model(place.parent if place.name == "artifacts" else place)
    return apply(model, description, tensors)


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
    _check_version(description)
    before = dict(fresh_model.named_modules(remove_duplicate=False))
    _check_fits(before, description)
    _check_tensors(description, tensors)
    device = _device_of(fresh_model)
    for path, data in description["modules"].items():
        fresh_model.set_submodule(path, _module(fresh_model, before, data))
    for path in description["removed_modules"]:
        delattr(fresh_model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2])
    for path, attributes in description["attributes"].items():
        for name, value in attributes.items():
            setattr(fresh_model.get_submodule(path), name, from_json(value))
    _place_tensors(fresh_model, description, tensors, device)
    return fresh_model.eval()


def _module(
    model: nn.Module, before: Mapping[str, nn.Module], data: Mapping[str, Any]
) -> nn.Module:
    if "share" in data:
        return model.get_submodule(data["share"])
    if "reuse" in data:
        return before[data["reuse"]]
    try:
        return from_data(data)
    except (ValueError, KeyError, TypeError) as error:
        raise _unreadable(Path(DESCRIPTION), str(error)) from error


def _place_tensors(
    model: nn.Module,
    description: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    device: torch.device,
) -> None:
    """Puts every stored tensor at all its names; what is left in new layers goes."""
    names: dict[str, list[str]] = {name: [name] for name in description["tensors"]}
    for alias, name in description["aliases"].items():
        names[name].append(alias)
    for name, places in names.items():
        entry = description["tensors"][name]
        value = _with_memory_order(tensors[name].to(device), entry.get("memory_order"))
        if entry["kind"] == "parameter":
            value = nn.Parameter(value, requires_grad=entry["trainable"])
        for each in places:
            _set(model, each, value, persistent=entry["kind"] == "buffer")
    for name in description["removed"]:
        _remove(model, name)
    known = {*description["tensors"], *description["aliases"], *description["untouched"]}
    for path in _made(description):
        for child, module in model.get_submodule(path).named_modules(prefix=path):
            for local, _ in list(own_tensors(module)):
                if joined(child, local) not in known:
                    _remove(model, joined(child, local))


def _made(description: Mapping[str, Any]) -> list[str]:
    return [path for path, data in description["modules"].items() if "class" in data]


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


def _remove(model: nn.Module, name: str) -> None:
    """Leaves None, as layers without bias have it."""
    path, _, local = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(getattr(module, local), nn.Parameter):
        module.register_parameter(local, None)
    else:
        setattr(module, local, None)


def _with_memory_order(value: Tensor, order: list[int] | None) -> Tensor:
    if order is None:
        return value
    back = sorted(range(len(order)), key=order.__getitem__)
    return value.permute(order).contiguous().permute(back)


def _device_of(model: nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type != "meta":
            return tensor.device
    return torch.device("cpu")


def _check_version(description: Mapping[str, Any]) -> None:
    if description.get("format") != FORMAT:
        raise _unreadable(Path(DESCRIPTION), f"it is not in the format {FORMAT}")
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
            raise _unreadable(Path(TENSORS), f"{name} is missing or has another shape")


def _shape(shape: list[int] | None) -> str:
    return "nothing" if shape is None else f"shape {tuple(shape)}"


def _read_description(place: Path) -> dict[str, Any]:
    try:
        description = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(place, str(error)) from error
    if not isinstance(description, dict):
        raise _unreadable(place, "it is not a description of a model")
    _check_version(description)
    return description


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


def _unreadable(place: Path, reason: str) -> RunError:
    return RunError(Problem("E-DEPLOY-DAMAGED", f"{place} can't be used: {reason}"))
