"""Values against a pydantic schema: every complaint of pydantic at its place in the text.

The values pass as JSON in strict mode: nothing is coerced except an integer to a float.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from slimcli.errors import Problem
from slimcli.recipe.expected import (
    accepts_list,
    branches,
    choices,
    describe,
    expected,
    item_annotation,
)
from slimcli.recipe.nodes import Entry, Node, Place, plain, problem

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Section:
    """Entries of one mapping that a schema is to check.

    Attributes:
        name: What the keys are called in messages before their own name (``config``).
        entries: Key -> entry.
        place: Where to point when something is missing.
        defaults: Values for keys that are not given, where they differ from the schema's.
    """

    name: str
    entries: Mapping[str, Entry]
    place: Place
    defaults: Mapping[str, Any]


def suggest(word: str, known: Iterable[str]) -> str:
    """The nearest known word, or an empty string.

    >>> suggest("epocs", ["epoch", "lr"]), suggest("EPOCH", ["epoch"]), suggest("zzz", ["lr"])
    ('epoch', 'epoch', '')
    """
    by_shape = {each.lower().replace("-", "_"): each for each in known}
    shaped = word.lower().replace("-", "_")
    close = difflib.get_close_matches(shaped, list(by_shape), n=1, cutoff=0.6)
    return by_shape[close[0]] if close else ""


def received(value: object) -> str:
    """A value the way the reader of a message knows it.

    >>> [received(each) for each in (12.0, "abc", True, None, [], {})]
    ['the number 12.0', 'the text "abc"', 'true', 'null', 'a list', 'a mapping']
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f'the text "{value}"'
    if isinstance(value, dict | list):
        return "a list" if isinstance(value, list) else "a mapping"
    return f"an object of class {type(value).__name__}"


def validate(schema: type[Model], section: Section, problems: list[Problem]) -> Model | None:
    """The section as a model, or None; complaints are added to ``problems``."""
    is_broken = False
    values: dict[str, Any] = dict(section.defaults)
    for key, entry in section.entries.items():
        if _broken(entry.node):
            is_broken = True
        else:
            values[key] = _literal_text(schema, key, entry.node)
    try:
        model = schema.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        problems += _complaints(error, schema, section)
        return None
    return None if is_broken else model


def _broken(node: Node) -> bool:
    below = [*node.items, *(entry.node for entry in node.entries.values())]
    return node.broken or any(_broken(each) for each in below)


def _literal_text(schema: type[BaseModel], key: str, node: Node) -> Any:
    """The value; where the schema lists words and one was typed, the word (``precision: 32``)."""
    field = schema.model_fields.get(key)
    words = choices(field.annotation) if field else []
    return node.raw if node.raw in words else plain(node)


def _complaints(error: ValidationError, schema: type[BaseModel], section: Section) -> list[Problem]:
    """One problem a key: of the branches of a union, the one that went deepest speaks."""
    best: dict[str, tuple[int, ErrorDetails]] = {}
    whole: list[Problem] = []
    for detail in error.errors(include_url=False):
        if not detail["loc"]:
            whole.append(_whole(detail, section))
            continue
        key = str(detail["loc"][0])
        depth = len(_steps(section.entries[key].node, detail)) if key in section.entries else 0
        if key not in best or depth > best[key][0]:
            best[key] = (depth, detail)
    return [_one(key, detail, schema, section) for key, (_, detail) in best.items()] + whole


def _whole(detail: ErrorDetails, section: Section) -> Problem:
    """A complaint of the schema about keys that limit each other.

    A schema begins its message with the key it is about, and ends it with ``; fix: ...``.
    """
    said, _, fix = detail["msg"].removeprefix("Value error, ").partition("; fix: ")
    first = re.split(r"\W", said, maxsplit=1)[0]
    entry = section.entries.get(first)
    place = entry.node.place if entry else section.place
    what = f"{section.name}.{said}" if entry else f"{section.name}: {said}"
    return problem("E-RECIPE-VALUE", what, place, fix=fix)


