"""``slim explain``: an algorithm, a key, a hook, an error code, a topic. Offline."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from functools import cache
from typing import Any

import click
from click.shell_completion import CompletionItem
from pydantic.fields import FieldInfo

from slimcli import console
from slimcli.cli import resources
from slimcli.compressor import AlgorithmInfo
from slimcli.errors import Problem, RecipeError


def complete_names(
    _context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Everything that can be explained and begins with what was typed."""
    return [CompletionItem(each) for each in names() if each.startswith(incomplete)]


@click.command(name="explain")
@click.argument("name", shell_complete=complete_names)
def command(name: str) -> None:
    """An algorithm, a key, a hook, an error code, or a topic.

    \b
    Examples:
      slim explain finetune             an algorithm and its keys
      slim explain prune_rate           a key
      slim explain E-HOOK-SIGNATURE     an error
      slim explain recipe               all keys of a recipe; --json: its JSON schema

    \b
    Topics: recipe, stages, hooks, overrides, frozen, exit-codes, events, completion
    """
    if name == "recipe" and console.settings().json:
        from slimcli.recipe.json_schema import json_schema

        console.document(json_schema())
        return
    text = explain(name)
    if console.settings().json:
        console.document({"version": 1, "name": name, "text": text})
    else:
        console.result(text)


def explain(name: str) -> str:
    """The text about a name.

    Raises:
        RecipeError: Nothing has that name.
    """
    from slimcli.recipe import keys

    info = keys.find_algorithm(name)
    if info:
        return algorithm_text(info)
    if name in _TOPICS:
        return _TOPICS[name]()
    page = resources.PAGES / f"{name}.txt"
    if page.is_file() and page.parent == resources.PAGES:
        return page.read_text(encoding="utf-8").rstrip("\n")
    code = name.upper()
    if code in error_pages():
        return error_text(code)
    text = key_text(name)
    if text:
        return text
    raise _unknown(name)


def names() -> list[str]:
    """Everything that has a text."""
    from slimcli.recipe import keys

    topics = sorted(page.stem for page in resources.PAGES.glob("*.txt"))
    config = dict.fromkeys(
        (*keys.TRAINING_KEYS, *(k for each in keys.algorithms().values() for k in _own(each)))
    )
    return [
        *keys.algorithms(),
        *_TOPICS,
        *topics,
        *keys.TOP_KEYS,
        *keys.HOOKS,
        *config,
        *error_pages(),
    ]


def _own(info: AlgorithmInfo) -> tuple[str, ...]:
    return tuple(info.config.model_fields)


def _unknown(name: str) -> RecipeError:
    from slimcli.recipe.validate import suggest

    close = suggest(name, names())
    fix = f"did you mean {close}?" if close else "slim explain recipe, or slim list algorithms"
    return RecipeError(Problem("E-EXPLAIN", f"nothing is called {name}", fix=fix))


@cache
def error_pages() -> dict[str, dict[str, str]]:
    """Code -> cause, example, fix."""
    import yaml

    pages: dict[str, dict[str, str]] = yaml.safe_load(
        (resources.PAGES / "errors.yaml").read_text(encoding="utf-8")
    )
    return pages


def error_text(code: str) -> str:
    """The page of an error code."""
    page = error_pages()[code]
    example = "\n".join(f"    {line}" for line in page["example"].rstrip("\n").split("\n"))
    parts = (code, page["cause"].strip(), f"Example\n{example}", f"Fix\n    {page['fix'].strip()}")
    return "\n\n".join(parts)


def algorithm_text(info: AlgorithmInfo) -> str:
    """What an algorithm does, its paper and its keys."""
    lines = [f"{info.name}: {info.summary}", f"Paper: {info.paper}"]
    if info.aliases:
        lines.append(f"Also called: {', '.join(info.aliases)}")
    if info.config.model_fields:
        lines += ["", "Its own keys"]
        lines += [_line(name, field) for name, field in info.config.model_fields.items()]
    if info.key_aliases:
        also = ", ".join(f"{alias} = {name}" for alias, name in info.key_aliases.items())
        lines += ["", f"Other spellings: {also}"]
    if info.training_defaults:
        changed = ", ".join(f"{key}: {value}" for key, value in info.training_defaults.items())
        lines += ["", f"Defaults of the loop that differ: {changed}"]
    if info.example:
        shown = ", ".join(f"{key}: {value}" for key, value in info.example.items())
        lines += ["", f"Example: config: {{{shown}}}"]
    lines += ["", "Keys of the training loop: slim explain recipe"]
    return "\n".join(lines)


