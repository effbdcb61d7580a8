"""Keys of ``acnet``. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from slimcli.compressor import AlgorithmConfig, AlgorithmInfo

BlockName = Literal["acnet_cr", "acb_corner", "cnc", "dbb", "merged"]


class ACNetConfig(AlgorithmConfig):
    """What replaces a convolution during training, and how it starts."""

    acnet_type: BlockName = Field(
        "acnet_cr",
        description="block: acnet_cr (square + column + row), acb_corner (+ corners), cnc (centre "
        "and corners), dbb (diverse branch block), merged (kernels summed before one conv)",
    )
    init: Literal["warm", "paper"] = Field(
        "warm",
        description="warm keeps the trained conv and BN, side branches start at 0, the function "
        "stays; paper draws fresh weights",
    )
    gamma_init: Literal["1/3"] | float | None = Field(
        None,
        description="first BN scale of every branch with `init: paper`: 1 (default), 1/3, a number",
    )
    skip: tuple[str, ...] = Field(
        (), description="glob patterns of module paths that stay as they are; '*' keeps all"
    )

    @model_validator(mode="after")
    def _gamma_needs_paper_init(self) -> ACNetConfig:
        """A warm start fixes the scales, so a value given for them would do nothing."""
        if self.gamma_init is not None and self.init == "warm":
            raise ValueError(
                "gamma_init has no effect with init: warm (side branches start at 0); "
                "fix: init: paper, or leave gamma_init out"
            )
        return self

    @property
    def gamma(self) -> float:
        """The first scale of a branch under ``init: paper``.

        >>> round(ACNetConfig(init="paper", gamma_init="1/3").gamma, 4)
        0.3333
        """
        if self.gamma_init is None:
            return 1.0
        return 1.0 / 3.0 if self.gamma_init == "1/3" else float(self.gamma_init)


ALGORITHM = AlgorithmInfo(
    name="acnet",
    summary="trains each k x k conv as several branches, deploys one plain conv",
    paper="ACNet: Strengthening the Kernel Skeletons for Powerful CNN via Asymmetric Convolution "
    "Blocks, arXiv:1908.03930",
    config=ACNetConfig,
    compressor="slimcli.algorithms.acnet.method:ACNetCompressor",
    solver="ACNetSolver",
    example={"acnet_type": "acnet_cr", "init": "warm"},
    aliases=(
        "torchslim.reparameter.acnet.ACNetSolver",
        "torchslim.reparameter.reparam.ReparamSolver",
    ),
    key_aliases={"reparam_type": "acnet_type"},
)
