"""What must be done to a fresh user model so that it becomes the compressed one, as data.

Compares two module trees: it knows layers and tensors, and no algorithm. What can't be said in data
(a class of ours, a changed user class) is refused here, when the file is written, and not when it
is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slimcli.artifacts.plain_modules import as_data, class_name, to_data
from slimcli.errors import Problem, RunError
from slimcli.network.holders import joined, own_tensors

FORMAT = "slim-deploy"
VERSION = 1

ATTRIBUTES = (
    *("in_channels", "out_channels", "groups", "in_features", "out_features", "num_features"),
    *("in1_features", "in2_features", "num_channels", "num_groups", "normalized_shape"),
    *("num_parameters", "num_embeddings", "embedding_dim", "embed_dim", "kdim", "vdim"),
    *("head_dim", "num_heads", "eps", "momentum", "affine", "track_running_stats", "p", "inplace"),
)
"""Attributes of torch's layers (and subclasses) that may differ on a layer that is kept."""

CONSTRUCTED = ("kernel_size", "stride", "padding", "dilation", "output_padding", "padding_mode")
"""Attributes that other hidden ones depend on: where they differ, the layer is made anew."""

Tree = Mapping[str, nn.Module]


def describe(model: nn.Module, reference: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of ``model`` and how ``reference`` becomes ``model`` around them.

    Args:
        model: The compressed model; not changed.
        reference: A fresh model from the user's ``model`` hook; not changed.

    Returns:
        Tensors by name (each shared one once, contiguous, on the CPU), and JSON data:

        * ``kept``: module path -> class, of all modules that stay;
        * ``modules``: path -> layer to construct (``class``), to take from elsewhere in the fresh
          model (``reuse``) or to share (``share``);
        * ``removed_modules``, ``removed``: paths of modules, names of tensors that go;
        * ``attributes``: path -> attribute -> value;
        * ``tensors``: name -> shape, dtype, kind, trainable, memory order;
        * ``aliases``: name -> name of the tensor it is;
        * ``reference_shapes``: what the fresh model must look like before.

    Raises:
        RunError: Something in ``model`` can't be said as data.
    """
    after = dict(model.named_modules(remove_duplicate=False))
    before = dict(reference.named_modules(remove_duplicate=False))
    kept, modules = _compare_modules(after, before)
    removed_modules = [
        path
        for path in before
        if path not in after and _parent(path) in kept and _parent(path) not in modules
    ]
    tensors, table, aliases, untouched = _tensors(model, after, before)
    names = _names(after)
    old_names = _names({path: before[path] for path in kept})
    return tensors, {
        "format": FORMAT,
        "version": VERSION,
        "model": class_name(model),
        "kept": {path: class_name(after[path]) for path in kept},
        "modules": modules,
        "removed_modules": removed_modules,
        "removed": [name for name in old_names if name not in names],
        "attributes": _attributes(after, before, kept),
        "tensors": table,
        "aliases": aliases,
        "untouched": untouched,
        "reference_shapes": {name: list(tensor.shape) for name, tensor in old_names.items()},
    }


def same_kind(module: nn.Module, other: nn.Module) -> bool:
    """Whether one can stand where the other does, once attributes and tensors are set."""
    if class_name(module) != class_name(other):
        return False
    return not _is_torch_layer(module) or all(
        getattr(module, name, None) == getattr(other, name, None) for name in CONSTRUCTED
    )


def _compare_modules(after: Tree, before: Tree) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Paths that stay, and what happens to the others."""
    kept: list[str] = []
    modules: dict[str, dict[str, Any]] = {}
    first_path: dict[int, str] = {}
    for path, module in after.items():
        if any(path.startswith(f"{top}.") for top in modules):
            first_path.setdefault(id(module), path)
            continue
        fresh = before.get(path)
        first = first_path.setdefault(id(module), path)
        if first != path and (first not in kept or before[first] is not fresh):
            modules[path] = {"share": first}
        elif fresh is not None and same_kind(module, fresh):
            _check_sharing(path, first, fresh, before, kept)
            _check_forward(path, module, fresh)
            kept.append(path)
        else:
            modules[path] = _replacement(path, module, before)
    _check_order(after, before, modules)
    return kept, modules


def _replacement(path: str, module: nn.Module, before: Tree) -> dict[str, Any]:
    """How to get a module that the fresh model does not have at this place."""
    data = to_data(module)
    if data is not None and path:
        return data
    for other, candidate in before.items():
        inside = other.startswith(f"{path}.")
        if (
            inside
            and path
            and class_name(candidate) == class_name(module)
            and not _names({"": module})
        ):
            return {"reuse": other}
    fresh = before.get(path)
    raise refused(
        f"{path or 'the model'} is a {class_name(module)}, which is no plain torch layer",
        expected=class_name(fresh) if fresh is not None else "a plain layer",
    )


def _attributes(after: Tree, before: Tree, kept: list[str]) -> dict[str, dict[str, Any]]:
    """Attributes of kept torch layers that differ from the fresh ones."""
    changed: dict[str, dict[str, Any]] = {}
    for path in kept:
        module, fresh = after[path], before[path]
        if not _is_torch_layer(module):
            continue
        for name in ATTRIBUTES:
            value = getattr(module, name, None)
            if isinstance(value, Tensor) or value == getattr(fresh, name, None):
                continue
            try:
                changed.setdefault(path, {})[name] = as_data(value)
            except ValueError as error:
                raise refused(f"{joined(path, name)}: {error}") from error
    return changed


def _tensors(
    model: nn.Module, after: Tree, before: Tree
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str], list[str]]:
    """Tensors by first name, their table, other names, and buffers that need no storing."""
    saved = set(model.state_dict(keep_vars=True))
    extra = [name for name in saved if name.endswith("_extra_state")]
    if extra:
        raise refused(f"{extra[0]} holds state that is no tensor")
    fresh = _names(before)
    tensors: dict[str, Tensor] = {}
    table: dict[str, Any] = {}
    aliases: dict[str, str] = {}
    untouched: list[str] = []
    first_name: dict[int, str] = {}
    for name, tensor in _names(after).items():
        if (
            name not in saved
            and not isinstance(tensor, nn.Parameter)
            and _equal(tensor, fresh.get(name))
        ):
            untouched.append(name)
            continue
        first = first_name.setdefault(id(tensor), name)
        if first != name:
            aliases[name] = first
            continue
        tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        table[name] = _entry(tensor, name in saved)
    return tensors, table, aliases, untouched


