"""Arguments that several commands share, with their completion. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from slimcli.errors import Problem, RecipeError, SlimError
from slimcli.recipe.validate import suggest

Function = TypeVar("Function", bound=Callable[..., Any])


class RecipeCommand(click.Command):
    """A command with ``KEY=VALUE`` words: ``--config.epoch=1`` gets the error that helps."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does, but an unknown option that is a key is told as one.

        Raises:
            RecipeError: An option such as ``--config.epoch=1`` was meant as an override.
        """
        words = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            key = error.option_name.lstrip("-")
            if not _is_key(key):
                raise
            word = next(each for each in words if each.startswith(error.option_name))
            value = word.partition("=")[2] or _following(words, word)
            fix = f"write {key}={value}"
            raise RecipeError(
                Problem("E-OVERRIDE-SYNTAX", f"{word} is not key=value", "command line", fix=fix)
            ) from None


def _following(words: list[str], word: str) -> str:
    rest = words[words.index(word) + 1 :]
    return rest[0] if rest and "=" not in rest[0] else "value"


def _is_key(key: str) -> bool:
    from slimcli.recipe import keys

    first = key.split(".")[0]
    known = (*keys.TOP_KEYS, *keys.HOOKS, *keys.TRAINING_KEYS)
    return "." in key or first in known or bool(keys.owners(first))


def existing(expected: str) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """A check for a path on the command line; click's own says only that it is not there.

    Args:
        expected: What the command wants to be given.
    """

    def check(_context: click.Context, parameter: click.Parameter, path: Path | None) -> Any:
        if path is None or path.exists():
            return path
        there = {each.name for each in path.parent.glob("*")} if path.parent.is_dir() else set()
        close = suggest(path.name, there)
        fix = f"did you mean {path.parent / close}?" if close else "slim list runs"
        what = f"there is no {path}"
        where = f"{parameter.make_metavar(_context)} on the command line"
        raise RecipeError(Problem("E-FILE-MISSING", what, where, expected, "nothing", fix))

    return check


def recipe_argument(function: Function) -> Function:
    """``RECIPE``: a YAML file."""
    return click.argument(
        "recipe", type=click.Path(path_type=Path), shell_complete=complete_recipes
    )(function)


def overrides_argument(function: Function) -> Function:
    """``[KEY=VALUE]...``."""
    return click.argument(
        "overrides", nargs=-1, metavar="[KEY=VALUE]...", shell_complete=complete_overrides
    )(function)


def complete_recipes(
    _context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """YAML files and folders that begin with what was typed."""
    folder = Path(incomplete).parent if not incomplete.endswith("/") else Path(incomplete)
    found = []
    for path in sorted(folder.glob("*")) if folder.is_dir() else []:
        if not str(path).startswith(incomplete):
            continue
        if path.is_dir() and not path.name.startswith("."):
            found.append(CompletionItem(f"{path}/"))
        elif path.suffix in (".yaml", ".yml"):
            found.append(CompletionItem(str(path)))
    return found


def complete_overrides(
    context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Dotted keys of the recipe on the line, and the words a key accepts behind its ``=``."""
    fields = _fields(context.params.get("recipe"))
    key, sign, value = incomplete.partition("=")
    if sign:
        words = _words(fields.get(key))
        return [CompletionItem(f"{key}={word}") for word in words if word.startswith(value)]
    return [
        CompletionItem(f"{name}=", help=field.description or "")
        for name, field in fields.items()
        if name.startswith(key) or name.rpartition(".")[2].startswith(key)
    ]


def _fields(recipe: Path | None) -> dict[str, Any]:
    """Full key -> pydantic field; of the recipe's algorithms if it can be read, else of all."""
    from slimcli.recipe import ExportConfig, keys, load
    from slimcli.solver.config import TrainingConfig

    fields: dict[str, Any] = {f"config.{k}": v for k, v in TrainingConfig.model_fields.items()}
    fields |= {f"export.{k}": v for k, v in ExportConfig.model_fields.items()}
    try:
        stages = load(Path(recipe), find_hooks=False).stages if recipe else ()
    except SlimError:
        stages = ()
    named = [each.algorithm for each in stages if not isinstance(each.algorithm, str)]
    for info in named or keys.algorithms().values():
        fields |= {f"config.{k}": v for k, v in info.config.model_fields.items()}
    if len(stages) > 1:
        own = [k for k in fields if k.startswith("config.")]
        fields |= {f"stages.{each.name}.{k}": fields[k] for each in stages for k in own}
    return fields


def _words(field: Any) -> list[str]:
    """What a field accepts in words."""
    from slimcli.recipe.expected import branches, choices

    if field is None:
        return []
    kinds = branches(field.annotation)
    words = choices(field.annotation)
    words += ["true", "false"] if bool in kinds else []
    return words + (["null"] if type(None) in kinds else [])
