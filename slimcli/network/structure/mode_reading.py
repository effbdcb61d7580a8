"""Does code ask for the mode only to tell a dropout? Read from its source; no is the safe answer.

``F.dropout(x, self.rate, self.training)`` and ``dropout_p=self.rate if self.training else 0.0`` of
attention do. Where anything else is done with the mode, or the source can't be had, it does not.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from types import CodeType, FrameType, ModuleType
from typing import Any

import torch.nn.functional as F

MODE = "training"

_PLACES: dict[Any, dict[str, int]] = {
    **{each: {"p": 1, MODE: 2} for each in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)},
    F.scaled_dot_product_attention: {"dropout_p": 4},
}
"""Functions that drop -> the arguments that say whether and how much, and their places."""

_NUMBERS = (ast.Attribute, ast.Name, ast.Constant, ast.Load)


def only_drops(frame: FrameType) -> bool:
    """Does the function that runs here ask for the mode only in arguments of a dropout?

    Args:
        frame: Of the function; its globals tell what names in it stand for.
    """
    code = frame.f_code
    if MODE in _strings(code):
        return False  # ``getattr(self, "training")``
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError):
        return False
    if [getattr(each, "name", "") for each in tree.body] != [code.co_name]:
        return False  # a lambda, or a file that has changed
    harmless = {
        id(asked)
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        for asked in _told(call, _places(_meant(call.func, frame)))
    }
    asked = [each for each in ast.walk(tree) if getattr(each, "attr", "") == MODE]
    return bool(asked) and all(id(each) in harmless for each in asked)


def _strings(code: CodeType) -> Iterator[str]:
    """Texts in a function and in the functions inside it."""
    for each in code.co_consts:
        if isinstance(each, str):
            yield each
        elif isinstance(each, CodeType):
            yield from _strings(each)


def _meant(node: ast.expr, frame: FrameType) -> Any:
    """What ``F.dropout`` stands for here; None for all that is not in a module."""
    if isinstance(node, ast.Name):
        code = frame.f_code
        is_local = node.id in (*code.co_varnames, *code.co_cellvars, *code.co_freevars)
        return None if is_local else frame.f_globals.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _meant(node.value, frame)
        return vars(owner).get(node.attr) if isinstance(owner, ModuleType) else None
    return None


def _places(function: Any) -> dict[str, int]:
    return next((places for each, places in _PLACES.items() if each is function), {})


def _told(call: ast.Call, places: dict[str, int]) -> Iterator[ast.AST]:
    """Where a call asks for the mode in these arguments, as it is or to choose between numbers."""
    if any(isinstance(each, ast.Starred) for each in call.args):
        return
    given = [(each.arg, each.value) for each in call.keywords]
    given += [(name, call.args[place]) for name, place in places.items() if place < len(call.args)]
    for name, value in given:
        if name == MODE and name in places:
            yield value
        elif name in places and isinstance(value, ast.IfExp):
            numbers = [*ast.walk(value.body), *ast.walk(value.orelse)]
            if all(isinstance(each, _NUMBERS) for each in numbers):
                test = value.test
                yield test.operand if isinstance(test, ast.UnaryOp) else test
