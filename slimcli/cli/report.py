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
    from slimcli.cli import full_disk
    from slimcli.cli.finished import newest
    from slimcli.report.write import write_report

    with full_disk.repeat("slim report"):
        path = write_report(run_folder.open_run(run or newest()).path)
    if console.settings().json:
        console.document(
            {"version": 1, "report": str(path), "card": str(path.with_name("card.md"))}
        )
    else:
        console.result(str(path))


def refresh(folder: Path) -> None:
    """The report once more after something was added; a fault in it is only a warning."""
    from slimcli.report.write import write_report

    try:
        write_report(folder)
    except Exception as error:
        console.warn(f"no report: {type(error).__name__}: {error}; try slim report")
