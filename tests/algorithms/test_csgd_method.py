"""C-SGD on whole models: what is planned, how filters meet, and what a merge leaves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimcli.algorithms.csgd.config import CSGDConfig
from slimcli.algorithms.csgd.method import CSGDCompressor
from slimcli.algorithms.csgd.planning import Analysis
from slimcli.algorithms.csgd.ties import project
from slimcli.compressor import Goal, GroupDefaults, Plan, Progress, Schedule
from slimcli.errors import GoalError, RecipeError
from slimcli.network import surgery
from slimcli.network.count import count_macs
from slimcli.network.example import Example

from .csgd_networks import NETWORKS, build, images

EXACT = 1e-10
"""Relative, float64: sums of merged channels in another order."""
MET = 1e-3
"""The limit of the merge: the measured spread must stay below it."""
STEPS = 25
"""Steps in an epoch of these tests."""


def example() -> Example:
    return Example(images(), lambda model, batch: model(batch))


def schedule(epochs: int = 20, lr: float = 0.02, **keys: Any) -> Schedule:
    return Schedule(epochs, STEPS, (lr,) * (epochs * STEPS), **keys)


def config(**keys: Any) -> CSGDConfig:
    amount = {} if "prune_rate" in keys else {"cluster_percent": 0.5}
    defaults = {"centri_strength": "auto", "auto_find_module_strategy": "all_conv"}
    return CSGDConfig(**{**amount, **defaults, **keys})


def planned(model: nn.Module, plan_for: Schedule, **keys: Any) -> tuple[CSGDCompressor, Plan]:
    compressor = CSGDCompressor(config(**keys))
    return compressor, compressor.plan(model, example(), plan_for)


def ready(
    model: nn.Module, plan_for: Schedule | None = None, **keys: Any
) -> tuple[CSGDCompressor, nn.Module]:
    compressor, plan = planned(model, plan_for or schedule(), **keys)
    assert plan.refusals == []
    return compressor, compressor.prepare(model, example(), plan)


def tie_by_hand(compressor: CSGDCompressor, model: nn.Module) -> None:
    """What training does, at once: every channel becomes the mean of its cluster."""
    with torch.no_grad():
        for tie in compressor._ties:
            project(tie, model.get_parameter(tie.tensor))
        for tie in compressor._statistics:
            project(tie, model.get_buffer(tie.tensor))


def at(epoch: int, plan_for: Schedule, step: int = 0) -> Progress:
    step = epoch * STEPS + step
    return Progress(epoch, step, plan_for.learning_rates[step], plan_for)


def merge(compressor: CSGDCompressor, model: nn.Module, **keys: Any) -> None:
    progress = Progress(10_000, 0, 0.1, schedule())
    cuts = compressor.before_epoch(model, progress)
    surgery.apply(model, cuts, **keys)
    compressor.after_cut(model, cuts)


def train_epoch(
    compressor: CSGDCompressor,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    plan_for: Schedule,
) -> None:
    model.train()
    for step in range(STEPS):
        batch = images(epoch * STEPS + step)
        optimizer.zero_grad()
        (model(batch) - batch.mean()).square().mean().backward()
        progress = at(epoch, plan_for, step)
        compressor.after_backward(model, progress)
        optimizer.step()
        compressor.after_step(model, progress, False)


def relative(first: Tensor, second: Tensor) -> float:
    return ((first - second).abs().max() / second.abs().max()).item()


@pytest.fixture(params=sorted(NETWORKS))
def network(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_layer_that_can_be_merged_is_clustered(network: str) -> None:
    _, plan = planned(build(network), schedule())
    assert tuple(plan.targets) == NETWORKS[network][1]
    clusters = plan.private.clusters
    for name in plan.targets:
        size = plan.private.structure.group(name).size
        assert len(clusters[name]) == size - size // 2
        assert sorted(c for members in clusters[name] for c in members) == list(range(size))


def test_merging_tied_channels_changes_nothing(network: str) -> None:
    compressor, model = ready(build(network))
    tie_by_hand(compressor, model)
    model.eval()
    expected = model(images(5))
    before = sum(parameter.numel() for parameter in model.parameters())
    merge(compressor, model)
    assert relative(model(images(5)), expected) < EXACT
    assert sum(parameter.numel() for parameter in model.parameters()) < before


def test_the_macs_of_the_plan_are_those_of_the_merged_model(network: str) -> None:
    compressor, plan = planned(build(network), schedule())
    model = compressor.prepare(build(network), example(), plan)
    tie_by_hand(compressor, model)
    merge(compressor, model)
    assert count_macs(model, example()).total == plan.goal.target == macs_left(plan)


def assert_members_are_alike(compressor: CSGDCompressor, model: nn.Module) -> None:
    """Kernels, scales, shifts and running statistics of the two ends of every cluster."""
    norms = [name for name, each in model.named_modules() if isinstance(each, nn.BatchNorm2d)]
    for name in set(norms) & set(compressor._clusters):
        norm = model.get_submodule(name)
        ends = [(members[0], members[-1]) for members in compressor._clusters[name]]
        first, last = (torch.tensor(each) for each in zip(*ends, strict=True))
        for tensor in (norm.weight, norm.bias):
            apart = (tensor[first] - tensor[last]).norm() / tensor.norm()
            assert apart < 2 * MET, (name, apart)
        unit = (norm.running_var + norm.eps).sqrt()
        assert (
            (norm.running_mean[first] - norm.running_mean[last]) / unit[first]
        ).abs().max() < 0.1


@pytest.mark.slow
def test_filters_meet_in_training_as_planned_and_merge(network: str) -> None:
    nesterov = network in ("residual", "depthwise")  # the others without
    plan_for = schedule(epochs=5, lr=0.01, momentum=0.5, nesterov=nesterov)
    compressor, plan = planned(build(network), plan_for)
    model = compressor.prepare(build(network), example(), plan)
    assert plan.settings["pull"] == "gradient"
    defaults = GroupDefaults(0.01, momentum=0.5, nesterov=nesterov)
    groups = compressor.param_groups(model, defaults)
    optimizer = torch.optim.SGD(groups, lr=0.01)
    merge_epoch = plan.settings["prune_epoch"]
    assert merge_epoch == 4
    for epoch in range(merge_epoch):
        assert compressor.before_epoch(model, at(epoch, plan_for)) == []
        train_epoch(compressor, model, optimizer, epoch, plan_for)
        assert not compressor.may_save(model, at(epoch, plan_for))
    spread = compressor.status(model)["spread"]
    assert spread <= 1.1 * plan.budget["spread_at_merge"]
    assert_members_are_alike(compressor, model)
    cuts = compressor.before_epoch(model, at(merge_epoch, plan_for))
    model.eval()
    projected = model(images(5))
    surgery.apply(model, cuts, optimizer=optimizer)
    compressor.after_cut(model, cuts)
    assert relative(model(images(5)), projected) < EXACT
    assert compressor.may_save(model, at(merge_epoch, plan_for))
    train_epoch(compressor, model, optimizer, merge_epoch, plan_for)  # optimizer state fits
    assert compressor.status(model)["spread_at_merge"] == spread


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("weight_decay", [1e-4, 0.1])
def test_with_an_adaptive_optimizer_filters_come_together_as_planned(
    kind: type[torch.optim.Optimizer], weight_decay: float
) -> None:
    """Also where decay is all that moves a parameter: biases in front of a norm."""
    plan_for = schedule(epochs=6, lr=0.001, is_sgd=False)
    compressor, plan = planned(build("residual"), plan_for)
    model = compressor.prepare(build("residual"), example(), plan)
    groups = compressor.param_groups(model, GroupDefaults(0.001, weight_decay=weight_decay))
    optimizer = kind(groups, lr=0.001)
    decays = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert decays["stem.weight"] == decays["fc.weight"] == weight_decay  # the optimizer's affair
    for epoch in range(4):
        train_epoch(compressor, model, optimizer, epoch, plan_for)
    spread = compressor.status(model)["spread"]
    assert spread == pytest.approx(plan.budget["spread_at_merge"], rel=1e-6)
    cuts = compressor.before_epoch(model, at(4, plan_for))
    assert [str(cut) for cut in cuts] == ["norm (12 -> 6)", "inner_norm (8 -> 4)"]


def test_a_skipped_step_leaves_every_bit_of_a_contracted_model() -> None:
    plan_for = schedule(is_sgd=False)
    compressor, model = ready(build("residual"), plan_for)
    before = copy.deepcopy(model.state_dict())
    compressor.after_backward(model, at(0, plan_for))
    assert not torch.equal(before["stem.weight"], model.state_dict()["stem.weight"])
    compressor.after_step(model, at(0, plan_for), skipped=True)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    compressor.after_backward(model, at(0, plan_for))
    compressor.after_step(model, at(0, plan_for), skipped=False)
    assert not torch.equal(before["stem.weight"], model.state_dict()["stem.weight"])


@pytest.mark.parametrize("is_sgd", [True, False])
def test_running_statistics_are_not_touched_in_training(is_sgd: bool) -> None:
    plan_for = schedule(is_sgd=is_sgd)
    compressor, model = ready(build("residual"), plan_for)
    model(images()).square().mean().backward()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    compressor.after_backward(model, at(0, plan_for))
    compressor.after_step(model, at(0, plan_for), skipped=False)
    assert len(before) == 9
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


def mean_over(clusters: Any, values: Tensor) -> Tensor:
    """The paper's F x F matrix of means times the values, (F, ...)."""
    matrix = torch.zeros(len(values), len(values), dtype=torch.float64)
    for members in clusters:
        for row in members:
            matrix[row, list(members)] = 1 / len(members)
    return torch.einsum("ij,j...->i...", matrix, values)


