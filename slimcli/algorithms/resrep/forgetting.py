"""One training step of the compactors: gradients reset, lasso added, masked rows shrunk to zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from slimcli.algorithms.resrep.bundles import Bundles, wide
from slimcli.algorithms.resrep.compactor import bundle_norms, lasso_gradients


def reset_gradients(bundles: Bundles, model: nn.Module, *, has_lasso: bool) -> list[Tensor]:
    """``g <- mask g + strength q / ||q||`` in place (arXiv:2007.03260, equation 7).

    Args:
        bundles: The channels of one group.
        model: After backward; compactors without a gradient get one.
        has_lasso: Whether the lasso is added: with SGD. Masked rows get no other gradient, rows
            that are zero for good none at all.

    Returns:
        The rows as they are before the optimizer's step.
    """
    weights = bundles.weights(model)
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    gradients = [cast(Tensor, weight.grad) for weight in weights]
    rows = bundles.rows(weights)
    # torch.where and no product: an overflowing gradient times zero would be nan.
    kept = [torch.where(wide(bundles.masked, g), 0, g) for g in bundles.rows(gradients)]
    if has_lasso:
        pull = torch.where(bundles.locked, 0, bundles.strengths).to(rows[0].dtype)
        lasso = lasso_gradients(rows, bundle_norms(rows))
        kept = [g + wide(pull, q) * q for g, q in zip(kept, lasso, strict=True)]
    bundles.write(gradients, kept)
    return rows


def shrink_unmasked(bundles: Bundles, model: nn.Module, step_size: float) -> None:
    """Proximal step of the lasso on rows that aren't masked, for optimizers other than SGD.

    ``q <- q max(0, 1 - step_size strength / ||q||)`` after the optimizer's step: an adaptive
    optimizer would divide a lasso gradient by its own size.

    Args:
        bundles: The channels of one group.
        model: After the optimizer's step.
        step_size: ``lr / (1 - m)``, so that ``lasso_decay`` means the same as with SGD.
    """
    weights = bundles.weights(model)
    rows = bundles.rows(weights)
    factors = shrink_factors(bundle_norms(rows).value, step_size * bundles.strengths)
    factors = torch.where(bundles.masked, 1, factors)
    bundles.write(weights, [each * wide(factors.to(each.dtype), each) for each in rows])


def shrink_masked(
    bundles: Bundles, model: nn.Module, before: Sequence[Tensor], lr: float, momentum: float
) -> None:
    """Moves masked rows straight to zero, where they stay.

    The optimizer's own step on them is undone: its momentum still holds the gradients of the loss
    that were to be forgotten, turns the row and makes it miss zero. What it would do from rest
    under the lasso alone is done instead: speed ``v <- m v + strength``, ``||q|| <- ||q|| - lr v``.
    So the budget of the plan is what happens, and the step that would cross zero ends there.

    Args:
        bundles: The channels of one group; speeds and locks are updated.
        model: After the optimizer's step.
        before: The rows as they were before it.
        lr: Learning rate of this step.
        momentum: Momentum of the compactors.
    """
    if not bundles.has_masked:
        return
    active = bundles.masked & ~bundles.locked
    speeds = momentum * bundles.speeds + bundles.strengths
    bundles.speeds = torch.where(active, speeds, 0)
    factors = shrink_factors(bundle_norms(before).value, lr * bundles.speeds)
    bundles.locked = bundles.locked | (active & (factors == 0))
    factors = torch.where(bundles.locked, 0, factors)
    weights = bundles.weights(model)
    rows = [
        torch.where(wide(bundles.masked, was), was * wide(factors.to(was.dtype), was), now)
        for was, now in zip(before, bundles.rows(weights), strict=True)
    ]
    bundles.write(weights, rows)


def shrink_factors(norms: Tensor, distances: Tensor) -> Tensor:
    """What rows are multiplied by to lose these distances from their norms, shape (n,).

    >>> shrink_factors(torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0.25, 0.75, 0.1]))
    tensor([0.7500, 0.0000, 0.0000])
    """
    return (1 - distances / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_min(0)
