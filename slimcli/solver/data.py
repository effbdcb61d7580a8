"""From what ``dataset_generator`` returns to batches on the device, the same on every resume."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.data import default_collate as torch_collate

from slimcli.errors import Problem, RunError, SlimError
from slimcli.network.count import samples_in
from slimcli.recipe.binding import RAISED, hook_failed
from slimcli.solver.interrupts import StopRequested
from slimcli.solver.job import JobHooks
from slimcli.solver.randomness import derive, epoch_order, seed_all, untouched_rng

Collate = Callable[[list[Any]], Any]


@dataclass(frozen=True)
class Batch:
    """One batch and the number of samples in it, over all processes where it was dealt out."""

    data: Any
    size: int


class Source(Protocol):
    """Batches of one epoch; ``skip`` starts later, as if the first ones had been taken."""

    def __len__(self) -> int:
        """Batches in one epoch."""

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, on the CPU."""


@dataclass(frozen=True)
class Sharding:
    """Which part of each batch this process takes."""

    rank: int = 0
    world: int = 1


@dataclass(frozen=True)
class LoaderSettings:
    """How batches are made of samples.

    Attributes:
        batch_size: Samples a batch, over all processes.
        shuffle: A new order each epoch; False: the dataset's own.
        drop_single: Leave out a last batch that has one sample (a process): BatchNorm can't
            train on it.
        seed: The run's seed.
        workers: Loader processes.
        collate: Makes a batch of a list of samples.
        sharding: This process's part.
    """

    batch_size: int
    shuffle: bool
    drop_single: bool
    seed: int
    workers: int
    collate: Collate | None = None
    sharding: Sharding = Sharding()


BatchKey = tuple[int, int, tuple[int, ...]]
"""Epoch, number of the batch in it, and the samples it is made of."""


class SeededBatches(Dataset[Any]):
    """A dataset of whole batches: the key says which samples, and seeds what they draw."""

    def __init__(self, dataset: Any, collate: Collate, seed: int) -> None:
        self.dataset = dataset
        self.collate = collate
        self.seed = seed

    def __getitem__(self, key: BatchKey) -> Any:
        epoch, number, indices = key
        seed_all(self.seed, "data", epoch, number)
        if hasattr(self.dataset, "__getitems__"):
            return self.collate(self.dataset.__getitems__(list(indices)))
        return self.collate([self.dataset[index] for index in indices])