def test_every_tied_tensor_of_a_network_gets_the_papers_gradient() -> None:
    """``M G + eta W + eps (W - M W)``; stem and block output share the clusters of their group."""
    compressor, model = ready(build("residual"), centri_strength=3.0, vector_strength=0.5)
    compressor.param_groups(model, GroupDefaults(0.1, weight_decay=0.01))
    model(images()).square().mean().backward()
    loss = {name: each.grad.clone() for name, each in model.named_parameters()}
    compressor.after_backward(model, at(0, schedule()))
    stream, inside = (compressor._clusters[name] for name in ("norm", "inner_norm"))
    layers = {"stem": stream, "norm": stream, "outer": stream, "outer_norm": stream}
    for layer, clusters in {**layers, "inner": inside, "inner_norm": inside}.items():
        for name in (f"{layer}.weight", f"{layer}.bias"):
            values = model.get_parameter(name).detach()
            pull = 3.0 if values.dim() > 1 else 1.5
            expected = mean_over(clusters, loss[name]) + 0.01 * values
            expected += pull * (values - mean_over(clusters, values))
            assert (model.get_parameter(name).grad - expected).abs().max() < 1e-13, name
    assert torch.equal(model.fc.weight.grad, loss["fc.weight"])


def test_with_no_loss_the_mean_of_a_cluster_decays_once_a_step() -> None:
    compressor, model = ready(build("residual"))
    groups = compressor.param_groups(model, GroupDefaults(0.1, weight_decay=0.01, momentum=0.0))
    optimizer = torch.optim.SGD(groups, lr=0.1)
    clusters = compressor._clusters["norm"]
    start = mean_over(clusters, model.stem.weight.detach())
    free = model.fc.weight.detach().clone()
    for _ in range(20):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        compressor.after_backward(model, at(0, schedule()))
        optimizer.step()
    left = (1 - 0.1 * 0.01) ** 20
    assert (mean_over(clusters, model.stem.weight.detach()) - left * start).abs().max() < 1e-13
    assert (model.fc.weight.detach() - left * free).abs().max() < 1e-13


