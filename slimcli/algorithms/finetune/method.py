"""Plain training behind the contract: the base model, and the control of every comparison.

Paper: none. Differs from the paper: nothing to differ from; the loop is torch's own, and what the
compressor adds is counting before training and folding after it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from torch import nn

from slimcli.algorithms.finetune.config import ALGORITHM
from slimcli.compressor import AlgorithmInfo, Compressor, LayerPlan, Plan, Schedule
from slimcli.network import count, fuse
from slimcli.network.copying import deep_copy
from slimcli.network.example import Example
from slimcli.network.structure import analyze


class FinetuneCompressor(Compressor):
    """Compresses nothing; at the end it folds the norms that the trace shows foldable."""

    info: ClassVar[AlgorithmInfo] = ALGORITHM
    compresses: ClassVar[bool] = False

    _pairs: tuple[tuple[str, str], ...] = ()

    def plan(self, model: nn.Module, example: Example, schedule: Schedule) -> Plan:
        """Count, and list the layers; no channel will go."""
        structure = analyze(model, example, trial=False)
        pairs = tuple((pair.conv, pair.norm) for pair in structure.conv_batch_norms)
        layers = [
            LayerPlan(
                name=row.name,
                type=row.type,
                channels=row.channels,
                channels_minimum=row.channels,
                group=row.group,
                frozen_reason=row.frozen_reason,
            )
            for row in structure.layers
        ]
        return Plan(
            layers=layers,
            macs=structure.macs,
            params=count.count_params(model),
            private=pairs,
        )

    def prepare(self, model: nn.Module, example: Example, plan: Plan) -> nn.Module:
        """The model as it is; which norms can be folded is remembered."""
        self._pairs = plan.private
        return model

    def handover(self, model: nn.Module, batches: Iterable[Example]) -> nn.Module:
        """A copy."""
        return deep_copy(model)

    def deploy(self, model: nn.Module) -> nn.Module:
        """A copy in eval mode whose norms are folded into the convolutions before them."""
        plain = deep_copy(model).eval()
        fuse.fold_pairs(plain, self._pairs)
        return plain
