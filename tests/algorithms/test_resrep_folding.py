"""Compactors change nothing when they come, and folding changes nothing when they go."""

import copy

import pytest
import torch
from torch import Tensor, nn

from slimcli.algorithms.resrep.config import ALGORITHM, ResRepConfig
from slimcli.algorithms.resrep.method import ResRepCompressor
from slimcli.compressor import GroupDefaults, Progress, Schedule
from slimcli.network import surgery
from slimcli.network.count import count_macs
from slimcli.network.example import Example
from slimcli.network.handover import NormLeftOut

from .resrep_networks import NETWORKS, SHAPE, build

# Float64; folding reorders sums over at most a few hundred terms of order 1.
EXACT = 1e-10
SCHEDULE = Schedule(4, 10, (0.01,) * 40)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def predict(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch)


def example() -> Example:
    torch.manual_seed(5)
    return Example(torch.randn(SHAPE).double(), predict)


def prepared(name: str, **keys: object) -> tuple[ResRepCompressor, nn.Module]:
    """The network with compactors."""
    return prepared_of(build(name), **keys)


def prepared_of(model: nn.Module, **keys: object) -> tuple[ResRepCompressor, nn.Module]:
    defaults = {
        "lasso_decay": "auto",
        "prune_rate": 0.1,
        "warmup_epoch": 0,
        "groups_size": 1,
        "min_channels": 1,
        "auto_find_module_strategy": "all_bn",
    }
    compressor = ResRepCompressor(ResRepConfig(**{**defaults, **keys}))
    plan = compressor.plan(model, example(), SCHEDULE)
    assert plan.refusals == []
    return compressor, compressor.prepare(model, example(), plan)


def stir(compressor: ResRepCompressor, model: nn.Module) -> None:
    """Compactors as they are in the middle of training."""
    torch.manual_seed(7)
    for bundles in compressor.bundles:
        for weight in bundles.weights(model):
            weight.data += 0.2 * torch.randn_like(weight)


def kill(compressor: ResRepCompressor, model: nn.Module, share: float = 0.4) -> dict[str, int]:
    """Zeroes and locks some channels of every group; group -> how many."""
    killed = {}
    for number, bundles in enumerate(compressor.bundles):
        count = len(bundles.kept)
        gone = torch.randperm(count, generator=torch.Generator().manual_seed(number))
        which = torch.zeros(count, dtype=torch.bool)
        which[gone[: max(1, int(share * count))]] = True
        bundles.masked |= which
        bundles.project(model)
        killed[bundles.target.name] = int(which.sum())
    return killed


def eval_output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return example().run(copy.deepcopy(model).eval())


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name", NETWORKS)
def test_identity_compactors_change_neither_mode(name: str) -> None:
    plain = build(name)
    _, model = prepared(name)
    assert torch.equal(eval_output(model), eval_output(plain))
    with torch.no_grad():
        trained = example().run(copy.deepcopy(model).train())
        assert torch.equal(trained, example().run(plain.train()))


@pytest.mark.parametrize("name", NETWORKS)
def test_zeroed_equals_cut(name: str) -> None:
    compressor, model = prepared(name)
    stir(compressor, model)
    killed = kill(compressor, model)
    plain = compressor.deploy(model)
    assert difference(eval_output(plain), eval_output(model)) <= EXACT
    widths = {
        each.target.name: each.target.group.size - killed[each.target.name]
        for each in compressor.bundles
    }
    counted = count_macs(plain, example()).total
    assert counted == compressor.analysis.structure.macs_with(widths)
    assert counted < compressor.analysis.structure.macs


