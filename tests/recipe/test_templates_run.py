"""What ``slim init`` writes runs as it is: every algorithm, every task, on a CPU, in a minute."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from slimcli.cli import main
from slimcli.cli.init import TASKS
from slimcli.compressor import registry

CPU_SECONDS = 60.0
PAIRS = [(name, list(TASKS)[number % len(TASKS)]) for number, name in enumerate(registry())]


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "task"), PAIRS)
def test_a_template_runs_as_generated(folder, algorithm, task):
    runner = CliRunner()
    assert not runner.invoke(main, ["init", "demo", "--algo", algorithm, "--task", task]).exit_code
    started = time.process_time()
    result = runner.invoke(main, ["run", "demo/recipe.yaml", "-q"])
    assert result.exit_code == 0, result.stderr
    assert time.process_time() - started < CPU_SECONDS
    run = Path(result.stdout.strip())
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["status"] == "finished"
    assert summary["final"]["metrics"][TASKS[task]] > 0.5
    assert all(seam["ok"] for seam in summary["verification"])
    assert (run / "artifacts" / "model.onnx").is_file()
