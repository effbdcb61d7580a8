"""ACNet on whole models: what is replaced, what stays, and what comes out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm.layers
import torch
from torch import Tensor, nn

from slimcli.algorithms.acnet.blocks import BLOCKS, BranchBlock, MergedBlock
from slimcli.algorithms.acnet.config import ACNetConfig
from slimcli.algorithms.acnet.method import ACNetCompressor
from slimcli.compressor import GroupDefaults, Plan, Schedule
from slimcli.errors import RecipeError
from slimcli.network.count import count_macs
from slimcli.network.example import Example

from ..contract.networks import NETWORKS, build

EXACT = 1e-10
"""Relative, float64: kernels summed before or after convolving."""
SAME = 1e-12
"""Relative, float64: the same sums, in another memory format."""

TARGETS = ["stem", "shared", "depthwise", "before_batch", "last"]
"""The convolutions of ``Mixed`` that become blocks."""

SCHEDULE = Schedule(epochs=2, steps_per_epoch=2, learning_rates=(0.1,) * 4, seed=7)


class Mixed(nn.Module):
    """A conv of every kind that is replaced or stays."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.point = nn.Conv2d(8, 8, 1)
        self.even = nn.Conv2d(8, 8, 4, padding=1)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, (3, 5), padding="same", groups=8, padding_mode="reflect")
        self.depthwise_norm = nn.BatchNorm2d(8, affine=False)
        self.batch_norm_of_batch = nn.BatchNorm2d(8, track_running_stats=False)
        self.before_batch = nn.Conv2d(8, 8, 3, padding=1)
        self.by_function = nn.Conv2d(8, 8, 3, padding=1)
        self.own_class = timm.layers.Conv2dSame(8, 8, 3)
        self.tied_a = nn.Conv2d(8, 8, 3, padding=1)
        self.tied_b = nn.Conv2d(8, 8, 3, padding=1)
        self.tied_b.weight = self.tied_a.weight
        self.last = nn.Conv2d(8, 8, 3, padding=1)
        self.last_norm = timm.layers.BatchNormAct2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        x = self.even(self.point(x))
        x = self.shared(torch.relu(self.shared(x)))
        x = torch.relu(self.depthwise_norm(self.depthwise(x)))
        x = self.batch_norm_of_batch(self.before_batch(x))
        x = nn.functional.conv2d(x, self.by_function.weight, padding=1)
        x = self.tied_b(self.tied_a(self.own_class(x)))
        x = self.last_norm(self.last(x))
        return self.fc(x.mean((2, 3)))


def example(seed: int = 0) -> Example:
    torch.manual_seed(seed)
    batch = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    return Example(batch, lambda model, images: model(images))


def mixed() -> nn.Module:
    torch.manual_seed(1)
    model = Mixed().double()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None:
            norm.running_mean.normal_(std=0.3)
            norm.running_var.uniform_(0.5, 2.0)
    return model.eval()


def prepared(model: nn.Module, **keys: Any) -> tuple[ACNetCompressor, nn.Module, Plan]:
    compressor = ACNetCompressor(ACNetConfig(**keys))
    plan = compressor.plan(model, example(), SCHEDULE)
    return compressor, compressor.prepare(model, example(), plan), plan


def train_a_little(compressor: ACNetCompressor, model: nn.Module) -> None:
    optimizer = torch.optim.SGD(compressor.param_groups(model, GroupDefaults(0.01)), lr=0.01)
    model.train()
    for seed in range(3):
        optimizer.zero_grad()
        example(seed).run(model).square().mean().backward()
        optimizer.step()
    model.eval()