def _steps(node: Node, detail: ErrorDetails) -> list[Node]:
    """The nodes below ``node`` that the location of a complaint leads through.

    Names of union branches occur in a location too; they lead nowhere and are skipped.
    """
    found: list[Node] = []
    for step in detail["loc"][1:]:
        if isinstance(step, int) and step < len(node.items):
            node = node.items[step]
            found.append(node)
        elif isinstance(step, str) and step in node.entries:
            node = node.entries[step].node
            found.append(node)
    return found


def _one(key: str, detail: ErrorDetails, schema: type[BaseModel], section: Section) -> Problem:
    """The problem of one key."""
    if detail["type"] == "missing":
        what = f"{section.name}.{key} is required"
        about = schema.model_fields[key]
        fix = f"add {key}: {about.description or expected(about)}"
        return problem("E-RECIPE-MISSING-KEY", what, section.place, fix=fix)
    entry = section.entries.get(key)
    if entry is None:
        what = f"{section.name}.{key}: {detail['msg'].removeprefix('Value error, ')}"
        return problem("E-RECIPE-VALUE", what, section.place)
    steps = _steps(entry.node, detail)
    node = steps[-1] if steps else entry.node
    name = (entry.spelled or f"{section.name}.{key}") + "".join(
        f"[{step}]"
        for step in detail["loc"][1:]
        if isinstance(step, int) or step in entry.node.entries
    )
    if detail["type"] in ("value_error", "assertion_error"):
        what = f"{name}: {detail['msg'].removeprefix('Value error, ')}"
        return problem("E-RECIPE-VALUE", what, node.place)
    field = schema.model_fields[key]
    annotation = field.annotation
    for _ in steps:
        annotation = item_annotation(annotation)
    wanted = describe(annotation) if steps else expected(field)
    code = "E-RECIPE-RANGE" if "than" in detail["type"] else "E-RECIPE-TYPE"
    if detail["type"] == "literal_error":
        code = "E-RECIPE-VALUE"
    return problem(
        code,
        name,
        node.place,
        expected=wanted,
        received=received(plain(node)),
        fix=_fix(plain(node), annotation, field) or _fix_of_list(entry.node, annotation, steps),
    )


_NUMBERS_IN_WORDS = {"yes": True, "on": True, "no": False, "off": False}


def _fix_of_list(node: Node, annotation: Any, steps: list[Node]) -> str:
    """Brackets that are missing around one value, or around a list of lists."""
    if isinstance(plain(node), dict) or not accepts_list(annotation):
        return ""
    if isinstance(plain(node), str) and str not in branches(item_annotation(annotation)):
        return ""
    return f"write [{json.dumps(plain(node)) if steps else node.raw}]"


def _fix(value: object, annotation: Any, field: FieldInfo) -> str:
    """What to type instead, where that can be said."""
    kinds = branches(annotation)
    if value is None:
        return "write a value, or leave the key out for the default"
    if bool in kinds and value in (0, 1):
        return f"write {str(bool(value)).lower()}"
    if isinstance(value, str):
        return _fix_of_text(value, kinds, annotation)
    if isinstance(value, float) and int in kinds and value.is_integer():
        return f"write {int(value)}"
    if isinstance(value, int | float) and not isinstance(value, bool) and str in kinds:
        return f"write '{value}' for the text"
    if isinstance(value, int | float) and "fraction" in (field.description or ""):
        # Nobody means 1.5 %; 2 and more may well be percent.
        return f"write {value / 100:g} for {value:g} %" if 2 <= value <= 100 else ""
    return ""


def _fix_of_text(value: str, kinds: tuple[Any, ...], annotation: Any) -> str:
    """What to type instead of a text."""
    word = value.strip().lower()
    if bool in kinds and word in (*_NUMBERS_IN_WORDS, "true", "false"):
        return f"write {str(_NUMBERS_IN_WORDS.get(word, word == 'true')).lower()}"
    number = word.replace("_", "")
    if int in kinds and number.isdigit():
        return f"write {int(number)}"
    if float in kinds and _is_number(number):
        return f"write {number}"
    close = suggest(value, choices(annotation))
    return f"did you mean {close}?" if close else ""


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
