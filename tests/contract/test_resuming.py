"""Stopping and going on changes no bit, whatever the algorithm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from slimcli.compressor import registry
from slimcli.solver.job import Job
from slimcli.solver.stages import run
from tests.solver import toys
from tests.solver.test_resume import same, states, stopped_and_resumed

ALGORITHMS = registry()
EPOCHS = 10  # five steps each: enough for the channels that the examples let go


def job(name: str, folder: Path) -> Job:
    info = ALGORITHMS[name]
    one = toys.job(folder, info.load(), epoch=EPOCHS, lr=0.05)
    stage = replace(one.stages[0], algorithm=name, config=info.config(**info.example))
    return replace(one, stages=(stage,))


@pytest.mark.parametrize("step", [12, 33])
@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_stop_and_resume_equals_a_straight_run(tmp_path: Path, name: str, step: int) -> None:
    straight = run(job(name, tmp_path / "straight")).folder
    resumed = stopped_and_resumed(job(name, tmp_path / "stopped"), step)
    assert same(states(straight), states(resumed)) == []
