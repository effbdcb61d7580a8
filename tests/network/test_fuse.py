"""Folding: one layer equals the several it was made of."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from slimcli.errors import RunError
from slimcli.network import fuse
from slimcli.network.example import Example
from slimcli.network.handover import insert_norms
from slimcli.network.structure import analyze

EXACT = 1e-12
"""Float64, a few hundred products summed in another order."""
EPSILON_OF_NORM = 1e-4
"""The norm's eps of 1e-5 weighs against both variances."""
SINGLE = 1e-4
"""Float32, relative to outputs of size about one."""

CONVS = {
    "conv1d": (nn.Conv1d, nn.BatchNorm1d, 1),
    "conv2d": (nn.Conv2d, nn.BatchNorm2d, 2),
    "conv3d": (nn.Conv3d, nn.BatchNorm3d, 3),
    "transposed1d": (nn.ConvTranspose1d, nn.BatchNorm1d, 1),
    "transposed2d": (nn.ConvTranspose2d, nn.BatchNorm2d, 2),
    "transposed3d": (nn.ConvTranspose3d, nn.BatchNorm3d, 3),
}


def shaken(norm: nn.Module) -> nn.Module:
    """A norm that looks trained."""
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.2, 3.0)
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm


def pair(kind: str, groups: int, bias: bool, affine: bool) -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    conv, norm, dimensions = CONVS[kind]
    layers = nn.Sequential(
        conv(4, 8, 3, stride=2, padding=1, groups=groups, bias=bias), shaken(norm(8, affine=affine))
    )
    return layers.double().eval(), torch.randn(2, 4, *(5,) * dimensions, dtype=torch.float64)


@pytest.mark.parametrize("kind", CONVS)
def test_folding_a_norm_keeps_the_function(kind) -> None:
    for groups, bias, affine in itertools.product((1, 2, 4), (False, True), (False, True)):
        model, batch = pair(kind, groups, bias, affine)
        expected = model(batch)
        fuse.fold_pairs(model, [("0", "1")])
        torch.testing.assert_close(model(batch), expected, rtol=EXACT, atol=EXACT)
        assert type(model[1]) is nn.Identity


def test_a_linear_layer_takes_up_its_norm() -> None:
    model = nn.Sequential(nn.Linear(4, 6), shaken(nn.BatchNorm1d(6))).double().eval()
    batch = torch.randn(3, 4, dtype=torch.float64)
    expected = model(batch)
    fuse.fold_pairs(model, [("0", "1")])
    torch.testing.assert_close(model(batch), expected, rtol=EXACT, atol=EXACT)


def test_half_precision_is_folded_in_float64_and_keeps_its_dtype() -> None:
    conv, norm = nn.Conv2d(4, 8, 3), shaken(nn.BatchNorm2d(8))
    wide, _ = fuse.fuse_conv_norm(copy.deepcopy(conv).double(), copy.deepcopy(norm).double())
    weight, bias = fuse.fuse_conv_norm(conv, norm)
    assert weight.dtype is bias.dtype is torch.float32
    torch.testing.assert_close(weight, wide.float(), rtol=1e-6, atol=0.0)


def test_fusing_leaves_both_layers_as_they_were() -> None:
    model, _ = pair("conv2d", 1, True, True)
    before = copy.deepcopy(model.state_dict())
    fuse.fuse_conv_norm(model[0], model[1])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_frozen_norm_of_torchvision_is_folded() -> None:
    from torchvision.ops import FrozenBatchNorm2d

    norm = FrozenBatchNorm2d(8)
    norm.weight.normal_(), norm.bias.normal_(), norm.running_mean.normal_()
    model = nn.Sequential(nn.Conv2d(4, 8, 3), norm).double()
    batch = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    expected = model(batch)
    fuse.fold_pairs(model, [("0", "1")])
    torch.testing.assert_close(model(batch), expected, rtol=EXACT, atol=EXACT)


