"""The loop equals a hand-written one, calls the compressor in order, and stops where it must."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import default_collate

from slimcli.artifacts import checkpoint
from slimcli.compressor import Goal, Plan, Refusal
from slimcli.errors import GoalError, HookError, Problem, RecipeError, RunError
from slimcli.solver.randomness import derive, epoch_order
from slimcli.solver.stages import run
from tests.solver import toys


def last(folder: Path) -> dict[str, Any]:
    return checkpoint.load(folder / "toy" / "latest" / "checkpoints" / "last.pt")


def seed(*parts: Any) -> None:
    value = derive(0, *parts)
    random.seed(value)
    numpy.random.seed(value)
    torch.manual_seed(value)


def test_training_equals_a_plain_pytorch_loop_bit_for_bit(tmp_path: Path) -> None:
    losses: list[float] = []

    def recording(prediction: torch.Tensor, data: Any) -> torch.Tensor:
        value = toys.loss(prediction, data)
        losses.append(value.item())
        return value

    run(toys.with_hooks(toys.job(tmp_path, weight_decay=1e-3), calculate_loss_function=recording))

    seed("model")
    model = toys.Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)
    train_set, _ = toys.datasets()
    plain = []
    for epoch in range(3):
        model.train()
        order = epoch_order(0, epoch, toys.SAMPLES)
        for number in range(toys.SAMPLES // 8):
            seed("data", epoch, number)
            batch = default_collate([train_set[i] for i in order[8 * number : 8 * number + 8]])
            seed("step", epoch, number, 0)
            value = toys.loss(model(batch[0]), batch)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            plain.append(value.item())
        scheduler.step()

    assert losses[toys.PLANNER_CALLS :] == plain
    stored = last(tmp_path)["model"]
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())


def test_the_compressor_is_called_in_the_order_of_its_contract(tmp_path: Path) -> None:
    toys.Counting.calls.clear()
    run(toys.job(tmp_path, toys.Counting, epoch=2, batch_size=20))
    step = ["after_backward", "after_step"]
    assert toys.Counting.calls == [
        *("plan", "prepare", "calibrate", "param_groups"),
        *("before_epoch", *step, *step, "may_save"),
        *("before_epoch", *step, *step, "finish", "may_save"),
        "deploy",
    ]


def test_the_best_checkpoint_is_the_best_among_models_that_meet_the_goal(tmp_path: Path) -> None:
    class Late(toys.Counting):
        def may_save(self, model: nn.Module, progress: Any) -> bool:
            return progress.epoch >= 1

    # One batch validates: first the planner asks, then the baseline, then each epoch.
    values = itertools.chain([0.1, 0.1], [0.9, 0.5, 0.7, 0.6], itertools.repeat(0.0))

    def metric(prediction: Any, data: Any) -> dict[str, float]:
        return {"acc": next(values)}

    done = run(
        toys.with_hooks(
            toys.job(tmp_path, Late, epoch=4, test_batch_size=20), evaluate_function=metric
        )
    )
    best = done.summary["stages"][0]["best"]
    assert (best["value"], best["epoch"]) == (0.7, 3)


def test_a_smaller_metric_is_better_where_metric_mode_says_so(tmp_path: Path) -> None:
    done = run(toys.job(tmp_path, save_keyword="error", metric_mode="min"))
    events = [json.loads(line) for line in (done.folder / "events.jsonl").read_text().splitlines()]
    errors = [each["val"]["error"] for each in events if each["event"] == "epoch_end"]
    assert done.summary["stages"][0]["best"]["value"] == min(errors)


def test_a_model_that_never_meets_the_goal_ends_with_exit_code_4(tmp_path: Path) -> None:
    class Never(toys.Counting):
        def plan(self, model: nn.Module, example: Any, schedule: Any) -> Plan:
            plan = super().plan(model, example, schedule)
            plan.goal = Goal("macs", 7.0)
            return plan

        def may_save(self, model: nn.Module, progress: Any) -> bool:
            return False

    with pytest.raises(GoalError, match="no checkpoint of stage 1-toy meets the goal"):
        run(toys.job(tmp_path, Never))
    summary = json.loads((tmp_path / "toy" / "latest" / "summary.json").read_text())
    assert (summary["status"], summary["exit_code"]) == ("goal_missed", 4)
    assert summary["goal"] == {"name": "macs", "target": 7.0, "reached": False, "value": None}
    assert summary["goal"]["reached"] is False
    assert [stage["best"]["value"] for stage in summary["stages"]] == [None]
    assert last(tmp_path)["position"]["epoch"] == 3


def test_a_metric_that_is_always_nan_is_told_as_that_and_not_as_a_missed_goal(
    tmp_path: Path,
) -> None:
    def empty(prediction: torch.Tensor, data: Any) -> dict[str, float]:
        return {"acc": math.nan}

    with pytest.raises(RunError, match="no best model of stage 1-toy can be chosen: acc was nan"):
        run(toys.with_hooks(toys.job(tmp_path), evaluate_function=empty))
    assert last(tmp_path)["position"]["epoch"] == 3


def test_a_refused_plan_stops_before_the_first_step(tmp_path: Path) -> None:
    class Refusing(toys.Counting):
        def plan(self, model: nn.Module, example: Any, schedule: Any) -> Plan:
            plan = super().plan(model, example, schedule)
            plan.refusals.append(Refusal("the budget is 0.3 of what is needed", "epoch", "90"))
            return plan

    toys.Counting.calls.clear()
    with pytest.raises(GoalError, match=r"0\.3 of what is needed"):
        run(toys.job(tmp_path, Refusing))
    assert "after_step" not in toys.Counting.calls


def test_a_loss_that_is_not_finite_stops_with_step_and_last_checkpoint(tmp_path: Path) -> None:
    calls = [0]

    def breaking(prediction: torch.Tensor, data: Any) -> torch.Tensor:
        calls[0] += 1
        return toys.loss(prediction, data) * (math.nan if calls[0] == 9 else 1.0)

    with pytest.raises(RunError, match="loss became nan in epoch 2, step 8, batch 3") as caught:
        run(toys.with_hooks(toys.job(tmp_path), calculate_loss_function=breaking))
    assert caught.value.exit_code == 1
    assert "last.pt" in str(caught.value)
    assert last(tmp_path)["position"]["epoch"] == 1
    assert (tmp_path / "toy" / "latest" / "nan-batch.pt").exists()


def test_epoch_0_trains_nothing_and_deploys(tmp_path: Path) -> None:
    toys.Counting.calls.clear()
    done = run(toys.job(tmp_path, toys.Counting, epoch=0))
    assert "after_step" not in toys.Counting.calls
    assert toys.Counting.calls[-3:] == ["finish", "may_save", "deploy"]
    assert all(seam["ok"] for seam in done.summary["verification"])


def test_evaluation_leaves_statistics_modes_and_gradients_alone(tmp_path: Path) -> None:
    seen: list[bool] = []

    def watching(model: nn.Module, data: Any) -> Any:
        seen.append(torch.is_grad_enabled() and not model.training)
        return toys.predict(model, data)

    run(toys.with_hooks(toys.job(tmp_path), predict_function=watching))
    assert not any(seen)


def test_an_object_with_update_and_compute_is_a_metric(tmp_path: Path) -> None:
    class Total:
        def __init__(self) -> None:
            self.right = self.count = 0

        def update(self, prediction: torch.Tensor, data: Any) -> None:
            self.right += int((prediction.argmax(1) == data[1]).sum())
            self.count += len(data[1])

        def compute(self) -> dict[str, float]:
            return {"acc": self.right / self.count, "count": self.count}

    done = run(toys.with_hooks(toys.job(tmp_path), evaluate_function=Total()))
    assert done.summary["final"]["metrics"]["count"] == 20
    plain = run(toys.job(tmp_path / "plain", test_batch_size=7))
    assert done.summary["final"]["metrics"]["acc"] == pytest.approx(
        plain.summary["final"]["metrics"]["acc"], abs=1e-6
    )


def test_a_teacher_with_weight_0_changes_nothing_and_one_with_weight_does(tmp_path: Path) -> None:
    states = []
    for name, weight, teacher in (("a", 1.0, None), ("b", 0.0, toys.Net), ("c", 1.0, toys.Net)):
        job = toys.job(tmp_path / name, epoch=1, teacher_weight=weight)
        run(toys.with_hooks(job, teacher=teacher))
        states.append(last(tmp_path / name)["model"]["conv1.weight"])
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_a_teacher_whose_predictions_do_not_fit_is_refused(tmp_path: Path) -> None:
    def wide() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 5))

    with pytest.raises(HookError, match="can't be compared"):
        run(toys.with_hooks(toys.job(tmp_path), teacher=wide))


@pytest.mark.parametrize(
    ("hook", "value", "message"),
    [
        ("calculate_loss_function", lambda p, d: 1.0, "a float"),
        ("calculate_loss_function", lambda p, d: p, "shape"),
        ("calculate_loss_function", lambda p, d: p.detach().sum(), "no parameter leads to"),
        ("evaluate_function", lambda p, d: 0.5, "a dictionary of numbers"),
        ("evaluate_function", lambda p, d: {"acc": "good"}, "str for 'acc'"),
        ("evaluate_function", lambda p, d: {"iou": 0.5}, "returns no 'acc'"),
        ("dataset_generator", lambda: toys.images(4, 0), "two or three datasets"),
        (
            "dataset_generator",
            lambda: (toys.images(0, 0), toys.images(4, 0)),
            "training set is empty",
        ),
        ("build_model", lambda: toys.Net, "the class Net"),
        ("optimizer_generator", lambda c, p: "sgd", "a torch Optimizer"),
        ("scheduler_generator", lambda c, o: 3, "a scheduler with step"),
        (
            "optimizer_generator",
            lambda c, p: torch.optim.SGD(p[0]["params"][:2], lr=0.1),
            "in no group",
        ),
    ],
)
def test_a_hook_that_returns_the_wrong_thing_is_told_before_training(
    tmp_path: Path, hook: str, value: Any, message: str
) -> None:
    with pytest.raises(HookError) as caught:
        run(toys.with_hooks(toys.job(tmp_path), **{hook: value}))
    assert message in str(caught.value)
    assert caught.value.exit_code == 3


def test_a_batch_of_one_with_batch_norm_is_refused(tmp_path: Path) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1 = nn.Linear(36, 4)
            self.norm = nn.BatchNorm1d(4)
            self.fc2 = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc2(self.norm(self.fc1(x.flatten(1))))

    with pytest.raises(RecipeError, match=r"config\.batch_size"):
        run(toys.with_hooks(toys.job(tmp_path, batch_size=1), build_model=Flat))


def test_init_from_starts_with_the_weights_of_a_run(tmp_path: Path) -> None:
    first = run(toys.job(tmp_path / "a"))
    second = run(replace(toys.job(tmp_path / "b", epoch=0), init_from=first.folder))
    assert second.summary["final"]["metrics"] == first.summary["final"]["metrics"]


def test_init_from_refuses_weights_of_another_model(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(2, 1, 3, 3)}, tmp_path / "other.pt")
    with pytest.raises(RecipeError, match=r"no bn1\.weight"):
        run(replace(toys.job(tmp_path), init_from=tmp_path / "other.pt"))


def problem_of(folder: Path, content: Any) -> Problem:
    """Why a file with this content is no file to start from."""
    torch.save(content, folder / "start.pt")
    with pytest.raises(RecipeError) as caught:
        run(replace(toys.job(folder), init_from=folder / "start.pt"))
    (problem,) = caught.value.problems
    assert problem.where == str(folder / "start.pt")
    assert problem.code == "E-RECIPE-INIT-FROM"
    return problem


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module."])
def test_init_from_names_what_a_wrapper_put_before_all_names(tmp_path: Path, prefix: str) -> None:
    weights = {prefix + name: value for name, value in toys.Net().state_dict().items()}
    problem = problem_of(tmp_path, {"epoch": 3, "state_dict": weights})
    assert problem.fix.startswith(f"all names begin with '{prefix}', which a wrapper put there")
    assert f"name.removeprefix('{prefix}')" in problem.fix
    without = {name.removeprefix(prefix): value for name, value in weights.items()}
    torch.save(without, tmp_path / "mended.pt")
    run(replace(toys.job(tmp_path, epoch=0), init_from=tmp_path / "mended.pt"))


def test_init_from_says_of_a_pickled_model_that_it_is_one(tmp_path: Path) -> None:
    problem = problem_of(tmp_path, toys.Net())
    assert "it is a whole pickled model (tests.solver.toys.Net), not its weights" in problem.what
    assert problem.fix == "weights are stored with torch.save(model.state_dict(), path)"


def test_init_from_names_objects_that_are_no_weights(tmp_path: Path) -> None:
    weights = toys.Net().state_dict()
    problem = problem_of(tmp_path, {"model": weights, "options": argparse.Namespace(lr=1)})
    assert "it holds more than tensors and plain values: argparse.Namespace" in problem.what


def test_a_metric_of_some_batches_only_is_told_once_with_their_number(tmp_path: Path) -> None:
    calls = itertools.count()

    def partial(prediction: torch.Tensor, data: Any) -> dict[str, float]:
        found = toys.accuracy(prediction, data)
        return found if next(calls) % 4 else {**found, "recall": 1.0}

    job = toys.with_hooks(toys.job(tmp_path, test_batch_size=5), evaluate_function=partial)
    result = run(job)
    text = (
        "evaluate_function returned recall for 1 of 4 batches, and its average is that of those; "
        "return it for each, or an object with update and compute"
    )
    lines = (result.folder / "events.jsonl").read_text().splitlines()
    notices = [each.get("text") for each in map(json.loads, lines) if each["event"] == "notice"]
    assert notices.count(text) == 1
    assert result.summary["notes"].count(text) == 1
    assert text in (result.folder / "report.html").read_text()


def test_a_metric_of_every_batch_is_not_told(tmp_path: Path) -> None:
    result = run(toys.job(tmp_path, test_batch_size=5))
    assert [each for each in result.summary["notes"] if "evaluate_function" in each] == []


def test_a_metric_that_is_gone_in_a_later_epoch_is_an_error_of_the_run_not_of_its_start(
    tmp_path: Path,
) -> None:
    calls = itertools.count()

    def forgetful(prediction: torch.Tensor, data: Any) -> dict[str, float]:
        return {"acc": 0.5} if next(calls) < 3 else {"other": 0.5}

    with pytest.raises(RunError, match="returns no 'acc' in epoch 3") as caught:
        run(toys.with_hooks(toys.job(tmp_path), evaluate_function=forgetful))
    assert caught.value.exit_code == 1
    assert caught.value.problems[0].fix == "config.save_keyword=other; then slim resume"
    assert last(tmp_path)["position"]["epoch"] == 2