@pytest.mark.parametrize("name", NETWORKS)
def test_deploying_twice_is_the_same_and_leaves_the_model_alone(name: str) -> None:
    compressor, model = prepared(name)
    stir(compressor, model)
    kill(compressor, model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first, second = compressor.deploy(model), compressor.deploy(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_of_ours_and_no_norm_is_left(name: str) -> None:
    compressor, model = prepared(name)
    plain = compressor.deploy(model)
    kept = [type(module).__name__ for module in plain.modules() if isinstance(module, NORMS)]
    ours = [m for m in plain.modules() if type(m).__module__.startswith("slimcli")]
    hooked = [m for m in plain.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert (kept, ours, hooked) == ([], [], [])


@pytest.mark.parametrize("name", NETWORKS)
def test_every_trainable_parameter_is_in_one_group_and_compactors_have_their_own(name: str) -> None:
    compressor, model = prepared(name, compactor_momentum=0.97)
    groups = compressor.param_groups(model, GroupDefaults(lr=0.1, nesterov=True))
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    own = groups[-1]
    assert {key: own[key] for key in ("lr", "momentum", "weight_decay", "nesterov")} == {
        "lr": 0.1,
        "momentum": 0.97,
        "weight_decay": 0.0,
        "nesterov": False,
    }
    assert all(name.endswith("compactor.weight") for name in own["names"])
    others = [name for group in groups[:-1] for name in group["names"]]
    assert not any("compactor" in name for name in others)


def progress(step: int) -> Progress:
    return Progress(step // 10, step, 0.01, SCHEDULE)


@pytest.mark.parametrize("name", NETWORKS)
def test_cuts_between_epochs_change_nothing_and_deploy_stays_exact(name: str) -> None:
    compressor, model = prepared(name)
    stir(compressor, model)
    total = sum(parameter.numel() for parameter in model.parameters())
    optimizer = torch.optim.SGD(compressor.param_groups(model, GroupDefaults(lr=0.1)), lr=0.1)
    for _ in range(2):
        kill(compressor, model, 0.3)
        before, folded = eval_output(model), eval_output(compressor.deploy(model))
        cuts = compressor.before_epoch(model, progress(10))
        surgery.apply(model, cuts, optimizer=optimizer)
        compressor.after_cut(model, cuts)
        assert difference(eval_output(model), before) <= EXACT
        plain = compressor.deploy(model)
        assert difference(eval_output(plain), before) <= EXACT
        assert difference(folded, before) <= EXACT
    may_shrink = bool(compressor._shrinking)
    assert (sum(parameter.numel() for parameter in model.parameters()) < total) is may_shrink
    grouped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert grouped == {id(parameter) for parameter in model.parameters()}


def test_a_fresh_model_takes_the_state_of_a_cut_one() -> None:
    compressor, model = prepared("residual")
    stir(compressor, model)
    for _ in range(2):
        kill(compressor, model, 0.3)
        cuts = compressor.before_epoch(model, progress(10))
        surgery.apply(model, cuts)
        compressor.after_cut(model, cuts)
    kill(compressor, model, 0.3)
    again, fresh = prepared("residual")
    from slimcli.network.reshape import reshape_to

    reshape_to(fresh, {key: value.shape for key, value in model.state_dict().items()})
    fresh.load_state_dict(model.state_dict())
    again.load_state_dict(compressor.state_dict())
    assert torch.equal(eval_output(fresh), eval_output(model))
    assert repr(again.state_dict()) == repr(compressor.state_dict())
    pairs = zip(
        again.deploy(fresh).state_dict().values(),
        compressor.deploy(model).state_dict().values(),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_handover_has_every_norm_again_and_the_same_function(name: str) -> None:
    compressor, model = prepared(name)
    stir(compressor, model)
    kill(compressor, model)
    handed = compressor.handover(model, [example()])
    assert difference(eval_output(handed), eval_output(model)) <= EXACT
    norms = sum(isinstance(module, NORMS) for module in build(name).modules())
    assert sum(isinstance(module, NORMS) for module in handed.modules()) == norms
    assert not any(type(m).__module__.startswith("slimcli") for m in handed.modules())


class WithAuxiliaryHead(nn.Module):
    """A second head that only training runs, as in GoogLeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(SHAPE[1], 6), nn.BatchNorm2d(6), nn.ReLU())
        self.head = nn.Conv2d(6, 3, 1)
        self.auxiliary = nn.Sequential(conv(6, 5), nn.BatchNorm2d(5), nn.Conv2d(5, 3, 1))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        if not self.training:
            return self.head(x).mean((2, 3))
        self.calls += 1
        return (self.head(x) + self.auxiliary(x)).mean((2, 3))


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)


def test_a_head_that_only_training_runs_is_handed_over_with_its_norm() -> None:
    torch.manual_seed(1)
    compressor, model = prepared_of(WithAuxiliaryHead().double())
    stir(compressor, model)
    assert "auxiliary.1" in {each.target.name for each in compressor.bundles}
    handed = compressor.handover(model, [example()])
    assert difference(eval_output(handed), eval_output(model)) <= EXACT
    norm = handed.auxiliary[1]
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        features = handed.auxiliary[0](handed.eval().body(example().batch))
        expected = model.eval().auxiliary[:2](model.body(example().batch))
        assert difference(norm.running_mean, features.mean((0, 2, 3))) <= EXACT
        assert difference(norm(features), expected) <= EXACT
    assert handed.calls == 0  # measuring is no training


def test_a_conv_that_no_batch_reaches_is_handed_over_as_it_is_and_that_is_told() -> None:
    compressor, model = prepared("chain")
    stir(compressor, model)
    with pytest.warns(NormLeftOut, match="did not run on any batch"):
        handed = compressor.handover(model, [])
    assert difference(eval_output(handed), eval_output(model)) <= EXACT


def test_a_grouped_conv_gets_one_factor_a_channel() -> None:
    _, model = prepared("grouped conv")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if "compactor" in name}
    assert shapes["first.1.compactor.weight"] in ((8,), (8, 8))
    assert shapes["middle.1.compactor.weight"] == (8,)
    assert shapes["last.1.compactor.weight"] == (6, 6)


def test_coupled_layers_have_one_compactor_each_and_share_their_channels() -> None:
    compressor, _ = prepared("residual")
    groups = {each.target.name: each.target for each in compressor.bundles}
    assert [place.host for place in groups["stem.1"].places] == ["stem.1", "b.1"]
    assert [place.host for place in groups["d.1"].places] == ["d.1", "projection.1"]


def test_skip_leaves_layers_alone_and_must_fit_something() -> None:
    from slimcli.errors import RecipeError

    compressor, _ = prepared("residual", skip=("stem*",))
    assert "stem.1" not in {each.target.name for each in compressor.bundles}
    with pytest.raises(RecipeError, match=r"no layer that would be pruned is called steam"):
        prepared("residual", skip=("steam*",))


def test_layers_that_a_pattern_fits_lose_at_most_their_own_fraction() -> None:
    compressor, _ = prepared("residual", prune_ratios={"a*": 0.4, "self.stem*": 0.0})
    assert compressor.analysis.limits.least == {"stem.1": 6, "a.1": 3}
    plan = compressor.plan(build("residual"), example(), SCHEDULE)
    layers = {layer.name: (layer.channels, layer.channels_minimum) for layer in plan.layers}
    assert (layers["a.0"], layers["stem.0"], layers["b.0"]) == ((5, 3), (6, 6), (6, 6))
    assert layers["c.0"] == (7, 1)
    assert "a.1: prune_ratios removes at most 2 of 5 channels, keeps 3 or more" in plan.notes


@pytest.mark.parametrize("name", ["prune_module_names", "prune_ratios"])
def test_an_output_of_the_model_is_never_cut(name: str) -> None:
    from slimcli.errors import RecipeError

    value = {"fc": 0.5} if name == "prune_ratios" else ("fc",)
    with pytest.raises(RecipeError, match="it is an output of the model"):
        prepared("residual", **{name: value})


@pytest.mark.parametrize("keys", [{"prune_module_names": ()}, {"skip": ("*",)}])
def test_with_nothing_selected_the_model_stays_as_it_is(keys: dict) -> None:
    compressor, model = prepared("residual", **keys)
    assert list(model.state_dict()) == list(build("residual").state_dict())
    assert compressor.may_save(model, progress(0))
    assert compressor.before_epoch(model, progress(0)) == []
    assert difference(eval_output(compressor.deploy(model)), eval_output(model)) <= EXACT


def test_named_modules_alone_are_pruned() -> None:
    compressor, _ = prepared("residual", prune_module_names=("self.a.1",))
    assert [each.target.name for each in compressor.bundles] == ["a.1"]


@pytest.mark.parametrize(
    ("name", "what", "fix"),
    [
        ("a.*", "takes no patterns", "prune_module_names: [a.1]"),
        ("self.[ac].*", "takes no patterns", "prune_module_names: [a.1, c.1]"),
        ("nothing*", "takes no patterns", "slim inspect RECIPE lists the layers"),
        ("a", "a is no layer but has some", "prune_module_names: [a.1]"),
    ],
)
def test_a_pattern_or_a_parent_among_the_names_is_told_with_the_layers_that_are_meant(
    name: str, what: str, fix: str
) -> None:
    from slimcli.errors import RecipeError

    with pytest.raises(RecipeError, match=what) as caught:
        prepared("residual", prune_module_names=(name,))
    (problem,) = caught.value.problems
    assert (problem.where, problem.received) == ("config.prune_module_names", name)
    assert problem.fix == fix


def refusals(**keys: object) -> list:
    compressor = ResRepCompressor(ResRepConfig(**keys))
    return compressor.plan(build("residual"), example(), SCHEDULE).refusals


def test_an_unreachable_target_is_refused_with_values_that_work() -> None:
    keys = {"warmup_epoch": 0, "lasso_decay": "auto", "prune_rate": 0.6, "min_channels": 4}
    (refused,) = refusals(**keys)
    assert refused.key == "prune_rate"
    assert refused.what.startswith("prune_rate 0.6 is out of reach: at min_channels 4 ")
    rate = float(refused.fix.split(",")[0].removeprefix("prune_rate: "))
    assert 0 < rate < 0.6
    assert refusals(**{**keys, "prune_rate": rate}) == []
    assert refusals(**{**keys, "prune_rate": rate + 0.011})[0].key == "prune_rate"
    one = refusals(**{**keys, "prune_module_names": ("a.1",)})[0]
    assert "the only prunable group holds at most" in one.what


def test_a_network_without_anything_to_prune_is_refused() -> None:
    compressor = ResRepCompressor(ResRepConfig(warmup_epoch=0, lasso_decay="auto"))
    plan = compressor.plan(nn.Conv2d(2, 3, 1).double(), example(), SCHEDULE)
    (refused,) = plan.refusals
    assert refused.what.startswith("nothing to prune with linear_bn (")
    assert refused.fix.startswith("slim inspect RECIPE shows what freezes each group")


def test_where_skip_left_nothing_the_fix_is_a_narrower_skip() -> None:
    (refused,) = refusals(skip=["a.*", "c.*"], warmup_epoch=0)
    assert "2 left alone by skip (a.1, c.1)" in refused.what
    assert refused.key == "skip"
    assert "auto_find_module_strategy: all_bn" in refused.fix


def test_where_only_coupled_groups_can_be_pruned_the_fix_is_the_strategy_that_takes_them() -> None:
    class Trunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
            self.fc = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.stem(x))
            return self.fc((x + torch.relu(self.block(x))).mean((2, 3)))

    compressor = ResRepCompressor(ResRepConfig(warmup_epoch=0, lasso_decay="auto"))
    (refused,) = compressor.plan(Trunk().double(), example(), SCHEDULE).refusals
    assert (refused.key, refused.fix) == (
        "auto_find_module_strategy",
        "auto_find_module_strategy: all_bn",
    )


def test_the_registry_knows_the_original_class_path() -> None:
    assert ALGORITHM.aliases == ("torchslim.pruning.resrep.ResRepSolver",)
    assert ALGORITHM.load() is ResRepCompressor