def shapes_of_convs(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the kernel, of every convolution."""
    convs = {name: each for name, each in model.named_modules() if isinstance(each, nn.Conv2d)}
    return {name: tuple(each.weight.shape) for name, each in convs.items()}


def relative(first: Tensor, second: Tensor) -> float:
    return ((first - second).abs().max() / second.abs().max()).item()


@pytest.fixture(params=sorted(BLOCKS))
def block_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_plan_says_why_convs_stay() -> None:
    _, _, plan = prepared(mixed())
    reasons = {layer.name: layer.frozen_reason for layer in plan.layers}
    assert plan.targets == TARGETS
    assert "1x1" in reasons["point"]
    assert "even kernel 4x4" in reasons["even"]
    assert "not called" in reasons["by_function"]
    assert "Conv2dSame" in reasons["own_class"]
    assert "another module" in reasons["tied_a"]
    assert "another module" in reasons["tied_b"]
    assert [reasons[name] for name in plan.targets] == [""] * 5
    assert "5 of 11 convolutions" in plan.notes[0]


class WithAverage(nn.Module):
    """Trains one copy of a network and evaluates another, the average of the first."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2)
        self.trained = nn.Sequential(*layers)
        self.average = copy.deepcopy(self.trained).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.average(x)
        with torch.no_grad():
            for old, new in zip(self.average.parameters(), self.trained.parameters(), strict=True):
                old.mul_(0.5).add_(new, alpha=0.5)
        return self.trained(x)


def test_a_conv_that_only_training_calls_becomes_a_block_like_its_average() -> None:
    old = WithAverage().double().eval()
    before = example().run(old)
    compressor, model, plan = prepared(old)
    assert plan.targets == ["trained.0", "average.0"]
    assert relative(example().run(model), before) < SAME
    train_a_little(compressor, model)
    assert relative(example().run(compressor.deploy(model)), example().run(model)) < EXACT
    handed = compressor.handover(model, [example(1)])
    assert relative(example().run(handed), example().run(model)) < EXACT
    assert isinstance(handed.trained[1], nn.BatchNorm2d)


def test_a_conv_whose_weight_eval_mode_computes_with_stays() -> None:
    class Merging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                return self.wide(x) + self.narrow(x)
            kernel = self.wide.weight + nn.functional.pad(self.narrow.weight, (1, 1, 1, 1))
            return nn.functional.conv2d(x, kernel, self.wide.bias + self.narrow.bias, padding=1)

    _, _, plan = prepared(Merging().double())
    reasons = {layer.name: layer.frozen_reason for layer in plan.layers}
    assert plan.targets == []
    assert "eval mode computes with its weight" in reasons["wide"]


def test_a_train_mode_that_fails_is_told_of_the_convs_it_might_have_called() -> None:
    class NeedsTargets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.auxiliary = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
            x = self.conv(x)
            if self.training and targets is None:
                raise ValueError("targets are missing")
            return x if targets is None else x + self.auxiliary(x)

    _, _, plan = prepared(NeedsTargets().double())
    reasons = {layer.name: layer.frozen_reason for layer in plan.layers}
    assert plan.targets == ["conv"]
    assert "train mode raised ValueError: targets are missing" in reasons["auxiliary"]


def test_the_norm_behind_a_conv_is_taken_in_and_an_activation_stays(block_name: str) -> None:
    _, model, _ = prepared(mixed(), acnet_type=block_name)
    assert type(model.stem_norm) is nn.Identity
    assert type(model.depthwise_norm) is nn.Identity
    assert type(model.batch_norm_of_batch) is nn.BatchNorm2d
    assert type(model.last_norm) is nn.ReLU
    assert isinstance(model.before_batch.norm, nn.Identity)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_warm_start_leaves_the_function_as_it_was(block_name: str, mode: str) -> None:
    model = mixed().train(mode == "train")
    before = example().run(copy.deepcopy(model))
    _, model, _ = prepared(model, acnet_type=block_name)
    assert relative(example().run(model), before) < SAME


def test_deploying_gives_the_old_modules_back_with_a_bias(block_name: str) -> None:
    old = mixed()
    compressor, model, _ = prepared(mixed(), acnet_type=block_name)
    train_a_little(compressor, model)
    plain = compressor.deploy(model)
    assert relative(example().run(plain), example().run(model)) < EXACT
    ours = [m for m in plain.modules() if type(m).__module__.startswith("slimcli")]
    assert ours == []
    assert shapes_of_convs(plain) == shapes_of_convs(old)
    assert [name for name, _ in plain.named_children()] == [n for n, _ in old.named_children()]
    assert all(plain.get_submodule(name).bias is not None for name in TARGETS)
    assert count_macs(plain, example()).total == count_macs(old, example()).total


def test_deploying_twice_gives_the_same_and_changes_nothing(block_name: str) -> None:
    compressor, model, _ = prepared(mixed(), acnet_type=block_name)
    train_a_little(compressor, model)
    before = copy.deepcopy(model.state_dict())
    first, second = compressor.deploy(model), compressor.deploy(model)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_module_used_twice_is_replaced_once_and_stays_shared() -> None:
    torch.manual_seed(2)
    conv = nn.Conv2d(3, 3, 3, padding=1)
    model = nn.Sequential(conv, nn.ReLU(), conv, nn.Flatten(), nn.LazyLinear(2)).double()
    example().run(model)
    expected = example().run(model)
    compressor, model, plan = prepared(model)
    assert plan.targets == ["0"]
    assert isinstance(model[0], BranchBlock)
    assert model[0] is model[2]
    assert relative(example().run(model), expected) < SAME
    plain = compressor.deploy(model)
    assert type(plain[0]) is nn.Conv2d
    assert plain[0] is plain[2]
    assert relative(example().run(plain), expected) < EXACT


class Child(nn.Module):
    """Knows its owner, without owning it."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.owner = [owner]
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.owner[0].scale


class Owner(nn.Module):
    """A child that refers back to it makes a circle of objects, not of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.child = Child(self)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.child(x)).mean((2, 3))


