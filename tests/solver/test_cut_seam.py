"""A cut in training is measured: what the model predicts before and after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from slimcli.network import surgery
from slimcli.network.cuts import Cut, SlotCut
from slimcli.network.example import Example
from slimcli.solver import cut_seam


def cut_of(*kept: int) -> Cut:
    sources = tuple((index,) for index in kept)
    slots = [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)]
    return Cut("0", 3, len(kept), tuple(SlotCut(name, dim, sources) for name, dim in slots))


def heard(*kept: int) -> list[tuple[str, dict[str, Any]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2), nn.Dropout(0.5))
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0, 0
    example = Example(torch.randn(5, 4), lambda network, batch: network(batch))
    events: list[tuple[str, dict[str, Any]]] = []
    state = torch.get_rng_state()
    with cut_seam.measured(model, example, lambda name, **values: events.append((name, values))):
        surgery.apply(model, [cut_of(*kept)])
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert model[0].out_features == len(kept)
    return events


def test_a_cut_of_zero_channels_is_exact_and_said_to_be():
    [(name, seam)] = heard(0, 2)
    assert name == "verified"
    assert (seam["from"], seam["to"], seam["ok"]) == ("uncut", "cut", True)
    assert seam["max_abs"] <= 1e-6  # float32: the same sums in another order


def test_a_cut_of_channels_that_are_not_zero_is_a_warning():
    (_, seam), (name, notice) = heard(1, 2)
    assert seam["ok"] is False
    assert seam["max_abs"] > 1e-2
    assert (name, notice["level"]) == ("notice", "warning")
    assert "the cut changes what the model predicts: uncut -> cut" in notice["text"]
