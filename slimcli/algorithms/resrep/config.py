"""Keys of ``resrep``. No torch here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from slimcli.compressor import AlgorithmConfig, AlgorithmInfo


class ResRepConfig(AlgorithmConfig):
    """How much goes, how fast it is chosen, and how hard it is driven to zero."""

    prune_rate: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="fraction of the deployed model's MACs to remove (0.5 halves them); 0 to 1",
    )
    warmup_epoch: int = Field(
        5, ge=0, description="epochs before the first channel is masked; less than epoch"
    )
    compactor_momentum: float = Field(
        0.99, ge=0, lt=1, description="momentum of the compactors, which have no weight decay"
    )
    lasso_decay: float | Literal["auto"] = Field(
        1e-4,
        description="strength of the group lasso on the compactors' rows, more than 0; auto: 1e-4, "
        "and on masked rows whatever takes them to zero inside the schedule",
    )
    prune_groups: int = Field(
        1, ge=1, description="blocks of channels masked at one update, at most; 1 or more"
    )
    groups_size: int = Field(
        8, ge=1, description="channels of one layer in a block, at most; 1 or more"
    )
    min_channels: int = Field(8, ge=1, description="channels every layer keeps; 1 or more")
    prune_interval: int | Literal["auto"] = Field(
        "auto",
        description="optimizer steps between two updates of the masks, 1 or more; auto: evenly, so "
        "that the last mask leaves the time its rows need to reach zero",
    )
    prune_module_names: tuple[str, ...] | None = Field(
        None,
        description="norm or conv modules to prune; default: found by the strategy; [] prunes none",
    )
    auto_find_module_strategy: Literal["linear_bn", "all_bn", "linear_conv", "all_conv"] = Field(
        "linear_bn",
        description="linear_bn, linear_conv: chains only (first and second conv of a bottleneck); "
        "all_bn, all_conv: every layer that can be cut exactly, residual-coupled ones included; "
        "layers are named by their norm (bn) or by themselves (conv)",
    )
    skip: tuple[str, ...] = Field(
        (), description="patterns of layers or groups to leave alone (`layer4.*`); `*` is all"
    )
    prune_ratios: dict[str, Annotated[float, Field(ge=0, lt=1)]] = Field(
        {},
        description="pattern of layers -> the largest fraction of their channels that may be "
        "removed ({layer4.*: 0.75}); other layers have no such limit",
    )
    round_to: int | None = Field(
        None,
        ge=1,
        description="widths of pruned layers are multiples of this many channels; divides "
        "groups_size",
    )

    @model_validator(mode="after")
    def _ranges_of_keys_that_may_be_words(self) -> ResRepConfig:
        """Numbers next to ``auto``, and keys that limit each other."""
        if self.lasso_decay != "auto" and not 0 < self.lasso_decay <= 1:
            raise ValueError(
                f"lasso_decay: expected auto or more than 0 up to 1, received {self.lasso_decay}"
            )
        if self.prune_interval != "auto" and self.prune_interval < 1:
            raise ValueError(
                f"prune_interval: expected auto or 1 and more, received {self.prune_interval}"
            )
        if self.round_to is not None and self.groups_size % self.round_to:
            raise ValueError(
                f"groups_size: expected a multiple of round_to ({self.round_to}), received "
                f"{self.groups_size}; fix: groups_size: {self.round_to}"
            )
        return self


ALGORITHM = AlgorithmInfo(
    name="resrep",
    summary="adds an identity 1x1 compactor behind each layer, drives rows of it to zero, folds it",
    paper="ResRep: Lossless CNN Pruning via Decoupling Remembering and Forgetting, "
    "arXiv:2007.03260",
    config=ResRepConfig,
    compressor="slimcli.algorithms.resrep.method:ResRepCompressor",
    solver="ResRepSolver",
    aliases=("torchslim.pruning.resrep.ResRepSolver",),
    key_aliases={"group_size": "groups_size"},
    example={
        "lasso_decay": "auto",
        "warmup_epoch": 1,
        "prune_rate": 0.3,
        "groups_size": 2,
        "min_channels": 2,
        "auto_find_module_strategy": "all_bn",
    },
)
