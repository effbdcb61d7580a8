"""Code that asks for the mode only to tell a dropout costs no second run; any other code does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import dropout

from slimcli.network.example import Example
from slimcli.network.structure import analyze

PICTURES = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1))


class Layer(nn.Module):
    """A layer with a rate."""

    rate = 0.5


class Keyword(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, p=self.rate, training=self.training)


class Place(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.dropout1d(x, self.rate, self.training)


class Imported(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.rate, self.training).relu()


class Attention(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            x, x, x, dropout_p=self.rate if self.training else 0.0
        )


class NotTraining(Layer):
    def forward(self, x: Tensor) -> Tensor:
        rate = self.rate
        return F.scaled_dot_product_attention(x, x, x, None, 0.0 if not self.training else rate)


class Rate(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.rate if self.training else 0)


class Torch(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Recurrent(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(8, 8, num_layers=2, dropout=0.4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]


class Also(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, self.rate, self.training)
        return x if self.training else x.relu()


class Branch(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x) if self.training else x


class Made(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.chosen(x) if self.training else 0.0)

    def chosen(self, x: Tensor) -> float:
        self.seen = x
        return self.rate


class Alpha(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return F.alpha_dropout(x, self.rate, self.training)


class Own(Layer):
    def forward(self, x: Tensor) -> Tensor:
        F = SimpleNamespace(dropout=lambda x, p, training: x.relu() if training else x)
        return F.dropout(x, self.rate, self.training)


class Input(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x.relu() if self.training else x, self.rate, self.training)


class Named(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, self.rate, self.training)
        return x if getattr(self, "training") else x.relu()  # noqa: B009


class Unpacked(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(*(x.clone(), 0.5, True), self.rate if self.training else 0)  # type: ignore


class Lambda(Layer):
    def forward(self, x: Tensor) -> Tensor:
        drop = lambda each: F.dropout(each, self.rate, self.training)  # noqa: E731
        return drop(x)


class Textless(Layer):
    exec("def forward(self, x): return F.dropout(x, self.rate, self.training)")


ONCE = [Keyword, Place, Imported, Attention, NotTraining, Rate, Torch, Recurrent]
TWICE = [Also, Branch, Made, Alpha, Own, Input, Named, Unpacked, Lambda, Textless]


@pytest.mark.parametrize(
    ("kind", "count"), [*((each, 1) for each in ONCE), *((each, 2) for each in TWICE)]
)
def test_the_model_runs(kind: type[Layer], count: int) -> None:
    runs = []

    def predict(model: nn.Module, batch: Tensor) -> Any:
        runs.append(vars(model)["training"])
        return model(batch)

    net = nn.Sequential(nn.Linear(8, 8), kind(), nn.Linear(8, 3))
    analyze(net, Example(PICTURES, predict), trial=False)
    assert runs == [False, True][:count]


def test_a_head_behind_a_dropout_that_is_told_the_mode_is_found() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.drop, self.b = nn.Linear(8, 6), Also(), nn.Linear(6, 3)
            self.extra = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Any:
            x = F.dropout(self.a(x), 0.5, self.training)
            return (self.b(x), self.extra(x)) if self.training else self.b(x)

    structure = analyze(Net(), Example(PICTURES, lambda model, x: model(x)))
    assert "extra.weight" in {slot.tensor for slot in structure.group("a").slots}
