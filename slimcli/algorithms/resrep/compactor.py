"""The compactor: an identity matrix behind a layer, whose rows are driven to zero.

It is a child called ``compactor`` of the module whose output it multiplies, applied by a hook, so
that paths and types of the user's modules stay. The hook is a module-level function that finds the
compactor through its arguments: a deep copy of the model runs the copy's own compactor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

NAME = "compactor"
"""Name of the child module; parameters are called ``bn1.compactor.weight``."""


class Compactor(nn.Module):
    """Multiplies the channels of its input by a matrix or, if diagonal, by one factor each.

    Args:
        size: Channels D.
        like: Tensor whose device and floating type the weight takes.
        is_diagonal: One factor a channel, for layers whose groups a full matrix would mix.
        spatial: Dimensions behind the channels; None: all but the first two of the input.

    Attributes:
        weight: The identity at first. Matrix (D', D), later with fewer rows, or vector (D',).
    """

    def __init__(
        self, size: int, like: Tensor, *, is_diagonal: bool = False, spatial: int | None = None
    ) -> None:
        super().__init__()
        start = torch.ones(size) if is_diagonal else torch.eye(size)
        self.weight = nn.Parameter(start.to(like))
        self.spatial = spatial
        self.handle: RemovableHandle | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Tensor (N, D, ...) to (N, D', ...); with ``spatial=0`` channels come last."""
        spatial = x.dim() - 2 if self.spatial is None else self.spatial
        if self.weight.dim() == 1:
            return x * self.weight.view(-1, *(1,) * spatial)
        if spatial == 0:
            return nn.functional.linear(x, self.weight)
        kernel = self.weight.view(*self.weight.shape, *(1,) * spatial)
        convolutions = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)
        return convolutions[spatial - 1](x, kernel)

    def extra_repr(self) -> str:
        """Shape of the weight, for ``print(model)``."""
        return f"{tuple(self.weight.shape)}"


def behind(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """Forward hook: the compactor multiplies what the module returns."""
    compacted: Tensor = getattr(module, NAME)(output)
    return compacted


def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Forward pre-hook: the compactor multiplies what the module is given."""
    return (getattr(module, NAME)(inputs[0]), *inputs[1:])


def attach(module: nn.Module, compactor: Compactor, *, is_before: bool = False) -> None:
    """Makes the compactor a child of ``module`` and applies it behind (or before) it.

    The handle is kept on the compactor: a deep copy of the model then holds a handle of its own
    hook, by which the copy, and only the copy, can be freed from it.
    """
    module.add_module(NAME, compactor)
    if is_before:
        compactor.handle = module.register_forward_pre_hook(before)
    else:
        # In front of hooks of the user's, which then read what the folded layer will give.
        compactor.handle = module.register_forward_hook(behind, prepend=True)


def detach(module: nn.Module) -> None:
    """Takes the compactor of ``module`` and its hook away again."""
    compactor: Compactor = getattr(module, NAME)
    if compactor.handle is not None:
        compactor.handle.remove()
    delattr(module, NAME)


@dataclass(frozen=True)
class Norms:
    """Norms of the bundles of one group, kept apart so that nothing under- or overflows.

    Attributes:
        largest: Largest absolute entry of each bundle, shape (n,).
        scaled: Root mean square norm of the rows divided by ``largest``, shape (n,); 1 where zero.
    """

    largest: Tensor
    scaled: Tensor

    @property
    def value(self) -> Tensor:
        """``sqrt(sum ||q||^2 / R)`` over the R rows of each bundle, shape (n,)."""
        return self.largest * self.scaled


def bundle_norms(rows: Sequence[Tensor]) -> Norms:
    """Joint norm of the rows that belong to one channel, in all compactors of a coupled group.

    The square root of the *mean* squared row norm, so that every bundle starts at 1 however many
    layers are coupled; with one row it is the paper's ``||q||_2``. Scaled by the largest entry: in
    float32 the square of a row of norm 1e-30 is zero.

    Args:
        rows: One tensor a compactor, shape (n, rows of a channel, D) or (n, rows) if diagonal.

    >>> bundle_norms([torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]], [[3e-30, 4e-30]]])]).value
    tensor([5.0000e+00, 0.0000e+00, 5.0000e-30])
    """
    flat = [each.reshape(each.shape[0], -1) for each in rows]
    largest = torch.stack([each.abs().amax(1) for each in flat]).amax(0)
    safe = torch.where(largest > 0, largest, 1)
    squares = torch.stack([(each / safe[:, None]).square().sum(1) for each in flat]).sum(0)
    scaled = (squares / sum(each.shape[1] for each in rows)).sqrt()
    return Norms(largest, torch.where(largest > 0, scaled, 1))


def lasso_gradients(rows: Sequence[Tensor], norms: Norms) -> list[Tensor]:
    """Gradient of ``sum_j R ||bundle_j||_rms``: ``q / ||bundle||_rms``, zero at a zero bundle.

    It is the group lasso of Yuan and Lin (2006) with its weight ``sqrt(R)`` for R rows; with one
    row a channel it is the paper's ``q / ||q||`` (arXiv:2007.03260, equation 6). Every row of a
    bundle shrinks by 1 a unit of time, whatever R is.

    >>> rows = [torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]]])]
    >>> lasso_gradients(rows, bundle_norms(rows))
    [tensor([[[0.6000, 0.8000]],
    <BLANKLINE>
            [[0.0000, 0.0000]]])]
    """
    safe = torch.where(norms.largest > 0, norms.largest, 1)
    gradients = []
    for each in rows:
        shape = (-1, *(1,) * (each.dim() - 1))
        gradients.append(each / safe.view(shape) / norms.scaled.view(shape))
    return gradients
