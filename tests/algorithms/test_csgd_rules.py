"""The update rule, the clusters and the collapse budget of C-SGD, on plain tensors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from slimcli.algorithms.csgd.allocation import merge_costs, per_layer
from slimcli.algorithms.csgd.budget import Dynamics, delayed, remaining, strength_for
from slimcli.algorithms.csgd.clustering import (
    cluster,
    compact,
    duplicates,
    labels_of,
)
from slimcli.algorithms.csgd.ties import (
    Tie,
    centripetal_gradient,
    distance,
    gather_at_means,
    project,
    spread_again,
)
from slimcli.network.cuts import Slot

EXACT = 1e-12
"""A few sums and products of numbers of order 1 in float64."""

CLUSTERS = ((0, 3, 4), (1,), (2, 5))
STRENGTH, DECAY = 0.3, 0.01


def plain_slot(channels: int, dim: int = 0) -> Slot:
    return Slot("weight", dim, tuple((channel,) for channel in range(channels)))


def matrix_of_means(clusters: tuple[tuple[int, ...], ...]) -> Tensor:
    """The F x F averaging matrix of the paper."""
    channels = sum(map(len, clusters))
    matrix = torch.zeros(channels, channels, dtype=torch.float64)
    for members in clusters:
        for row in members:
            matrix[row, list(members)] = 1 / len(members)
    return matrix


def test_the_update_is_the_papers_formula() -> None:
    torch.manual_seed(0)
    weight, gradient = torch.randn(2, 6, 2, 3, 3, dtype=torch.float64)
    mean = matrix_of_means(CLUSTERS)
    identity = torch.eye(6, dtype=torch.float64)
    expected = mean @ gradient.flatten(1) + (
        (DECAY + STRENGTH) * identity - STRENGTH * mean
    ) @ weight.flatten(1)
    tie = Tie(plain_slot(6), CLUSTERS, is_vector=False)
    centripetal_gradient(tie, gradient, weight, STRENGTH)
    gradient.add_(weight, alpha=DECAY)
    assert (gradient.flatten(1) - expected).abs().max() < EXACT


def test_a_singleton_and_the_mean_of_a_cluster_get_plain_descent() -> None:
    torch.manual_seed(1)
    weight, gradient = torch.randn(2, 6, 4, dtype=torch.float64)
    before = gradient.clone()
    centripetal_gradient(Tie(plain_slot(6), CLUSTERS, False), gradient, weight, STRENGTH)
    assert torch.equal(gradient[1], before[1])
    for members in ([0, 3, 4], [2, 5]):
        assert (gradient[members].mean(0) - before[members].mean(0)).abs().max() < EXACT


def test_vectors_other_dimensions_and_wide_channels_follow_the_same_formula() -> None:
    torch.manual_seed(2)
    mean = matrix_of_means(CLUSTERS)
    vector, transposed, wide = (
        torch.randn(6, dtype=torch.float64),
        torch.randn(4, 6, 3, dtype=torch.float64),
        torch.randn(12, 3, dtype=torch.float64),
    )
    project(Tie(plain_slot(6), CLUSTERS, True), expected_vector := vector.clone())
    assert (expected_vector - mean @ vector).abs().max() < EXACT
    project(Tie(plain_slot(6, dim=1), CLUSTERS, False), got := transposed.clone())
    assert (got - torch.einsum("ij,ajb->aib", mean, transposed)).abs().max() < EXACT
    pairs = Slot("weight", 0, tuple((2 * channel, 2 * channel + 1) for channel in range(6)))
    project(Tie(pairs, CLUSTERS, False), got := wide.clone())
    by_channel = wide.reshape(6, 2, 3)
    assert (
        got.reshape(6, 2, 3) - torch.einsum("ij,jab->iab", mean, by_channel)
    ).abs().max() < EXACT


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_differences_shrink_as_the_budget_says(momentum: float, nesterov: bool) -> None:
    if nesterov and not momentum:
        pytest.skip("torch refuses Nesterov without momentum")
    torch.manual_seed(3)
    weight = nn.Parameter(torch.randn(6, 5, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=momentum, nesterov=nesterov)
    tie = Tie(plain_slot(6), CLUSTERS, False)
    start = (weight[0] - weight[3]).detach()
    rates = [0.1 * (1 - step / 60) for step in range(40)]
    predicted = remaining(rates, DECAY + STRENGTH, Dynamics(True, momentum, nesterov))
    for rate, left in zip(rates, predicted, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = torch.randn_like(weight)  # whatever the loss says
        with torch.no_grad():
            centripetal_gradient(tie, weight.grad, weight, STRENGTH)
            weight.grad.add_(weight, alpha=DECAY)
        optimizer.step()
        difference = (weight[0] - weight[3]).detach()
        assert (difference - left * start).abs().max() < EXACT * 10
    assert abs(predicted[-1]) < 0.5


def test_without_momentum_each_step_leaves_one_minus_lr_times_force() -> None:
    left = remaining([0.1] * 3, 0.31, Dynamics(True, 0.0, False))
    assert left == pytest.approx([0.969, 0.969**2, 0.969**3])


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        (torch.optim.Adam, {"weight_decay": 0.1}),
        (torch.optim.AdamW, {"weight_decay": 0.1}),
        (torch.optim.RMSprop, {"weight_decay": 0.1, "momentum": 0.9}),
        (torch.optim.SGD, {"weight_decay": 0.1, "momentum": 0.9}),
    ],
)
def test_distances_contract_as_the_budget_says_and_means_train_as_ever(
    kind: Any, keys: dict[str, float]
) -> None:
    """Whatever the optimizer makes of weight decay: members make the same step from their mean."""
    torch.manual_seed(4)
    weight = nn.Parameter(torch.randn(4, 5, dtype=torch.float64))
    alone = nn.Parameter(weight.detach().view(2, 2, 5).mean(1))
    optimizer, other = kind([weight], lr=0.01, **keys), kind([alone], lr=0.01, **keys)
    tie = Tie(plain_slot(4), ((0, 1), (2, 3)), False)
    start = (weight[::2] - weight[1::2]).detach()
    predicted = remaining([0.01] * 50, 20.0, Dynamics(False, 0.9, False))
    for _ in range(50):
        weight.grad = torch.randn_like(weight)
        with torch.no_grad():
            centripetal_gradient(tie, weight.grad, weight, 0.0)
            alone.grad = weight.grad[::2].clone()
            own = gather_at_means(tie, weight)
            optimizer.step()
            spread_again(tie, weight, own, 0.01 * 20.0)
        other.step()
    difference = (weight[::2] - weight[1::2]).detach()
    assert (difference - predicted[-1] * start).abs().max() < EXACT
    assert (weight.detach().view(2, 2, 5).mean(1) - alone).abs().max() < EXACT
    assert predicted[-1] == pytest.approx(0.8**50)


def test_a_projection_makes_members_equal_bit_for_bit() -> None:
    weight = torch.randn(6, 100)
    tie = Tie(plain_slot(6), CLUSTERS, False)
    assert distance(tie, weight) > 0.1
    project(tie, weight)
    for first, other in ((0, 3), (0, 4), (2, 5)):
        assert torch.equal(weight[first], weight[other])
    assert distance(tie, weight) < 1e-7


@pytest.mark.parametrize("method", ["kmeans", "even"])
@pytest.mark.parametrize("count", [1, 2, 5, 11, 12])
def test_clusters_partition_the_channels(method: str, count: int) -> None:
    features = np.random.default_rng(0).normal(size=(12, 30))
    clusters = cluster(features, count, method, seed=0)
    assert len(clusters) == count
    assert all(clusters)
    assert sorted(channel for members in clusters for channel in members) == list(range(12))
    assert clusters == cluster(features, count, method, seed=0)
    assert all(list(members) == sorted(members) for members in clusters)


def test_duplicate_filters_leave_no_cluster_empty() -> None:
    features = np.ones((8, 3))
    assert sorted(map(len, cluster(features, 5, "kmeans", seed=0))) == [1, 1, 1, 1, 4]


def test_similar_filters_find_each_other() -> None:
    generator = np.random.default_rng(1)
    centres = generator.normal(size=(3, 40)) * 10
    features = np.concatenate([centres, centres[::-1]]) + generator.normal(size=(6, 40)) * 0.01
    assert cluster(features, 3, "kmeans", seed=0) == ((0, 5), (1, 4), (2, 3))


def test_compact_coordinates_keep_all_distances() -> None:
    features = np.random.default_rng(2).normal(size=(5, 50))
    small = compact(features)
    assert small.shape == (5, 5)
    for first in range(5):
        for second in range(5):
            before = np.linalg.norm(features[first] - features[second])
            assert np.linalg.norm(small[first] - small[second]) == pytest.approx(before)


def test_a_count_out_of_range_is_refused() -> None:
    for count in (0, 4):
        with pytest.raises(ValueError, match="expected 1 to 3 clusters"):
            cluster(np.zeros((3, 1)), count, "even", seed=0)


def test_only_equal_filters_are_duplicates() -> None:
    features = np.array([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0 + 1e-15 * 4], [0.0, 0.0], [-0.0, 0.0]])
    assert duplicates(features) == ((0, 1), (2,), (3, 4))


def test_of_two_layers_that_lose_alike_the_one_that_saves_more_macs_gives_first() -> None:
    costs = {"small": [0.1, 0.3], "large": [0.2, 0.3]}
    choices = per_layer(costs, {"small": 1, "large": 4})
    assert [choices.at(number) for number in range(choices.count)] == [
        {"small": 0.0, "large": pytest.approx(1 / 3)},  # 0.05 a MAC
        {"small": 0.0, "large": pytest.approx(2 / 3)},  # 0.075 a MAC
        {"small": pytest.approx(1 / 3), "large": pytest.approx(2 / 3)},
        {"small": pytest.approx(2 / 3), "large": pytest.approx(2 / 3)},
    ]


def test_the_costs_of_all_merges_are_what_the_mean_of_all_filters_leaves_out() -> None:
    features = np.random.default_rng(3).normal(size=(7, 20))
    costs = merge_costs(features)
    spread = np.square(features - features.mean(0)).sum() / np.square(features).sum()
    assert len(costs) == 6
    assert costs == sorted(costs)
    assert sum(costs) == pytest.approx(spread)


def test_labels_name_the_cluster_of_each_channel() -> None:
    assert labels_of(CLUSTERS) == [0, 1, 2, 0, 0, 2]


def test_statistics_follow_with_a_delay() -> None:
    left = [0.0] * 10
    assert delayed(left, 0.1)[-1] == pytest.approx(0.9**10)


def test_the_weakest_strength_that_works_is_found_or_none() -> None:
    def predicted(pull: float) -> float:
        return abs(remaining([0.05] * 400, pull, Dynamics(True, 0.9, True))[-1])

    strength = strength_for(predicted, 1e-4, 20.0)
    assert strength is not None
    assert predicted(strength) <= 1e-4
    assert predicted(strength * 0.98) > 1e-4
    assert strength_for(lambda pull: math.exp(-pull), 1e-4, 1.0) is None
