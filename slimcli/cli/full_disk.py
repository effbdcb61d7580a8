"""What helps on a full disk, where a run is over and nothing can be resumed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from slimcli.artifacts import atomic
from slimcli.errors import RunError


@contextlib.contextmanager
def repeat(command: str) -> Iterator[None]:
    """Errors of a full disk say that this command is to be given once more."""
    try:
        yield
    except RunError as error:
        if not any(each.code == atomic.FULL for each in error.problems):
            raise
        fix = f"free some space, then {command} again"
        raise RunError(*(replace(each, fix=fix) for each in error.problems)) from error
