"""Eval mode for a while: all of a model, whatever its own ``train`` says, and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from slimcli.network.evaluating import evaluating


class Restless(nn.Module):
    """Its dropout goes on in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def train(self, mode: bool = True) -> Restless:
        super().train(mode)
        self.drop.train()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x)


def test_a_part_that_its_model_keeps_in_train_mode_is_in_eval_mode_too() -> None:
    model, x = Restless().eval(), torch.ones(100)
    assert model.drop.training
    with evaluating(model):
        assert torch.equal(model(x), x)
    assert model.drop.training
    assert not model.training


def test_modes_come_back_when_something_is_raised() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())

    def fail() -> None:
        with evaluating(model, None):
            assert not model[0].training
            raise ValueError("seen")

    with pytest.raises(ValueError, match="seen"):
        fail()
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
