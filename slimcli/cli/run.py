"""``slim run``: train, compress, verify, export."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slimcli import console
from slimcli.cli import stopping
from slimcli.cli.arguments import RecipeCommand, overrides_argument, recipe_argument
from slimcli.errors import AnotherFailed

if TYPE_CHECKING:
    from slimcli.recipe import Recipe


@click.command(name="run", cls=RecipeCommand)
@recipe_argument
@overrides_argument
@click.option(
    "--dry-run",
    is_flag=True,
    help="Build everything, try a few steps, deploy, export; writes nothing.",
)
@click.option(
    "--resume",
    type=click.Choice(["auto"]),
    help="auto: go on with the unfinished run of this recipe, or start one.",
)
@click.option("--max-steps", type=click.IntRange(min=1), help="Stop each epoch after N steps.")
@click.option("--name", default="", help="Name of the run folder; default: the time.")
@click.option("--require", multiple=True, metavar="COND", help="acc>=0.9: else exit 4.")
def command(
    recipe: Path,
    overrides: tuple[str, ...],
    dry_run: bool,
    resume: str | None,
    max_steps: int | None,
    name: str,
    require: tuple[str, ...],
) -> None:
    """Train and compress the model a recipe describes.

    \b
    Examples:
      slim run recipe.yaml                          all as written
      slim run recipe.yaml config.epoch=1 --dry-run try it, write nothing
      RUN=$(slim run recipe.yaml -q)                in a script
    """
    from slimcli.cli import jobs
    from slimcli.recipe import load

    loaded = load(recipe, overrides)
    conditions = jobs.requirements(require)
    _check_name(name)
    for change in loaded.changes:
        tell = console.say if change.origin.startswith("command line") else console.detail
        tell(f"{change.key} = {change.value} ({change.origin}; default {change.default})")
    if dry_run:
        from slimcli.cli.plan import show_plan

        show_plan(loaded, trial=True, max_steps=max_steps)
        return
    start(
        loaded,
        requirements=conditions,
        max_steps=max_steps,
        name=name,
        resume=jobs.unfinished_run(loaded) if resume else None,
    )


def _check_name(name: str) -> None:
    if name in (".", "..", "latest") or "/" in name or "\\" in name:
        raise click.BadParameter("a folder's name, without separators", param_hint="--name")


def start(recipe: Recipe, **changes: Any) -> None:
    """Run or resume, then print the result: the folder alone with -q, else the table."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read once, when torch is imported
    from slimcli.artifacts.run_folder import shown
    from slimcli.recipe.find import shadowing
    from slimcli.recipe.job import job_of
    from slimcli.solver.stages import run

    for warning in shadowing(dict.fromkeys((recipe.folder, *recipe.code))):
        console.warn(warning)
    display = console.RunDisplay()
    try:
        outcome = run(job_of(recipe, listeners=(display,), on_signal=_on_signal, **changes))
    except AnotherFailed:
        stopping.obey()  # a launcher's SIGTERM to the processes that are left is no news
        raise
    finally:
        display.close()
    stopping.go_on()
    # The user's code may have changed the current folder; the shell that reads this has not.
    folder = shown(outcome.folder, recipe.started_in)
    if recipe.export.trt and console.is_main_process():
        build_engine(outcome.folder)
    if console.settings().json or not console.is_main_process():
        return
    if console.settings().quiet:
        console.result(folder)
        return
    show_result(outcome.folder, outcome.summary, recipe.started_in)


def build_engine(folder: Path) -> None:
    """``export: {trt: true}`` is ``slim export RUN --trt`` after the run.

    Raises:
        SlimError: No engine could be made; the run keeps everything else, and its exit code.
    """
    from slimcli.artifacts import run_folder, summary
    from slimcli.cli.export import command as export
    from slimcli.errors import SlimError

    try:
        export.main([str(folder), "--trt"], standalone_mode=False)
    except SlimError as error:
        path = run_folder.open_run(folder).summary
        summary.write(path, {**summary.read(path), "exit_code": error.exit_code})
        raise


def _on_signal(name: str) -> None:
    stopping.obey()
    console.urgent(f"{name}: stopping after this step (again to stop now)")


def show_result(folder: Path, summary: dict[str, Any], started_in: Path) -> None:
    """Before and after, the files, and what to do next."""
    from slimcli.artifacts.event_lines import large, numbers
    from slimcli.artifacts.run_folder import shown

    named = Path(shown(folder, started_in))

    final, before = summary["final"], summary["baseline"]
    rows = [("before", before)] if before else []
    for label, each in (*rows, ("after", final)):
        console.result(
            f"{label:<7}{numbers(each['metrics'])} · {large(each['macs'], 'MACs')} "
            f"· {large(each['params'])} params"
        )
    for file, size in final["file_bytes"].items():
        console.result(f"       {named / 'artifacts' / file}  {large(size, 'B')}")
    if (folder / "report.html").is_file():
        console.result(f"report {named / 'report.html'}")
    console.result(f"run    {named}")
    console.say(f"Next: {console.command('eval', named)}")