def test_the_merge_leaves_the_mean_of_each_cluster_in_every_tensor() -> None:
    """Filters within the limit of each other, but not equal: a projection makes them so."""
    compressor, model = ready(build("residual"))
    tie_by_hand(compressor, model)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor += 1e-4 * tensor.abs().mean() * torch.randn_like(tensor)
    before = copy.deepcopy(model)
    clusters = compressor._clusters["norm"]
    firsts = [members[0] for members in clusters]
    merge(compressor, model)
    assert 0 < compressor.status(model)["spread_at_merge"] < MET
    for name in ("stem.bias", "norm.weight", "norm.bias", "outer.bias", "outer_norm.bias"):
        expected = mean_over(clusters, before.get_parameter(name).detach())[firsts]
        assert (model.get_parameter(name) - expected).abs().max() < 1e-13, name
        assert not torch.equal(expected, before.get_parameter(name)[firsts])
    for name in ("norm.running_mean", "outer_norm.running_var"):
        expected = mean_over(clusters, before.get_buffer(name))[firsts]
        assert (model.get_buffer(name) - expected).abs().max() < 1e-13, name
        assert not torch.equal(expected, before.get_buffer(name)[firsts])


def test_every_layer_of_a_coupled_group_has_a_say_in_its_clusters() -> None:
    """The stem's filters are all alike; those that write into the stem's channels are not."""
    model = build("residual")
    with torch.no_grad():
        for tensor in (model.stem.weight, model.norm.weight, model.norm.running_var):
            tensor.copy_(tensor[:1].expand_as(tensor))
        for tensor in (model.outer.weight, model.outer_norm.weight, model.outer_norm.running_var):
            tensor[6:] = tensor[:6].flip(0)
    _, plan = planned(model, schedule())
    assert plan.private.clusters["norm"] == ((0, 11), (1, 10), (2, 9), (3, 8), (4, 7), (5, 6))


