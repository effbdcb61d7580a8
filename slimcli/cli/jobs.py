"""What ``slim run`` adds to a recipe: conditions on the result, the run to go on with."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slimcli.errors import Problem, RecipeError

if TYPE_CHECKING:
    from slimcli.recipe import Recipe
    from slimcli.solver.job import Requirement

REQUIREMENT = re.compile(r"^\s*([\w./-]+)\s*(>=|<=)\s*([-+.\deE]+)\s*$")


def requirements(words: Sequence[str]) -> tuple[Requirement, ...]:
    """``acc>=0.9`` and the like.

    Raises:
        RecipeError: A word is no condition.
    """
    from slimcli.solver.job import Requirement

    found, problems = [], []
    for word in words:
        match = REQUIREMENT.match(word)
        try:
            if match is None:
                raise ValueError(word)
            found.append(Requirement(match[1], match[2], float(match[3])))
        except ValueError:
            problems.append(
                Problem(
                    "E-REQUIRE-SYNTAX",
                    f"--require {word} is no condition",
                    "command line",
                    expected="NAME>=NUMBER or NAME<=NUMBER",
                    fix="--require 'acc>=0.9'",
                )
            )
    if problems:
        raise RecipeError(*problems)
    return tuple(found)


def unfinished_run(recipe: Recipe) -> Path | None:
    """The newest run of this very recipe that can go on, for ``--resume auto``."""
    from slimcli.artifacts import summary

    parent = recipe.started_in / recipe.stages[0].training.save_dir / recipe.task_name
    folders = [each for each in parent.glob("*") if each.is_dir() and not each.is_symlink()]
    for folder in sorted(folders, key=lambda each: each.stat().st_mtime, reverse=True):
        stored = folder / "recipe.yaml"
        if not stored.is_file() or stored.read_text(encoding="utf-8") != recipe.to_yaml(folder):
            continue
        has_checkpoint = (folder / "checkpoints" / "last.pt").is_file()
        is_open = not (folder / "summary.json").is_file() or (
            summary.read(folder / "summary.json")["status"] in ("running", "interrupted", "failed")
        )
        return folder if has_checkpoint and is_open else None
    return None
