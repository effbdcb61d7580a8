"""``key=value`` words of the command line, as nodes that know their place.

A value is YAML. Where a key points to is decided in :mod:`slimcli.recipe.draft`, which knows the
recipe; nothing here does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from slimcli.errors import Problem
from slimcli.recipe.nodes import Entry, Node, Place, Source, parse, problem

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Override:
    """One ``key=value``.

    Attributes:
        key: The key as it was written.
        steps: The key, split at its dots.
        place: Where the key stands in the word.
        node: The value.
    """

    key: str
    steps: tuple[str, ...]
    place: Place
    node: Node

    def entry(self, spelled: str) -> Entry:
        """The override as an entry of a mapping, called ``spelled`` in messages."""
        return Entry(self.place, self.node, spelled)


def parse_overrides(words: Sequence[str], problems: list[Problem]) -> list[Override]:
    """The words as overrides; those that are none are reported."""
    found: dict[str, Override] = {}
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        key, sign, value = word.partition("=")
        if not sign or not key or key.startswith("-"):
            waiting = _not_an_override(word, waiting, problems)
            continue
        place = Place(Source(COMMAND_LINE, word), 0, 1, len(key))
        if key in found:
            first = found[key].place.source.text
            what = f"{key} is given twice: {first} and {word}"
            problems.append(problem("E-OVERRIDE-DUPLICATE", what, place, fix="keep one of them"))
            continue
        node = _value(word, value, problems)
        if node is not None:
            found[key] = Override(key, tuple(key.split(".")), place, node)
    return list(found.values())


def _not_an_override(word: str, rest: list[str], problems: list[Problem]) -> list[str]:
    """Reports a word without a proper ``key=value``; returns the words that are left."""
    place = Place(Source(COMMAND_LINE, word), 0, 1, len(word))
    key, sign, value = word.lstrip("-").partition("=")
    if not sign and rest and rest[0] == "=":
        rest = rest[1:]
    if not sign and rest and "=" not in rest[0]:
        value, rest = rest[0], rest[1:]
    fix = f"write {key or 'key'}={value or 'value'}"
    what = f"{word} is not key=value"
    problems.append(problem("E-OVERRIDE-SYNTAX", what, place, fix=fix))
    return rest


def _value(word: str, text: str, problems: list[Problem]) -> Node | None:
    """The text behind the first ``=`` as a node; None if it was reported."""
    begin = len(word) - len(text)
    place = Place(Source(COMMAND_LINE, word), 0, begin + 1, max(1, len(text)))
    if not text.strip():
        what = f"{word} has no value"
        fix = f"write {word.strip()}null where null is meant"
        problems.append(problem("E-OVERRIDE-EMPTY", what, place, fix=fix))
        return None
    own: list[Problem] = []
    node = parse(Source(COMMAND_LINE, text), own)
    problems += [replace(each, where=str(place), excerpt=place.excerpt()) for each in own]
    if node is None:
        if not own:
            what = f"{word} has no value: everything behind # is a comment"
            problems.append(problem("E-OVERRIDE-EMPTY", what, place, fix="put it in quotes"))
        return None
    return _moved(node, place)


def _moved(node: Node, place: Place) -> Node:
    """The node and all below it, at one place."""
    if isinstance(node.value, dict):
        entries = {
            key: Entry(place, _moved(entry.node, place)) for key, entry in node.value.items()
        }
        return replace(node, place=place, value=entries)
    if isinstance(node.value, list):
        return replace(node, place=place, value=[_moved(item, place) for item in node.value])
    return replace(node, place=place)


def as_list(node: Node) -> Node:
    """``1,2`` as the list it stands for where a list is wanted; anything else as it is."""
    if not isinstance(node.value, str) or node.place.line or "," not in node.raw:
        return node
    ignored: list[Problem] = []
    listed = parse(Source(COMMAND_LINE, f"[{node.raw}]"), ignored)
    return node if listed is None or ignored else _moved(listed, node.place)
