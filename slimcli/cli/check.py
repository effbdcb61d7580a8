"""``slim check``: everything that is wrong with a recipe, before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slimcli import console
from slimcli.cli.arguments import RecipeCommand, overrides_argument, recipe_argument

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
    """
    from slimcli.recipe import load
    from slimcli.recipe.find import shadowing

    loaded = load(recipe, overrides)
    rows = _hook_rows(loaded) if with_hooks else []
    if console.settings().json:
        console.document(_as_json(loaded, rows))
        return
    for warning in shadowing(dict.fromkeys((loaded.folder, *loaded.code))):
        console.warn(warning)
    if show:
        _print(loaded)
        return
    console.result(f"{recipe}  ok")
    if not console.settings().quiet:
        _tell(loaded, rows, with_hooks)


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
        console.say(f"{len(rows)} of {len(rows)} hooks ok. Next: slim plan {loaded.path}")
    else:
        console.say(f"Next: slim check {loaded.path} --hooks")


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
