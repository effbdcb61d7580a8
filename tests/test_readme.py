"""What the README says is what the code does."""

from __future__ import annotations

import re
from typing import Any

import torch

import slimcli
from tests.readme_tables import README, ROOT, rendered
from tests.solver import toys

TEXT = README.read_text(encoding="utf-8")


def test_its_tables_are_those_of_the_code_and_of_the_measured_runs() -> None:
    assert rendered(TEXT) == TEXT, "run: python -m tests.readme_tables"


def test_the_test_line_is_the_one_that_ci_finds() -> None:
    lines = [line for line in TEXT.splitlines() if re.match(r"python3 -m venv .*pytest", line)]
    assert len(lines) == 1
    assert "grep -m1 '^python3 -m venv .*pytest' README.md" in (ROOT / ".ci/run").read_text()


def test_the_loop_of_ones_own_is_fifteen_lines_that_run() -> None:
    block = re.search(r"<!-- attach: run by the tests -->\n```python\n(.*?)```", TEXT, re.DOTALL)
    assert block is not None
    code = block.group(1)
    assert len(code.splitlines()) <= 15
    torch.manual_seed(0)
    loader = torch.utils.data.DataLoader(toys.datasets()[0], batch_size=8)
    config = {
        "epoch": 8,
        "lr": 0.1,
        "prune_rate": 0.3,
        "lasso_decay": "auto",
        "warmup_epoch": 1,
        "groups_size": 1,
        "min_channels": 1,
    }
    names: dict[str, Any] = {
        "slimcli": slimcli,
        "torch": torch,
        "model": toys.Net(),
        "config": config,
        "loader": loader,
        "predict": toys.predict,
        "loss": lambda model, batch: toys.loss(toys.predict(model, batch), batch),
    }
    exec(compile(code, "README.md", "exec"), names)
    before = sum(p.numel() for p in toys.Net().parameters())
    after = sum(p.numel() for p in names["plain"].parameters())
    assert after < before
    batch = next(iter(loader))
    trained = toys.predict(names["slim"].model.eval(), batch)
    assert torch.allclose(toys.predict(names["plain"], batch), trained, atol=1e-5)


def test_every_recipe_it_names_is_there() -> None:
    for path in re.findall(r"recipes/\w+\.yaml", TEXT):
        assert (ROOT / path).is_file(), path
