"""``slim report``: write report.html and card.md of a run again."""

from __future__ import annotations

from pathlib import Path

import click

from slimcli import console


@click.command(name="report")
@click.argument("run", required=False, type=click.Path(path_type=Path))
def command(run: Path | None) -> None:
    """Write the report of a run from its files; no model is loaded.

    \b
    Examples:
      slim report                              of the newest finished run
      slim report checkpoints/task/latest      of this one, however it ended
    """
    from slimcli.artifacts import run_folder
    from slimcli.cli.finished import newest
    from slimcli.report.write import write_report

    path = write_report(run_folder.open_run(run or newest()).path)
    if console.settings().json:
        console.document(
            {"version": 1, "report": str(path), "card": str(path.with_name("card.md"))}
        )
    else:
        console.result(str(path))
