"""Keys of ``finetune``: none beyond those of the training loop."""

from __future__ import annotations

from slimcli.compressor import AlgorithmConfig, AlgorithmInfo


class FinetuneConfig(AlgorithmConfig):
    """The plain loop has no keys of its own."""


ALGORITHM = AlgorithmInfo(
    name="finetune",
    summary="plain training: the base model, and the control of every comparison",
    paper="none: stochastic gradient descent as torch has it",
    config=FinetuneConfig,
    compressor="slimcli.algorithms.finetune.method:FinetuneCompressor",
    solver="FinetuneSolver",
)
