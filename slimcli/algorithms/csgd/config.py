"""Keys of ``csgd``. No torch here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from slimcli.compressor import AlgorithmConfig, AlgorithmInfo


class CSGDConfig(AlgorithmConfig):
    """How many filters go, how hard the rest is pulled together, and when they merge."""

    cluster_percent: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="fraction of each layer's channels that is REMOVED (0.25 keeps 48 of 64); "
        "required unless prune_rate is given",
    )
    prune_rate: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="fraction of the MACs to remove; the planner finds the fraction per layer",
    )
    allocation: Literal["per_layer", "uniform"] = Field(
        "per_layer",
        description="how prune_rate is spread: per_layer takes more from layers whose filters are "
        "alike, for the MACs that saves; uniform takes one fraction from all",
    )
    prune_epoch: int | Literal["auto"] = Field(
        "auto",
        description="the merge comes after this many full epochs; auto: as soon as the filters "
        "have met, at most 0.8 of epoch",
    )
    centri_strength: float | Literal["auto"] = Field(
        3e-3, description="pull towards the cluster mean; auto: what the schedule needs"
    )
    vector_strength: Literal["full"] | float = Field(
        "full",
        description="factor on the pull of BN scale, BN shift and conv bias: full is 1, the paper "
        "has 0.1",
    )
    cluster_method: Literal["kmeans", "even"] = Field(
        "kmeans", description="kmeans on the BN-scaled kernels of the whole group, or even runs"
    )
    min_channels: int = Field(1, ge=1, description="channels every layer keeps")
    auto_find_module_strategy: Literal["linear_conv", "all_conv"] = Field(
        "linear_conv",
        description="linear_conv: chains only; all_conv: residual-coupled layers too",
    )
    prune_module_names: tuple[str, ...] | None = Field(
        None, description="convs to prune; default: found by the strategy; [] prunes nothing"
    )

    skip: tuple[str, ...] = Field(
        (), description="patterns of layers or groups to leave alone (`layer4.*`); `*` is all"
    )
    prune_ratios: dict[str, Annotated[float, Field(ge=0, lt=1)]] = Field(
        {},
        description="pattern of layers -> the fraction of their channels that is removed, exactly, "
        "instead of cluster_percent ({layer4.*: 0.75}); min_channels and round_to still hold",
    )
    round_to: int | None = Field(
        None,
        ge=1,
        description="widths of pruned layers are multiples of this many channels, rounded up",
    )

    @model_validator(mode="after")
    def _one_amount(self) -> CSGDConfig:
        """Exactly one key says how much goes, unless nothing is selected."""
        if self.cluster_percent is not None and self.prune_rate is not None:
            raise ValueError("cluster_percent and prune_rate both say how much goes; fix: keep one")
        if self.cluster_percent is not None and self.allocation != "per_layer":
            raise ValueError(
                "allocation spreads prune_rate, and cluster_percent is given; fix: remove "
                "allocation, or give prune_rate instead of cluster_percent"
            )
        if self.cluster_percent is None and self.prune_rate is None:
            raise ValueError(
                "cluster_percent is required; fix: cluster_percent: 0.25 (removes a quarter of "
                "the channels of each layer), or prune_rate: 0.5 (removes half of the MACs)"
            )
        return self

    @model_validator(mode="after")
    def _positive_numbers(self) -> CSGDConfig:
        """Ranges of the keys that may also be words."""
        if self.prune_epoch != "auto" and self.prune_epoch < 0:
            raise ValueError(
                f"prune_epoch: expected auto or 0 and more, received {self.prune_epoch}"
            )
        if self.centri_strength != "auto" and self.centri_strength <= 0:
            raise ValueError(
                f"centri_strength: expected auto or more than 0, received {self.centri_strength}"
            )
        if self.vector_strength != "full" and not 0 < self.vector_strength <= 1:
            raise ValueError(
                f"vector_strength: expected full or more than 0 up to 1, "
                f"received {self.vector_strength}"
            )
        return self

    @property
    def vector_factor(self) -> float:
        """Factor on the pull of vectors.

        >>> CSGDConfig(cluster_percent=0.25, vector_strength=0.1).vector_factor
        0.1
        """
        return 1.0 if self.vector_strength == "full" else self.vector_strength


ALGORITHM = AlgorithmInfo(
    name="csgd",
    summary="pulls clusters of filters together until they are identical, then merges them",
    paper="Centripetal SGD for Pruning Very Deep Convolutional Networks with Complicated "
    "Structure, arXiv:1904.03837",
    config=CSGDConfig,
    compressor="slimcli.algorithms.csgd.method:CSGDCompressor",
    solver="CSGDSolver",
    example={"cluster_percent": 0.25, "centri_strength": "auto"},
    aliases=("torchslim.pruning.acnet.CSGDSolver", "torchslim.pruning.csgd.CSGDSolver"),
)
