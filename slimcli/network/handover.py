"""A BN behind a conv that has absorbed its own, so that a folded model can be trained again.

The new BN changes nothing in eval mode: it normalises with statistics measured on batches and
scales back to exactly what came in.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimcli.errors import Problem, RunError
from slimcli.network.copying import deep_copy
from slimcli.network.evaluating import evaluating
from slimcli.network.example import Example
from slimcli.network.structure.modes import preserved_randomness
from slimcli.network.structure.train_mode import set_train_mode


class NormLeftOut(UserWarning):
    """A conv goes on without the norm that was folded into it."""


def insert_norms(
    model: nn.Module, pairs: Sequence[tuple[str, str]], batches: Iterable[Example]
) -> None:
    """Puts a batch norm behind convs whose own was folded into them, in place.

    With mean ``m`` and variance ``v`` of the conv's output without its bias ``b``, the norm gets
    the statistics (m, v), ``gamma = sqrt(v + eps)`` and ``beta = m + b``, and the conv loses its
    bias: in eval mode the pair computes what the conv did (as ``insert_bn`` of RepVGG, arXiv
    2101.03697, does for quantization-aware training).

    A conv that eval mode leaves out (an auxiliary head) is measured in train mode, on a copy. One
    that no batch reaches at all keeps its bias and no norm, which is the same function; a
    ``NormLeftOut`` warning says so. Trained weights are at stake here: nothing to measure is no
    reason to lose them.

    Args:
        model: Changed in place; modes are as before afterwards.
        pairs: (path of a conv or Linear, path of the ``nn.Identity`` its norm left behind).
        batches: Enough real batches for the statistics; each is run once in eval mode, and once
            in train mode where a conv did not run.

    Raises:
        RunError: There is no Identity at the norm's place.
    """
    for conv_path, norm_path in pairs:
        if type(model.get_submodule(norm_path)) is not nn.Identity:
            raise _refused(conv_path, f"{norm_path} is no Identity")
    moments = _measure(model, [conv for conv, _ in pairs], batches)
    for conv_path, norm_path in pairs:
        if not moments[conv_path].count:
            warnings.warn(
                f"{conv_path} did not run on any batch, in eval mode or in train mode: it keeps "
                "what was folded into it, and gets no batch norm",
                NormLeftOut,
                stacklevel=2,
            )
            continue
        conv = model.get_submodule(conv_path)
        mean, variance = moments[conv_path].result()
        norm = _norm_for(conv, len(mean))
        offset: Any = conv.bias.detach().double() if isinstance(conv.bias, Tensor) else 0.0
        with torch.no_grad():
            norm.running_mean.copy_(mean - offset)
            norm.running_var.copy_(variance)
            # From the statistics as they are stored: their rounding must cancel too.
            norm.weight.copy_((norm.running_var.double() + norm.eps).sqrt())
            norm.bias.copy_(norm.running_mean.double() + offset)
        conv.register_parameter("bias", None)
        norm.train(conv.training)
        model.set_submodule(norm_path, norm)


class Moments:
    """Mean and variance a channel over many batches, without cancellation.

    >>> moments = Moments()
    >>> moments.add(torch.tensor([[1.0, 3.0]])), moments.add(torch.tensor([[5.0]]))
    (None, None)
    >>> [tensor.tolist() for tensor in moments.result()]
    [[3.0], [4.0]]
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor = torch.zeros(())
        self.squares: Tensor = torch.zeros(())

    def add(self, values: Tensor) -> None:
        """Takes in values of shape (channels, samples)."""
        values = values.detach().double()
        count, mean = values.shape[1], values.mean(1)
        squares = (values - mean[:, None]).square().sum(1)
        total = self.count + count
        if self.count:
            gap = mean - self.mean
            squares = self.squares + squares + gap.square() * (self.count * count / total)
            mean = self.mean + gap * (count / total)
        self.count, self.mean, self.squares = total, mean, squares

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance, float64 (channels,)."""
        return self.mean, self.squares / max(self.count - 1, 1)


def _measure(
    model: nn.Module, paths: Sequence[str], batches: Iterable[Example]
) -> dict[str, Moments]:
    """Moments of the outputs of each module: in eval mode, else in train mode, else empty."""
    moments = {path: Moments() for path in paths}
    of_training = {path: Moments() for path in paths}
    twin: nn.Module | None = None
    with evaluating(model):
        for batch in batches:
            _add(model, moments, batch)
            if not all(each.count for each in moments.values()):
                # A copy, since training writes into a model. Norms stay in eval mode there: a conv
                # then gets what the norms before it were trained to give.
                if twin is None:
                    twin = deep_copy(model)
                    set_train_mode(twin)
                with preserved_randomness(model):
                    _add(twin, of_training, batch)
    return {path: each if each.count else of_training[path] for path, each in moments.items()}


def _add(model: nn.Module, moments: Mapping[str, Moments], batch: Example) -> None:
    """Runs one batch and adds the outputs of the modules to their moments."""

    def watch(path: str) -> Any:
        def hook(layer: nn.Module, _: Any, output: Tensor) -> None:
            dim = output.dim() - 1 - len(getattr(layer, "kernel_size", ()))
            moments[path].add(output.movedim(dim, 0).flatten(1))

        return model.get_submodule(path).register_forward_hook(hook)

    handles = [watch(path) for path in moments]
    try:
        with torch.no_grad():
            batch.run(model)
    finally:
        for handle in handles:
            handle.remove()


def _norm_for(conv: nn.Module, channels: int) -> Any:
    """A fresh batch norm for the outputs of a conv, on its device, in its dtype."""
    dimensions = len(getattr(conv, "kernel_size", (1,)))
    kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dimensions]
    weight: Any = conv.weight
    return kind(channels, device=weight.device, dtype=weight.dtype)


def _refused(conv: str, reason: str) -> RunError:
    return RunError(Problem("E-HANDOVER-NORM", f"{conv} can't get a batch norm back: {reason}"))
