"""What a key accepts, in words, read from its pydantic field.

Used by error messages and by ``slim explain``, so that both say the same.
"""

from __future__ import annotations

import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

_SINGULAR = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
_PLURAL = {int: "integers", float: "numbers", bool: "booleans", str: "texts", Any: "values"}
_BOUNDS = (
    (annotated_types.Gt, "gt", ">"),
    (annotated_types.Ge, "ge", ">="),
    (annotated_types.Lt, "lt", "<"),
    (annotated_types.Le, "le", "<="),
)


def expected(field: FieldInfo) -> str:
    """What the field accepts.

    >>> from slimcli.solver.config import TrainingConfig
    >>> expected(TrainingConfig.model_fields["momentum"])
    'a number >= 0 and < 1'
    >>> expected(TrainingConfig.model_fields["devices"])
    'a list of integers >= 0, or cpu'
    """
    return describe(field.annotation, field.metadata)


def describe(annotation: Any, metadata: list[Any] | None = None) -> str:
    """What an annotation with its constraints accepts."""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return describe(inner, [*(metadata or []), *more])
    if get_origin(annotation) in (Union, types.UnionType):
        branches = [describe(each, metadata) for each in get_args(annotation)]
        return ", or ".join(dict.fromkeys(branches))
    if get_origin(annotation) is Literal:
        words = [_yaml(each) for each in get_args(annotation)]
        return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))
    if annotation is None or annotation is type(None):
        return "null"
    if is_list(annotation):
        return f"a list of {_plural(item_annotation(annotation))}"
    if annotation in (int, float):
        return _SINGULAR[annotation] + _bounds(metadata or [])
    return _SINGULAR.get(annotation, "a mapping" if _is_mapping(annotation) else "a value")


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _bounds(metadata: list[Any]) -> str:
    """`` >= 0 and < 1`` for the numeric constraints among the metadata."""
    parts = [
        f"{sign} {_number(getattr(each, name))}"
        for kind, name, sign in _BOUNDS
        for each in _flat(metadata)
        if isinstance(each, kind)
    ]
    return f" {' and '.join(parts)}" if parts else ""


def _number(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def _flat(metadata: list[Any]) -> list[Any]:
    """The metadata with nested pydantic fields (``Annotated[int, Field(ge=0)]``) opened."""
    return [
        inner
        for each in metadata
        for inner in (each.metadata if isinstance(each, FieldInfo) else [each])
    ]


def _plural(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        return _plural(inner) + _bounds(metadata)
    if is_list(annotation):
        return f"lists of {_plural(item_annotation(annotation))}"
    if get_origin(annotation) is Literal:
        return describe(annotation)
    return _PLURAL.get(annotation, "values")


def is_list(annotation: Any) -> bool:
    """True for tuples, lists and sets."""
    return get_origin(annotation) in (tuple, list, set, frozenset) or annotation in (tuple, list)


def _is_mapping(annotation: Any) -> bool:
    return get_origin(annotation) is dict or annotation is dict


def branches(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation itself."""
    if get_origin(annotation) is Annotated:
        return branches(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(inner for each in get_args(annotation) for inner in branches(each))
    return (annotation,)


def item_annotation(annotation: Any) -> Any:
    """What the items of a list or the values of a mapping are; Any if it does not say."""
    for each in branches(annotation):
        if is_list(each):
            return next(iter(get_args(each)), Any)
        if _is_mapping(each):
            return next(iter(get_args(each)[1:]), Any)
    return Any


def choices(annotation: Any) -> list[str]:
    """The words among the literals of an annotation."""
    return [
        word
        for each in branches(annotation)
        if get_origin(each) is Literal
        for word in get_args(each)
        if isinstance(word, str)
    ]


def accepts_list(annotation: Any) -> bool:
    """True if one of the branches is a list."""
    return any(is_list(each) for each in branches(annotation))
