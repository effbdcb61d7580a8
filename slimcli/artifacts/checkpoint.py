"""Checkpoints: tensors and plain values only, written atomically, loaded with ``weights_only``.

Knows the file, not what is in it: the solver decides what a checkpoint holds.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import Counter
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

from slimcli.artifacts import atomic
from slimcli.errors import Problem, RunError

VERSION = 1
START_AGAIN = "a run that can't go on is started again: slim run RUN/recipe.yaml"
CHUNK_BYTES = 1 << 20
STATE_DICT = "weights are stored with torch.save(model.state_dict(), path)"


def normalise(value: Any, path: str = "checkpoint") -> Any:
    """The same content as tensors (detached, on the CPU) and plain values.

    Args:
        value: Nested dictionaries, lists and tuples of tensors, arrays, numbers, strings.
        path: Where in the checkpoint this is, for the message.

    Raises:
        RunError: Something in it can't be stored without pickling code.

    >>> normalise({"a": (numpy.float64(0.5), [True])})
    {'a': (0.5, [True])}
    """
    if isinstance(value, Counter):
        return Counter(value)
    if isinstance(value, Mapping):
        return {
            normalise(key, path): normalise(each, f"{path}.{key}") for key, each in value.items()
        }
    if isinstance(value, list | tuple):
        items = [normalise(each, f"{path}[{index}]") for index, each in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, set | frozenset):
        return {normalise(each, path) for each in value}
    return _leaf(value, path)


def _leaf(value: Any, path: str) -> Any:
    """One tensor or plain value."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    if isinstance(value, numpy.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, numpy.generic | Enum):
        return _leaf(value.item() if isinstance(value, numpy.generic) else value.value, path)
    if isinstance(value, Path):
        return str(value)
    if value is None:
        return None
    for base in (bool, int, float, str):
        if isinstance(value, base):
            return base(value)
    raise RunError(
        Problem(
            "E-CHECKPOINT-STATE",
            f"{path} can't be stored in a checkpoint",
            expected="tensors, numbers, strings, lists, dictionaries",
            received=f"{type(value).__module__}.{type(value).__qualname__}",
            fix="return plain values from state_dict()",
        )
    )


def save(path: Path, content: Mapping[str, Any], *, read_back: bool = False) -> None:
    """Write a checkpoint under a temporary name and rename it.

    Args:
        path: Where it goes; the file that is there stays whole until the new one is.
        content: What :func:`normalise` accepts.
        read_back: Load the bytes again before they replace anything.

    Raises:
        RunError: It can't be stored, or the disk is full.
    """
    stream = io.BytesIO()
    torch.save({"version": VERSION, **normalise(content)}, stream)
    if read_back:
        stream.seek(0)
        try:
            torch.load(stream, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise RunError(
                Problem("E-CHECKPOINT-STATE", f"the checkpoint does not load again: {error}")
            ) from error
    atomic.write_bytes(path, stream.getvalue())


def stored_weights(path: Path) -> dict[str, Any]:
    """The weights in a run folder (its best checkpoint) or in a file.

    A file is safetensors, or what torch saves: a state dict, alone or under ``model`` or
    ``state_dict``. No code in it is run.

    Raises:
        RunError: There is nothing of the kind.
    """
    if path.is_dir():
        weights: dict[str, Any] = load(path / "checkpoints" / "best.pt")["model"]
        return weights
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    content = _read(path)
    for name in ("model", "state_dict"):
        if isinstance(content.get(name), dict):
            content = content[name]
    return content


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint; no code in it is run.

    Raises:
        RunError: There is none, it is damaged (its checksums tell), or a newer slim wrote it.
    """
    content = _read(path)
    if content.get("version") != VERSION:
        raise RunError(
            Problem(
                "E-CHECKPOINT-VERSION",
                "the checkpoint has another format",
                str(path),
                expected=f"version {VERSION}",
                received=str(content.get("version")),
                fix=START_AGAIN,
            )
        )
    return content


def _read(path: Path) -> dict[str, Any]:
    if damaged := _damaged_entry(path):
        reason = f"the content of {damaged} is not what was written (its CRC-32 differs)"
        raise _unreadable(path, reason, f"copy it again from where it is whole; {START_AGAIN}")
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise _missing(path) from error
    except pickle.UnpicklingError as error:
        # torch's text tells how to run the code in the file; that is not what we want to advise.
        raise _unreadable(path, _what_is_pickled(path), STATE_DICT) from error
    except Exception as error:  # torn bytes make the unpickler raise whatever they spell
        raise _unreadable(path, "the file is not whole", START_AGAIN) from error
    if not isinstance(content, dict):
        raise _unreadable(path, f"it holds a {type(content).__name__}", STATE_DICT)
    return content


def _damaged_entry(path: Path) -> str:
    """The first entry of torch's zip file whose checksum is wrong; empty where none is.

    torch writes the checksums and does not look at them: weights with flipped bits load like any
    others. A file that is no zip is left to ``torch.load``; so is an entry with checksum 0, as
    torch writes it after ``torch.serialization.set_crc32_options(False)``.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.CRC and not _is_whole(archive, entry):
                    return entry.filename
    except (OSError, zipfile.BadZipFile):
        return ""
    return ""


def _is_whole(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bool:
    try:
        with archive.open(entry) as stream:
            while stream.read(CHUNK_BYTES):
                pass
    except zipfile.BadZipFile:
        return False
    return True


def _what_is_pickled(path: Path) -> str:
    """What a file holds that can't be read without running code of it; nothing of it is run."""
    try:
        names = get_unsafe_globals_in_checkpoint(path)
    except Exception:  # a file of another format, or torn bytes
        names = []
    if any(name.startswith("torch.nn.modules.") for name in names):
        # The class of the model is in it, too, and is the one that is not torch's.
        whole = next((name for name in names if not name.startswith("torch.")), names[0])
        return f"it is a whole pickled model ({whole}), not its weights"
    if names:
        return f"it holds more than tensors and plain values: {', '.join(sorted(names)[:3])}"
    return "it holds more than tensors and plain values, or is no file of torch"


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        loaded: dict[str, Any] = load_file(path)
    except FileNotFoundError as error:
        raise _missing(path) from error
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, f"no safetensors file: {error}", "write it again") from error
    return loaded


def _missing(path: Path) -> RunError:
    what = "there is no checkpoint"
    return RunError(Problem("E-CHECKPOINT-MISSING", what, str(path), fix=START_AGAIN))


def _unreadable(path: Path, reason: str, fix: str) -> RunError:
    what = f"the checkpoint can't be read: {reason}"
    return RunError(Problem("E-CHECKPOINT-DAMAGED", what, str(path), fix=fix))
