"""Keys of ``qat``. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from slimcli.compressor import AlgorithmConfig, AlgorithmInfo

PERCENTILE = 99.99


class QATConfig(AlgorithmConfig):
    """How ranges are found, when they stop moving, and what stays float."""

    weight_granularity: Literal["tensor", "channel"] = Field(
        "tensor",
        description="one weight scale for a whole layer, or one for each output channel; "
        "transposed convolutions always have one",
    )
    calibration: Literal["max", "ema", "percentile", "mse", "entropy"] = Field(
        "max", description="how the range of an activation is chosen before training starts"
    )
    calibration_batches: int = Field(
        16, ge=1, description="training batches that calibration looks at"
    )
    percentile: float = Field(
        PERCENTILE,
        gt=0,
        le=100,
        description="share of values inside the range, in percent; for calibration: percentile",
    )
    scale: Literal["frozen", "ema", "lsq"] = Field(
        "frozen",
        description="scales while training: as calibrated, following the data, or learned (LSQ)",
    )
    freeze_scale_epoch: int | None = Field(
        None, ge=0, description="epoch at whose start ema and lsq scales stop moving; null: never"
    )
    freeze_bn_epoch: int | None = Field(
        None,
        ge=0,
        description="epoch at whose start batch statistics stop moving; null: never",
    )
    bn_export: Literal["keep", "fold"] = Field(
        "keep",
        description="batch norms behind quantized layers in model.onnx: as nodes, which TensorRT "
        "folds itself, or folded into weight scales and biases; fold needs weight_granularity: "
        "channel",
    )
    skip: tuple[str, ...] = Field(
        (),
        description="layers that stay float: module names, glob patterns, type names, "
        "`first`, `last`",
    )

    @model_validator(mode="after")
    def _keys_with_an_effect(self) -> QATConfig:
        """Values that nothing would read; a default that stands in a resolved recipe is none."""
        if self.calibration != "percentile" and self.percentile != PERCENTILE:
            raise ValueError(
                f"percentile has no effect with calibration: {self.calibration}; "
                "fix: calibration: percentile, or leave percentile out"
            )
        if self.scale == "frozen" and self.freeze_scale_epoch is not None:
            raise ValueError(
                "freeze_scale_epoch has no effect with scale: frozen (no scale ever moves); "
                "fix: scale: ema or lsq, or leave freeze_scale_epoch out"
            )
        return self

    @model_validator(mode="after")
    def _exact_fold(self) -> QATConfig:
        """One scale for a whole layer can't take up a factor for each of its channels."""
        if self.bn_export == "fold" and self.weight_granularity == "tensor":
            raise ValueError(
                "bn_export: fold scales each output channel by its own gamma/sigma, which one "
                "weight scale for the whole layer can't hold: the int8 codes would not be those "
                "that were trained; fix: weight_granularity: channel, or bn_export: keep "
                "(TensorRT folds batch norms itself)"
            )
        return self


ALGORITHM = AlgorithmInfo(
    name="qat",
    summary="trains with symmetric int8 fake quantization; deploys as ONNX with Q/DQ",
    paper="no single paper; learned scales: Learned Step Size Quantization (arXiv 1902.08153)",
    config=QATConfig,
    compressor="slimcli.algorithms.qat.method:QATCompressor",
    solver="QATSolver",
    training_defaults={"lr": 0.001},
    example={"weight_granularity": "channel", "freeze_bn_epoch": 1},
    aliases=(
        "torchslim.reparameter.quantizing.qat.QATSolver",
        "torchslim.quantizing.qat.QATSolver",
    ),
)
