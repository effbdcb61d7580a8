"""The line of the user's code that is being executed, or that an exception came through."""

from __future__ import annotations

import linecache
import os
import sys
from types import FrameType, TracebackType

import torch

import slimcli

_SLIM = slimcli.__path__[0] + os.sep
_OURS = (torch.__path__[0] + os.sep, _SLIM, "<")
_EINOPS = f"-packages{os.sep}einops{os.sep}"


def _is_ours(filename: str) -> bool:
    return filename.startswith(_OURS) or _EINOPS in filename


def is_of_slim(frame: FrameType) -> bool:
    """Is this code of this package?"""
    return frame.f_code.co_filename.startswith(_SLIM)


def is_of_torch(frame: FrameType) -> bool:
    """Is this code of torch?"""
    return frame.f_code.co_filename.startswith(_OURS[0])


def is_of_check() -> bool:
    """Does torch ask for a value only to raise (``torch._check_tensor_all``)?"""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _is_ours(frame.f_code.co_filename):
        if is_of_torch(frame) and frame.f_code.co_name.startswith("_check"):
            return True
        frame = frame.f_back
    return False


def is_of_einops() -> bool:
    """Does einops ask? It compares sizes with what it was told, only to raise."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and is_of_slim(frame):
        frame = frame.f_back
    return frame is not None and _EINOPS in frame.f_code.co_filename


def describe(filename: str, line: int) -> str:
    """``blocks.py:12: x = x.view(-1, 9216)``."""
    text = linecache.getline(filename, line).strip()
    short = "/".join(filename.replace("\\", "/").split("/")[-2:])
    return f"{short}:{line}: {text}" if text else f"{short}:{line}"


def current() -> str:
    """The innermost frame outside torch, einops and slimcli."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if not _is_ours(frame.f_code.co_filename):
            return describe(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return ""


def of_error(error: BaseException) -> str:
    """The innermost such frame of a traceback; empty if there is none."""
    found = ""
    step: TracebackType | None = error.__traceback__
    while step is not None:
        filename = step.tb_frame.f_code.co_filename
        if not _is_ours(filename):
            found = describe(filename, step.tb_lineno)
        step = step.tb_next
    return found
