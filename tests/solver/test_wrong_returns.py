"""Hooks that return the wrong thing: exit 3, and the message has all its parts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from slimcli.errors import HookError
from slimcli.solver.stages import run
from tests.solver import toys


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(toys.images(40, 1))


WRONG = {
    "a class": ("build_model", lambda: toys.Net),
    "no model": ("build_model", lambda: None),
    "no teacher": ("teacher", lambda: 3),
    "one data set": ("dataset_generator", lambda: toys.images(40, 1)),
    "no data": ("dataset_generator", lambda: (toys.images(0, 1), toys.images(20, 2))),
    "a generator": ("dataset_generator", lambda: (iter([1]), toys.images(20, 2))),
    "a stream": ("dataset_generator", lambda: (Stream(), toys.images(20, 2))),
    "a loader of a stream": (
        "dataset_generator",
        lambda: (DataLoader(Stream()), toys.images(20, 2)),
    ),
    "no prediction": ("predict_function", lambda model, data: None),
    "no metrics": ("evaluate_function", lambda prediction, data: None),
    "a metric too large": ("evaluate_function", lambda prediction, data: {"acc": 10**400}),
    "metrics a sample": ("evaluate_function", lambda prediction, data: {"acc": prediction}),
    "no loss": ("calculate_loss_function", lambda prediction, data: None),
    "losses": ("calculate_loss_function", lambda prediction, data: {"a": prediction.sum()}),
    "a loss a sample": ("calculate_loss_function", lambda prediction, data: prediction.sum(1)),
    "no optimizer": ("optimizer_generator", lambda config, params: None),
    "no scheduler": ("scheduler_generator", lambda config, optimizer: 3),
    "a number": ("calculate_loss_function", lambda prediction, data: prediction.sum().detach()),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_expected_received_and_fix_are_said(name: str, tmp_path: Path) -> None:
    hook, function = WRONG[name]
    with pytest.raises(HookError) as caught:
        run(toys.with_hooks(toys.job(tmp_path), **{hook: function}))
    (problem,) = caught.value.problems
    assert f"hook `{hook.removeprefix('build_')}`" in problem.what
    assert problem.expected
    assert problem.received
    assert problem.fix


def putting_into_train_mode(model: Any, data: Any) -> Any:
    model.train()
    return toys.predict(model, data)


def test_a_prediction_that_changes_the_mode_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(HookError) as caught:
        run(toys.with_hooks(toys.job(tmp_path), predict_function=putting_into_train_mode))
    (problem,) = caught.value.problems
    assert problem.code == "E-HOOK-MODE"
    assert "train mode" in problem.received


def with_a_part_in_train_mode(model: Any, data: Any) -> Any:
    model.fc.train()
    return toys.predict(model, data)


def test_a_prediction_may_switch_a_part_of_the_model(tmp_path: Path) -> None:
    done = run(
        toys.with_hooks(toys.job(tmp_path, epoch=0), predict_function=with_a_part_in_train_mode)
    )
    assert done.summary["status"] == "finished"


def test_predictions_without_a_number_are_told(tmp_path: Path) -> None:
    def datasets() -> Any:
        validation = toys.images(20, 2)
        validation.tensors[0][[0, 9]] = math.nan
        return toys.images(40, 1), validation

    job = toys.with_hooks(
        toys.job(tmp_path, epoch=1, test_batch_size=5), dataset_generator=datasets
    )
    notes = run(job).summary["notes"]
    (note,) = (each for each in notes if "nan" in each)
    assert note.startswith("predictions of 2 of 4 validation batches hold nan")
    others = run(toys.job(tmp_path, epoch=1)).summary["notes"]
    assert not [each for each in others if "nan" in each]


def test_predictions_that_cannot_be_asked_for_nan_are_left_alone(tmp_path: Path) -> None:
    def predict(model: Any, data: Any) -> Any:
        return toys.predict(model, data), torch.eye(3).to_sparse_csr()

    job = toys.with_hooks(
        toys.job(tmp_path, epoch=1, save_deploy_format=False),
        predict_function=predict,
        calculate_loss_function=lambda prediction, data: toys.loss(prediction[0], data),
        evaluate_function=lambda prediction, data: toys.accuracy(prediction[0], data),
    )
    assert run(job).summary["status"] == "finished"


def test_without_any_metric_the_fix_is_to_return_one(tmp_path: Path) -> None:
    with pytest.raises(HookError) as caught:
        run(toys.with_hooks(toys.job(tmp_path), evaluate_function=lambda prediction, data: {}))
    assert caught.value.problems[0].fix.startswith("return {'acc': ")
