"""``slim list``: what there is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from slimcli import console
from slimcli.cli import resources

WHAT = ("algorithms", "recipes", "hooks", "runs")
Row = dict[str, Any]


@click.command(name="list")
@click.argument("what", type=click.Choice(WHAT), default="algorithms")
@click.option(
    "--in",
    "save_dir",
    type=click.Path(path_type=Path),
    default=Path("checkpoints"),
    show_default=True,
    help="Where run folders lie.",
)
def command(what: str, save_dir: Path) -> None:
    """What there is: algorithms, recipes, hooks or runs.

    \b
    Examples:
      slim list                 the algorithms
      slim list recipes         recipes that come with slim
      slim list runs --json     run folders and how they ended
    """
    rows = runs(save_dir) if what == "runs" else _TABLES[what]()
    if console.settings().json:
        console.document({"version": 1, what: rows})
    elif console.settings().quiet:
        for row in rows:
            console.result(str(next(iter(row.values()))))
    elif rows:
        console.table(list(rows[0]), [list(row.values()) for row in rows])
    else:
        console.say(f"no {what} here")


def algorithms() -> list[Row]:
    """Every algorithm of the registry."""
    from slimcli.recipe import keys

    return [{"name": info.name, "summary": info.summary} for info in keys.algorithms().values()]


def recipes() -> list[Row]:
    """The recipes that come with slim, with the first line of their comment."""
    return [
        {"path": str(path), "about": about(path)}
        for path in sorted(resources.folder("recipes").glob("*.yaml"))
    ]


def about(path: Path) -> str:
    """The first comment of a file."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""


def hooks() -> list[Row]:
    """The hooks a recipe can name."""
    from slimcli.recipe import keys

    rows = [("model", "() -> nn.Module", "yes")]
    rows += [(name, text, "yes") for name, text in keys.REQUIRED_HOOKS.items()]
    rows += [(name, text, "no") for name, text in keys.OPTIONAL_HOOKS.items()]
    return [{"name": name, "call": call, "required": need} for name, call, need in rows]


def runs(save_dir: Path) -> list[Row]:
    """Run folders below ``save_dir``, newest first."""
    found = [
        path.parent
        for pattern in ("*/*/recipe.yaml", "*/*/events.jsonl")
        for path in save_dir.glob(pattern)
        if not path.parent.is_symlink()
    ]
    return [_run(folder) for folder in sorted(set(found), key=lambda each: each.name, reverse=True)]


def _run(folder: Path) -> Row:
    from slimcli.artifacts import process

    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        summary = {}
    state = process.state(folder, summary.get("status", "unfinished"))
    return {
        "run": str(folder),
        "state": state,
        "exit": "" if summary.get("exit_code") is None else summary["exit_code"],
        "algorithm": summary.get("algorithm", ""),
        "process": _process(folder) if state in ("running", "died") else "",
    }


def _process(folder: Path) -> str:
    """Whose run it is, and for how long nothing was heard of it."""
    from slimcli.artifacts import process
    from slimcli.artifacts.event_lines import seconds

    quiet = process.quiet_seconds(folder)
    heard = "" if quiet is None else f"last heard of {seconds(quiet)} ago"
    return ", ".join(filter(None, (str(process.of(folder) or ""), heard)))


_TABLES = {"algorithms": algorithms, "recipes": recipes, "hooks": hooks}
