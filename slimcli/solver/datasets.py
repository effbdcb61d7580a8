"""What ``dataset_generator`` returned, checked and turned into sources of batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from slimcli.errors import HookError, Problem, RecipeError
from slimcli.solver.config import TrainingConfig
from slimcli.solver.data import (
    DatasetSource,
    LoaderSettings,
    LoaderSource,
    Sharding,
    Source,
    guarded,
)
from slimcli.solver.job import JobHooks
from slimcli.solver.randomness import seed_all

EXAMPLE_SAMPLES = 8  # enough for BatchNorm in training mode, cheap enough to trace many times

LENGTH_FIX = "give it a `__len__`: the schedule is planned from the number of steps"


@dataclass(frozen=True)
class Data:
    """The sources of a stage.

    Attributes:
        train: Training batches, shared out over the processes.
        validation: Validation batches, all of them in every process.
        test: Test batches for the end, or None.
        example_batch: A small training batch on the CPU.
        notices: What the user should know about how the data are read.
    """

    train: Source
    validation: Source
    test: Source | None
    example_batch: Any
    notices: tuple[str, ...] = ()


def generate_datasets(hooks: JobHooks, seed: int) -> tuple[Any, ...]:
    """Call ``dataset_generator`` once, with every generator seeded.

    Raises:
        HookError: It did not return two or three things that hold samples.
    """
    seed_all(seed, "dataset_generator")
    returned = hooks.dataset_generator()
    if not isinstance(returned, tuple | list) or len(returned) not in (2, 3):
        received = f"a {type(returned).__name__}"
        if isinstance(returned, tuple | list):
            received += f" of {len(returned)}"
        raise _wrong(
            hooks,
            "must return two or three datasets",
            "(train, validation[, test])",
            received,
            fix="return train_set, validation_set",
        )
    for name, each in zip(("training", "validation", "test"), returned, strict=False):
        _check_dataset(hooks, name, each)
    return tuple(returned)


def _check_dataset(hooks: JobHooks, name: str, dataset: Any) -> None:
    if not hasattr(dataset, "__len__") and isinstance(dataset, IterableDataset | DataLoader):
        raise _wrong(
            hooks,
            f"the {name} set has no length",
            "a `__len__`",
            type(dataset).__name__,
            fix=LENGTH_FIX,
        )
    is_loader = hasattr(dataset, "__iter__") and hasattr(dataset, "__len__")
    if not is_loader and not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise _wrong(
            hooks,
            f"the {name} set is neither a dataset nor a loader",
            "`__len__` and `__getitem__`, or a DataLoader",
            type(dataset).__name__,
            fix="return a torch Dataset or a DataLoader; a list of samples is one too",
        )
    try:
        length = len(dataset)
    except TypeError as error:  # a DataLoader over an iterable dataset without a length
        raise _wrong(
            hooks, f"the {name} set has no length", "a `__len__`", str(error), fix=LENGTH_FIX
        ) from error
    if length == 0:
        raise _wrong(
            hooks,
            f"the {name} set is empty",
            "at least one sample",
            "none",
            fix="look at the path, the split or the filter it is made with",
            code="E-DATA-EMPTY",
        )


def _wrong(
    hooks: JobHooks,
    what: str,
    expected: str,
    received: str,
    *,
    fix: str,
    code: str = "E-HOOK-DATASETS",
) -> HookError:
    where = hooks.where("dataset_generator")
    what = f"hook `dataset_generator`: {what}"
    return HookError(Problem(code, what, where, expected, received, fix))


def build_data(
    datasets: tuple[Any, ...],
    hooks: JobHooks,
    training: TrainingConfig,
    model: nn.Module,
    sharding: Sharding,
    setup_loader: Callable[[Any], Any],
) -> Data:
    """Sources for one stage.

    Args:
        datasets: What :func:`generate_datasets` gave.
        hooks: For ``collate_fn``.
        training: Batch sizes, workers, seed.
        model: Looked at for BatchNorm.
        sharding: This process's part of each training batch.
        setup_loader: Makes a user's training DataLoader a distributed one.

    Raises:
        RecipeError: A batch can't be shared out equally.
        HookError: A training set smaller than what one step needs.
    """
    _check_shares(training, sharding)
    notices: list[str] = []
    has_batch_norm = any(
        isinstance(each, nn.modules.batchnorm._BatchNorm) for each in model.modules()
    )

    def source(dataset: Any, size: int, shuffle: bool) -> Source:
        if not _is_map_style(dataset):
            return _loader_source(dataset, size, training, setup_loader if shuffle else _unchanged)
        settings = LoaderSettings(
            batch_size=size,
            shuffle=shuffle,
            drop_single=has_batch_norm and size > 1,
            seed=training.seed,
            workers=training.num_workers,
            collate=hooks.collate_fn,
            sharding=sharding,
        )
        return DatasetSource(dataset, settings)

    train = source(datasets[0], training.batch_size, True)
    if len(train) == 0:
        raise _wrong(
            hooks,
            "the training set is too small for one step",
            f"a sample for each of {sharding.world} processes",
            f"{len(datasets[0])}",
            fix="more samples, a smaller config.batch_size or fewer config.num_processes",
        )
    if isinstance(train, DatasetSource) and (count := train.left_out()):
        notices.append(
            f"the last {count} of {train.count} training samples of each epoch are left out: "
            "BatchNorm and equal shares need more than one sample a process"
        )
    if isinstance(train, LoaderSource):
        notices.append("your DataLoader is replayed from the start of the epoch when a run resumes")
    validation = source(datasets[1], training.test_batch_size, False)
    test = source(datasets[2], training.test_batch_size, False) if len(datasets) == 3 else None
    return Data(train, validation, test, _example_batch(train, training), tuple(notices))


def _check_shares(training: TrainingConfig, sharding: Sharding) -> None:
    if training.batch_size % sharding.world:
        raise RecipeError(
            Problem(
                "E-RECIPE-BATCH-SHARES",
                "config.batch_size: a batch is shared out equally over the processes",
                expected=f"a multiple of {sharding.world}",
                received=str(training.batch_size),
            )
        )


def _unchanged(loader: Any) -> Any:
    return loader


def _is_map_style(dataset: Any) -> bool:
    return hasattr(dataset, "__getitem__") and not isinstance(dataset, DataLoader | IterableDataset)


def _loader_source(
    dataset: Any, size: int, training: TrainingConfig, setup: Callable[[Any], Any]
) -> LoaderSource:
    if isinstance(dataset, IterableDataset):
        dataset = DataLoader(dataset, batch_size=size, num_workers=training.num_workers)
    return LoaderSource(setup(dataset), training.seed)


def _example_batch(train: Source, training: TrainingConfig) -> Any:
    """The first samples of epoch 0, in a batch of at most eight."""
    if isinstance(train, LoaderSource):
        return next(train.batches(0)).data
    assert isinstance(train, DatasetSource)
    count = min(EXAMPLE_SAMPLES, training.batch_size, train.count)
    chunk = train.chunks(range(train.count))[0][:count]
    return next(guarded(train.dataset[key] for key in [(0, 0, chunk)]))
