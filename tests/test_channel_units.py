"""``min_channels`` and ``round_to`` count channels where a group's unit is several of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from slimcli.algorithms.csgd.config import CSGDConfig
from slimcli.algorithms.csgd.planning import make_plan as plan_csgd
from slimcli.algorithms.resrep.config import ResRepConfig
from slimcli.algorithms.resrep.planning import make_plan as plan_resrep
from slimcli.channel_units import channels_per_unit
from slimcli.compressor import Plan, Schedule
from slimcli.network.example import Example
from slimcli.network.structure import analyze

from .algorithms.resrep_networks import conv_bn


class Grouped(nn.Module):
    """A conv of 8 groups of 8 channels: the smallest unit is one channel of each."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.grouped = conv_bn(3, 64), conv_bn(64, 64, groups=8)
        self.last, self.head = conv_bn(64, 32, 1), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.grouped(self.wide(x))).mean((2, 3)))


def example() -> Example:
    images = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    return Example(images, lambda model, batch: model(batch))


def planned(algorithm: str, **keys: int) -> Plan:
    torch.manual_seed(0)
    schedule = Schedule(40, 20, (0.05,) * 800)
    if algorithm == "resrep":
        config = ResRepConfig(prune_rate=0.5, auto_find_module_strategy="all_conv", **keys)
        return plan_resrep(config, Grouped().eval(), example(), schedule)
    merging = CSGDConfig(cluster_percent=0.9, auto_find_module_strategy="all_conv", **keys)
    return plan_csgd(merging, Grouped().eval(), example(), schedule)


def test_a_unit_of_a_grouped_conv_has_a_channel_of_each_group() -> None:
    counts = channels_per_unit(analyze(Grouped().eval(), example()))
    assert counts == {"wide.1": (8,), "grouped.1": (8,), "last.1": (1,), "head": (1,)}


@pytest.mark.parametrize(
    ("keys", "widths"),
    [
        ({"min_channels": 8, "round_to": 8}, {"wide.0": 8, "grouped.0": 8, "last.0": 8}),
        ({"min_channels": 12, "round_to": 4}, {"wide.0": 16, "grouped.0": 16, "last.0": 12}),
        ({"min_channels": 17, "round_to": 1}, {"wide.0": 24, "grouped.0": 24, "last.0": 17}),
    ],
)
@pytest.mark.parametrize("algorithm", ["resrep", "csgd"])
def test_limits_of_grouped_layers_are_channels(
    algorithm: str, keys: dict[str, int], widths: dict[str, int]
) -> None:
    rows = planned(algorithm, **keys).layers
    assert {row.name: row.channels_minimum for row in rows if row.name in widths} == widths


def test_a_coarse_multiple_is_named_by_the_refusal() -> None:
    refusal = planned("resrep", round_to=64, groups_size=64, min_channels=8).refusals[0]
    assert "at min_channels 8 and round_to 64 the 3 prunable groups hold at most" in refusal.what
    assert refusal.fix == "round_to: 32"