@pytest.mark.parametrize("method", ["kmeans", "even"])
@pytest.mark.parametrize(("fraction", "left"), [(0.0, (12, 8)), (0.99, (1, 1))])
def test_all_filters_or_one_may_stay(fraction: float, left: tuple[int, int], method: str) -> None:
    keys = {"cluster_percent": fraction, "cluster_method": method}
    compressor, model = ready(build("residual"), **keys)
    tie_by_hand(compressor, model)
    expected = model.eval()(images(5))
    merge(compressor, model)
    assert (model.stem.out_channels, model.inner.out_channels) == left
    assert relative(model(images(5)), expected) < EXACT


def test_weight_decay_of_tied_tensors_is_in_the_update_rule_once() -> None:
    compressor, model = ready(build("residual"))
    groups = compressor.param_groups(model, GroupDefaults(0.1, no_decay=("norm", "bias")))
    decays = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert decays["stem.weight"] == decays["inner.weight"] == decays["norm.weight"] == 0
    assert decays["fc.weight"] == 1e-4
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tie_by_hand(compressor, model)
    compressor.after_backward(model, at(0, schedule()))
    assert relative(model.stem.weight.grad, 1e-4 * model.stem.weight.detach()) < EXACT
    assert model.norm.weight.grad.abs().max() < 1e-16  # no_decay counts here too
    assert model.fc.weight.grad.abs().max() == 0  # the optimizer decays it