def test_a_module_that_refers_back_to_its_owner_is_replaced_once() -> None:
    torch.manual_seed(6)
    model = Owner().double().eval()
    expected = example().run(model)
    compressor, model, plan = prepared(model)
    assert plan.targets == ["child.conv"]
    assert relative(example().run(model), expected) < SAME
    train_a_little(compressor, model)
    plain = compressor.deploy(model)
    assert plain.child.owner[0] is plain
    assert type(plain.child.conv) is nn.Conv2d
    assert relative(example().run(plain), example().run(model)) < EXACT


@pytest.mark.parametrize(
    "keys", [{"kernel_size": 4, "stride": 2, "padding": 1}, {"kernel_size": 2, "stride": 2}]
)
def test_even_kernels_with_a_stride_stay_and_are_deployed_right(keys: dict[str, int]) -> None:
    torch.manual_seed(7)
    even = nn.Conv2d(3, 4, **keys)
    model = nn.Sequential(even, nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)).double()
    compressor, model, plan = prepared(model)
    assert plan.targets == ["2"]
    assert "even kernel" in plan.layers[0].frozen_reason
    train_a_little(compressor, model)
    plain = compressor.deploy(model)
    assert [type(each) for each in plain] == [nn.Conv2d, nn.Identity, nn.Conv2d]
    assert relative(example().run(plain), example().run(model)) < EXACT


NORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "affine=False": {"affine": False},
    "no statistics": {"track_running_stats": False},
    "average of all batches": {"momentum": None},
}


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("norm", [None, *NORMS])
def test_every_kind_of_norm_behind_a_conv_is_deployed_right(
    block_name: str, norm: str | None, has_bias: bool
) -> None:
    torch.manual_seed(8)
    behind = nn.Identity() if norm is None else nn.BatchNorm2d(4, **NORMS[norm])
    conv = nn.Conv2d(3, 4, 3, padding=1, bias=has_bias)
    compressor, model, plan = prepared(
        nn.Sequential(conv, behind, nn.ReLU()).double(), acnet_type=block_name
    )
    assert plan.targets == ["0"]
    train_a_little(compressor, model)
    assert compressor.status(model)["side_scale"] > 0
    plain = compressor.deploy(model)
    stays = norm == "no statistics"  # eval mode normalises by the batch: nothing to fold
    assert type(plain[1]) is (nn.BatchNorm2d if stays else nn.Identity)
    assert relative(example().run(plain), example().run(model)) < EXACT


@pytest.mark.parametrize(("asked", "scale"), [(None, 1.0), ("1/3", 1 / 3), (0.25, 0.25)])
def test_every_branch_starts_with_the_scale_asked_for(
    block_name: str, asked: float | str | None, scale: float
) -> None:
    _, model, _ = prepared(build("chain"), init="paper", gamma_init=asked, acnet_type=block_name)
    block = model.conv1
    if isinstance(block, MergedBlock):
        scales = [block.norm.weight, *block.scales]
    else:
        scales = [block.norm.weight, *(side.norm.weight for side in block.sides)]
    assert len(scales) >= 3
    assert all(torch.all((each - scale).abs() < 1e-6) for each in scales)


