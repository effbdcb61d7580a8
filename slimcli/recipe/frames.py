"""Tracebacks reduced to the user's own lines. No torch here."""

from __future__ import annotations

import itertools
import os
import re
import sysconfig
import traceback
from pathlib import Path

from slimcli.recipe.find import shown

_OURS = str(Path(__file__).resolve().parents[1])
_INSTALLED = tuple(
    {sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)


_OF_WORKER = "Original Traceback (most recent call last):\n"
_FRAME = re.compile(r'  File "(.+)", line (\d+), in (.+)\n(?:    (.*)\n)?')
"""A data loader's worker hands over its error as text: the message has the frames in it."""


def _told_by_worker(text: str) -> tuple[str, str]:
    """The frames of the error itself, not of its causes, and its type and message; or nothing.

    >>> _told_by_worker("no worker's")
    ('', '')
    """
    last = text.partition(_OF_WORKER)[2].rpartition(_OF_WORKER.removeprefix("Original "))[2]
    lines = last.splitlines(keepends=True)
    frames = list(itertools.takewhile(lambda line: line.startswith("  "), lines))
    return "".join(frames), "".join(lines[len(frames) :]).strip()


def is_users(file: str) -> bool:
    """True for a file that belongs neither to slim nor to Python nor to an installed package."""
    return not file.startswith((_OURS, *_INSTALLED, "<frozen"))


def user_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """The frames in the user's files, outermost first.

    If there are none (a hook of an installed package), those below slim's last frame.
    """
    frames = [
        traceback.FrameSummary(file, int(number), name, lookup_line=False, line=line)
        for file, number, name, line in _FRAME.findall(_told_by_worker(str(error))[0])
    ]
    frames = frames or list(traceback.extract_tb(error.__traceback__))
    users = [each for each in frames if is_users(each.filename)]
    if users:
        return users
    last = max((i for i, each in enumerate(frames) if each.filename.startswith(_OURS)), default=-1)
    return [each for each in frames[last + 1 :] if not each.filename.startswith("<frozen")]


def is_ours(error: BaseException) -> bool:
    """True for an error raised inside slim, whoever called it: no fault of a hook.

    A single frame is slim's call of the hook itself, which did not take the arguments.
    """
    frames = traceback.extract_tb(error.__traceback__)
    own_class = type(error).__module__.startswith("slimcli.")
    return own_class or (len(frames) > 1 and frames[-1].filename.startswith(_OURS + os.sep))


def frame_lines(frames: list[traceback.FrameSummary]) -> tuple[str, ...]:
    """One line a frame: ``hooks.py:33 in predict   return model(x)``."""
    return tuple(
        f"{shown(Path(each.filename))}:{each.lineno} in {each.name}   {each.line or ''}".rstrip()
        for each in frames
    )


def place_of(frames: list[traceback.FrameSummary]) -> str:
    """``file:line`` of the innermost frame, or an empty string."""
    return f"{shown(Path(frames[-1].filename))}:{frames[-1].lineno}" if frames else ""


def describe(error: BaseException) -> str:
    """Type and message: ``RuntimeError: expected 3 channels, got 1``.

    >>> describe(SystemExit(0)), describe(SystemExit())
    ('SystemExit: 0', 'SystemExit')
    """
    is_bare = isinstance(error, SystemExit) and error.code is None  # its text would be "None"
    text = "" if is_bare else str(error).strip()
    if told := _told_by_worker(text)[1]:
        return told
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
