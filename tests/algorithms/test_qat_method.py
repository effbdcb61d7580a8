"""The four moments of QAT: calibration, freezing on schedule, hand-over, what deploys."""

import copy

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from slimcli.algorithms.qat.config import ALGORITHM, QATConfig
from slimcli.algorithms.qat.method import QATCompressor
from slimcli.compressor import GroupDefaults, Progress, Schedule, registry
from slimcli.errors import RunError
from slimcli.network.example import Example
from slimcli.network.quantize.fake_quant import Phase, quantizers

from .qat_networks import NETWORKS, Residual, build, example_of, predict

EPOCHS, STEPS = 4, 3
SCHEDULE = Schedule(EPOCHS, STEPS, (0.01,) * (EPOCHS * STEPS))


def batches(count=4):
    torch.manual_seed(11)
    return [Example(torch.randn(8, 3, 16, 16), predict) for _ in range(count)]


def started(model, calibrated=True, **keys):
    """Compressor and model, ready to train."""
    compressor = QATCompressor(QATConfig(**keys))
    example = example_of()
    model = compressor.prepare(model, example, compressor.plan(model, example, SCHEDULE))
    if calibrated:
        compressor.calibrate(model, batches())
    return compressor, model


def train(compressor, model, epochs=range(EPOCHS), watch=lambda epoch: None, lr=0.01):
    groups = compressor.param_groups(model, GroupDefaults(lr=lr))
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=1e-4)
    for epoch in epochs:
        progress = Progress(epoch, epoch * STEPS, lr, SCHEDULE)
        assert compressor.before_epoch(model, progress) == []
        model.train()
        for step in range(STEPS):
            torch.manual_seed(epoch * STEPS + step)
            labels = torch.randint(5, (8,))
            images = torch.randn(8, 3, 16, 16) + labels.view(-1, 1, 1, 1)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            compressor.after_backward(model, progress)
            optimizer.step()
            compressor.after_step(model, progress, False)
        watch(epoch)
    return loss.item()


def scales(model):
    return {name: each.scale.detach().clone() for name, each in quantizers(model).items()}


def statistics(model):
    return {name: value.clone() for name, value in model.state_dict().items() if "running" in name}


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_the_original_class_path_names_the_algorithm():
    info = registry()["qat"]
    assert info is ALGORITHM
    assert "torchslim.reparameter.quantizing.qat.QATSolver" in info.aliases
    assert info.training_defaults == {"lr": 0.001}
    assert info.load() is QATCompressor


def test_the_plan_lists_every_layer_with_macs_and_why_one_stays_float():
    compressor = QATCompressor(QATConfig(skip=("first",)))
    plan = compressor.plan(build("residual"), example_of(), SCHEDULE)
    assert [(row.name, row.frozen_reason) for row in plan.layers] == [
        ("conv1", "skip: first"),
        ("conv2", ""),
        ("conv3", ""),
        ("fc", ""),
    ]
    assert plan.targets == ["conv2", "conv3", "fc"]
    assert plan.budget["quantized_layers"] == 3
    assert plan.macs == 16 * 16 * 9 * (3 * 8 + 2 * 8 * 8) + 8 * 5
    assert plan.refusals == []


def test_a_model_with_nothing_to_quantize_is_refused():
    plan = QATCompressor(QATConfig()).plan(nn.Sequential(nn.ReLU()), example_of(), SCHEDULE)
    assert len(plan.refusals) == 1


