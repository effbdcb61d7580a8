"""``slim doctor``: what this machine can do, and the fix for what it cannot."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

from slimcli import console

if TYPE_CHECKING:
    from slimcli.doctor import Check

NEEDS = ("python", "torch", "gpu", "onnx", "trt", "rtx", "shm", "disk")


@click.command(name="doctor")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.option("--issue", is_flag=True, help="Markdown for a bug report, home folder shortened.")
@click.option("--strict", is_flag=True, help="Exit 5 if a check fails or a need is missing.")
@click.option("--need", multiple=True, type=click.Choice(NEEDS), help="What must be there.")
def command(as_json: bool, issue: bool, strict: bool, need: tuple[str, ...]) -> None:
    """Test what this machine can do.

    \b
    Examples:
      slim doctor                          look
      slim doctor --strict --need onnx     in a script: exit 5 if something is wrong
    """
    from slimcli import doctor

    rows = doctor.examine()
    if as_json:
        console.document(doctor.as_json(rows))
    elif issue:
        console.result(markdown(rows, doctor.as_json(rows)["packages"]))
    else:
        for row in rows:
            console.result(line(row))
        console.result(verdict(rows))
    lacking = [row for row in rows if row.name in need and row.state in ("none", "FAIL")]
    if (strict and any(row.state == "FAIL" for row in rows)) or ((strict or need) and lacking):
        sys.exit(5)


def line(row: Check) -> str:
    """One row for the terminal."""
    mark = "--" if row.state == "none" else row.state
    return f"{mark:<5} {row.text}" + (f"   fix: {row.fix}" if row.fix else "")


def verdict(rows: list[Check]) -> str:
    """The last line: counts, and what to do next."""
    count = {state: sum(row.state == state for row in rows) for state in ("ok", "warn", "FAIL")}
    text = f"{count['ok']} ok, {count['warn']} warnings, {count['FAIL']} failures."
    return text if count["FAIL"] else f"{text} Next: slim init demo"


def markdown(rows: list[Check], packages: dict[str, str]) -> str:
    """A block to paste into a bug report."""
    home = os.path.expanduser("~")
    lines = ["### slim doctor", "", "| check | state | found |", "|---|---|---|"]
    lines += [f"| {row.name} | {row.state} | {row.text} |" for row in rows]
    lines += ["", ", ".join(f"{name} {version}" for name, version in packages.items())]
    return "\n".join(lines).replace(home, "~")
