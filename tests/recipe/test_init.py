"""``slim init``: for every algorithm and task a recipe and hooks that pass every check."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from slimcli.cli import main
from slimcli.cli.init import TASKS
from slimcli.compressor import registry
from slimcli.recipe import load
from slimcli.recipe.hooks import resolve


def slim(*words):
    return CliRunner().invoke(main, list(words))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("algorithm", registry())
@pytest.mark.parametrize("full", [False, True])
def test_what_is_generated_is_a_valid_recipe(folder, task, algorithm, full):
    options = ["--full"] if full else []
    assert slim("init", "demo", "--algo", algorithm, "--task", task, *options).exit_code == 0
    recipe = load(folder.path / "demo" / "recipe.yaml")
    assert recipe.task_name == "demo"
    assert recipe.stages[-1].algorithm.name == algorithm
    assert recipe.stages[0].algorithm.name == "finetune"
    if full:
        text = (folder.path / "demo" / "recipe.yaml").read_text()
        assert all(f"  {key}:" in text for key in list(recipe.stages[-1].keys()))


def test_nothing_is_overwritten_without_force(folder):
    assert slim("init", ".").exit_code == 0
    hooks = folder.write("hooks.py", "mine")
    assert slim("init", ".").exit_code == 2
    assert hooks.read_text() == "mine"
    assert slim("init", ".", "--force").exit_code == 0
    assert hooks.read_text() != "mine"


def test_an_unknown_algorithm_is_told_with_the_nearest_one(folder):
    result = slim("init", "demo", "--algo", "resrap")
    assert result.exit_code == 2
    assert "did you mean resrep?" in result.stderr
    assert not (folder.path / "demo").exists()


@pytest.mark.parametrize("task", TASKS)
def test_the_lines_to_edit_are_marked(folder, task):
    slim("init", "demo", "--task", task)
    text = (folder.path / "demo" / "hooks.py").read_text()
    assert text.count("  # EDIT") == 3


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_the_generated_hooks_learn_their_task(folder, task):
    """Two epochs of plain SGD bring the loss down; every hook gets and gives what it says."""
    import torch
    from torch.utils.data import DataLoader

    slim("init", "demo", "--task", task)
    hooks = resolve(load(folder.path / "demo" / "recipe.yaml"))
    torch.manual_seed(0)
    model = hooks.build_model()
    train, validation = hooks.dataset_generator()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(2):
        for data in DataLoader(train, batch_size=32, shuffle=True):
            optimizer.zero_grad()
            loss = hooks.calculate_loss_function(hooks.predict_function(model, data), data)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    data = next(iter(DataLoader(validation, batch_size=64)))
    evaluate, prediction = hooks.evaluate_function, hooks.predict_function(model.eval(), data)
    if hasattr(evaluate, "update"):
        evaluate.update(prediction, data)
        metrics = evaluate.compute()
    else:
        metrics = evaluate(prediction, data)
    assert 0 <= metrics[TASKS[task]] <= 1
