"""Calls the user's functions by the names of their parameters, and tells whose error it was.

Two orders are in circulation (``(config, params)`` and ``(params, config)``); with names both
work. With names nobody knows, the documented order counts. No torch here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from slimcli.errors import HookError, Problem, RunError
from slimcli.recipe.find import shown
from slimcli.recipe.frames import describe, frame_lines, is_ours, is_users, place_of, user_frames
from slimcli.recipe.validate import received, suggest

ROLES: dict[str, tuple[str, ...]] = {
    "model": (),
    "teacher": (),
    "dataset_generator": (),
    "predict_function": ("model", "data"),
    "calculate_loss_function": ("prediction", "data"),
    "evaluate_function": ("prediction", "data"),
    "optimizer_generator": ("config", "params"),
    "scheduler_generator": ("config", "optimizer"),
    "collate_fn": ("samples",),
}
"""What each hook is called with, in the documented order."""

CONSTRUCTED = ("predict_function", "calculate_loss_function", "evaluate_function", "collate_fn")
"""Hooks that may be a class: one object of it is made, and that is called."""

_NAMES: dict[str, tuple[str, ...]] = {
    "model": ("model", "net", "network", "module"),
    "data": ("data", "batch", "sample", "samples", "inputs"),
    "prediction": ("prediction", "predictions", "pred", "preds", "predict", "output", "outputs"),
    "config": ("config", "cfg", "conf", "configuration"),
    "params": ("params", "parameters", "param_groups", "groups"),
    "optimizer": ("optimizer", "optim", "opt", "optmizer", "optimzer"),
    "samples": ("samples", "batch", "data"),
}
RAISED = (Exception, SystemExit)
"""What the user's code may raise; ``exit()`` in it must not end the command with its own code."""

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class Order:
    """How our arguments become the function's.

    Attributes:
        positional: Numbers of our arguments, in the order of the function's positional ones.
        named: Parameter name -> number of our argument.
        how: ``by name`` or ``in order``.
    """

    positional: tuple[int, ...]
    named: Mapping[str, int] = field(default_factory=dict)
    how: str = "in order"


class BoundHook:
    """A hook that takes our arguments in the documented order.

    Args:
        name: Name of the hook.
        function: The user's callable.
        order: How to call it.
        keywords: Further arguments from the recipe.
    """

    def __init__(
        self, name: str, function: Callable[..., Any], order: Order, keywords: Mapping[str, Any]
    ) -> None:
        self.name = name
        self.order = order
        self.keywords = dict(keywords)
        self.where = location(function)
        self.__wrapped__ = function
        self.__name__ = getattr(function, "__name__", name)

    def __call__(self, *arguments: Any) -> Any:
        """Calls the user's function.

        Raises:
            RunError: It raised; only the user's frames are told.
        """
        order = self.order
        positional = [arguments[number] for number in order.positional]
        named = {name: arguments[number] for name, number in order.named.items()}
        try:
            return self.__wrapped__(*positional, **named, **self.keywords)
        except RAISED as error:
            if is_ours(error):
                raise
            raise hook_failed(self.name, error) from error

    @property
    def call(self) -> str:
        """``(config, params) by name``, for ``slim check --hooks``."""
        roles = ROLES[self.name]
        return f"({', '.join(roles)})" + (f" {self.order.how}" if len(roles) > 1 else "")


def hook_failed(name: str, error: BaseException, where: str = "") -> RunError:
    """The error of a hook as ours, with the user's frames only.

    Args:
        name: Name of the hook.
        error: What it raised.
        where: The place to tell where no line of the user's is on the way to the error.
    """
    failed = code_failed(f"hook `{name}`", error)
    if where and not any(is_users(each.filename) for each in user_frames(error)):
        return RunError(replace(failed.problems[0], where=where))
    return failed


def code_failed(whose: str, error: BaseException) -> RunError:
    """The error of the user's code as ours, with the user's frames only.

    Args:
        whose: What failed, in words.
        error: What it raised.
    """
    frames = user_frames(error)
    what, fix = f"{whose} failed: {describe(error)}", "full trace: --traceback"
    if isinstance(error, SystemExit):
        fix = "raise an error in place of exit(): a command ends with a code of its own"
    problem = Problem("E-HOOK-FAILED", what, where=place_of(frames), fix=fix)
    return RunError(problem, user_frames=frame_lines(frames))


def location(function: object) -> str:
    """``file:line`` of a function or class; empty where there is no source."""
    while isinstance(function, functools.partial):
        function = function.func
    is_plain = inspect.isroutine(function) or inspect.isclass(function)
    subject = inspect.unwrap(function) if callable(function) and is_plain else type(function)
    code = getattr(subject, "__code__", None)
    if code is not None:
        return f"{shown(Path(code.co_filename))}:{code.co_firstlineno}"
    try:
        file = inspect.getsourcefile(subject)
        _, line = inspect.getsourcelines(subject)
    except (OSError, TypeError):
        return ""
    return f"{shown(Path(file))}:{line}" if file else ""