def test_an_epoch_to_freeze_at_that_never_comes_is_refused():
    keys = QATConfig(freeze_bn_epoch=EPOCHS, freeze_scale_epoch=EPOCHS + 95, scale="ema")
    plan = QATCompressor(keys).plan(build("residual"), example_of(), SCHEDULE)
    assert [each.key for each in plan.refusals] == ["freeze_scale_epoch", "freeze_bn_epoch"]
    assert plan.refusals[1].fix.startswith(f"freeze_bn_epoch: {EPOCHS - 1} or less")
    assert all(each.is_for_any_model for each in plan.refusals)
    keys = QATConfig(freeze_bn_epoch=EPOCHS - 1, freeze_scale_epoch=EPOCHS - 1, scale="ema")
    assert not QATCompressor(keys).plan(build("residual"), example_of(), SCHEDULE).refusals
    untrained = Schedule(0, 1, ())  # no key of training acts, and none is meant to
    assert not QATCompressor(keys).plan(build("residual"), example_of(), untrained).refusals


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"percentile": 50.0}, "percentile has no effect with calibration: max"),
        ({"percentile": 50.0, "calibration": "mse"}, "has no effect with calibration: mse"),
        ({"freeze_scale_epoch": 1}, "freeze_scale_epoch has no effect with scale: frozen"),
    ],
)
def test_a_key_that_nothing_reads_is_refused(keys, told):
    with pytest.raises(ValidationError, match=told):
        QATConfig(**keys)


def test_a_default_that_stands_in_a_resolved_recipe_is_not_refused():
    assert QATConfig(**QATConfig().model_dump()) == QATConfig()
    assert QATConfig(percentile=50.0, calibration="percentile").percentile == 50.0
    assert QATConfig(freeze_scale_epoch=1, scale="lsq").freeze_scale_epoch == 1


@pytest.mark.parametrize("name", sorted(NETWORKS))
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_the_deployed_model_equals_the_fake_quantized_one_bit_for_bit(name, granularity):
    compressor, model = started(build(name), weight_granularity=granularity)
    example = example_of()
    expected, state = example.run(model), copy.deepcopy(model.state_dict())
    deployed, again = compressor.deploy(model.train()), compressor.deploy(model)
    assert torch.equal(example.run(deployed), expected)
    assert not deployed.training
    assert equal(deployed.state_dict(), again.state_dict())
    assert equal(model.state_dict(), state)
    assert {each.phase for each in quantizers(deployed).values()} == {Phase.EXPORT}
    assert {each.phase for each in quantizers(model).values()} == {Phase.FROZEN}


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_int8_is_close_to_float_after_calibration(name):
    model, example = build(name), example_of()
    expected = example.run(model)
    _, model = started(model, weight_granularity="channel", freeze_bn_epoch=0)
    noise = (example.run(model) - expected).square().sum()
    # 8 bits over a few layers: 25 dB was exceeded by all of them, a wrong scale gives under 10.
    assert 10 * torch.log10(expected.square().sum() / noise) > 25


def test_every_zero_point_is_zero_and_scales_have_the_rank_onnx_wants():
    _, model = started(build("upsampling"), weight_granularity="channel")
    for name, each in quantizers(model).items():
        assert each.zero_point.dtype == torch.int8
        assert not each.zero_point.any()
        per_channel = each.is_weight and not name.startswith("up")
        assert each.scale.dim() == int(per_channel), name
    assert quantizers(model)["down.0.weight_quantizer"].scale.shape == (8,)


def test_channel_granularity_gives_conv_and_linear_one_scale_for_each_output():
    _, model = started(build("residual"), weight_granularity="channel")
    for name, outputs in (("conv1", 8), ("fc", 5)):
        made = quantizers(model)[f"{name}.weight_quantizer"]
        weight = model.get_submodule(name).weight
        assert made.axis == 0
        assert torch.equal(made.amax, weight.detach().abs().flatten(1).amax(1))
        assert len(made.scale) == outputs


def test_frozen_scales_stay_while_weights_train():
    compressor, model = started(build("residual"))
    before, weights = scales(model), copy.deepcopy(dict(model.named_parameters()))
    train(compressor, model)
    assert equal(scales(model), before)
    assert not torch.equal(model.conv1.weight, weights["conv1.weight"])


