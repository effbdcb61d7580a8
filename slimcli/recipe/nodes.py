"""YAML text to nodes that know their line and column.

Only the part of YAML that means the same to everyone is read: ``1e-4`` is a float, only true and
false are booleans, nothing is octal or sexagesimal, a key occurs once, tags and merge keys are
refused. Nothing here knows what a recipe is.
"""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass
from typing import Any, TypeAlias

import yaml

from slimcli.errors import Problem

MAX_NODES = 20_000
"""A recipe has some dozens of values; aliases that multiply to more than this are an attack."""

EXCERPT_WIDTH = 96


@dataclass(frozen=True)
class Source:
    """A text and what it is called in messages."""

    name: str
    text: str


@dataclass(frozen=True)
class Place:
    """A stretch of one line of a source.

    Attributes:
        source: The text it lies in.
        line: Line number from 1; 0 for a word of the command line.
        column: Column from 1.
        length: Characters to underline.
    """

    source: Source
    line: int
    column: int
    length: int = 1

    def __str__(self) -> str:
        """``recipe.yaml:3:5``, or ``command line``."""
        return f"{self.source.name}:{self.line}:{self.column}" if self.line else self.source.name

    @property
    def origin(self) -> str:
        """Where a value came from: ``recipe.yaml:3`` or ``command line``."""
        return f"{self.source.name}:{self.line}" if self.line else self.source.name

    def excerpt(self) -> str:
        """The line with carets below the place.

        >>> print(Place(Source("r.yaml", "epocs: 3"), 1, 1, 5).excerpt())
        1 | epocs: 3
            ^^^^^
        """
        lines = self.source.text.splitlines()
        line = lines[max(0, min(self.line, len(lines)) - 1)] if lines else ""
        start = max(0, self.column - 1 - EXCERPT_WIDTH // 2) if len(line) > EXCERPT_WIDTH else 0
        shown = line[start : start + EXCERPT_WIDTH]
        shown = "".join(each if each.isprintable() else " " for each in shown)
        gutter = f"{self.line} | " if self.line else ""
        before = shown[: self.column - 1 - start]
        under = shown[len(before) : len(before) + self.length] or " "
        return f"{gutter}{shown}\n{' ' * (len(gutter) + _width(before))}{'^' * _width(under)}"


def _width(text: str) -> int:
    """Terminal columns of a text: East Asian characters take two."""
    return sum(2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in text)


@dataclass
class Entry:
    """One ``key: value`` of a mapping.

    Attributes:
        place: Where the key stands.
        node: The value.
        spelled: The full key as the user wrote it (``config.group_size``).
    """

    place: Place
    node: Node
    spelled: str = ""


Scalar: TypeAlias = bool | int | float | str | None


@dataclass
class Node:
    """A value and its place.

    Attributes:
        place: Where it stands.
        value: A scalar, items or entries.
        raw: The text of a scalar as it was typed.
        broken: The value was refused and reported; nothing more is to be said about it.
    """

    place: Place
    value: Scalar | list[Node] | dict[str, Entry]
    raw: str = ""
    broken: bool = False

    @property
    def entries(self) -> dict[str, Entry]:
        """The entries of a mapping; none for anything else."""
        return self.value if isinstance(self.value, dict) else {}

    @property
    def items(self) -> list[Node]:
        """The items of a list; none for anything else."""
        return self.value if isinstance(self.value, list) else []


def plain(node: Node) -> Any:
    """The node as plain Python values."""
    if isinstance(node.value, dict):
        return {key: plain(entry.node) for key, entry in node.value.items()}
    if isinstance(node.value, list):
        return [plain(item) for item in node.value]
    return node.value


class _Loader(yaml.SafeLoader):
    """Composes only; its resolvers are those of YAML 1.2's core schema, without octal and hex."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


_PLAIN_TAGS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
        r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    ("leading-zero", r"[-+]?0[0-9]+", list("-+0")),
)
_PREFIX = "tag:yaml.org,2002:"
PLAIN_RESOLVERS = tuple(
    (_PREFIX + name, re.compile(f"(?:{pattern})$"), first) for name, pattern, first in _PLAIN_TAGS
)
"""Tag, pattern and first characters of what a plain text is read as, if not as text."""

for _tag, _pattern, _first in PLAIN_RESOLVERS:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)


def problem(code: str, what: str, place: Place, **parts: str) -> Problem:
    """A problem at a place, with its excerpt."""
    return Problem(code, what, where=str(place), excerpt=place.excerpt(), **parts)


def parse(source: Source, problems: list[Problem]) -> Node | None:
    """The tree of a text, or None; everything wrong with the text is added to ``problems``."""
    try:
        root = yaml.compose(source.text, Loader=_Loader)
    except RecursionError:
        place = Place(source, 1, 1)
        problems.append(problem("E-RECIPE-ALIASES", "nested deeper than can be read", place))
        return None
    except yaml.YAMLError as error:
        problems.append(_syntax_problem(error, source))
        return None
    if root is None:
        return None
    converter = _Converter(source, problems)
    try:
        return converter.convert(root, ())
    except _AliasError as error:
        fix = "write the values out; a recipe needs no nested aliases"
        problems.append(problem("E-RECIPE-ALIASES", error.what, error.place, fix=fix))
        return None


class _AliasError(Exception):
    """An alias bomb, or an alias inside its own anchor."""

    def __init__(self, what: str, place: Place) -> None:
        super().__init__(what)
        self.what = what
        self.place = place


class _Converter:
    """Turns PyYAML's nodes into ours and reports what is not allowed."""

    def __init__(self, source: Source, problems: list[Problem]) -> None:
        self.source = source
        self.problems = problems
        self.count = 0

    def place(self, node: yaml.Node) -> Place:
        """Where a node begins, and how much of its first line it takes."""
        start, end = node.start_mark, node.end_mark
        length = end.column - start.column if end.line == start.line else 1
        return Place(self.source, start.line + 1, start.column + 1, max(1, length))

    def convert(self, node: yaml.Node, above: tuple[int, ...]) -> Node:
        """One node and all below it; ``above`` holds the ids of those it lies in."""
        self.count += 1
        if self.count > MAX_NODES:
            what = f"the aliases of this file multiply to more than {MAX_NODES} values"
            raise _AliasError(what, self.place(node))
        if id(node) in above:
            raise _AliasError("an alias stands inside its own anchor", self.place(node))
        place = self.place(node)
        if isinstance(node, yaml.MappingNode) and node.tag == _PREFIX + "map":
            return Node(place, self._mapping(node, (*above, id(node))))
        if isinstance(node, yaml.SequenceNode) and node.tag == _PREFIX + "seq":
            return Node(place, [self.convert(item, (*above, id(node))) for item in node.value])
        if isinstance(node, yaml.ScalarNode):
            known = len(self.problems)
            value = self._scalar(node, place)
            return Node(place, value, node.value, broken=len(self.problems) > known)
        self._refuse_tag(node.tag, place)
        return Node(place, None, broken=True)

    def _mapping(self, node: yaml.MappingNode, above: tuple[int, ...]) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        for key_node, value_node in node.value:
            place = self.place(key_node)
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _PREFIX + "str":
                what = "a key must be text"
                self.problems.append(problem("E-RECIPE-KEY", what, place, fix="put it in quotes"))
            elif key_node.value == "<<" and key_node.style is None:
                what = "merge keys (<<) are not part of a recipe"
                fix = "write the keys out, or share them through the top-level config of stages"
                self.problems.append(problem("E-RECIPE-MERGE-KEY", what, place, fix=fix))
            elif key_node.value in entries:
                first = entries[key_node.value].place
                what = f"{key_node.value} is given twice: lines {first.line} and {place.line}"
                fix = "keep one of them"
                self.problems.append(problem("E-RECIPE-DUPLICATE-KEY", what, place, fix=fix))
            else:
                entries[key_node.value] = Entry(place, self.convert(value_node, above))
        return entries

    def _scalar(self, node: yaml.ScalarNode, place: Place) -> Scalar:
        kind, text = node.tag.removeprefix(_PREFIX), node.value
        if kind == "str":
            return str(text)
        if kind == "leading-zero":
            number = text.lstrip("+-").lstrip("0") or "0"
            what = f"{text} has a leading zero, which other YAML readers take for octal"
            fix = f"write {number} for the number, '{text}' for the text"
            self.problems.append(problem("E-RECIPE-LEADING-ZERO", what, place, fix=fix))
            return None
        if kind not in ("null", "bool", "int", "float"):
            self._refuse_tag(node.tag, place)
            return None
        try:
            return self._number(kind, text, place)
        except ValueError:
            self._refuse_tag(node.tag, place)
            return None

    def _number(self, kind: str, text: str, place: Place) -> Scalar:
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "int":
            return int(text)
        value = float(re.sub(r"\.(inf|nan)$", r"\1", text.lower()))
        if not math.isfinite(value):
            what = f"{text} is not a finite number"
            self.problems.append(problem("E-RECIPE-NOT-FINITE", what, place))
        return value

    def _refuse_tag(self, tag: str, place: Place) -> None:
        shown = tag.replace(_PREFIX, "!!")
        what = f"the YAML tag {shown} is not part of a recipe"
        self.problems.append(problem("E-RECIPE-TAG", what, place, fix="leave the tag out"))


_HINTS = (
    ("'\\t'", "indent with spaces: YAML does not allow tabs"),
    (
        "mapping values are not allowed",
        "quote a text with a colon in it, and check the indentation",
    ),
    ("could not find expected ':'", "every line of a mapping is `key: value`"),
    ("cannot start any token", "put the text in quotes"),
    ("expected a single document", "a recipe is one document: remove the line ---"),
    ("expected <block end>", "check the indentation, and that brackets and quotes are closed"),
    ("expected ',' or", "check that brackets and braces are closed"),
    ("unexpected end of stream", "check that quotes are closed"),
    ("undefined alias", "define the anchor (&name) before its alias (*name)"),
)


def _syntax_problem(error: yaml.YAMLError, source: Source) -> Problem:
    """PyYAML's complaint at its place, with what usually causes it."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        if mark and mark.line >= len(source.text.splitlines()) and error.context_mark:
            mark = error.context_mark  # The end of the file shows nothing; where it began does.
        said = f"{error.context}, {error.problem}" if error.context else str(error.problem)
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    else:
        before = source.text[: getattr(error, "position", 0)]
        said = f"{getattr(error, 'reason', error)}"
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
    fix = next((hint for pattern, hint in _HINTS if pattern in said), "")
    place = Place(source, line, column)
    return problem("E-RECIPE-SYNTAX", f"not valid YAML: {said}", place, fix=fix)
