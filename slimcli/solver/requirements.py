"""``--require``: conditions on the numbers of the result."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from slimcli.errors import GoalError, Problem, RecipeError
from slimcli.solver.job import Requirement

COUNTS = ("macs", "params")


def check_names(requirements: Sequence[Requirement], metrics: Collection[str]) -> None:
    """Refuse, before anything is trained, a condition on a number that will not be there.

    Raises:
        RecipeError: One names neither a metric nor a count.
    """
    known = (*metrics, *COUNTS)
    problems = [
        Problem(
            "E-REQUIRE-UNKNOWN",
            f"--require {each}: there is no {each.name!r}",
            expected=", ".join(known),
            received=each.name,
        )
        for each in requirements
        if each.name not in known
    ]
    if problems:
        raise RecipeError(*problems)


def check_result(
    requirements: Sequence[Requirement], record: Mapping[str, Any], folder: str
) -> None:
    """Hold the result against every condition.

    Args:
        requirements: The conditions.
        record: Content of summary.json.
        folder: The run folder, for the message.

    Raises:
        GoalError: One is not kept.
    """
    final = record["final"]
    check_names(requirements, final["metrics"])
    before = record["baseline"] or final  # without a compressing stage nothing has changed
    missed: list[Problem] = []
    for each in requirements:
        if each.name in COUNTS:
            actual = float(final[each.name]) / (before[each.name] if each.value <= 1 else 1)
        else:
            actual = final["metrics"][each.name]
        if not each.holds(actual):
            what = f"--require {each} is not met"
            fix = f"the result is kept: {folder}"
            missed.append(Problem("E-REQUIRE-MISSED", what, received=f"{actual:.4g}", fix=fix))
    if missed:
        raise GoalError(*missed)
