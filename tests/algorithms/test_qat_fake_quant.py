"""What one quantizer computes, against numpy."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from slimcli.network.quantize.fake_quant import (
    WEIGHT_LOW,
    FakeQuant,
    Phase,
    quantizers,
    scale_of,
)

# One float32 rounding on each side of a sum of 4,096 products of order one.
SUM_TOLERANCE = 1e-5


def quantizer(amax, phase=Phase.TRAIN, **keywords):
    made = FakeQuant("input of here", **keywords)
    made.set_amax(torch.as_tensor(amax, dtype=torch.float32))
    made.phase = phase
    return made


def by_hand(x, scale, low=-128):
    """The definition of ONNX QuantizeLinear, in float32; numpy rounds half to even."""
    codes = np.clip(np.round(x / scale), low, 127)
    return codes.astype(np.int8), codes.astype(np.float32) * scale


def test_values_and_codes_equal_quantizing_by_hand_bit_for_bit():
    torch.manual_seed(0)
    x = torch.randn(300_000) * 3
    made = quantizer(6.35)
    codes, values = by_hand(x.numpy(), made.scale.numpy())
    assert np.array_equal(made.codes(x).numpy(), codes)
    assert np.array_equal(made(x).numpy(), values)
    assert np.abs(codes.astype(int)).max() >= 127  # some were clamped


def test_ties_go_to_the_even_code_and_the_ends_are_minus_128_and_127():
    made = quantizer(127.0)
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 127.4, 127.6, 500.0, -128.5, -500.0])
    assert made.codes(x).tolist() == [0, 2, 2, 0, -2, 127, 127, 127, -128, -128]


def test_weights_never_get_code_minus_128():
    made = quantizer(127.0, low=WEIGHT_LOW)
    assert made.codes(torch.tensor([-127.4, -300.0, 300.0])).tolist() == [-127, -127, 127]


def test_the_gradient_is_one_inside_the_range_and_zero_outside():
    made = quantizer(12.7)  # scale 0.1
    x = torch.tensor([0.0, 12.74, 12.76, -12.84, -12.86, 99.0], requires_grad=True)
    made(x).backward(torch.full((6,), 3.0))
    assert x.grad.tolist() == [3.0, 3.0, 0.0, 3.0, 0.0, 0.0]


@pytest.mark.parametrize("policy", ["frozen", "lsq"])
@pytest.mark.parametrize("channels", [None, 4])
def test_leaving_out_the_clamp_where_nothing_is_clamped_changes_no_bit(policy, channels):
    results = []
    for ask in (True, False):
        torch.manual_seed(4)
        x = torch.randn(4, 30, requires_grad=True)
        made = FakeQuant("input of here", policy=policy, channels=channels)
        made.set_amax(made.magnitude(x))
        made.phase = Phase.TRAIN
        if not ask:
            made._fits = lambda x: False
        made(x).square().sum().backward()
        assert made._fits(x) is ask
        results.append([made(x).detach(), x.grad, made.scale.grad])
    for with_it, without in zip(*results, strict=True):
        assert with_it is without is None or torch.equal(with_it, without)


def test_one_value_outside_is_enough_to_clamp():
    made = quantizer(127.0)
    assert made._fits(torch.tensor([-128.4, 127.4]))
    assert not made._fits(torch.tensor([0.0, 127.6]))
    assert not made._fits(torch.tensor([-128.6, 0.0]))
    assert not made._fits(torch.tensor([float("nan"), 0.0]))


def test_each_channel_has_its_own_scale_along_its_axis():
    weight = torch.tensor([[1.0, -127.0], [0.5, 0.25], [0.0, 0.0]])
    made = FakeQuant("weight of here", WEIGHT_LOW, channels=3)
    made.set_amax(made.magnitude(weight))
    made.phase = Phase.FROZEN
    assert made.amax.tolist() == [127.0, 0.5, 0.0]
    assert made.codes(weight).tolist() == [[1, -127], [127, 64], [0, 0]]
    columns = FakeQuant("weight of here", WEIGHT_LOW, channels=2, axis=1)
    assert columns.magnitude(weight).tolist() == [1.0, 127.0]


def test_the_scale_is_amax_over_127_and_a_tensor_of_zeros_has_one_too():
    assert torch.equal(scale_of(torch.tensor(2.54)), torch.tensor(2.54) / 127)
    made = quantizer(0.0)
    assert made(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]
    assert made.scale.item() > 0


def test_a_learned_scale_gets_the_gradient_of_the_paper():
    torch.manual_seed(1)
    x = (torch.randn(8, 512) * 2).requires_grad_()
    upstream = torch.randn(8, 512)
    made = quantizer(3.0, policy="lsq")
    made(x).backward(upstream)
    ratio = x.detach().numpy() / made.scale.detach().numpy()
    inside = (np.round(ratio) >= -128) & (np.round(ratio) <= 127)
    slope = np.where(inside, np.round(ratio) - ratio, np.clip(ratio, -128, 127))
    expected = (upstream.numpy() * slope).sum() / np.sqrt(512 * 127)
    assert made.scale.grad.item() == pytest.approx(expected, rel=SUM_TOLERANCE, abs=SUM_TOLERANCE)
    assert torch.equal(x.grad, upstream * torch.from_numpy(inside))


def test_learned_weight_scales_get_one_gradient_a_channel():
    torch.manual_seed(1)
    weight = torch.randn(4, 10, requires_grad=True)
    made = FakeQuant("weight of here", WEIGHT_LOW, "lsq", channels=4)
    made.set_amax(made.magnitude(weight) * 0.5)
    made.phase = Phase.TRAIN
    made(weight).sum().backward()
    ratio = weight.detach() / made.scale.detach()[:, None]
    inside = ratio.round().abs() <= 127
    slope = torch.where(inside, ratio.round() - ratio, ratio.clamp(-127, 127))
    expected = slope.sum(1) / (10 * 127) ** 0.5
    assert torch.allclose(made.scale.grad, expected, rtol=SUM_TOLERANCE, atol=SUM_TOLERANCE)


def test_a_frozen_learned_scale_gets_no_gradient():
    made = quantizer(1.0, policy="lsq", phase=Phase.FROZEN)
    made(torch.randn(10, requires_grad=True)).sum().backward()
    assert made.scale.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_quantized_in_float32_and_given_back_as_it_came(dtype):
    torch.manual_seed(2)
    x = torch.randn(1000).to(dtype)
    made = quantizer(3.0)
    result = made(x)
    assert result.dtype == dtype
    assert torch.equal(result, made(x.float()).to(dtype))


def test_under_autocast_scales_stay_float32_and_codes_exact():
    made = quantizer(3.0)
    x = torch.randn(64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        product = x @ x
        inside = made(product)
    assert product.dtype == inside.dtype == torch.bfloat16
    assert made.scale.dtype == torch.float32
    assert torch.equal(inside, made(product.float()).to(torch.bfloat16))


def test_float64_stays_float64():
    assert quantizer(3.0)(torch.randn(5, dtype=torch.float64)).dtype == torch.float64


def test_nan_stays_visible_instead_of_becoming_a_number():
    assert torch.isnan(quantizer(1.0)(torch.tensor([float("nan")])))


def test_channels_last_stays_channels_last():
    x = torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    assert quantizer(2.0)(x).is_contiguous(memory_format=torch.channels_last)


def test_switched_off_it_gives_back_the_tensor_itself():
    x = torch.randn(3)
    assert FakeQuant("input of here")(x) is x


def test_the_ema_range_is_the_mean_of_the_first_batches_then_moves_by_a_hundredth():
    made = quantizer(0.0, policy="ema")
    for largest in (1.0, 2.0, 6.0):
        made(torch.tensor([-largest, 0.5]))
    assert made.amax.item() == pytest.approx(3.0, rel=1e-6)
    made.batches_seen.fill_(500)
    made(torch.tensor([103.0]))
    assert made.amax.item() == pytest.approx(4.0, rel=1e-6)
    made.eval()
    made(torch.tensor([1000.0]))
    assert made.amax.item() == pytest.approx(4.0, rel=1e-6)


def test_state_survives_save_and_load_bit_for_bit(tmp_path):
    made = quantizer(0.3, policy="ema")
    made(torch.randn(100))
    made.phase = Phase.FROZEN
    torch.save(made.state_dict(), tmp_path / "state.pt")
    fresh = FakeQuant("input of here", policy="ema")
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert fresh.phase is Phase.FROZEN
    assert all(
        torch.equal(value, fresh.state_dict()[name]) for name, value in made.state_dict().items()
    )
    x = torch.randn(100)
    assert torch.equal(made(x), fresh(x))


def test_a_copy_of_a_model_has_quantizers_of_its_own():
    model = nn.Sequential(quantizer(1.0))
    other = copy.deepcopy(model)
    quantizers(other)["0"].set_amax(torch.tensor(9.0))
    quantizers(other)["0"].phase = Phase.EXPORT
    assert quantizers(model)["0"].amax.item() == 1.0
    assert quantizers(model)["0"].phase is Phase.TRAIN


def plain_round_trip(x, scale, low):
    """The definition without blocks, in the shape of x; and where no code was clamped."""
    codes = torch.round(x / scale)
    clamped = codes.clamp(low, 127)
    return clamped * scale, clamped == codes


@pytest.mark.parametrize("policy", ["frozen", "lsq"])
@pytest.mark.parametrize("channels", [None, 40])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_a_tensor_of_many_blocks_gets_the_values_and_gradients_of_one(policy, channels, layout):
    torch.manual_seed(5)
    x = torch.randn(40, 6, 32, 32)  # 245,760 values: four blocks
    x[3, 2, 1, 0], x[39, 5, 31, 31] = 40.0, -41.0  # only the first and the last are clamped
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    if layout == "strided":
        x = x.repeat(1, 2, 1, 1)[:, ::2]
    x = x.detach().requires_grad_()
    made = FakeQuant("weight of here", WEIGHT_LOW, policy, channels)
    made.set_amax(torch.full((channels,) if channels else (), 30.0))
    made.phase = Phase.TRAIN
    y, upstream = made(x), torch.randn(40, 6, 32, 32)
    y.backward(upstream)
    scale = made.scale.detach().reshape(-1, 1, 1, 1) if channels else made.scale.detach()
    expected, inside = plain_round_trip(x.detach(), scale, WEIGHT_LOW)
    assert (~inside).sum() == 2
    assert torch.equal(y, expected)
    assert torch.equal(x.grad, upstream * inside)
    if policy == "lsq":
        wide, step = upstream.double(), scale.double()
        slope = torch.where(inside, expected.double() - x.detach().double(), expected.double())
        products = wide * slope / step
        sums = products.sum((1, 2, 3)) if channels else products.sum()
        factor = (x.numel() / (channels or 1) * 127) ** -0.5
        assert torch.allclose(made.scale.grad.double(), sums * factor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("policy", ["frozen", "lsq"])
def test_a_gradient_in_another_memory_order_lands_where_it_belongs(policy):
    torch.manual_seed(6)
    x = (torch.randn(2, 3, 4, 5) * 3).requires_grad_()
    made = quantizer(3.0, policy=policy)
    upstream = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    made(x).backward(upstream)
    _, inside = plain_round_trip(x.detach(), made.scale.detach(), -128)
    assert 0 < (~inside).sum() < x.numel()
    assert torch.equal(x.grad, upstream * inside)


def test_a_learned_scale_survives_a_sum_that_overwrites_the_quantized_tensor():
    torch.manual_seed(1)
    x = torch.randn(8, 512, requires_grad=True)
    grads = []
    for in_place in (False, True):
        made = quantizer(3.0, policy="lsq")
        made.is_overwritten = True
        y = made(x)
        total = y.add_(x.detach()) if in_place else y + x.detach()
        total.square().sum().backward()
        grads.append(made.scale.grad)
    assert torch.equal(*grads)
