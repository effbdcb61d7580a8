"""Puts an ONNX file in its place only when it is complete, weights above 2 GB beside it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from slimcli.artifacts import atomic

PROTOBUF_LIMIT_BYTES = 2_000_000_000


@dataclass(frozen=True)
class Staged:
    """A model file in a temporary folder beside its final place.

    Attributes:
        path: The staged file.
        final: Where it will be.
    """

    path: Path
    final: Path

    @property
    def file_bytes(self) -> int:
        """Bytes of the file and of its external data."""
        data = _external(self.path)
        return self.path.stat().st_size + (data.stat().st_size if data.exists() else 0)

    @property
    def sha256(self) -> str:
        """Hash of the file."""
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    def publish(self, content: dict[str, Any]) -> None:
        """Writes the sidecar and moves all to its final place; the ONNX file last.

        Raises:
            RunError: The disk is full or the folder cannot be written.
        """
        try:
            self._publish(content)
        except OSError as error:
            raise atomic.cannot_write(self.final, error) from error

    def _publish(self, content: dict[str, Any]) -> None:
        text = json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n"
        sidecar(self.path).write_text(text, encoding="utf-8")
        if not _external(self.path).exists():
            _external(self.final).unlink(missing_ok=True)
        for each in sorted(self.path.parent.iterdir(), key=lambda p: p == self.path):
            _flush(each)
            os.replace(each, self.final.parent / each.name)

    def keep_as_failed(self) -> Path:
        """Keeps the file under another name, so that no one takes it for the real one."""
        failed = self.final.with_name(self.final.name + ".failed")
        os.replace(self.path, failed)
        return failed


@contextlib.contextmanager
def staged(model: onnx.ModelProto, final: Path) -> Iterator[Staged]:
    """Writes the model beside its final place; what is not published is removed.

    Raises:
        RunError: The disk is full or the folder cannot be written.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".onnx-", dir=final.parent))
    except OSError as error:
        raise atomic.cannot_write(final, error) from error
    try:
        path = folder / final.name
        try:
            _save(model, path)
        except OSError as error:
            raise atomic.cannot_write(final, error) from error
        yield Staged(path, final)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _save(model: onnx.ModelProto, path: Path) -> None:
    is_large = sum(len(each.raw_data) for each in model.graph.initializer) > PROTOBUF_LIMIT_BYTES
    location = _external(path).name
    onnx.save_model(model, path, save_as_external_data=is_large, location=location)


def _external(path: Path) -> Path:
    return path.with_name(path.name + ".data")


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sidecar(path: Path) -> Path:
    """``model.onnx`` -> ``model.onnx.json``."""
    return path.with_name(path.name + ".json")
