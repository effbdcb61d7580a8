"""The deploy format: ``deploy.safetensors`` and ``deploy.json``, applied to a fresh user model.

Loading constructs no class of the user and unpickles nothing: the user's own ``model`` hook makes
the model, and the file says which of its layers get other shapes or give way to plain ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimcli import __version__
from slimcli.artifacts import atomic
from slimcli.artifacts.difference import describe
from slimcli.artifacts.rebuild import apply, check_version, unreadable
from slimcli.errors import Problem, RunError

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
        raise unreadable(place, f"its tensors, {file.name}, are missing")
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != description.get("sha256"):
        raise unreadable(file, "its content is not what was written (sha256 differs)")
    try:
        return description, from_bytes(data)
    except SafetensorError as error:
        raise unreadable(file, str(error)) from error


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
            fix="slim export RUN makes it again from checkpoints/best.pt; runs that end with qat "
            "have model.onnx only; those with save_deploy_format: false have none: "
            "slim eval RUN --compare trained",
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


def _read_description(place: Path) -> dict[str, Any]:
    try:
        description = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise unreadable(place, str(error)) from error
    if not isinstance(description, dict):
        raise unreadable(place, "it is not a description of a model")
    check_version(description)
    return description
