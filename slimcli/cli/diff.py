"""``slim diff``: settings, results and channels of two runs side by side."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from slimcli import console


@click.command(name="diff")
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@click.option("--exit-code", is_flag=True, help="Exit 1 if anything differs.")
def command(first: Path, second: Path, exit_code: bool) -> int:
    """Say what differs between two runs: settings, then results, then channels per layer.

    \b
    Examples:
      slim diff checkpoints/task/a checkpoints/task/b
      slim diff A B --exit-code -q      for scripts: 1 if anything differs
    """
    from slimcli.artifacts.run_folder import open_run
    from slimcli.report.compare import PARTS, differences

    found = differences(open_run(first), open_run(second))
    if console.settings().json:
        listed = [dataclasses.asdict(each) for each in found]
        console.document({"version": 1, "differences": listed})
    for part in () if console.settings().json else PARTS:
        rows = [(each.name, each.first, each.second) for each in found if each.part == part]
        if rows:
            # The signs say what colour would: - is the first run, + the second.
            console.table(
                (part, f"- {first}", f"+ {second}"), [[str(cell) for cell in row] for row in rows]
            )
    if not found:
        console.say("nothing differs")
    return int(exit_code and bool(found))