@pytest.mark.parametrize("policy", ["frozen", "ema", "lsq"])
def test_training_through_the_quantizers_learns(policy):
    compressor, model = started(build("residual"), scale=policy)
    torch.manual_seed(5)
    labels = torch.arange(100) % 5
    images = torch.randn(100, 3, 16, 16) + labels.view(-1, 1, 1, 1)
    train(compressor, model, [0, 1, 2, 3] * 5, lr=0.05)
    predicted = model.eval()(images).argmax(1)
    assert (predicted == labels).float().mean() >= 0.5  # guessing gives 0.2


@pytest.mark.parametrize("policy", ["ema", "lsq"])
def test_scales_move_until_their_epoch_and_stay_from_then_on(policy):
    compressor, model = started(build("residual"), scale=policy, freeze_scale_epoch=2)
    seen = [scales(model)]
    train(compressor, model, watch=lambda epoch: seen.append(scales(model)))
    stayed = [name for name in seen[0] if torch.equal(seen[0][name], seen[1][name])]
    assert stayed == (["conv1.input_quantizer"] if policy == "lsq" else [])  # the image
    assert not equal(seen[1], seen[2])
    assert equal(seen[2], seen[3])
    assert equal(seen[3], seen[4])
    assert compressor.status(model) == {"quantizers": 8.0, "frozen_scales": 8.0}


@pytest.mark.parametrize("failing_run", [1, 2])  # the second is that of the batch's own statistics
def test_a_batch_that_fails_leaves_modes_and_statistics_as_they_were(failing_run):
    compressor, model = started(build("residual"), calibrated=False)
    model.train()
    before, runs = statistics(model), []

    def failing(net, images):
        runs.append(net(images))
        if len(runs) == failing_run:
            raise ValueError("no such image")

    with pytest.raises(ValueError, match="no such image"):
        compressor.calibrate(model, [Example(batches(1)[0].batch, failing)])
    assert len(runs) == failing_run
    assert all(module.training for module in model.modules())
    assert equal(before, statistics(model))


def test_batch_statistics_move_until_their_epoch_and_stay_from_then_on():
    compressor, model = started(build("residual"), freeze_bn_epoch=2)
    seen, gains = [statistics(model)], []

    def watch(epoch):
        seen.append(statistics(model))
        gains.append(model.bn1.weight.detach().clone())

    train(compressor, model, watch=watch)
    assert not equal(seen[0], seen[1])
    assert not equal(seen[1], seen[2])
    assert equal(seen[2], seen[3])
    assert equal(seen[3], seen[4])
    assert not torch.equal(gains[2], gains[3])  # gamma and beta train on


def test_frozen_statistics_and_phases_come_back_with_the_state():
    compressor, model = started(
        build("residual"), scale="ema", freeze_bn_epoch=1, freeze_scale_epoch=1
    )
    train(compressor, model, range(2))
    _, fresh = started(
        Residual(), calibrated=False, scale="ema", freeze_bn_epoch=1, freeze_scale_epoch=1
    )
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    assert {each.phase for each in quantizers(fresh).values()} == {Phase.FROZEN}
    fresh.train()
    assert fresh.training
    assert not fresh.bn1.training
    example = example_of()
    assert torch.equal(example.run(fresh), example.run(model.train()))


@pytest.mark.parametrize("policy", ["frozen", "ema", "lsq"])
def test_stopping_and_resuming_equals_going_on_bit_for_bit(policy):
    keys = {"scale": policy, "freeze_bn_epoch": 1}
    if policy != "frozen":
        keys["freeze_scale_epoch"] = 3
    compressor, model = started(build("residual"), **keys)
    train(compressor, model, range(2))
    state = copy.deepcopy(model.state_dict())
    train(compressor, model, range(2, 4))
    other, fresh = started(Residual(), calibrated=False, **keys)
    fresh.load_state_dict(state)
    train(other, fresh, range(2, 4))
    assert equal(fresh.state_dict(), model.state_dict())