def test_weight_decay_goes_on_after_the_merge() -> None:
    compressor, model = ready(build("residual"))
    compressor.param_groups(model, GroupDefaults(0.1))
    tie_by_hand(compressor, model)
    merge(compressor, model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    compressor.after_backward(model, at(0, schedule()))
    assert torch.equal(model.stem.weight.grad, 1e-4 * model.stem.weight.detach())


def test_filters_that_have_not_met_are_not_merged() -> None:
    compressor, model = ready(build("residual"))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(GoalError, match="have not met"):
        merge(compressor, model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not compressor.may_save(model, at(0, schedule()))


def test_statistics_that_have_not_met_are_counted() -> None:
    compressor, model = ready(build("residual"))
    tie_by_hand(compressor, model)
    model.norm.running_mean.normal_(std=3.0)
    spread, statistics = compressor.spreads(model)
    assert spread < 1e-12
    assert statistics > 1
    with pytest.raises(GoalError, match="have not met"):
        merge(compressor, model)


def test_a_merge_epoch_at_the_end_or_behind_it_still_merges() -> None:
    for epochs_before in (20, 99):
        compressor, model = ready(build("residual"), prune_epoch=epochs_before)
        tie_by_hand(compressor, model)
        last = at(19, schedule())
        assert compressor.before_epoch(model, last) == []
        assert [cut.group for cut in compressor.finish(model, last)] == ["norm", "inner_norm"]
        assert compressor.may_save(model, last)


def test_the_plan_says_what_goes_in_words_and_numbers() -> None:
    _, plan = planned(build("residual"), schedule(), cluster_percent=0.25)
    assert plan.notes == [
        "norm: 0.25 removes 3 of 12 filters, keeps 9",
        "inner_norm: 0.25 removes 2 of 8 filters, keeps 6",
    ]
    lowest = {layer.name: (layer.channels, layer.channels_minimum) for layer in plan.layers}
    assert lowest["stem"] == (12, 9)
    assert lowest["inner"] == (8, 6)
    assert lowest["fc"] == (4, 4)


def test_a_share_of_macs_becomes_the_smallest_fraction_that_reaches_it() -> None:
    _, plan = planned(build("residual"), schedule(), prune_rate=0.4, allocation="uniform")
    assert macs_left(plan) <= 0.6 * plan.macs
    fraction = plan.settings["cluster_percent"]
    _, less = planned(build("residual"), schedule(), cluster_percent=fraction - 0.03)
    assert less.goal.target == macs_left(less) > 0.6 * plan.macs


def alike(model: nn.Module) -> nn.Module:
    """The same network, its inner filters copies of two, so that merging them costs nothing."""
    with torch.no_grad():
        for tensor in (model.inner.weight, model.inner_norm.weight, model.inner_norm.running_var):
            tensor.copy_(tensor[:2].repeat(4, *[1] * (tensor.dim() - 1)))
    return model


def test_more_goes_from_layers_whose_filters_are_alike() -> None:
    _, spread = planned(build("residual"), schedule(), prune_rate=0.3)
    _, copies = planned(alike(build("residual")), schedule(), prune_rate=0.3)
    assert widths(copies)["inner"] < widths(spread)["inner"]
    assert widths(copies)["stem"] == 12 > widths(spread)["stem"]
    assert macs_left(copies) <= 0.7 * copies.macs
    assert "per layer" in copies.settings["cluster_percent"]


def test_the_goal_is_what_the_recipe_allows_and_not_what_the_plan_reaches() -> None:
    _, plan = planned(build("residual"), schedule(), prune_rate=0.3)
    assert plan.goal == Goal("macs", 0.7 * plan.macs)
    assert macs_left(plan) < plan.goal.target
    _, plan = planned(build("residual"), schedule(), prune_rate=0.9, min_channels=6)
    assert plan.goal == Goal("macs", (1 - 0.9) * plan.macs)
    assert plan.goal.target < plan.reachable_macs


@pytest.mark.parametrize(
    ("keys", "key", "told"),
    [
        ({"min_channels": 1000}, "min_channels", "min_channels 1000 keeps every layer as it is"),
        ({"round_to": 48}, "round_to", "round_to 48 keeps every layer as it is"),
        (
            {"min_channels": 12, "round_to": 64},
            "min_channels",
            "min_channels 12 and round_to 64 keep every layer as it is",
        ),
        (
            {"cluster_percent": 0.001},
            "cluster_percent",
            "cluster_percent 0.001 of 12 filters is less than one",
        ),
        (
            {"cluster_percent": 0.0, "prune_ratios": {"inner*": 0.01}},
            "prune_ratios",
            "prune_ratios 0.01 of 8 filters is less than one",
        ),
    ],
)
def test_a_plan_that_can_remove_nothing_is_refused(
    keys: dict[str, Any], key: str, told: str
) -> None:
    _, plan = planned(build("residual"), schedule(), **keys)
    (refusal,) = plan.refusals
    assert refusal.what == f"no filter is removed: {told}"
    assert refusal.key == key


@pytest.mark.parametrize("keys", [{"min_channels": 1000}, {"round_to": 48}])
def test_the_value_that_a_refusal_names_removes_something(keys: dict[str, int]) -> None:
    _, plan = planned(build("residual"), schedule(), **keys)
    name, value = plan.refusals[0].fix.split(": ")
    _, again = planned(build("residual"), schedule(), **{name: int(value)})
    assert again.refusals == []
    assert macs_left(again) < again.macs


def test_a_recipe_that_asks_for_nothing_is_told_and_not_refused() -> None:
    _, plan = planned(build("residual"), schedule(), cluster_percent=0.0)
    assert plan.refusals == []
    assert "no filter is removed: this trains without compressing" in plan.warnings
    _, plan = planned(build("residual"), schedule(), cluster_percent=0.5)
    assert not any("no filter is removed" in each for each in plan.warnings)
    with pytest.raises(ValueError, match="allocation spreads prune_rate"):
        CSGDConfig(cluster_percent=0.5, allocation="uniform")


def test_without_training_a_rate_that_equal_filters_do_not_give_is_refused() -> None:
    _, plan = planned(build("residual"), schedule(epochs=0), prune_rate=0.3)
    assert "epoch: 0 merges only filters that are equal already" in plan.refusals[0].what
    _, plan = planned(build("residual"), schedule(epochs=0), cluster_percent=0.3)
    assert plan.refusals == []
    assert "no filter is removed: no two filters are equal" in plan.warnings
    _, plan = planned(alike(build("residual")), schedule(epochs=0), prune_rate=0.1)
    assert plan.refusals == []
    assert macs_left(plan) < plan.goal.target == 0.9 * plan.macs


def test_the_allocation_is_the_mildest_that_is_enough_and_always_the_same() -> None:
    plans = [planned(build("residual"), schedule(), prune_rate=0.4)[1] for _ in range(2)]
    assert plans[0].goal == plans[1].goal
    assert widths(plans[0]) == widths(plans[1])
    channel = max(  # no group is cut by one channel more than it takes
        plans[0].macs - plans[0].private.structure.macs_with({group.name: group.size - 1})
        for group in plans[0].private.groups
    )
    assert 0.6 * plans[0].macs - channel <= macs_left(plans[0]) <= 0.6 * plans[0].macs


def test_the_allocation_keeps_to_limits_ratios_and_skips() -> None:
    keys = {"min_channels": 5, "round_to": 3}
    _, free = planned(alike(build("residual")), schedule(), prune_rate=0.4)
    _, plan = planned(alike(build("residual")), schedule(), prune_rate=0.4, **keys)
    assert widths(free)["inner"] < 5
    assert widths(plan)["inner"] == 6
    assert widths(plan)["stem"] in (6, 9)
    assert macs_left(plan) <= 0.6 * plan.macs
    _, plan = planned(build("residual"), schedule(), prune_rate=0.2, skip=("stem",))
    assert widths(plan)["stem"] == 12
    assert macs_left(plan) <= 0.8 * plan.macs


def test_a_share_of_macs_out_of_reach_is_refused_with_what_is_possible() -> None:
    _, plan = planned(build("residual"), schedule(), prune_rate=0.9, min_channels=6)
    assert plan.refusals[0].key == "prune_rate"
    assert "all_conv" not in plan.refusals[0].fix  # it is set already
    possible = float(plan.refusals[0].fix.split()[1].rstrip(","))
    _, again = planned(build("residual"), schedule(), prune_rate=possible, min_channels=6)
    assert again.refusals == []


def macs_left(plan: Plan) -> int:
    """MACs of the model that the plan makes."""
    kept = {name: len(each) for name, each in plan.private.clusters.items()}
    return int(plan.private.structure.macs_with(kept))


def widths(plan: Plan) -> dict[str, int]:
    return {layer.name: layer.channels_minimum for layer in plan.layers}


def test_layers_that_a_pattern_fits_lose_exactly_their_own_fraction() -> None:
    ratios = {"inner*": 0.75, "self.stem": 0.25}
    _, plan = planned(build("residual"), schedule(), prune_ratios=ratios)
    assert widths(plan) == {"stem": 9, "outer": 9, "inner": 2, "fc": 4}
    assert "inner_norm: 0.75 removes 6 of 8 filters, keeps 2" in plan.notes


def test_the_planner_looks_for_the_fraction_of_the_other_layers_only() -> None:
    ratios = {"inner*": 0.0}
    _, plan = planned(build("residual"), schedule(), prune_rate=0.4, prune_ratios=ratios)
    assert widths(plan)["inner"] == 8
    assert widths(plan)["stem"] < 12
    assert macs_left(plan) <= 0.6 * plan.macs
    keys = {"prune_rate": 0.9, "min_channels": 6, "prune_ratios": ratios}
    _, plan = planned(build("residual"), schedule(), **keys)
    assert "prune_ratios" in plan.refusals[0].fix


def test_widths_are_rounded_up_to_a_multiple() -> None:
    ratios = {"inner*": 0.9}
    _, plan = planned(build("residual"), schedule(), round_to=5, prune_ratios=ratios)
    assert widths(plan) == {"stem": 10, "outer": 10, "inner": 5, "fc": 4}


def test_a_merged_network_has_the_widths_of_its_patterns() -> None:
    model = build("residual")
    compressor, model = ready(model, prune_ratios={"inner*": 0.75}, skip=("stem",))
    tie_by_hand(compressor, model)
    before = model.eval()(images())
    merge(compressor, model)
    assert (model.stem.out_channels, model.inner.out_channels) == (12, 2)
    assert (model(images()) - before).abs().max() <= EXACT * before.abs().max()


def test_skip_leaves_layers_alone_and_must_fit_something() -> None:
    _, plan = planned(build("residual"), schedule(), skip=("stem",))
    assert plan.targets == ["inner_norm"]
    reasons = {layer.name: layer.frozen_reason for layer in plan.layers}
    assert reasons["stem"] == "left alone by skip"
    with pytest.raises(RecipeError, match="no layer that would be pruned is called steam"):
        planned(build("residual"), schedule(), skip=("steam",))
    _, plan = planned(build("residual"), schedule(), skip=("*",))
    assert (plan.targets, plan.refusals) == ([], [])


@pytest.mark.parametrize("keys", [{"prune_module_names": ("fc",)}, {"prune_ratios": {"fc": 0.5}}])
def test_an_output_of_the_model_is_never_cut(keys: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="it is an output of the model"):
        planned(build("residual"), schedule(), **keys)
    _, plan = planned(build("residual"), schedule(), prune_ratios={"*": 0.5})
    assert widths(plan)["fc"] == 4


def test_a_pull_that_is_too_weak_is_refused_with_one_that_works() -> None:
    _, plan = planned(build("residual"), schedule(), centri_strength=3e-3)
    refusal = plan.refusals[0]
    assert refusal.key == "centri_strength"
    assert refusal.is_for_any_model
    works = float(refusal.fix.split()[1].rstrip(","))
    _, again = planned(build("residual"), schedule(), centri_strength=works)
    assert again.refusals == []
    assert again.budget["spread_at_merge"] <= again.budget["spread_wanted"]


def test_a_pull_that_overshoots_is_refused() -> None:
    _, plan = planned(build("residual"), schedule(), centri_strength=100.0)
    assert "overshoot" in plan.refusals[0].what


def test_too_few_steps_are_refused() -> None:
    few = Schedule(1, 3, (0.02,) * 3)
    _, plan = planned(build("residual"), few)
    assert plan.refusals[0].key == "epoch"


@pytest.mark.parametrize("keys", [{}, {"prune_epoch": 2}])
def test_the_refusal_of_too_few_steps_names_the_epochs_that_would_do(keys: dict[str, int]) -> None:
    def falling(epochs: int) -> Schedule:
        steps = 3 * epochs
        return Schedule(epochs, 3, tuple(0.02 * (1 - each / steps) for each in range(steps)))

    _, plan = planned(build("residual"), falling(4), **keys)
    (refusal,) = plan.refusals
    named = dict(each.split(": ") for each in refusal.fix.split(" and "))
    assert refusal.key in named
    enough = int(named.pop("epoch"))
    again = {name: int(value) for name, value in named.items()}
    _, plan = planned(build("residual"), falling(enough), **again)
    assert plan.refusals == []
    _, plan = planned(build("residual"), falling(enough - 1), **again)
    assert plan.refusals


def test_a_refusal_names_only_what_is_too_far_apart_and_by_how_much() -> None:
    # With norms that take a hundredth of each batch, statistics lag behind filters that have met.
    model = build("residual")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.01
    keys = {"centri_strength": 10.0, "prune_epoch": 4}
    _, plan = planned(model, schedule(momentum=0.0), **keys)
    (refusal,) = plan.refusals
    assert plan.budget["spread_at_merge"] <= plan.budget["spread_wanted"]
    statistics = plan.budget["statistics_spread_at_merge"]
    assert statistics > 0.03
    told = f"their running statistics are {statistics:.2g} standard deviations apart, "
    assert f"{told}{statistics / 0.03:.2g} times the 0.03 wanted" in refusal.what
    assert "of their size" not in refusal.what


def test_what_the_schedule_alone_forbids_is_told_apart_from_what_the_model_does() -> None:
    _, few = planned(build("residual"), schedule(epochs=1, lr=1e-4))
    assert [refusal.is_for_any_model for refusal in few.refusals] == [True]
    _, far = planned(build("residual"), schedule(), prune_rate=0.9, min_channels=6)
    assert [refusal.is_for_any_model for refusal in far.refusals] == [False]


def test_where_nothing_can_be_clustered_each_reason_is_told_once_with_what_helps() -> None:
    keys = {"auto_find_module_strategy": "linear_conv", "skip": ("inner*",)}
    _, plan = planned(build("residual"), schedule(), **keys)
    (refusal,) = plan.refusals
    assert "1 left alone by skip (inner_norm)" in refusal.what
    assert "1 not taken by linear_conv (norm)" in refusal.what
    assert "it is an output of the model (fc)" in refusal.what
    assert refusal.key == "auto_find_module_strategy"
    assert "all_conv" in refusal.fix
    _, plan = planned(build("residual"), schedule(), skip=("inner*", "stem"))
    (refusal,) = plan.refusals
    assert "2 left alone by skip" in refusal.what
    assert (refusal.key, "all_conv" in refusal.fix) == ("skip", False)
    _, plan = planned(build("residual").requires_grad_(False), schedule())
    assert "requires_grad_(True)" in plan.refusals[0].fix


def test_the_merge_comes_as_soon_as_filters_have_met_and_leaves_time_for_fine_tuning() -> None:
    _, strong = planned(build("residual"), schedule(), centri_strength=1.0)
    _, weak = planned(build("residual"), schedule(), centri_strength=0.15)
    assert strong.refusals == weak.refusals == []
    assert strong.settings["prune_epoch"] < weak.settings["prune_epoch"] <= 16


def test_vectors_with_a_tenth_of_the_pull_need_ten_times_as_much() -> None:
    _, full = planned(build("unnormalised"), schedule())
    _, tenth = planned(build("unnormalised"), schedule(), vector_strength=0.1)
    ratio = tenth.settings["centri_strength"] / full.settings["centri_strength"]
    assert 5 < ratio < 15


def test_even_clusters_are_runs_of_neighbours() -> None:
    _, plan = planned(build("flattened"), schedule(), cluster_method="even")
    assert plan.private.clusters["bn2"] == ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))


