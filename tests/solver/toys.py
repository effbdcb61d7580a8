"""Small models, data and compressors that the tests of the loop train with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from slimcli.algorithms.finetune.config import FinetuneConfig
from slimcli.algorithms.finetune.method import FinetuneCompressor
from slimcli.compressor import Goal, Plan, Progress, Schedule
from slimcli.network.cuts import Cut
from slimcli.network.example import Example
from slimcli.network.structure import analyze, zero_channels
from slimcli.solver.config import TrainingConfig
from slimcli.solver.job import Export, Job, JobHooks, StageJob

SAMPLES = 40


class Net(nn.Module):
    """Two convs with norms, dropout (so that randomness matters) and a classifier."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.fc(self.drop(x.mean((2, 3))))


def images(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    pictures = torch.randn(count, 1, 6, 6, generator=generator) + labels.view(-1, 1, 1, 1)
    return TensorDataset(pictures, labels)


class Noisy(Dataset[Any]):
    """Augments with torch's global generator, as transforms do."""

    def __init__(self, base: Any) -> None:
        self.base = base

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> Any:
        image, label = self.base[index]
        return image + 0.1 * torch.randn(image.shape), label


def datasets() -> tuple[Any, Any]:
    return Noisy(images(SAMPLES, 1)), images(20, 2)


def predict(model: nn.Module, data: Any) -> Any:
    return model(data[0])


def loss(prediction: Tensor, data: Any) -> Tensor:
    return nn.functional.cross_entropy(prediction, data[1])


def accuracy(prediction: Tensor, data: Any) -> dict[str, float]:
    return {
        "acc": (prediction.argmax(1) == data[1]).float().mean().item(),
        "error": nn.functional.cross_entropy(prediction, data[1]).item(),
    }


HOOKS = JobHooks(
    build_model=Net,
    dataset_generator=datasets,
    predict_function=predict,
    calculate_loss_function=loss,
    evaluate_function=accuracy,
)


def job(
    folder: Path,
    compressor: type[Any] = FinetuneCompressor,
    hooks: JobHooks = HOOKS,
    **keys: Any,
) -> Job:
    """A job of one stage that exports nothing slow."""
    settings = {"epoch": 3, "batch_size": 8, "lr": 0.1, "log_interval": 1, "devices": "cpu"}
    training = TrainingConfig(**{**settings, "save_dir": str(folder), **keys})
    stage = StageJob("1-toy", "toy", compressor, FinetuneConfig(), training)
    return Job("toy", (stage,), hooks, export=Export(onnx=False), recipe=lambda folder: "toy: 1\n")


def with_hooks(one: Job, **hooks: Any) -> Job:
    return replace(one, hooks=replace(one.hooks, **hooks))


def at_step(number: int, act: Callable[[], None]) -> Callable[[Tensor, Any], Tensor]:
    """A loss that calls ``act`` when it has been called ``number`` times in training."""
    calls = [0]

    def counting(prediction: Tensor, data: Any) -> Tensor:
        calls[0] += 1
        if calls[0] == number:
            act()
        return loss(prediction, data)

    return counting


PLANNER_CALLS = 1  # the planner tries the loss once before training


class Cutter(FinetuneCompressor):
    """Cuts two channels of the first conv before epoch 1; carries a number along as state."""

    compresses: ClassVar[bool] = True
    KEEP = (0, 2, 3, 5)

    def __init__(self, config: FinetuneConfig) -> None:
        super().__init__(config)
        self.steps = 0
        self.is_cut = False

    def plan(self, model: nn.Module, example: Example, schedule: Schedule) -> Plan:
        plan = super().plan(model, example, schedule)
        plan.goal = Goal("macs", plan.macs - 1)
        return plan

    def prepare(self, model: nn.Module, example: Example, plan: Plan) -> nn.Module:
        structure = analyze(model, example, trial=False)
        (self.group,) = [
            each for each in structure.groups if "conv1" in each.name or "bn1" in each.name
        ]
        return super().prepare(model, example, plan)

    def before_epoch(self, model: nn.Module, progress: Progress) -> list[Cut]:
        if progress.epoch != 1:
            return []
        removed = [index for index in range(6) if index not in self.KEEP]
        zero_channels(model, self.group, removed)
        return [self.group.cut(self.KEEP)]

    def after_cut(self, model: nn.Module, cuts: list[Cut]) -> None:
        self.is_cut = True

    def after_step(self, model: nn.Module, progress: Progress, skipped: bool) -> None:
        self.steps += 1

    def may_save(self, model: nn.Module, progress: Progress) -> bool:
        return self.is_cut

    def status(self, model: nn.Module) -> dict[str, float]:
        return {"steps": float(self.steps)}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "is_cut": self.is_cut}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.is_cut = state["steps"], state["is_cut"]


class Counting(FinetuneCompressor):
    """Writes down which moments of the contract came, in order."""

    compresses: ClassVar[bool] = True
    calls: ClassVar[list[str]] = []

    def plan(self, model: nn.Module, example: Example, schedule: Schedule) -> Plan:
        self.calls.append("plan")
        return super().plan(model, example, schedule)

    def prepare(self, model: nn.Module, example: Example, plan: Plan) -> nn.Module:
        self.calls.append("prepare")
        return super().prepare(model, example, plan)

    def calibrate(self, model: nn.Module, batches: Iterable[Example]) -> None:
        self.calls.append("calibrate")

    def param_groups(self, model: nn.Module, defaults: Any) -> list[dict[str, Any]]:
        self.calls.append("param_groups")
        return super().param_groups(model, defaults)

    def before_epoch(self, model: nn.Module, progress: Progress) -> list[Cut]:
        self.calls.append("before_epoch")
        return []

    def after_backward(self, model: nn.Module, progress: Progress) -> None:
        self.calls.append("after_backward")

    def after_step(self, model: nn.Module, progress: Progress, skipped: bool) -> None:
        self.calls.append("after_step")

    def finish(self, model: nn.Module, progress: Progress) -> list[Cut]:
        self.calls.append("finish")
        return []

    def may_save(self, model: nn.Module, progress: Progress) -> bool:
        self.calls.append("may_save")
        return True

    def deploy(self, model: nn.Module) -> nn.Module:
        self.calls.append("deploy")
        return copy.deepcopy(model)
