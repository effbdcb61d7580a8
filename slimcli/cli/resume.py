"""``slim resume``: go on with a stopped run, from its last checkpoint."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from slimcli import console
from slimcli.cli import stopping
from slimcli.cli.arguments import RecipeCommand, overrides_argument
from slimcli.errors import Problem, RecipeError

if TYPE_CHECKING:
    from slimcli.artifacts.run_folder import RunFolder
    from slimcli.recipe import Recipe

FREE_KEYS = (
    "num_workers",
    "devices",
    "num_processes",
    "log_interval",
    "save_every_minutes",
    "train_metrics",
    "test_batch_size",
)
"""Keys whose change alters nothing of what is learnt; others need --allow-recipe-change."""

FIXED_KEYS = ("seed", "save_dir")


@click.command(name="resume", cls=RecipeCommand)
@click.argument("run", type=click.Path(path_type=Path))
@overrides_argument
@click.option("--allow-code-change", is_flag=True, help="Go on although hook files changed.")
@click.option(
    "--allow-recipe-change", is_flag=True, help="Go on with settings that change the training."
)
@click.option("--max-steps", type=click.IntRange(min=1), help="As in slim run.")
def command(
    run: Path,
    overrides: tuple[str, ...],
    allow_code_change: bool,
    allow_recipe_change: bool,
    max_steps: int | None,
) -> None:
    """Go on with a stopped run, bit for bit where nothing was changed.

    \b
    Examples:
      slim resume checkpoints/digits/latest
      slim resume checkpoints/digits/latest num_workers=4
      slim resume checkpoints/digits/latest epoch=40 --allow-recipe-change
    """
    from slimcli.artifacts import process, run_folder
    from slimcli.recipe import load

    folder = run_folder.open_run(run)
    is_main = console.is_main_process()
    with process.claimed(folder.path) if is_main else nullcontext():  # before it is read
        before = load(folder.recipe)
        after = load(folder.recipe, overrides)
        _check_recipe(before, after, allow_recipe_change)
        _check_code(folder, after, allow_code_change)
        _go_on(run, folder, (before, after), max_steps)


def _go_on(
    run: Path, folder: RunFolder, recipes: tuple[Recipe, Recipe], max_steps: int | None
) -> None:
    """From the recipe as it was to the one that it is now."""
    from slimcli.artifacts import run_folder, summary
    from slimcli.cli.run import show_result, start

    before, after = recipes
    if _is_finished(folder) and not after_changes(before, after) and not _was_launched():
        console.say(f"{folder.path} is finished: nothing to resume")
        longer = console.command("resume", run, "epoch=N", "--allow-recipe-change")
        console.say(f"to train longer: {longer}")
        if console.settings().quiet:
            console.result(str(folder.path))
        elif console.settings().json:
            console.json_line(_ending(folder))
        else:
            show_result(folder.path, summary.read(folder.summary), before.started_in)
        return
    if after_changes(before, after):
        path = run_folder.write_changed_recipe(folder, after.to_yaml(folder.path))
        console.say(f"the changed recipe is {path}")
    start(after, resume=folder.path, max_steps=max_steps)


def _was_launched() -> bool:
    """Started by the first process, which wrote the changed recipe that this one reads."""
    return not console.is_main_process() and not stopping.has_launcher()


def _ending(folder: RunFolder) -> dict[str, object]:
    """The event with which the run ended, once more."""
    from slimcli.artifacts import events

    log = folder.path / "events.jsonl"
    ends = [each for each in events.read(log) if each["event"] == "run_end"] if log.exists() else []
    done = {"status": "finished", "exit_code": 0, "folder": str(folder.path)}
    return ends[-1] if ends else {"v": 1, "event": "run_end", **done}


def after_changes(before: Recipe, after: Recipe) -> list[tuple[str, object, object]]:
    """Every key that differs: (dotted name, old, new)."""
    old, new = _flat(before), _flat(after)
    return [
        (name, old.get(name), new.get(name))
        for name in dict.fromkeys((*old, *new))
        if old.get(name) != new.get(name)
    ]


def _flat(recipe: Recipe) -> dict[str, object]:
    flat: dict[str, object] = {
        "task_name": recipe.task_name,
        "model": str(recipe.model),
        "hooks": str(recipe.hooks),
        "export.onnx": recipe.export.onnx,
        "export.trt": recipe.export.trt,
    }
    for stage in recipe.stages:
        flat[f"{stage.name}.algorithm"] = stage.algorithm_name
        for key, value in stage.keys().items():
            flat[f"{stage.name}.{key}"] = value
    return flat


def _check_recipe(before: Recipe, after: Recipe, is_allowed: bool) -> None:
    """Free keys pass; others are shown and need a flag; some can't change.

    Raises:
        RecipeError: With the difference.
    """
    old_names, new_names = ([each.algorithm_name for each in r.stages] for r in (before, after))
    if old_names != new_names:
        raise RecipeError(
            Problem(
                "E-RESUME-RECIPE",
                f"the run trains {', '.join(old_names)}, now it is {', '.join(new_names)}",
                fix="start a new run",
            )
        )
    changes = after_changes(before, after)
    for name, old, new in changes:
        console.say(f"- {name}: {old}\n+ {name}: {new}")
    fixed: list[Problem] = []
    unsure: list[Problem] = []
    for name, old, new in changes:
        key = name.rpartition(".")[2]
        if key in FREE_KEYS or name.startswith("export."):
            continue
        in_stage = any(name.startswith(f"{stage.name}.") for stage in before.stages)
        is_fixed = not in_stage or key in FIXED_KEYS
        (fixed if is_fixed else unsure).append(
            Problem(
                "E-RESUME-RECIPE",
                f"{name} was {old} when the run started, now {new}",
                fix="start a new run" if is_fixed else "--allow-recipe-change, if you mean it",
            )
        )
    if fixed or (unsure and not is_allowed):
        raise RecipeError(*fixed, *([] if is_allowed else unsure))


def _check_code(folder: RunFolder, recipe: Recipe, is_allowed: bool) -> None:
    """The hook files must be those the run started with.

    Raises:
        RecipeError: One changed, and that was not allowed.
    """
    from slimcli.artifacts import run_folder
    from slimcli.recipe.hooks import resolve

    changed = run_folder.changed_code(folder, resolve(recipe).files)
    for each in changed:
        console.warn(f"hook file {each}")
    if changed and not is_allowed:
        raise RecipeError(
            Problem(
                "E-RESUME-CODE",
                f"hook files are not what they were when the run started: {', '.join(changed)}",
                fix=f"undo the change (a copy is in {folder.path / 'code'}), "
                "or --allow-code-change",
            )
        )


def _is_finished(folder: RunFolder) -> bool:
    from slimcli.artifacts import summary

    return summary.status(folder.summary) == "finished"
