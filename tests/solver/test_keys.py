"""Every key of the training loop does something that can be seen from outside."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from slimcli.artifacts import checkpoint
from slimcli.compressor import GroupDefaults, default_param_groups
from slimcli.errors import MissingError, RecipeError
from slimcli.solver.config import TrainingConfig
from slimcli.solver.job import RunResult
from slimcli.solver.stages import run
from tests.solver import toys

Observation = Callable[[RunResult, dict[str, Any]], Any]


def weights(done: RunResult, seen: dict[str, Any]) -> list[float]:
    stored = checkpoint.load(done.folder / "checkpoints" / "last.pt")["model"]
    return [round(value.double().sum().item(), 12) for value in stored.values()]


def events(name: str, *fields: str) -> Observation:
    def found(done: RunResult, seen: dict[str, Any]) -> Any:
        lines = (done.folder / "events.jsonl").read_text().splitlines()
        chosen = [each for each in map(json.loads, lines) if each["event"] == name]
        return [[each[field] for field in fields] for each in chosen]

    return found


def seen_by_the_hooks(name: str) -> Observation:
    return lambda done, seen: seen[name]


def best_epoch(done: RunResult, seen: dict[str, Any]) -> Any:
    return done.summary["stages"][0]["best"]["metric"], done.summary["stages"][0]["best"]["value"]


def files(done: RunResult, seen: dict[str, Any]) -> Any:
    return sorted(done.summary["final"]["file_bytes"])


# key: (other value, further keys both runs get, what differs)
KEYS: dict[str, tuple[Any, dict[str, Any], Observation]] = {
    "epoch": (2, {}, events("epoch_end", "epoch")),
    "lr": (0.05, {}, weights),
    "batch_size": (4, {}, events("step", "step")),
    "test_batch_size": (5, {}, seen_by_the_hooks("validation_sizes")),
    "momentum": (0.5, {}, weights),
    "weight_decay": (0.1, {}, weights),
    "nesterov": (True, {}, weights),
    "no_decay": (("norm", "bias"), {"weight_decay": 0.1}, weights),
    "bias_lr_multiplier": (2.0, {}, weights),
    "num_workers": (1, {}, seen_by_the_hooks("worker")),
    "precision": ("bf16-mixed", {}, weights),
    "seed": (1, {}, weights),
    "deterministic": (True, {}, seen_by_the_hooks("deterministic")),
    "accumulate_grad_batches": (2, {}, events("step", "step")),
    "gradient_clip": (0.01, {}, weights),
    "channels_last": (True, {}, seen_by_the_hooks("channels_last")),
    "compile": (True, {}, seen_by_the_hooks("compiled")),
    "scheduler_interval": ("step", {}, events("step", "lr")),
    "warmup_steps": (5, {}, events("step", "lr")),
    "log_interval": (4, {}, events("step", "step")),
    "train_metrics": (True, {}, events("step", "metrics")),
    "save_dir": ("elsewhere", {}, lambda done, seen: done.folder.parent.parent.name),
    "save_keyword": ("error", {}, best_epoch),
    "metric_mode": ("min", {"save_keyword": "error", "epoch": 3}, best_epoch),
    "save_deploy_format": (False, {}, files),
    "save_every_minutes": (1e-9, {}, events("saved", "step")),
    "teacher_weight": (0.0, {"with_teacher": True}, weights),
    "teacher_temperature": (4.0, {"with_teacher": True}, weights),
    "input_shapes": (((2, 12, 12),), {}, events("prepared", "macs")),
}
ELSEWHERE = {"devices", "num_processes"}  # see below, and test_processes.py


def test_every_key_is_looked_at() -> None:
    assert {*KEYS, *ELSEWHERE} == set(TrainingConfig.model_fields)


class TwoChannels(toys.Net):
    """Channels-last can be told from contiguous only with more than one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3, padding=1, bias=False)


