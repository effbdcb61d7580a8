"""What leaves torch as numpy arrays or lists keeps its channels, with the line where it leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slimcli.network.structure import analyze
from slimcli.network.structure.modes import output_tensors

from .proving import EXACT, prepared, prunable, zeroed_and_cut
from .structures import Net, conv_bn, image

LEAVING: dict[str, Callable[[Tensor], Any]] = {
    "numpy": lambda x: x.detach().cpu().numpy(),
    "numpy by force": lambda x: x.numpy(force=True),
    "asarray": lambda x: np.asarray(x.detach()),
    "a list": lambda x: x.detach().tolist(),
    "shared memory": lambda x: np.from_dlpack(x.detach()),
    "a copy": lambda x: {"maps": x.clone().numpy().copy()},
    "changed on the way": lambda x: [x.permute(0, 2, 3, 1).numpy() * 2 + 1],
}


class Leaving(Net):
    """What ``a`` gives leaves torch beside the scores."""

    def __init__(self, leave: Callable[[Tensor], Any]) -> None:
        super().__init__(12)
        self.a, self.b = conv_bn(8, 16), conv_bn(16, 12)
        self.leave = leave

    def forward(self, x: Tensor) -> Any:
        x = self.a(self.stem(x))
        return self.head(self.b(x).mean((2, 3))), self.leave(x)


@pytest.mark.parametrize("way", LEAVING)
def test_channels_that_leave_torch_stay(way: str) -> None:
    torch.manual_seed(0)
    model, example = prepared(Leaving(LEAVING[way]), image())
    structure = analyze(model, example)
    assert structure.notes == ()
    assert [group.name for group in prunable(structure)] == ["stem.1", "b.1"]
    reason = structure.group("a.1").frozen_reason
    assert reason.startswith("channels leave torch at network/test_structure_arrays.py:")
    assert zeroed_and_cut(model, example, prunable(structure), 0)[0] <= EXACT


def test_scores_as_an_array_are_an_output() -> None:
    class Scores(Leaving):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x)[0].softmax(1).numpy()

    torch.manual_seed(0)
    model, example = prepared(Scores(lambda x: None), image())
    structure = analyze(model, example)
    assert [group.name for group in prunable(structure)] == ["stem.1", "a.1", "b.1"]
    assert structure.group("head").frozen_reason.startswith("softmax over channels")
    assert zeroed_and_cut(model, example, prunable(structure), 0)[0] <= EXACT


def test_channels_that_come_back_from_an_array_stay() -> None:
    class Back(Leaving):
        def forward(self, x: Tensor) -> Any:
            x = torch.from_numpy(np.clip(self.a(self.stem(x)).numpy(), 0, 1))
            return self.head(self.b(x).mean((2, 3)))

    torch.manual_seed(0)
    model, example = prepared(Back(lambda x: None), image())
    structure = analyze(model, example)
    assert [group.name for group in prunable(structure)] == ["stem.1", "b.1"]
    assert "np.clip(self.a(self.stem(x)).numpy(), 0, 1)" in structure.group("a.1").frozen_reason


def test_arrays_of_numbers_are_compared_like_tensors() -> None:
    reverse = np.arange(3.0)[::-1]
    found = list(output_tensors({"numbers": [reverse, np.array(["a"]), np.array([True])]}))
    assert not list(output_tensors([np.zeros(2, ">f4"), np.zeros(2, np.longdouble)]))
    assert [each.tolist() for each in found] == [[2.0, 1.0, 0.0], [True]]
    assert not np.shares_memory(found[0].numpy(), reverse)
