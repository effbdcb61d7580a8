"""Where else than on the example a cut must hold: on other batches, and in train mode.

A constant that a bias takes up was measured on one batch. Where the code makes numbers of a batch
(``x.mean().item()``, ``height * width``, a number that came with it), the next batch may give
another constant.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimcli.network.count import samples_in
from slimcli.network.example import Example
from slimcli.network.nested import mapped, tensors_in
from slimcli.network.structure.remembering import Change
from slimcli.network.structure.train_mode import set_train_mode

NO_OTHER = (
    "the code makes numbers of sizes or values, and the model takes no batch but the example: "
    "that cuts are exact on other batches was not tried"
)
OUT_OF_REACH = (
    "slim finds no tensors in the batch, which is no tensor, list, tuple, dict or dataclass; other "
    "batches were not tried either"
)
ONE_NUMBER = (
    "of one sample a constant is a single number, and the model takes no other values: that it is "
    "the same for them was not tried"
)

SCALE = 1.3
SHIFT = 0.3
"""What zeros become: they would hide what is multiplied with them."""
CROPPED = (1, 3)
"""Rows and columns that are left out: an odd number each, so that even sizes become odd ones."""


@dataclass(frozen=True)
class Situation:
    """How the model is run.

    Attributes:
        example: The batch.
        trains: The model is in train mode.
        undoes: What earlier runs left in attributes is taken away first.
        written: Names of parameters that the code writes.
    """

    example: Example
    trains: bool = False
    undoes: Sequence[Change] = ()
    written: frozenset[str] = frozenset()

    @contextlib.contextmanager
    def entered(self, model: nn.Module) -> Iterator[None]:
        """Meanwhile the model is in this mode; what it does to its tensors is undone."""
        for change in self.undoes:
            change.undo()
        if not self.trains:
            yield
            return
        tensors = [*model.buffers(), *(p for n, p in model.named_parameters() if n in self.written)]
        before = [each.detach().clone() for each in tensors]
        # With those that are None yet, which named_buffers leaves out.
        held = [(each, dict(vars(each).get("_buffers", {}))) for each in model.modules()]
        set_train_mode(model)
        try:
            yield
        finally:
            model.eval()
            with torch.no_grad():
                for tensor, numbers in zip(tensors, before, strict=True):
                    tensor.copy_(numbers)
            for module, buffers in held:
                _restore(module, buffers)


def _restore(module: nn.Module, buffers: dict[str, Tensor | None]) -> None:
    """Other tensors may have been put in the places of buffers, none, or some where none was."""
    now = dict(vars(module).get("_buffers", {}))
    for name in now.keys() - buffers.keys():
        delattr(module, name)
    for name, buffer in buffers.items():
        if name not in now or now[name] is not buffer:
            if hasattr(module, name):
                delattr(module, name)
            module.register_buffer(name, buffer)


def other_batches(batch: Any) -> Iterator[Any]:
    """The most different batch first; a model may refuse other image sizes, or other sample counts.

    >>> [tuple(each.shape) for each in other_batches(torch.ones(2, 3, 16, 16))]
    [(3, 3, 15, 13), (3, 3, 16, 16), (2, 3, 16, 16)]
    """
    scaled = mapped(batch, _scaled)
    try:
        samples = samples_in(batch)
    except ValueError:
        samples = 0
    more = mapped(scaled, lambda each: _with_one_more(each, samples))
    yield mapped(more, _cropped)
    if any(each.dim() == 3 for each in tensors_in(batch)):
        yield mapped(more, lambda each: _shorter(each, -1))  # signals
        yield mapped(more, lambda each: _shorter(each, 1))  # sequences
    yield more
    yield scaled


def unlike(batch: Any) -> Any:
    """A batch of the same sizes with other values at all places.

    >>> unlike(torch.tensor([[1.0, 2.0]]))
    tensor([[2.6000, 1.3000]])
    """

    def turned(each: Any) -> Any:
        return each.flip(-1) if isinstance(each, Tensor) and each.dim() > 1 else each

    return mapped(mapped(batch, turned), _scaled)


def holds_numbers(batch: Any) -> bool:
    """Are there Python numbers in a batch?

    >>> holds_numbers([torch.ones(2), {"time": 0.5}]), holds_numbers([torch.ones(2), True])
    (True, False)
    """
    kinds: set[type] = set()

    def note(value: Any) -> None:
        kinds.add(type(value))

    mapped(batch, note)
    return not kinds.isdisjoint((int, float))


def _scaled(value: Any) -> Any:
    if isinstance(value, float):
        return value * SCALE if value else SHIFT
    if isinstance(value, Tensor) and value.is_floating_point():
        return value * SCALE if bool(value.any()) else value + SHIFT
    return value


def _with_one_more(value: Any, samples: int) -> Any:
    if isinstance(value, Tensor) and value.dim() and 0 < value.shape[0] == samples:
        return torch.cat([value, value[:1]])
    return value


def _cropped(value: Any) -> Any:
    is_image = isinstance(value, Tensor) and value.dim() > 3
    if not is_image or min(value.shape[-2:]) <= 2 * CROPPED[1]:
        return value
    return value[..., : -CROPPED[0], : -CROPPED[1]]


def _shorter(value: Any, dim: int) -> Any:
    is_row = isinstance(value, Tensor) and value.dim() == 3 and value.shape[dim] > 2 * CROPPED[1]
    return value.narrow(dim, 0, value.shape[dim] - CROPPED[1]) if is_row else value