def bind(name: str, function: Any, keywords: Mapping[str, Any] | None = None) -> Any:
    """The user's callable as one that takes our arguments in the documented order.

    A class for a hook that is called on batches is constructed. An object with ``update`` and
    ``compute`` is handed back as it is for ``evaluate_function``, and so is ``collate_fn``, which
    worker processes call.

    Args:
        name: Name of the hook; a key of :data:`ROLES`.
        function: The callable.
        keywords: Further arguments, from the recipe.

    Raises:
        HookError: It can't be called, or not with these arguments.
    """
    keywords = dict(keywords or {})
    if inspect.isclass(function) and name in CONSTRUCTED:
        function, keywords = _construct(name, function, keywords), {}
    if name == "evaluate_function" and is_accumulating(function):
        return function
    if not callable(function):
        raise _wrong(name, function, f"is {received(function)}, which cannot be called")
    if inspect.iscoroutinefunction(function):
        raise _wrong(name, function, "is async, and nothing awaits it")
    order = call_order(name, function, keywords)
    if name == "collate_fn":
        return functools.partial(function, **keywords) if keywords else function
    return BoundHook(name, function, order, keywords)


def is_accumulating(value: object) -> bool:
    """True for an object with ``update`` and ``compute``."""
    return all(callable(getattr(value, each, None)) for each in ("update", "compute"))


def _construct(name: str, cls: type, keywords: Mapping[str, Any]) -> Any:
    try:
        return cls(**keywords)
    except RAISED as error:
        raise HookError(*hook_failed(name, error).problems) from error


def call_order(name: str, function: Callable[..., Any], keywords: Mapping[str, Any]) -> Order:
    """How to call a function with the arguments of a hook.

    >>> call_order("optimizer_generator", lambda params, config: None, {}).positional
    (1, 0)

    Raises:
        HookError: Its parameters do not fit.
    """
    roles = ROLES[name]
    forward = getattr(function, "forward", None)  # a torch module's own __call__ takes anything
    try:
        signature = inspect.signature(forward if inspect.ismethod(forward) else function)
    except (TypeError, ValueError):
        return Order(tuple(range(len(roles))))
    parameters = _free(name, function, signature, keywords)
    is_variadic = any(each.kind is inspect.Parameter.VAR_POSITIONAL for each in parameters)
    parameters = [
        each
        for each in parameters
        if each.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    ]
    taken, all_by_name = _assign(roles, parameters)
    required = [each.name for each in parameters if each.default is each.empty]
    if is_variadic and len(taken) < len(roles) and not set(required) - set(taken):
        return Order(tuple(range(len(roles))))
    if set(required) - set(taken) or len(taken) < len(roles):
        raise _wrong(name, function, f"takes {_count(parameters)}; it is called with", signature)
    return _order(parameters, taken, "by name" if all_by_name else "in order")


def _free(
    name: str,
    function: Callable[..., Any],
    signature: inspect.Signature,
    keywords: Mapping[str, Any],
) -> list[inspect.Parameter]:
    """The parameters that the recipe's keywords leave; an unknown keyword is an error."""
    parameters = list(signature.parameters.values())
    takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)
    names = [each.name for each in parameters]
    for keyword in keywords:
        if keyword not in names and not takes_any:
            close = suggest(keyword, names)
            fix = f"did you mean {close}?" if close else f"it has {', '.join(names) or 'none'}"
            what = f"hook `{name}` has no parameter {keyword}"
            raise HookError(Problem("E-HOOK-KEYWORD", what, location(function), fix=fix))
    return [each for each in parameters if each.name not in keywords]


def _assign(
    roles: tuple[str, ...], parameters: list[inspect.Parameter]
) -> tuple[dict[str, int], bool]:
    """Parameter name -> number of our argument; first by name, the rest in order."""
    taken: dict[str, int] = {}
    for parameter in parameters:
        for number, role in enumerate(roles):
            if parameter.name in _NAMES[role] and number not in taken.values():
                taken[parameter.name] = number
                break
    all_by_name = len(taken) == len(roles)
    left = iter([number for number in range(len(roles)) if number not in taken.values()])
    for parameter in parameters:
        is_needed = parameter.default is parameter.empty and parameter.kind in _POSITIONAL
        if is_needed and parameter.name not in taken:
            number = next(left, -1)
            if number >= 0:
                taken[parameter.name] = number
    return taken, all_by_name


def _order(parameters: list[inspect.Parameter], taken: Mapping[str, int], how: str) -> Order:
    """By position as far as that goes, the rest by keyword."""
    positional: list[int] = []
    named: dict[str, int] = {}
    for parameter in parameters:
        if parameter.name not in taken:
            continue
        index = parameters.index(parameter)
        if parameter.kind in _POSITIONAL and index == len(positional):
            positional.append(taken[parameter.name])
        else:
            named[parameter.name] = taken[parameter.name]
    return Order(tuple(positional), named, how)


def _count(parameters: list[inspect.Parameter]) -> str:
    needed = [each for each in parameters if each.default is each.empty]
    names = ", ".join(each.name for each in parameters)
    number = len(needed)
    return f"{number} argument{'' if number == 1 else 's'}" + (f" ({names})" if names else "")


def _wrong(name: str, function: Any, what: str, signature: inspect.Signature | None = None) -> Any:
    """The error of a hook that has the wrong form."""
    call = f"({', '.join(ROLES[name])})"
    text = f"hook `{name}` {what}" + (f" {call}" if signature is not None else "")
    fix = f"def {getattr(function, '__name__', name)}{call}: ..."
    return HookError(Problem("E-HOOK-SIGNATURE", text, location(function), fix=fix))