def test_a_frozen_layer_is_left_alone_with_the_reason() -> None:
    model = build("flattened")
    model.conv1.weight.requires_grad_(False)
    _, plan = planned(model, schedule())
    assert plan.targets == ["bn2"]
    reason = {layer.name: layer.frozen_reason for layer in plan.layers}["conv1"]
    assert "conv1.weight is not trained" in reason


def test_names_choose_the_layers_and_a_wrong_name_is_an_error() -> None:
    _, plan = planned(build("flattened"), schedule(), prune_module_names=("self.conv2",))
    assert plan.targets == ["bn2"]
    with pytest.raises(RecipeError):
        planned(build("flattened"), schedule(), prune_module_names=("conv9",))
    with pytest.raises(RecipeError, match="takes no patterns") as caught:
        planned(build("residual"), schedule(), prune_module_names=("inner*",))
    assert caught.value.problems[0].fix == "prune_module_names: [inner_norm]"


def test_an_empty_list_of_names_is_plain_training() -> None:
    compressor, plan = planned(build("flattened"), schedule(), prune_module_names=())
    model = compressor.prepare(build("flattened"), example(), plan)
    assert plan.targets == []
    assert "no layer is selected" in plan.warnings[0]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    compressor.after_backward(model, at(0, schedule()))
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert compressor.may_save(model, at(0, schedule()))