class DatasetSource:
    """Batches of a map-style dataset."""

    def __init__(self, dataset: Any, settings: LoaderSettings) -> None:
        self.settings = settings
        self.count = len(dataset)
        self.dataset = SeededBatches(dataset, settings.collate or torch_collate, settings.seed)

    def chunks(self, order: Sequence[int]) -> list[tuple[int, ...]]:
        """The samples of each batch, over all processes."""
        size, world = self.settings.batch_size, self.settings.sharding.world
        chunks = [tuple(order[start : start + size]) for start in range(0, len(order), size)]
        if chunks and self.settings.shuffle:  # training: equal shares in every process
            chunks[-1] = chunks[-1][: len(chunks[-1]) // world * world]
            smallest = 2 * world if self.settings.drop_single else 1
            if len(chunks[-1]) < smallest and (len(chunks) > 1 or not chunks[-1]):
                chunks.pop()
        return chunks

    def __len__(self) -> int:
        return len(self.chunks(range(self.count)))

    def left_out(self) -> int:
        """Samples of an epoch that no batch holds."""
        return self.count - sum(len(chunk) for chunk in self.chunks(range(self.count)))

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """Batches from number ``skip`` on; each process gets its own slice of every batch."""
        settings = self.settings
        order: Sequence[int] = range(self.count)
        if settings.shuffle:
            order = epoch_order(settings.seed, epoch, self.count)
        chunks = self.chunks(order)[skip:]
        keys = [(epoch, number, self._share(chunk)) for number, chunk in enumerate(chunks, skip)]
        loader: DataLoader[Any] = DataLoader(
            self.dataset,
            batch_size=None,
            sampler=keys,  # a key says more than an index: it is for SeededBatches
            num_workers=settings.workers,
            collate_fn=_as_it_is,
            worker_init_fn=_ignore_interrupts,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(derive(settings.seed, "workers", epoch)),
        )
        for chunk, data in zip(chunks, guarded(loader), strict=True):
            yield Batch(data, len(chunk))

    def _share(self, chunk: tuple[int, ...]) -> tuple[int, ...]:
        sharding = self.settings.sharding
        if not self.settings.shuffle or sharding.world == 1:
            return chunk
        share = len(chunk) // sharding.world
        return chunk[sharding.rank * share : (sharding.rank + 1) * share]


class LoaderSource:
    """Batches of a DataLoader the user made, replayed the same way on every resume."""

    def __init__(self, loader: Any, seed: int) -> None:
        self.loader = loader
        self.seed = seed

    def __len__(self) -> int:
        return len(self.loader)

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """Batches from number ``skip`` on; the ones before are drawn and thrown away."""
        seed_all(self.seed, "loader", epoch)
        generator = getattr(self.loader, "generator", None)
        if generator is not None:
            generator.manual_seed(derive(self.seed, "loader", epoch))
        sampler: Any = getattr(self.loader, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        iterator = guarded(self.loader)
        for number in itertools.count():
            seed_all(self.seed, "data", epoch, number)
            data = next(iterator, _END)
            if data is _END:
                return
            if number >= skip:
                yield Batch(data, self._size(number, data))

    def _size(self, number: int, data: Any) -> int:
        size = getattr(self.loader, "batch_size", None)
        dataset: Any = getattr(self.loader, "dataset", None)
        if size and not isinstance(dataset, IterableDataset) and hasattr(dataset, "__len__"):
            # A sampler may visit fewer or more samples than the dataset has.
            sampler: Any = getattr(self.loader, "sampler", dataset)
            return max(1, min(int(size), len(sampler) - number * int(size)))
        return batch_size_of(data)


_END = object()


def _as_it_is(batch: Any) -> Any:
    return batch


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; only the main one may act on it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def guarded(items: Iterable[Any]) -> Iterator[Any]:
    """The same items; what the user's data set raises is told as an error of the user's hook.

    Raises:
        RunError: A sample could not be read, or samples could not be put into one batch.
    """
    # At once, and not with the first item: a loader draws its seed here.
    return _each(_of_users(iter, items))


def _each(iterator: Iterator[Any]) -> Iterator[Any]:
    while (item := _of_users(next, iterator, _END)) is not _END:
        yield item


def _of_users(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except (SlimError, StopRequested):
        raise
    except RAISED as error:
        raise hook_failed("dataset_generator", error) from error


def has_more(rest: Iterator[Batch]) -> bool:
    """Whether a batch is left; looking for it leaves the random states as they were."""
    with untouched_rng():
        return next(rest, None) is not None


def wrong_length(epoch: int, found: int, length: int) -> str:
    """The warning about a training loader whose length is not the number of its batches.

    >>> print(wrong_length(1, 17, 32)[:73])
    the training loader gave 17 batches in epoch 1 and its length says 32: 15
    >>> print(wrong_length(1, 10, 10)[:74])
    the training loader gave more batches in epoch 1 than the 10 its length sa
    """
    fix = "give it a `__len__` that counts what it yields"
    if found < length:
        return (
            f"the training loader gave {found} batches in epoch {epoch} and its length says "
            f"{length}: {length - found} planned batches an epoch are missing. Each epoch starts "
            f"at its planned learning rate, but the budgets of the plan count with them; {fix}"
        )
    return (
        f"the training loader gave more batches in epoch {epoch} than the {length} its length "
        f"says: those from number {length + 1} on are left out of each epoch, because the schedule "
        f"is planned by the length; {fix}"
    )


def no_batches(hooks: JobHooks, epoch: int, length: int) -> RunError:
    """The error of a training loader that is used up."""
    return RunError(
        Problem(
            "E-DATA-EMPTY",
            f"the training loader gave no batch in epoch {epoch}",
            hooks.where("dataset_generator"),
            expected=f"the {length} batches its length says",
            received="none",
            fix="an `__iter__` that starts again each time it is called, not one iterator",
        )
    )


def batch_size_of(data: Any) -> int:
    """Samples in a batch nobody counted; 1 where nothing in it says how many.

    >>> batch_size_of({"image": torch.zeros(4, 3), "label": torch.zeros(4)})
    4
    """
    if is_dataclass(data) and not isinstance(data, type):
        data = {each.name: getattr(data, each.name) for each in fields(data)}
    try:
        return samples_in(data)
    except ValueError:
        return 1
