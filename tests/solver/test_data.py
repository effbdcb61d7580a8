"""Batches: the same whoever reads them, nested in any way, counted right."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from slimcli.errors import HookError, RunError
from slimcli.solver.config import TrainingConfig
from slimcli.solver.data import (
    DatasetSource,
    LoaderSettings,
    LoaderSource,
    Sharding,
    batch_size_of,
)
from slimcli.solver.datasets import build_data
from slimcli.solver.stages import run
from tests.solver import toys

Pair = namedtuple("Pair", "image label")


@dataclass
class Sample:
    image: Tensor
    label: Tensor


def source(count: int = 10, **changes: Any) -> DatasetSource:
    settings = {"batch_size": 4, "shuffle": True, "drop_single": False, "seed": 0, "workers": 0}
    return DatasetSource(list(range(count)), LoaderSettings(**{**settings, **changes}))


def samples(one: DatasetSource, epoch: int = 0, skip: int = 0) -> list[list[int]]:
    return [batch.data.tolist() for batch in one.batches(epoch, skip)]


def test_an_epoch_visits_every_sample_once_in_an_order_of_its_own() -> None:
    first, second = samples(source(), 0), samples(source(), 1)
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(10))
    assert first != second
    assert first == samples(source(), 0)


def test_skipping_gives_the_rest_of_the_same_epoch() -> None:
    assert samples(source(), 3, skip=2) == samples(source(), 3)[2:]


def test_validation_keeps_the_order_of_the_data_set() -> None:
    assert samples(source(shuffle=False)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_last_batch_of_one_is_left_out_where_a_norm_needs_two() -> None:
    assert len(source(9)) == 3
    assert len(source(9, drop_single=True)) == 2
    assert source(9, drop_single=True).left_out() == 1
    assert len(source(1, drop_single=True)) == 1  # there is nothing else to train on


def test_processes_share_each_batch_equally_and_without_overlap() -> None:
    whole = samples(source(10))
    parts = [samples(source(10, sharding=Sharding(rank, 2))) for rank in (0, 1)]
    for batch, left, right in zip(whole, *parts, strict=True):
        assert left + right == batch
        assert len(left) == len(right)


def test_samples_that_cannot_be_shared_are_left_out() -> None:
    assert [len(each) for each in samples(source(9, sharding=Sharding(0, 2)))] == [2, 2]


def test_a_users_loader_starts_again_the_same_way_with_its_own_generator() -> None:
    data = list(range(12))
    loader = DataLoader(data, batch_size=4, shuffle=True, generator=torch.Generator())
    one = LoaderSource(loader, seed=0)
    first = [batch.data.tolist() for batch in one.batches(2)]
    assert first == [batch.data.tolist() for batch in one.batches(2)]
    assert first[1:] == [batch.data.tolist() for batch in one.batches(2, skip=1)]
    assert [batch.size for batch in LoaderSource(DataLoader(data, 5), 0).batches(0)] == [5, 5, 2]


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(4, 3),
        (torch.zeros(4, 3), torch.zeros(4)),
        {"text": "a", "image": torch.zeros(4, 3)},
        Pair(torch.zeros(4, 3), torch.zeros(4)),
        Sample(torch.zeros(4, 3), torch.zeros(4)),
        ([torch.zeros(3, size, size) for size in (5, 6, 7, 8)], [{}] * 4),
    ],
)
def test_samples_are_counted_in_any_nesting(batch: Any) -> None:
    assert batch_size_of(batch) == 4


@pytest.mark.parametrize("kind", [dict, Pair, Sample], ids=lambda kind: kind.__name__)
def test_nested_batches_reach_the_hooks_in_their_own_types(tmp_path: Path, kind: Any) -> None:
    def collate(listed: list[Any]) -> Any:
        image = torch.stack([image for image, _ in listed])
        label = torch.stack([label for _, label in listed])
        return kind(image=image, label=label)

    seen: set[type[Any]] = set()

    def part(data: Any, name: str) -> Tensor:
        seen.add(type(data))
        return data[name] if isinstance(data, dict) else getattr(data, name)

    def predict(model: nn.Module, data: Any) -> Any:
        return model(part(data, "image"))

    def loss(prediction: Tensor, data: Any) -> Tensor:
        return nn.functional.cross_entropy(prediction, part(data, "label"))

    def accuracy(prediction: Tensor, data: Any) -> dict[str, Any]:
        return {"acc": (prediction.argmax(1) == part(data, "label")).float().mean()}

    hooks = {
        "collate_fn": collate,
        "predict_function": predict,
        "calculate_loss_function": loss,
        "evaluate_function": accuracy,
    }
    done = run(toys.with_hooks(toys.job(tmp_path, epoch=1), **hooks))
    assert seen == {kind}
    assert done.exit_code == 0


def test_averages_are_weighted_by_the_number_of_samples(tmp_path: Path) -> None:
    """Batches of 8, 8 and 4: a mean of means would differ."""
    eights = run(toys.job(tmp_path / "a", epoch=1, test_batch_size=8))
    whole = run(toys.job(tmp_path / "b", epoch=1, test_batch_size=20))
    for name, value in whole.summary["final"]["metrics"].items():
        assert eights.summary["final"]["metrics"][name] == pytest.approx(value, abs=1e-6)


MESSAGES = ["image 33 is gone", "in 33:\n  two channels\nwanted:\n    three"]


@pytest.mark.parametrize("message", MESSAGES)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_cannot_be_read_names_the_hook(
    tmp_path: Path, workers: int, message: str
) -> None:
    class Broken(toys.Noisy):
        def __getitem__(self, index: int) -> Any:
            if index == 33:
                try:
                    read_image()
                except KeyError as error:
                    raise RuntimeError(message) from error
            return super().__getitem__(index)

    def datasets() -> Any:
        return Broken(toys.images(40, 1)), toys.images(20, 2)

    with pytest.raises(RunError) as caught:
        run(toys.with_hooks(toys.job(tmp_path, num_workers=workers), dataset_generator=datasets))
    (problem,) = caught.value.problems
    assert problem.what == f"hook `dataset_generator` failed: RuntimeError: {message}"
    assert "test_data.py:" in problem.where
    (frame,) = caught.value.user_frames
    assert frame.endswith("in __getitem__   raise RuntimeError(message) from error")


def read_image() -> None:
    raise KeyError(33)


def test_an_iterable_without_a_length_is_refused(tmp_path: Path) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(toys.images(40, 1))

    def datasets() -> Any:
        return Stream(), toys.images(20, 2)

    with pytest.raises(HookError, match="has no length"):
        run(toys.with_hooks(toys.job(tmp_path), dataset_generator=datasets))


def test_what_is_left_out_is_said() -> None:
    training = TrainingConfig(batch_size=8)
    data = build_data(
        (toys.images(41, 1), toys.images(4, 2)),
        toys.HOOKS,
        training,
        toys.Net(),
        Sharding(),
        lambda loader: loader,
    )
    assert "the last 1 of 41 training samples" in data.notices[0]
    assert len(data.example_batch[0]) == 8
