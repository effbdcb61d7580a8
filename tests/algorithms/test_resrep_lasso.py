"""The lasso of ResRep, its masks, and the step that ends at zero."""

import copy

import pytest
import torch
from torch import nn

from slimcli.algorithms.resrep.bundles import Bundles
from slimcli.algorithms.resrep.compactor import (
    Compactor,
    attach,
    bundle_norms,
    detach,
    lasso_gradients,
)
from slimcli.algorithms.resrep.forgetting import (
    reset_gradients,
    shrink_masked,
    shrink_unmasked,
)

from .resrep_networks import one_layer_target

# Both sides are sums of a dozen float64 products.
ROUNDING = 1e-14
# A central difference with step 1e-6 of a function of order 1 keeps about nine digits.
FINITE_DIFFERENCE = 1e-8
STRENGTH = 2.0**-7  # exact in float32, in which strengths are kept


def rows_of_two_layers() -> list[torch.Tensor]:
    """Five channels in two coupled layers, one of them with two rows a channel."""
    torch.manual_seed(0)
    return [torch.randn(5, 1, 7).double(), torch.randn(5, 2, 4).double()]


def penalty(rows: list[torch.Tensor]) -> torch.Tensor:
    """Sum over channels of R times the root mean square norm of their R rows."""
    squares = sum(each.flatten(1).square().sum(1) for each in rows)
    count = sum(each.shape[1] for each in rows)
    return (squares * count).sqrt().sum()


def test_the_lasso_gradient_is_that_of_autograd() -> None:
    rows = [each.requires_grad_() for each in rows_of_two_layers()]
    expected = torch.autograd.grad(penalty(rows), rows)
    found = lasso_gradients(rows, bundle_norms(rows))
    assert max((a - b).abs().max() for a, b in zip(found, expected, strict=True)) <= ROUNDING


def test_the_lasso_gradient_is_that_of_finite_differences() -> None:
    rows = rows_of_two_layers()
    found = lasso_gradients(rows, bundle_norms(rows))
    for layer, place in ((0, (1, 0, 3)), (1, (4, 1, 2))):
        moved = []
        for step in (1e-6, -1e-6):
            other = [each.clone() for each in rows]
            other[layer][place] += step
            moved.append(penalty(other))
        slope = (moved[0] - moved[1]) / 2e-6
        assert abs(slope - found[layer][place]) <= FINITE_DIFFERENCE


def test_with_one_row_a_channel_it_is_the_row_divided_by_its_norm() -> None:
    rows = [torch.tensor([[[3.0, 4.0]], [[0.0, -2.0]]])]
    (found,) = lasso_gradients(rows, bundle_norms(rows))
    assert found.flatten(1).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0.0, -1.0]]


def test_a_zero_row_has_gradient_zero_and_no_nan() -> None:
    rows = [torch.zeros(3, 1, 4)]
    (found,) = lasso_gradients(rows, bundle_norms(rows))
    assert torch.equal(found, torch.zeros(3, 1, 4))


@pytest.mark.parametrize("size", [1e-30, 1e-37, 1e30, 1e38])
def test_rows_far_outside_the_range_of_their_squares_have_the_right_gradient(size: float) -> None:
    rows = [torch.tensor([[[0.6, 0.8]]]) * size]
    norms = bundle_norms(rows)
    (found,) = lasso_gradients(rows, norms)
    assert norms.value.item() == pytest.approx(size, rel=1e-6)
    assert found.flatten().tolist() == pytest.approx([0.6, 0.8], rel=1e-6)


def test_every_bundle_starts_at_norm_one_however_many_layers_are_coupled() -> None:
    identity = torch.eye(6).unsqueeze(1)
    assert bundle_norms([identity] * 3).value.tolist() == [1.0] * 6
    assert bundle_norms([identity, torch.ones(6, 1)]).value.tolist() == [1.0] * 6