def test_the_papers_init_draws_fresh_weights_with_the_scale_asked_for() -> None:
    old = build("residual")
    _, model, _ = prepared(copy.deepcopy(old), init="paper", gamma_init="1/3")
    block = model.stem
    assert not torch.equal(block.square.weight, old.stem.weight)
    assert block.square.bias is None
    for norm in (block.norm, *(side.norm for side in block.sides)):
        assert torch.all((norm.weight - 1 / 3).abs() < 1e-6)
        assert norm.running_mean.abs().max() == 0
    without = ACNetConfig(init="paper")
    assert without.gamma == 1.0


def test_a_scale_that_would_do_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="gamma_init has no effect"):
        ACNetConfig(gamma_init=0.5)


def test_fresh_weights_come_from_the_seed_alone() -> None:
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(prepared(build("chain"))[1])
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_the_handover_has_every_norm_back_at_its_place(network: str) -> None:
    old = build(network)
    compressor, model, _ = prepared(build(network))
    train_a_little(compressor, model)
    handed = compressor.handover(model, [example(1), example(2)])
    assert relative(example().run(handed), example().run(model)) < EXACT
    norms = [name for name, m in old.named_modules() if isinstance(m, nn.BatchNorm2d)]
    for name in norms:
        assert type(handed.get_submodule(name)) is nn.BatchNorm2d


def test_the_handover_keeps_an_activation_that_sat_in_the_norm() -> None:
    compressor, model, _ = prepared(mixed())
    train_a_little(compressor, model)
    handed = compressor.handover(model, [example(1), example(2)])
    assert [type(each) for each in handed.last_norm] == [nn.BatchNorm2d, nn.ReLU]
    assert relative(example().run(handed), example().run(model)) < EXACT


def test_skip_takes_patterns_and_a_pattern_that_fits_nothing_is_refused() -> None:
    _, model, plan = prepared(mixed(), skip=("stem", "dep*"))
    assert plan.targets == ["shared", "before_batch", "last"]
    assert type(model.stem) is nn.Conv2d
    with pytest.raises(RecipeError, match="no module fits the pattern 'layer9"):
        prepared(mixed(), skip=("layer9.*",))


def test_skipping_everything_is_plain_training_and_says_so() -> None:
    model = mixed()
    before = copy.deepcopy(model.state_dict())
    compressor, model, plan = prepared(model, skip=("*",))
    assert list(model.state_dict()) == list(before)
    assert "plain training" in plan.warnings[0]
    assert relative(example().run(compressor.deploy(model)), example().run(model)) < EXACT


def test_side_branches_start_at_zero_and_take_part_after_training(block_name: str) -> None:
    compressor, model, _ = prepared(mixed(), acnet_type=block_name)
    assert compressor.status(model) == {"side_scale": 0.0}
    train_a_little(compressor, model)
    assert compressor.status(model)["side_scale"] > 0
    kind = MergedBlock if block_name == "merged" else BranchBlock
    assert isinstance(model.stem, kind)


def test_a_conv_over_single_images_stays_plain() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)).double()
    one = Example(torch.randn(3, 8, 8, dtype=torch.float64), lambda net, image: net(image))
    compressor = ACNetCompressor(ACNetConfig())
    plan = compressor.plan(model, one, SCHEDULE)
    assert plan.targets == []
    assert "without a batch" in plan.layers[0].frozen_reason


class Tapped(nn.Module):
    """Its head reads what a hook wrote down behind a conv, as taps of features do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.up, self.up_norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)
        self.seen: dict[str, Tensor] = {}
        self.up.register_forward_hook(lambda conv, inputs, output: self.seen.update(up=output))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.up_norm(self.up(torch.relu(self.stem_norm(self.stem(x))))))
        return self.fc((x + self.seen["up"].sigmoid()).mean((2, 3)))


def test_a_conv_that_a_hook_of_the_users_reads_stays_plain(block_name: str) -> None:
    torch.manual_seed(3)
    compressor, model, plan = prepared(Tapped().double(), acnet_type=block_name)
    assert plan.targets == ["stem"]
    assert {row.name: row.frozen_reason for row in plan.layers} == {
        "stem": "",
        "up": "forward hooks read it",
    }
    assert type(model.up) is nn.Conv2d
    train_a_little(compressor, model)
    trained = example(9).run(model)
    assert relative(example(9).run(compressor.deploy(model)), trained) < EXACT
