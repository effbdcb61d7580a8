"""``slim lint``: an ONNX file against the rules of int8 in TensorRT."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from slimcli import console
from slimcli.cli.arguments import existing
from slimcli.errors import Problem, RecipeError

if TYPE_CHECKING:
    from slimcli.artifacts.lint import Finding

DISAGREES = 6
FAILING = {False: ("error",), True: ("error", "warning")}


@click.command(name="lint")
@click.argument("file", type=click.Path(path_type=Path), callback=existing("an ONNX file"))
@click.option("--strict", is_flag=True, help="Warnings fail too: int8 or time is lost there.")
@click.option("--rules", "show_rules", is_flag=True, help="Explain every rule that was broken.")
def command(file: Path, strict: bool, show_rules: bool) -> int:
    """Check an ONNX file against the rules by which TensorRT makes int8 kernels.

    Exit 6 if there is an error (TensorRT refuses or misreads the file), with --strict also if
    there is a warning (it runs, but partly in float or slower than it could); otherwise 0.

    \b
    Examples:
      slim lint model.onnx             findings by node
      slim lint model.onnx --strict    in CI
      slim lint model.onnx --json      for scripts
    """
    from slimcli.artifacts.lint import RULES, lint_file

    if file.is_dir():
        inside = [each for each in (file, file / "artifacts") if (each / "model.onnx").is_file()]
        fix = f"slim lint {inside[0] / 'model.onnx'}" if inside else "slim export RUN --onnx"
        problem = Problem("E-FILE-KIND", "this is a folder", str(file), "an ONNX file", fix=fix)
        raise RecipeError(problem)
    findings = lint_file(file)
    failed = any(each.severity in FAILING[strict] for each in findings)
    if console.settings().json:
        console.document(
            {
                "version": 1,
                "file": str(file),
                "ok": not failed,
                "findings": [each.as_dict() for each in findings],
            }
        )
        return DISAGREES if failed else 0
    for each in findings:
        console.result(str(each))
        if show_rules:
            rule = RULES[each.rule]
            console.result(f"    {rule.title}\n    fix: {rule.fix}")
    console.say(_verdict(findings))
    return DISAGREES if failed else 0


def _verdict(findings: list[Finding]) -> str:
    """The last line: how many of which kind."""
    if not findings:
        return "clean: no rule is broken"
    count: Counter[str] = Counter(each.severity for each in findings)
    kinds = ("error", "warning", "info")
    return ", ".join(f"{count[kind]} {kind}" for kind in kinds if count[kind])