def test_a_norm_that_activates_keeps_its_activation() -> None:
    timm_layers = pytest.importorskip("timm.layers")
    norm = shaken(timm_layers.BatchNormAct2d(8, act_layer=nn.SiLU))
    model = nn.Sequential(nn.Conv2d(4, 8, 3), norm).double().eval()
    batch = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    expected = model(batch)
    fuse.fold_pairs(model, [("0", "1")])
    torch.testing.assert_close(model(batch), expected, rtol=EXACT, atol=EXACT)
    assert type(model[1]) is nn.SiLU


class Doubled(nn.Conv2d):
    """Computes with another weight than it holds."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(inputs, self.weight * 2, self.bias)


@pytest.mark.parametrize(
    ("conv", "norm", "message"),
    [
        (nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8, track_running_stats=False), "no running statistics"),
        (nn.Conv2d(4, 8, 1), nn.GroupNorm(2, 8), "GroupNorm is no batch norm"),
        (nn.Conv2d(4, 8, 1), nn.BatchNorm2d(6), "8 outputs and the norm 6 channels"),
        (Doubled(4, 8, 1), nn.BatchNorm2d(8), "Doubled is no plain conv"),
        (
            nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 8, 1)),
            nn.BatchNorm2d(8),
            "is no plain conv",
        ),
    ],
)
def test_what_cannot_be_folded_is_refused(conv, norm, message) -> None:
    model = nn.Sequential(conv, norm)
    with pytest.raises(RunError, match=message):
        fuse.fold_pairs(model, [("0", "1")])
    assert model[1] is norm


def test_a_layer_that_runs_twice_is_no_pair() -> None:
    conv, norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    for model in (nn.Sequential(conv, norm, conv), nn.Sequential(conv, norm, nn.ReLU(), norm)):
        example = Example(torch.randn(2, 4, 5, 5), lambda module, batch: module(batch))
        assert analyze(model, example).conv_batch_norms == ()


def test_a_layer_under_two_names_that_runs_once_is_folded_under_both() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            self.body = nn.Sequential(self.conv, self.norm)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    model = Named().double().eval()
    model.norm.running_mean.normal_()
    images = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    before = model(images)
    fuse.fold_pairs(model, [("conv", "norm")])
    assert type(model.norm) is nn.Identity
    assert model.body[1] is model.norm
    assert torch.allclose(model(images), before, rtol=0, atol=1e-12)


def test_a_tied_weight_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    model[2].weight = model[0].weight
    with pytest.raises(RunError, match=r"0\.weight and 2\.weight are one"):
        fuse.fold_pairs(model, [("0", "1")])


def test_a_conv_in_two_pairs_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    with pytest.raises(RunError, match="this conv is in two pairs"):
        fuse.fold_pairs(model, [("0", "1"), ("0", "2")])


@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize("groups", [1, 2])
def test_a_matrix_behind_a_layer_goes_into_it(kind, groups) -> None:
    model, batch = pair(kind, groups, True, True)
    blocks = [torch.randn(3, 8 // groups, dtype=torch.float64) for _ in range(groups)]
    matrix = torch.block_diag(*blocks)
    expected = torch.einsum("no,bo...->bn...", matrix, model[0](batch))
    conv = copy.deepcopy(model[0])
    weight, bias = fuse.mix_outputs(
        conv.weight, conv.bias, matrix, groups=groups, is_transposed="transposed" in kind
    )
    conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
    torch.testing.assert_close(conv(batch), expected, rtol=EXACT, atol=EXACT)


def test_a_matrix_that_mixes_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="different groups"):
        fuse.mix_outputs(torch.ones(4, 1, 1), torch.ones(4), torch.ones(4, 4), groups=2)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_pointwise_conv_goes_into_the_next(groups, kernel) -> None:
    torch.manual_seed(0)
    first = nn.Conv2d(4, 6, 1, groups=groups).double()
    second = nn.Conv2d(6, 8, kernel, stride=2, groups=groups).double()
    batch = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    weight, bias = fuse.fold_pointwise(
        (first.weight, first.bias), (second.weight, second.bias), groups
    )
    folded = nn.functional.conv2d(batch, weight, bias, stride=2, groups=groups)
    torch.testing.assert_close(folded, second(first(batch)), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize(("small", "large"), [((1, 3), (3, 3)), ((1, 1), (5, 7)), ((3, 3), (3, 3))])
def test_a_padded_kernel_sees_what_the_small_one_saw(small, large) -> None:
    weight = torch.randn(2, 3, *small, dtype=torch.float64)
    batch = torch.randn(1, 3, 9, 9, dtype=torch.float64)
    wide = fuse.pad_kernel(weight, large)
    expected = nn.functional.conv2d(batch, weight, padding=tuple(each // 2 for each in small))
    received = nn.functional.conv2d(batch, wide, padding=tuple(each // 2 for each in large))
    torch.testing.assert_close(received, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("large", [(4, 3), (1, 3)])
def test_a_kernel_without_a_common_centre_is_refused(large) -> None:
    with pytest.raises(ValueError, match="no place in the centre"):
        fuse.pad_kernel(torch.ones(1, 1, 3, 3), large)


def batches(dimensions: int) -> list[Example]:
    torch.manual_seed(3)
    shape = (4, 4, *(6,) * dimensions)
    inputs = [torch.randn(shape, dtype=torch.float64) * 2 + 5 for _ in range(3)]
    return [Example(each, lambda model, data: model(data)) for each in inputs]


@pytest.mark.parametrize("kind", CONVS)
def test_a_norm_put_back_changes_nothing_in_eval_mode_and_little_in_train_mode(kind) -> None:
    model, _ = pair(kind, 1, True, True)
    fuse.fold_pairs(model, [("0", "1")])
    examples = batches(CONVS[kind][2])
    expected = [each.run(model) for each in examples]
    model.train()
    insert_norms(model, [("0", "1")], examples)
    assert type(model[1]) is CONVS[kind][1]
    assert model[0].bias is None
    assert model.training
    assert model[1].training
    model.eval()
    for each, output in zip(examples, expected, strict=True):
        torch.testing.assert_close(each.run(model), output, rtol=1e-9, atol=1e-9)
    model.train()
    received = model(torch.cat([each.batch for each in examples]))
    wanted = torch.cat(expected)
    dims = [dim for dim in range(wanted.dim()) if dim != 1]
    mean, count = wanted.mean(dims, keepdim=True), wanted.numel() / wanted.shape[1]
    wider = mean + (wanted - mean) * (count / (count - 1)) ** 0.5  # train mode's variance is biased
    torch.testing.assert_close(received, wider, rtol=EPSILON_OF_NORM, atol=EPSILON_OF_NORM)


def test_a_norm_goes_only_where_an_identity_is() -> None:
    model, _ = pair("conv2d", 1, True, True)
    with pytest.raises(RunError, match="1 is no Identity"):
        insert_norms(model, [("0", "1")], batches(2))


def test_folding_and_putting_back_twice_is_stable() -> None:
    model, batch = pair("conv2d", 2, False, True)
    expected = model(batch)
    for _ in range(2):
        fuse.fold_pairs(model, [("0", "1")])
        insert_norms(model, [("0", "1")], batches(2))
    torch.testing.assert_close(model.eval()(batch), expected, rtol=1e-9, atol=1e-9)


def test_single_precision_stays_close() -> None:
    model, batch = pair("conv2d", 1, False, True)
    model, batch = model.float(), batch.float()
    expected = model(batch)
    fuse.fold_pairs(model, [("0", "1")])
    torch.testing.assert_close(model(batch), expected, rtol=SINGLE, atol=SINGLE)