def test_linear_takes_chains_only() -> None:
    _, plan = planned(build("residual"), schedule(), auto_find_module_strategy="linear_conv")
    assert plan.targets == ["inner_norm"]


def test_zero_epochs_merge_only_what_is_equal_already() -> None:
    model = build("flattened")
    with torch.no_grad():
        for tensor in (model.conv1.weight, model.bn1.weight, model.bn1.bias):
            tensor[4] = tensor[7]
        for tensor in (model.bn1.running_mean, model.bn1.running_var):
            tensor[4] = tensor[7]
    none = Schedule(0, STEPS, ())
    model.eval()
    expected = model(images(5))
    compressor, plan = planned(model, none)
    model = compressor.prepare(model, example(), plan)
    cuts = compressor.finish(model, Progress(0, 0, 0.1, none))
    assert [str(cut) for cut in cuts] == ["bn1 (12 -> 11)"]
    surgery.apply(model, cuts)
    assert relative(model(images(5)), expected) < EXACT


def test_clusters_see_filters_through_their_norm() -> None:
    """Filters that differ by a factor which the norm takes back belong together."""
    model = build("flattened")
    with torch.no_grad():
        model.conv1.weight[3] = 7 * model.conv1.weight[8]
        model.bn1.running_var[3] = 49 * (model.bn1.running_var[8] + 1e-5) - 1e-5
        model.bn1.weight[3] = model.bn1.weight[8]
    _, plan = planned(model, schedule(), cluster_percent=0.1)
    assert (3, 8) in plan.private.clusters["bn1"]


