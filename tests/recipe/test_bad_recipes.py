"""Every file of tests/cases/bad_recipes gives exactly its message and exit code."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from slimcli.cli import main

CASES = Path(__file__).parents[1] / "cases" / "bad_recipes"
NAMES = sorted(path.stem for path in CASES.glob("*.yaml"))


def outcome_of(name: str) -> str:
    """What ``slim check`` says on stderr, and its exit code."""
    words: list[str] = []
    for line in (CASES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[:2]:
        for head in ("# overrides: ", "# options: "):
            words += shlex.split(line.removeprefix(head)) if line.startswith(head) else []
    result = CliRunner().invoke(main, ["check", f"{name}.yaml", *words])
    assert result.exit_code, f"{name} is accepted: {result.output}"
    return f"{result.stderr.rstrip()}\nexit code {result.exit_code}\n"


@pytest.mark.parametrize("name", NAMES)
def test_message_is_exactly_as_written(name, monkeypatch):
    monkeypatch.chdir(CASES)
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    expected = (CASES / f"{name}.txt").read_text(encoding="utf-8")
    assert outcome_of(name) == expected


def test_there_are_at_least_sixty_cases_and_each_has_its_message():
    assert len(NAMES) >= 60
    assert {path.stem for path in CASES.glob("*.txt")} == set(NAMES)