def test_learned_scales_are_trained_without_decay_and_every_parameter_once():
    compressor, model = started(build("residual"), scale="lsq")
    groups = compressor.param_groups(model, GroupDefaults(lr=0.1, weight_decay=0.5))
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    decay = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert {decay[name] for name in names if name.endswith("quantizer.scale")} == {0.0}
    assert decay["conv1.weight"] == 0.5


def test_a_learned_scale_stays_positive_and_near_the_calibrated_one():
    compressor, model = started(build("residual"), scale="lsq")
    made = quantizers(model)["conv1.weight_quantizer"]
    calibrated = made.scale.item()
    for pushed, kept in ((-3.0, calibrated / 4), (1e6, 2 * calibrated)):
        with torch.no_grad():
            made.scale.fill_(pushed)
        compressor.after_step(model, Progress(0, 0, 0.1, SCHEDULE), False)
        assert made.scale.item() == pytest.approx(kept)


def test_everything_skipped_is_the_plain_loop_step_by_step():
    plain = build("residual")
    twin = copy.deepcopy(plain)
    compressor, model = started(plain, skip=("*",))
    loss = train(compressor, model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    twin.train()
    for step in range(EPOCHS * STEPS):
        torch.manual_seed(step)
        labels = torch.randint(5, (8,))
        images = torch.randn(8, 3, 16, 16) + labels.view(-1, 1, 1, 1)
        optimizer.zero_grad()
        expected = nn.functional.cross_entropy(twin(images), labels)
        expected.backward()
        optimizer.step()
    assert loss == expected.item()
    assert equal(model.state_dict(), twin.state_dict())


def test_handover_is_the_float_network_with_the_trained_weights():
    compressor, model = started(build("residual"), scale="lsq", freeze_bn_epoch=1)
    train(compressor, model)
    state = copy.deepcopy(model.state_dict())
    plain = compressor.handover(model, batches(1))
    names = list(Residual().state_dict())
    assert list(plain.state_dict()) == names
    assert equal(plain.state_dict(), {name: state[name] for name in names})
    assert not any(type(each).__module__.startswith("slimcli") for each in plain.modules())
    assert type(plain.conv1) is nn.Conv2d
    assert type(plain.bn1) is nn.BatchNorm2d
    assert not any(each._forward_pre_hooks or each._forward_hooks for each in plain.modules())
    assert plain.train().bn1.training
    assert equal(model.state_dict(), state)


def test_calibration_leaves_weights_statistics_and_modes_alone():
    _, model = started(build("residual"), calibrated=False)
    model.train()
    model.bn2.eval()
    before = statistics(model)
    QATCompressor(QATConfig()).calibrate(model, batches())
    assert equal(statistics(model), before)
    assert model.training
    assert not model.bn2.training


def test_ranges_also_fit_the_statistics_that_training_uses():
    torch.manual_seed(0)
    _, model = started(Residual())  # fresh: its stored statistics fit no data
    model.train()
    seen = {}
    for name, each in quantizers(model).items():
        each.register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: module.magnitude(args[0])})
        )
    model(batches()[0].batch)
    for name, largest in seen.items():
        # The batch was calibrated on; rounding on the way moves the largest value by a few percent.
        assert largest <= 1.1 * quantizers(model)[name].amax, name


def test_frozen_statistics_are_calibrated_as_they_are():
    ranges = []
    for epoch in (0, 1):
        _, model = started(build("upsampling"), freeze_bn_epoch=epoch)
        ranges.append(quantizers(model)["up2.input_quantizer"].amax.item())
    assert 2 * ranges[0] < ranges[1]  # this network's stored statistics are not those of its data


def test_only_as_many_batches_as_asked_for_are_looked_at():
    taken = []

    def stream():
        for each in batches(4):
            taken.append(each)
            yield each

    compressor, model = started(build("residual"), calibrated=False, calibration_batches=2)
    compressor.calibrate(model, stream())
    assert len(taken) == 2