def test_state_brings_the_clusters_back() -> None:
    compressor, _ = ready(build("residual", seed=0))
    other, _ = ready(build("residual", seed=9))
    assert other.state_dict()["clusters"] != compressor.state_dict()["clusters"]
    other.load_state_dict(compressor.state_dict())
    assert other.state_dict() == compressor.state_dict()
    again, twin = ready(build("residual", seed=0))
    tie_by_hand(other, twin)
    merge(other, twin)
    analysis: Analysis = again._analysis
    assert twin.stem.out_channels == len(analysis.clusters["norm"])


def test_deploying_folds_every_norm_before_and_after_the_merge(network: str) -> None:
    compressor, model = ready(build(network))
    model.eval()
    plain = compressor.deploy(model)
    assert relative(plain(images(5)), model(images(5))) < EXACT
    tie_by_hand(compressor, model)
    merge(compressor, model)
    plain = compressor.deploy(model)
    assert relative(plain(images(5)), model(images(5))) < EXACT


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "cluster_percent is required"),
        ({"cluster_percent": 0.5, "prune_rate": 0.5}, "keep one"),
        ({"cluster_percent": 1.0}, "less than 1"),
        ({"cluster_percent": 0.5, "centri_strength": 0}, "more than 0"),
        ({"cluster_percent": 0.5, "prune_epoch": -1}, "0 and more"),
        ({"cluster_percent": 0.5, "vector_strength": 2}, "up to 1"),
    ],
)
def test_wrong_keys_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CSGDConfig(**keys)
