"""Files appear whole or not at all: written beside their place, flushed to disk, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from slimcli.errors import Problem, RunError

FULL = "E-DISK-FULL"
"""The code of the error of a full disk."""


def write_bytes(path: Path, data: bytes) -> None:
    """Writes ``data`` so that ``path`` holds either all of it or what it held before.

    Raises:
        RunError: The disk is full or the folder can't be written; no stray file stays.
    """
    with replacing(path) as temporary, open(temporary, "wb") as stream:
        stream.write(data)


def write_text(path: Path, data: str) -> None:
    """Writes UTF-8 text with ``\\n`` line ends, as :func:`write_bytes` does."""
    write_bytes(path, data.encode("utf-8"))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path in the folder of ``path``; what is written there replaces it at the end.

    For writers that want a file name. If the block raises, ``path`` stays as it was and the
    temporary file goes.

    Raises:
        RunError: The disk is full or the folder can't be written.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        temporary = Path(name)
        os.close(handle)
        yield temporary
        _take_usual_permissions(temporary)
        _flush(temporary)
        os.replace(temporary, path)
        temporary = None
        _flush_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()


def _take_usual_permissions(path: Path) -> None:
    """Temporary files are private; the result should be as any file the user creates."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _flush(path: Path) -> None:
    with open(path, "rb+") as stream:
        os.fsync(stream.fileno())


def _flush_folder(folder: Path) -> None:
    """Makes the rename itself durable, where the system can flush folders."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def cannot_write(path: Path, error: OSError) -> RunError:
    """What to tell of a file that the system did not let be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    reason = "no space left on the disk" if full else (error.strerror or str(error))
    fix = "may the folder be written?"
    if error.errno == errno.EFBIG:
        fix = "allow larger files (ulimit -f)"
    if full:
        fix = "free some space, then slim resume RUN (slim run RECIPE where nothing was saved)"
    return RunError(Problem(FULL if full else "E-WRITE", f"can't write {path}: {reason}", fix=fix))