def trained_layer(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Bundles]:
    """A conv with a compactor of four channels, and its bundles."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 4, 1, dtype=dtype))
    attach(model[0], Compactor(4, model[0].weight.detach(), spatial=2))
    model[0].compactor.weight.data += 0.1 * torch.randn(4, 4, dtype=dtype)
    return model, Bundles(one_layer_target("0", 4), STRENGTH)


def gradient_after_reset(has_lasso: bool, strength: float) -> tuple[torch.Tensor, torch.Tensor]:
    model, bundles = trained_layer()
    bundles.strengths.fill_(strength)
    bundles.mask([1, 3], [strength, strength])
    model(torch.randn(3, 2, 5, 5).double()).square().sum().backward()
    weight = model[0].compactor.weight
    objective = weight.grad.clone()
    reset_gradients(bundles, model, has_lasso=has_lasso)
    return weight.grad, objective


def test_without_a_lasso_masked_rows_get_exactly_zero_gradient() -> None:
    for gradient, objective in (gradient_after_reset(False, 0.5), gradient_after_reset(True, 0.0)):
        assert torch.equal(gradient[[1, 3]], torch.zeros(2, 4).double())
        assert torch.equal(gradient[[0, 2]], objective[[0, 2]])


def test_with_a_lasso_masked_rows_get_only_its_part() -> None:
    model, _ = trained_layer()
    rows = model[0].compactor.weight.detach()
    gradient, objective = gradient_after_reset(True, STRENGTH)
    lasso = STRENGTH * rows / rows.norm(dim=1, keepdim=True)
    assert (gradient[[1, 3]] - lasso[[1, 3]]).abs().max() <= ROUNDING
    assert (gradient[[0, 2]] - objective[[0, 2]] - lasso[[0, 2]]).abs().max() <= ROUNDING


def test_an_overflowing_gradient_does_not_make_masked_rows_nan() -> None:
    model, bundles = trained_layer()
    bundles.mask([1], [STRENGTH])
    weight = model[0].compactor.weight
    weight.grad = torch.full_like(weight, float("inf"))
    reset_gradients(bundles, model, has_lasso=True)
    assert weight.grad[1].isfinite().all()


def test_a_masked_row_ends_at_exactly_zero_and_stays_there() -> None:
    model, bundles = trained_layer(torch.float32)
    bundles.mask([2], [STRENGTH])
    weight = model[0].compactor.weight
    optimizer = torch.optim.SGD([weight], lr=0.05, momentum=0.99)
    norms = []
    for step in range(400):
        optimizer.zero_grad()
        (model(torch.randn(3, 2, 5, 5)).square().sum() * 1e-3).backward()
        before = reset_gradients(bundles, model, has_lasso=True)
        optimizer.step()
        shrink_masked(bundles, model, before, 0.05, 0.99)
        norms.append(weight[2].norm().item())
        if bundles.locked[2] and step > 350:
            break
    assert norms[-1] == 0.0
    first_zero = norms.index(0.0)
    assert norms[:first_zero] == sorted(norms[:first_zero], reverse=True)
    assert set(norms[first_zero:]) == {0.0}
    assert bundles.locked.tolist() == [False, False, True, False]


def test_a_masked_row_only_gets_shorter_and_keeps_its_direction() -> None:
    model, bundles = trained_layer()
    bundles.mask([0], [STRENGTH])
    weight = model[0].compactor.weight
    start = weight[0].detach().clone()
    before = reset_gradients(bundles, model, has_lasso=True)
    weight.data += 0.3  # what an optimizer's old momentum would do
    shrink_masked(bundles, model, before, 0.1, 0.5)
    cosine = nn.functional.cosine_similarity(weight[0], start, dim=0)
    assert cosine.item() == pytest.approx(1.0, abs=1e-12)
    assert weight[0].norm().item() == pytest.approx(start.norm().item() - 0.1 * STRENGTH)


def test_the_proximal_step_shrinks_unmasked_rows_by_its_length() -> None:
    model, bundles = trained_layer()
    weight = model[0].compactor.weight
    before = weight.detach().norm(dim=1)
    bundles.mask([3], [STRENGTH])
    shrink_unmasked(bundles, model, 2.0)
    after = weight.detach().norm(dim=1)
    assert (before - after).tolist() == pytest.approx([2 * STRENGTH] * 3 + [0.0])


def test_a_deep_copy_runs_its_own_compactor_and_can_be_freed_from_it() -> None:
    model, _ = trained_layer()
    x = torch.randn(2, 2, 3, 3).double()
    before = model(x)
    copied = copy.deepcopy(model)
    copied[0].compactor.weight.data.zero_()
    assert torch.equal(copied(x), torch.zeros_like(before))
    assert torch.equal(model(x), before)
    detach(copied[0])
    assert [name for name, _ in copied.named_parameters()] == ["0.weight", "0.bias"]
    assert torch.equal(copied(x), nn.functional.conv2d(x, model[0].weight, model[0].bias))
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("spatial", [0, 1, 2, 3])
def test_an_identity_compactor_returns_its_input_bit_for_bit(spatial: int) -> None:
    shape = (2, 7, 5) if spatial == 0 else (2, 5, *(4,) * spatial)
    x = torch.randn(shape)
    for is_diagonal in (False, True):
        if is_diagonal and spatial == 0:
            continue
        assert torch.equal(Compactor(5, x, is_diagonal=is_diagonal, spatial=spatial)(x), x)
