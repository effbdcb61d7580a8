"""``slim check``: everything that is wrong with a recipe, before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slimcli import console
from slimcli.cli.arguments import RecipeCommand, overrides_argument, recipe_argument
from slimcli.errors import SlimError

if TYPE_CHECKING:
    from slimcli.recipe import Recipe


@click.command(name="check", cls=RecipeCommand)
@recipe_argument
@overrides_argument
@click.option("--hooks", "with_hooks", is_flag=True, help="Import your code, check signatures.")
@click.option("--print", "show", is_flag=True, help="The complete recipe, defaults marked.")
def command(recipe: Path, overrides: tuple[str, ...], with_hooks: bool, show: bool) -> None:
    """Find mistakes in a recipe, with line and column. Imports nothing of yours without --hooks.

    \b
    Examples:
      slim check recipe.yaml                    keys, values, files
      slim check recipe.yaml --hooks            your functions too
      slim check recipe.yaml epoch=3 --print    what would be run
      slim check recipes/*.yaml                 several
    """
    files = [recipe, *(Path(word) for word in overrides if _is_recipe(word))]
    words = [word for word in overrides if not _is_recipe(word)]
    failed: list[SlimError] = []
    documents = []
    for file in files:
        try:
            documents.append(_check(file, words, with_hooks, show))
        except SlimError as error:
            failed.append(error)
    if failed:
        problems = [problem for error in failed for problem in error.problems]
        frames = tuple(frame for error in failed for frame in error.user_frames)
        raise type(failed[0])(*problems, user_frames=frames) from failed[0]
    if console.settings().json:
        single = documents[0] if len(documents) == 1 else {"version": 1, "recipes": documents}
        console.document(single)


def _is_recipe(word: str) -> bool:
    """True for a further file: it ends like one and is no ``key=value``."""
    return "=" not in word and word.endswith((".yaml", ".yml"))


def _check(recipe: Path, words: list[str], with_hooks: bool, show: bool) -> dict[str, Any]:
    """Checks one recipe and says so; what it says as JSON."""
    from slimcli.recipe import load
    from slimcli.recipe.find import shadowing

    loaded = load(recipe, words)
    rows = _hook_rows(loaded) if with_hooks else []
    for warning in shadowing(dict.fromkeys((loaded.folder, *loaded.code))):
        console.warn(warning)
    if console.settings().json:
        return _as_json(loaded, rows)
    if show:
        _print(loaded)
        return {}
    console.result(f"{recipe}  ok")
    _tell(loaded, rows, with_hooks)
    return {}


def _tell(loaded: Recipe, rows: list[dict[str, str]], with_hooks: bool) -> None:
    """Stages, what differs from the defaults, hooks, and the next command."""
    for stage in loaded.stages:
        console.say(f"stage {stage.name}: {stage.algorithm_name}, {stage.training.epoch} epochs")
        if isinstance(stage.config, dict) and not with_hooks:
            keys = ", ".join(stage.config) or "none"
            console.say(f"  keys of your own class are checked only with --hooks: {keys}")
    for change in loaded.changes:
        console.say(f"  {change.key} {change.default} -> {change.value}  ({change.origin})")
    for row in rows:
        console.say(f"  {row['name']:<24} {row['where']:<24} {row['call']}")
    if with_hooks:
        console.say(f"{len(rows)} of {len(rows)} hooks ok")
    after = ("plan", loaded.path) if with_hooks else ("check", loaded.path, "--hooks")
    console.say(f"Next: {console.command(*after)}")


def _hook_rows(loaded: Recipe) -> list[dict[str, str]]:
    """Imports the user's code; one row a hook."""
    from slimcli.recipe.compressors import load_compressor
    from slimcli.recipe.hooks import resolve

    hooks = resolve(loaded)
    for stage in loaded.stages:
        if isinstance(stage.algorithm, str):
            load_compressor(loaded, stage)
    rows = []
    for name, where in hooks.locations.items():
        bound = getattr(hooks, "build_model" if name == "model" else name)
        call = getattr(bound, "call", "() -> nn.Module" if name in ("model", "teacher") else "")
        rows.append({"name": name, "where": where, "call": call})
    return rows


def _print(loaded: Recipe) -> None:
    from slimcli.recipe.dump import mark_defaults

    changed = {change.key for change in loaded.changes}
    console.result(mark_defaults(loaded.resolved(), changed).rstrip("\n"))


def _as_json(loaded: Recipe, rows: list[dict[str, str]]) -> dict[str, Any]:
    return {
        "version": 1,
        "recipe": str(loaded.path),
        "ok": True,
        "changes": [change._asdict() for change in loaded.changes],
        "hooks": rows,
        "resolved": loaded.resolved(),
    }