def _entry(tensor: Tensor, is_saved: bool) -> dict[str, Any]:
    is_parameter = isinstance(tensor, nn.Parameter)
    entry: dict[str, Any] = {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "kind": "parameter" if is_parameter else "buffer" if is_saved else "unsaved buffer",
    }
    if is_parameter:
        entry["trainable"] = tensor.requires_grad
    if list(tensor.dim_order()) != list(range(tensor.dim())):
        entry["memory_order"] = list(tensor.dim_order())
    return entry


def _names(tree: Tree) -> dict[str, Tensor]:
    """All names of all parameters and buffers of some modules, without their children."""
    return {
        joined(path, local): tensor
        for path, module in tree.items()
        for local, tensor in own_tensors(module)
    }


def _equal(tensor: Tensor, other: Tensor | None) -> bool:
    if other is None or other.shape != tensor.shape or other.dtype != tensor.dtype:
        return False
    return torch.equal(tensor.detach().cpu(), other.detach().cpu())


def _is_torch_layer(module: nn.Module) -> bool:
    return any(
        kind.__module__.startswith("torch.nn.") and kind is not nn.Module
        for kind in type(module).__mro__
    )


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _check_sharing(path: str, first: str, fresh: nn.Module, before: Tree, kept: list[str]) -> None:
    """Two modules of the compressed model must not be one in the fresh model."""
    if first == path:
        for other in kept:
            if before[other] is fresh:
                raise refused(f"{path} and {other} are one module in the model hook's model only")


def _check_forward(path: str, module: nn.Module, fresh: nn.Module) -> None:
    if "forward" in vars(module) and "forward" not in vars(fresh):
        raise refused(f"{path or 'the model'} has a forward function of its own")


def _check_order(after: Tree, before: Tree, modules: Mapping[str, Any]) -> None:
    """New modules can only be added behind those that were there: order matters in Sequential."""
    for path in modules:
        if path in before:
            continue
        parent = _parent(path)
        siblings = [each for each in after if each and _parent(each) == parent]
        if any(each in before for each in siblings[siblings.index(path) :]):
            raise refused(f"{path} was put between the modules of {parent or 'the model'}")


def refused(what: str, expected: str = "") -> RunError:
    """The error of a model that can't be stored in deploy format."""
    return RunError(
        Problem(
            "E-DEPLOY-REFUSED",
            f"this model can't be stored in deploy format: {what}",
            expected=expected,
        )
    )
