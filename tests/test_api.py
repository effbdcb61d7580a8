"""The Python API: Solvers made from the registry, deploy files loaded, a Compressor attached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import slimcli
from slimcli.compressor import registry
from slimcli.errors import GoalError, RecipeError
from slimcli.network.example import Example
from tests.solver import toys

DEPLOYED = 1e-5  # folding reorders float32 sums


def config(folder: Path, **keys: Any) -> dict[str, Any]:
    return {
        "task_name": "toy",
        "epoch": 2,
        "batch_size": 8,
        "devices": "cpu",
        "save_dir": str(folder),
        "export": {"onnx": False},
        "dataset_generator": toys.datasets,
        "predict_function": toys.predict,
        "calculate_loss_function": toys.loss,
        "evaluate_function": toys.accuracy,
        **keys,
    }


@pytest.mark.parametrize("name", [info.solver for info in registry().values()])
def test_every_algorithm_has_a_solver(name: str) -> None:
    assert getattr(slimcli, name).__name__ == name


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="NoSuchSolver"):
        _ = slimcli.NoSuchSolver


def test_a_solver_runs_and_leaves_the_model_alone(tmp_path: Path) -> None:
    model = toys.Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    done = slimcli.FinetuneSolver(model, config(tmp_path)).run()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert done.exit_code == 0
    assert done.summary["final"]["metrics"]["acc"] > 0
    assert "FinetuneSolver" in (done.folder / "recipe.yaml").read_text()


def test_hooks_of_both_argument_orders_work(tmp_path: Path) -> None:
    def upstream(params: Any, config: Any) -> Any:
        return torch.optim.SGD(params, lr=config["lr"])

    done = slimcli.FinetuneSolver(
        toys.Net(), config(tmp_path, optimizer_generator=upstream, epoch=1)
    ).run()
    assert done.exit_code == 0


def test_all_wrong_keys_are_told_at_once(tmp_path: Path) -> None:
    keys = config(tmp_path, epocs=3, lr=-1, batch_size="many")
    with pytest.raises(RecipeError) as caught:
        slimcli.FinetuneSolver(toys.Net(), keys)
    assert len(caught.value.problems) == 3
    assert "did you mean epoch?" in str(caught.value)


def test_a_missing_hook_is_told(tmp_path: Path) -> None:
    keys = config(tmp_path)
    del keys["predict_function"]
    with pytest.raises(RecipeError, match="predict_function"):
        slimcli.FinetuneSolver(toys.Net(), keys)


def test_load_deploy_gives_the_compressed_model(tmp_path: Path) -> None:
    done = slimcli.FinetuneSolver(toys.Net(), config(tmp_path)).run()
    plain = slimcli.load_deploy(done.folder, toys.Net())
    assert not any(isinstance(each, nn.BatchNorm2d) for each in plain.modules())
    metrics = toys.accuracy(*evaluated(plain))
    assert metrics["acc"] == pytest.approx(done.summary["final"]["metrics"]["acc"], abs=1e-6)


def test_without_the_hooks_of_a_run_its_model_is_asked_for(tmp_path: Path) -> None:
    done = slimcli.FinetuneSolver(toys.Net(), config(tmp_path)).run()
    recipe = "algorithm: finetune\nmodel: gone.py:build_model\nhooks: {}\n"
    (done.folder / "recipe.yaml").write_text(recipe)
    with pytest.raises(RecipeError) as caught:
        slimcli.load_deploy(done.folder)
    assert "load_deploy(run, model=...)" in caught.value.problems[-1].fix


@pytest.mark.parametrize("command", ["resume", "export", "eval"])
def test_a_run_of_a_solver_is_told_as_that_by_commands_that_need_its_hooks(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from slimcli.cli import main

    folder = slimcli.FinetuneSolver(toys.Net(), config(tmp_path, epoch=1)).run().folder
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([command, str(folder)])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert "the run was started from Python: its model and hooks were objects" in said
    assert f"slimcli.load_deploy('{folder}', model=...)" in said
    assert f"slimcli.FinetuneSolver(model, config).run(resume='{folder}')" in said
    assert "model is required" not in said
    with pytest.raises(RecipeError, match="started from Python") as caught:
        slimcli.load_deploy(folder)
    assert caught.value.problems[0].fix.count("load_deploy") == 1


def test_a_recipe_of_a_solver_that_was_given_a_model_is_a_recipe(tmp_path: Path) -> None:
    from slimcli.recipe import load

    done = slimcli.FinetuneSolver(toys.Net(), config(tmp_path, epoch=1)).run()
    with pytest.raises(RecipeError, match="hooks: missing dataset_generator"):
        load(done.folder / "recipe.yaml", ["model=hooks.py:build_model"])


def evaluated(model: nn.Module) -> tuple[Any, Any]:
    batch = next(iter(torch.utils.data.DataLoader(toys.datasets()[1], batch_size=20)))
    with torch.no_grad():
        return model(batch[0]), batch


def test_an_attached_algorithm_compresses_in_a_loop_of_ones_own() -> None:
    torch.manual_seed(0)
    loader = torch.utils.data.DataLoader(toys.datasets()[0], batch_size=8)
    example = Example(next(iter(loader)), toys.predict)
    keys = {
        "epoch": 12,
        "lr": 0.1,
        "prune_rate": 0.3,
        "lasso_decay": "auto",
        "min_channels": 1,
        "groups_size": 1,
        "warmup_epoch": 1,
    }
    slim = slimcli.attach(toys.Net(), "resrep", keys, example, steps_per_epoch=len(loader))
    optimizer = torch.optim.SGD(slim.param_groups(), lr=0.1)
    for epoch in range(12):
        slim.before_epoch(optimizer)
        for batch, rate in zip(loader, slim.schedule.learning_rates[5 * epoch :], strict=False):
            for group in optimizer.param_groups:
                group["lr"] = rate
            toys.loss(toys.predict(slim.model, batch), batch).backward()
            slim.after_backward()
            optimizer.step()
            slim.after_step()
            optimizer.zero_grad()
    slim.finish(optimizer)
    plain = slim.deploy()
    assert sum(each.numel() for each in plain.parameters()) < sum(
        each.numel() for each in toys.Net().parameters()
    )
    trained, batch = evaluated(slim.model.eval())
    deployed, _ = evaluated(plain)
    assert torch.allclose(trained, deployed, atol=DEPLOYED)


class KeepsItsLoss(toys.Net):
    """Keeps a loss for the side, as layers of experts do, in train mode."""

    aux: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        if self.training:
            self.aux = {"balance": [x.square().mean()]}
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.fc(self.drop(x.mean((2, 3))))


@pytest.mark.parametrize("algorithm", ["acnet", "resrep", "csgd", "finetune"])
def test_a_model_that_keeps_a_loss_of_its_last_step_is_deployed(algorithm: str) -> None:
    batch = next(iter(torch.utils.data.DataLoader(toys.datasets()[0], batch_size=8)))
    own: dict[str, dict[str, Any]] = {
        "resrep": {"prune_rate": 0.01, "lasso_decay": "auto", "min_channels": 1, "warmup_epoch": 0},
        "csgd": {"cluster_percent": 0.25, "centri_strength": "auto"},
    }
    keys = {"epoch": 1, **own.get(algorithm, {})}
    example = Example(batch, toys.predict)
    slim = slimcli.attach(KeepsItsLoss(), algorithm, keys, example, steps_per_epoch=500)
    loss = toys.loss(toys.predict(slim.model, batch), batch)
    (loss + slim.model.aux["balance"][0]).backward()
    plain = slim.deploy()
    assert plain.aux["balance"][0].is_leaf
    assert slim.model.aux["balance"][0].grad_fn is not None
    trained, deployed = evaluated(slim.model.eval())[0], evaluated(plain.eval())[0]
    assert torch.allclose(trained, deployed, atol=DEPLOYED)


def test_attaching_refuses_what_cannot_work() -> None:
    example = Example((torch.randn(4, 1, 6, 6),), toys.predict)
    with pytest.raises(GoalError):
        slimcli.attach(toys.Net(), "resrep", {"epoch": 1, "prune_rate": 0.99}, example)
    with pytest.raises(RecipeError, match="did you mean resrep"):
        slimcli.attach(toys.Net(), "resrap", {}, example)


def test_an_example_is_made_with_the_public_class() -> None:
    assert slimcli.Example is Example
    assert "Example" in dir(slimcli)


@pytest.mark.parametrize(
    ("wrong", "received"),
    [
        (torch.randn(4, 1, 6, 6), "a Tensor"),
        ((torch.randn(4, 1, 6, 6), toys.predict), "a tuple"),
        (Example(toys.predict, torch.randn(4, 1, 6, 6)), "a Tensor as predict"),  # type: ignore[arg-type]
        (None, "a NoneType"),
    ],
)
def test_attaching_says_what_an_example_is(wrong: Any, received: str) -> None:
    with pytest.raises(RecipeError) as caught:
        slimcli.attach(toys.Net(), "resrep", {}, wrong)
    (problem,) = caught.value.problems
    assert problem.code == "E-ATTACH-EXAMPLE"
    assert problem.expected == "slimcli.Example(batch, predict)"
    assert problem.received == received
    assert problem.fix.startswith("slimcli.Example(next(iter(loader)), ")