def _line(name: str, field: FieldInfo) -> str:
    """Name, default and meaning of a key, in as many lines as that takes."""
    indent = " " * 42
    lines = textwrap.wrap(field.description or "", 58, break_on_hyphens=False)
    head = f"  {name:<26} {_default(field):<12} "
    return (head + f"\n{indent}".join(lines)).rstrip()


def _default(field: FieldInfo) -> str:
    from slimcli.recipe.dump import dump

    if field.is_required():
        return "required"
    value = field.get_default()
    listed = list(value) if isinstance(value, tuple) else value
    return dump({"": listed}).partition(":")[2].strip()


def recipe_text() -> str:
    """Every key of a recipe that does not depend on the algorithm, and where the others are."""
    from slimcli.recipe import ExportConfig, keys
    from slimcli.solver.config import TrainingConfig

    lines = ["Recipe: keys of the top level"]
    lines += [f"  {name:<14} {text}" for name, text in keys.TOP_KEYS.items()]
    lines += ["", "hooks: (slim explain hooks)"]
    lines += [f"  {name:<26} {text}" for name, text in keys.HOOKS.items()]
    lines += ["", "config: keys of the training loop, with their defaults"]
    lines += [_line(name, field) for name, field in TrainingConfig.model_fields.items()]
    lines += ["", "config: keys of one algorithm"]
    lines += [f"  slim explain {name}" for name in keys.algorithms()]
    lines += ["", "export:"]
    lines += [_line(name, field) for name, field in ExportConfig.model_fields.items()]
    return "\n".join(lines)


def events_text() -> str:
    """Every event of a run, from the table the code writes them by."""
    from slimcli.artifacts.events import EVENTS

    lines = [
        "Events: the lines of events.jsonl, and of `slim run RECIPE --json`",
        "  One JSON object a line, always with v (version), t (time, UTC) and event.",
        "",
    ]
    return "\n".join([*lines, *(f"  {name:<12} {fields}" for name, fields in EVENTS.items())])


def key_text(name: str) -> str:
    """What is known of a key; empty if nothing has that name."""
    from slimcli.recipe import ExportConfig, keys
    from slimcli.solver.config import TrainingConfig

    short = name.rpartition(".")[2]
    parts = []
    if short in TrainingConfig.model_fields:
        special = {
            info.name: info.training_defaults[short]
            for info in keys.algorithms().values()
            if short in info.training_defaults
        }
        parts.append(_field_text(f"config.{short}", TrainingConfig.model_fields[short], special))
    for info in keys.owners(short):
        key = info.key_aliases.get(short, short)
        field = info.config.model_fields[key]
        parts.append(_field_text(f"config.{key} ({info.name})", field, {}))
    if short in ExportConfig.model_fields:
        parts.append(_field_text(f"export.{short}", ExportConfig.model_fields[short], {}))
    hook = keys.HOOK_TABLE.canonical(short)
    if hook:
        parts.append(f"hooks.{hook}: {keys.HOOKS[hook]}\n  more: slim explain hooks")
    if short in keys.TOP_KEYS:
        parts.append(f"{short}: {keys.TOP_KEYS[short]}")
    return "\n\n".join(parts)


def _field_text(title: str, field: FieldInfo, special: dict[str, Any]) -> str:
    from slimcli.recipe.expected import expected

    lines = [
        f"{title}: {field.description}",
        f"  accepts  {expected(field)}",
        f"  default  {_default(field)}",
    ]
    lines += [f"  default  {value} under {name}" for name, value in special.items()]
    return "\n".join(lines)


_TOPICS: dict[str, Callable[[], str]] = {"recipe": recipe_text, "events": events_text}