def test_without_calibration_nothing_is_trained_or_deployed():
    compressor, model = started(build("residual"), calibrated=False)
    with pytest.raises(RunError, match="8 quantizers have no range"):
        compressor.before_epoch(model, Progress(0, 0, 0.1, SCHEDULE))
    with pytest.raises(RunError, match="8 quantizers have no range"):
        compressor.deploy(model)


def test_nan_in_calibration_names_the_layer():
    compressor, model = started(build("residual"), calibrated=False)
    with torch.no_grad():
        model.bn2.bias[0] = float("nan")
    with pytest.raises(RunError, match="the input of conv3 is not finite"):
        compressor.calibrate(model, batches())


def test_nan_in_a_range_that_follows_the_data_stops_before_the_step():
    compressor, model = started(build("residual"), scale="ema")
    model.train()
    model(torch.full((2, 3, 16, 16), float("inf")))
    with pytest.raises(RunError, match="the input of conv1 is not finite"):
        compressor.after_backward(model, Progress(0, 0, 0.1, SCHEDULE))


def test_training_under_autocast_moves_weights_and_keeps_scales_float32():
    _, model = started(build("residual"), scale="lsq")
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(4, 3, 16, 16)).float().square().mean()
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    assert all(value.dtype == torch.float32 for value in scales(model).values())


# Each key with a value that is not its default; what is seen must differ from the default's.
EFFECTS = [
    ({}, {"weight_granularity": "channel"}),
    ({}, {"calibration": "ema"}),
    ({}, {"calibration": "percentile"}),
    ({}, {"calibration": "mse"}),
    ({}, {"calibration": "entropy"}),
    ({}, {"calibration_batches": 1}),
    ({"calibration": "percentile"}, {"percentile": 99.0}),
    ({}, {"scale": "ema"}),
    ({}, {"scale": "lsq"}),
    ({"scale": "ema"}, {"freeze_scale_epoch": 1}),
    ({}, {"freeze_bn_epoch": 0}),
    ({}, {"skip": ("fc",)}),
]


@pytest.mark.parametrize(("common", "change"), EFFECTS)
def test_every_key_of_training_has_an_effect(common, change):
    losses = []
    for keys in (common, common | change):
        compressor, model = started(build("residual"), **keys)
        losses.append(train(compressor, model, range(2)))
    assert losses[0] != losses[1]
    tested = {key for _, keys in EFFECTS for key in keys}
    assert tested == set(QATConfig.model_fields) - {"bn_export"}  # acts after training


@pytest.mark.parametrize(
    "keys", [{"percentile": 0}, {"calibration_batches": 0}, {"scale": "learned"}, {"bits": 4}]
)
def test_a_wrong_value_or_key_is_refused(keys):
    with pytest.raises(ValidationError):
        QATConfig(**keys)


def test_the_plan_names_the_quantizer_each_layer_reads_and_who_shares_it():
    compressor = QATCompressor(QATConfig())
    plan = compressor.plan(build("residual"), example_of(), Schedule(1, 1, (0.1,)))
    assert {row.name: row.group for row in plan.layers} == {
        "conv1": "conv1.input",
        "conv2": "conv2.input: conv2, + conv3",
        "conv3": "conv3.input",
        "fc": "fc.input",
    }


def test_the_plan_warns_of_float64_and_names_what_else_stays_float():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.gru(x)[0][:, -1])

    example = Example(torch.randn(2, 5, 3, dtype=torch.float64), lambda model, x: model(x))
    plan = QATCompressor(QATConfig()).plan(Recurrent().double(), example, Schedule(1, 1, (0.1,)))
    assert len(plan.warnings) == 1
    assert plan.warnings[0].startswith("head.weight is float64, which ONNX cannot quantize")
    assert plan.notes == ["stay float, only convolution and linear layers are quantized: gru (GRU)"]
