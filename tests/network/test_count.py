"""Counting: hand counts, and a figure that everybody knows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from slimcli.network.count import count_macs, count_params, samples_in
from slimcli.network.example import Example


def macs(model: nn.Module, *shape: int):
    return count_macs(model, Example(torch.randn(*shape), lambda module, data: module(data)))


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), (2, 3, 10, 12), 8 * 3 * 9 * 10 * 12),
        (nn.Conv2d(4, 8, 3, stride=2, groups=2), (3, 4, 9, 9), 8 * 2 * 9 * 4 * 4),
        (nn.Conv2d(8, 8, 3, groups=8), (1, 8, 5, 5), 8 * 9 * 9),
        (nn.Conv1d(4, 6, 5), (2, 4, 9), 6 * 4 * 5 * 5),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5), 6 * 4 * 9 * 25),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5), 6 * 2 * 9 * 25),
        (nn.Linear(7, 5), (4, 7), 35),
        (nn.Linear(7, 5), (4, 3, 7), 3 * 35),
        (nn.ReLU(), (4, 3), 0),
    ],
)
def test_one_layer_costs_what_a_hand_count_says(layer, shape, expected) -> None:
    assert macs(layer, *shape).total == expected


def test_attention_costs_its_projections_and_products() -> None:
    class SelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.attention(tokens, tokens, tokens, need_weights=False)[0]

    projections, products = 4 * 8 * 8 * 5, 2 * 5 * 5 * 8
    assert macs(SelfAttention(), 3, 5, 8).total == projections + products


def test_modules_are_counted_by_path_with_what_they_contain() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.ReLU(), nn.Linear(6, 2)))
    count = macs(model, 5, 4)
    assert count.by_module == {"": 36, "0": 24, "1": 12, "1.1": 12}
    assert count.total == 36


def test_counting_leaves_modes_and_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model[0].eval()
    macs(model, 2, 3, 4, 4)
    assert (model.training, model[0].training, model[1].training) == (True, False, True)
    assert model[1].num_batches_tracked == 0


def test_resnet50_at_224_costs_4_089_giga() -> None:
    from torchvision.models import resnet50

    assert macs(resnet50(), 1, 3, 224, 224).total == 4_089_184_256


def test_shared_parameters_count_once() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    assert count_params(nn.Sequential(first, second)) == 9 + 3 + 3


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        (torch.zeros(6, 2), 6),
        ([torch.zeros(6, 2), torch.zeros(6)], 6),
        ({"image": torch.zeros(5, 2), "label": torch.zeros(5)}, 5),
        (([torch.zeros(3, 4, 4)] * 2, [{"boxes": torch.zeros(1, 4)}] * 2), 2),
        (({"ids": torch.zeros(7, 3)}, torch.zeros(7)), 7),
        (((torch.zeros(9, 3), torch.zeros(9, 3)), torch.zeros(9)), 9),
        ((np.zeros((4, 3)), np.zeros(4)), 4),
    ],
)
def test_the_number_of_samples_is_read_from_the_batch(batch, samples) -> None:
    assert samples_in(batch) == samples


def test_a_batch_without_tensors_has_no_number_of_samples() -> None:
    with pytest.raises(ValueError, match="no tensor"):
        samples_in(({}, 3))