def observed(folder: Path, monkeypatch: pytest.MonkeyPatch, **keys: Any) -> tuple[RunResult, Any]:
    """A short run whose hooks write down what they see."""
    seen: dict[str, Any] = {
        "validation_sizes": set(),
        "worker": set(),
        "channels_last": set(),
        "deterministic": set(),
        "compiled": False,
    }

    class Watched(toys.Noisy):
        def __getitem__(self, index: int) -> Any:
            image, label = super().__getitem__(index)
            in_worker = torch.utils.data.get_worker_info() is not None
            return image.expand(2, -1, -1), label, in_worker

    def datasets() -> Any:
        train, validation = toys.datasets()
        return Watched(train.base), Watched(validation)

    def predict(model: nn.Module, data: Any) -> Any:
        seen["worker"] |= set(data[2].tolist())
        seen["channels_last"].add(data[0].is_contiguous())
        seen["deterministic"].add(torch.are_deterministic_algorithms_enabled())
        if not model.training:
            seen["validation_sizes"].add(len(data[0]))
        return toys.predict(model, data)

    def compiled(module: nn.Module) -> nn.Module:
        seen["compiled"] = True
        return module

    monkeypatch.setattr(torch, "compile", compiled)
    teacher = TwoChannels if keys.pop("with_teacher", False) else None
    job = toys.job(folder, **{"epoch": 1, **keys})
    hooks = {
        "dataset_generator": datasets,
        "predict_function": predict,
        "build_model": TwoChannels,
        "teacher": teacher,
    }
    return run(toys.with_hooks(job, **hooks)), seen


@pytest.mark.parametrize("key", KEYS)
def test_a_key_has_an_observable_effect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    value, further, observe = KEYS[key]
    if key == "save_dir":
        value = str(tmp_path / value)
    before = observe(*observed(tmp_path / "a", monkeypatch, **further))
    after = observe(*observed(tmp_path / "b", monkeypatch, **{**further, key: value}))
    assert before != after


def test_the_number_of_workers_changes_no_bit(tmp_path: Path) -> None:
    alone = run(toys.job(tmp_path / "a", epoch=2))
    helped = run(toys.job(tmp_path / "b", epoch=2, num_workers=2))
    assert weights(alone, {}) == weights(helped, {})


@pytest.mark.skipif(torch.cuda.is_available(), reason="the message is for machines without a GPU")
def test_a_gpu_that_is_not_there_is_exit_code_5(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"config\.devices") as caught:
        run(toys.job(tmp_path, devices=(0,)))
    assert caught.value.exit_code == 5


def test_accumulated_steps_equal_one_large_step(tmp_path: Path) -> None:
    """One batch of 8 or two of 4: without BatchNorm and dropout the same up to rounding."""

    def linear() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 3))

    def datasets() -> Any:
        return toys.images(40, 1), toys.images(20, 2)

    hooks = {"build_model": linear, "dataset_generator": datasets}
    large = run(toys.with_hooks(toys.job(tmp_path / "a"), **hooks))
    small_job = toys.job(tmp_path / "b", batch_size=4, accumulate_grad_batches=2)
    small = run(toys.with_hooks(small_job, **hooks))
    assert weights(large, {}) == pytest.approx(weights(small, {}), abs=1e-5)


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(4),
        nn.InstanceNorm2d(4, affine=True),
        nn.GroupNorm(2, 4),
        nn.LayerNorm(4),
        nn.RMSNorm(4),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_no_decay_of_norms_is_for_all_norms_of_torch_and_for_them_alone(norm: nn.Module) -> None:
    defaults = GroupDefaults(0.1, weight_decay=0.01, no_decay=("norm",))
    groups = default_param_groups(nn.Sequential(nn.Linear(4, 4), norm), defaults)
    decays = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert {decays.pop("0.weight"), decays.pop("0.bias")} == {0.01}
    assert decays == {f"1.{name}": 0.0 for name, _ in norm.named_parameters()}


def test_input_shapes_that_the_model_does_not_take_are_refused_with_those_it_gets(
    tmp_path: Path,
) -> None:
    with pytest.raises(RecipeError) as caught:
        run(toys.job(tmp_path, input_shapes=((1, 10),)))
    (problem,) = caught.value.problems
    assert problem.code == "E-RECIPE-INPUT-SHAPES"
    assert problem.received == "[[1, 10]]"
    assert "[1, 6, 6]" in problem.expected


def test_a_gpu_that_is_named_twice_is_refused_on_any_machine(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="names a GPU twice"):
        run(toys.job(tmp_path, devices=(0, 0)))
