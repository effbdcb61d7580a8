"""Which channels ResRep masks, how fast, and what it refuses to begin."""

import math

import pytest

from slimcli.algorithms.resrep import budget
from slimcli.algorithms.resrep.config import ResRepConfig
from slimcli.algorithms.resrep.pacing import Pace, find_pace
from slimcli.algorithms.resrep.selection import (
    Limits,
    Standing,
    choose,
    minimum_widths,
    updates_needed,
)
from slimcli.compressor import Refusal, Schedule

# The budget is the closed form of the very steps that are simulated; 5 % is what was asked for.
PREDICTION = 0.05


def standings(widths: dict[str, dict[int, float]], size: int = 8) -> dict[str, Standing]:
    return {name: Standing(size, norms) for name, norms in widths.items()}


def total(widths: dict[str, int]) -> int:
    return sum(widths.values())


def run_to_the_end(sizes: list[int], limits: Limits, blocks: int, target: float) -> list[list[int]]:
    """Widths after each update until nothing changes; norms rise with group and channel."""
    left = {
        f"layer{g}": {c: 1.0 + g * 0.01 + c * 0.001 for c in range(size)}
        for g, size in enumerate(sizes)
    }
    history = []
    while True:
        now = {name: Standing(size, left[name]) for name, size in zip(left, sizes, strict=True)}
        chosen = choose(now, limits, blocks, target, total)
        if not chosen:
            return history
        for name, channels in chosen.items():
            for channel in channels:
                del left[name][channel]
        history.append([len(each) for each in left.values()])


def test_a_group_with_a_limit_of_its_own_keeps_what_the_limit_says() -> None:
    limits = Limits(groups_size=4, min_channels=2, least={"layer0": 9, "layer1": 1})
    assert run_to_the_end([16, 10, 5], limits, 2, 0)[-1] == [9, 2, 2]
    assert minimum_widths({"layer0": 16, "layer1": 10}, limits) == {"layer0": 9, "layer1": 2}


def test_the_authors_stall_case_reaches_its_target() -> None:
    # Six layers of four, a quarter to keep, at least one each: their selector ends at 11 channels.
    history = run_to_the_end([4] * 6, Limits(groups_size=4, min_channels=1), 1, 6)
    assert history[-1] == [1] * 6


@pytest.mark.parametrize("groups_size", [1, 2, 3, 5, 8, 100])
@pytest.mark.parametrize("min_channels", [1, 3, 8])
@pytest.mark.parametrize("blocks", [1, 3])
def test_min_channels_holds_at_any_granularity(
    groups_size: int, min_channels: int, blocks: int
) -> None:
    limits = Limits(groups_size, min_channels)
    history = run_to_the_end([16, 10, 5], limits, blocks, 0)
    assert history[-1] == [min(16, min_channels), min(10, min_channels), min(5, min_channels)]
    before = 31
    for widths in history:
        assert 0 < before - sum(widths) <= blocks * groups_size
        before = sum(widths)


def test_masking_stops_at_the_channel_that_reaches_the_target() -> None:
    assert run_to_the_end([16, 16], Limits(8, 2), 4, 27)[-1] == [11, 16]


def test_ties_go_to_the_first_group_and_the_smallest_channel() -> None:
    equal = dict.fromkeys(range(8), 1.0)
    for _ in range(3):
        chosen = choose(standings({"b": equal, "a": equal}), Limits(3, 1), 1, 0, total)
        assert chosen == {"b": [0, 1, 2]}


def test_the_block_with_the_smallest_mean_norm_goes_first() -> None:
    first = {0: 0.1, 1: 2.0, 2: 2.0, 3: 2.0}
    second = {0: 0.5, 1: 0.5, 2: 0.5, 3: 0.5}
    chosen = choose(standings({"a": first, "b": second}), Limits(2, 1), 1, 0, total)
    assert chosen == {"b": [0, 1]}


def test_rounded_widths_are_multiples_and_never_below_the_minimum() -> None:
    limits = Limits(groups_size=8, min_channels=5, round_to=4)
    history = run_to_the_end([30, 16], limits, 1, 0)
    assert history[0] in ([24, 16], [30, 8])
    assert history[-1] == [8, 8]
    assert all(width % 4 == 0 for widths in history for width in widths if width not in (30, 16))


def test_rounded_blocks_go_whole_even_if_one_channel_would_do() -> None:
    assert run_to_the_end([16, 16], Limits(8, 4, round_to=4), 1, 31) == [[8, 16]]


def test_the_count_of_updates_is_never_less_than_a_selection_takes() -> None:
    sizes = {"layer0": 16, "layer1": 24, "layer2": 9}
    limits = Limits(groups_size=3, min_channels=2)
    for target in (40, 30, 20, 10):
        counted = updates_needed(sizes, limits, 1, target, total)
        assert counted is not None
        assert len(run_to_the_end(list(sizes.values()), limits, 1, target)) <= counted
    assert updates_needed(sizes, limits, 1, 5, total) is None


def cosine(steps: int, lr: float) -> list[float]:
    return [lr * 0.5 * (1 + math.cos(math.pi * step / steps)) for step in range(steps)]


def simulated_shrink(rates: list[float], momentum: float, strength: float) -> float:
    """How far a row gets, step by step."""
    speed = travelled = 0.0
    for rate in rates:
        speed = momentum * speed + strength
        travelled += rate * speed
    return travelled


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99])
@pytest.mark.parametrize("steps", [30, 500, 7820])
def test_the_budget_is_what_a_simulation_travels(momentum: float, steps: int) -> None:
    rates = cosine(steps, 0.01)
    reach = budget.reach(rates, momentum)
    for start in (0, steps // 2, steps - 5):
        simulated = simulated_shrink(rates[start:], momentum, 1e-4)
        assert 1e-4 * reach[start] == pytest.approx(simulated, rel=PREDICTION)


def test_the_official_schedule_needs_ten_thousand_steps_for_a_row_of_norm_one() -> None:
    # 480 epochs of CIFAR-10 at batch 64; 10 095 steps were measured to 1e-3 (ALGORITHMS 1.2).
    rates = cosine(374_880, 0.01)
    speed, norm, steps = 0.0, 1.0, 0
    while norm > 1e-3:
        speed = 0.99 * speed + 1e-4
        norm -= rates[steps] * speed
        steps += 1
    assert steps == pytest.approx(10_095, rel=PREDICTION)
    assert 1e-4 * budget.reach(rates, 0.99)[0] == pytest.approx(18.7, rel=PREDICTION)


def schedule(epochs: int, per_epoch: int, lr: float = 0.01, is_sgd: bool = True) -> Schedule:
    rates = tuple(cosine(epochs * per_epoch, lr))
    return Schedule(epochs, per_epoch, rates, is_sgd=is_sgd)


def test_a_twenty_epoch_recipe_with_the_papers_strength_is_refused_with_one_that_works() -> None:
    plan = schedule(20, 391)
    refused = find_pace(ResRepConfig(warmup_epoch=5), plan, updates=40)
    assert isinstance(refused, Refusal)
    assert refused.key == "lasso_decay"
    value = float(refused.fix.split(",")[0].removeprefix("lasso_decay: "))
    assert isinstance(find_pace(ResRepConfig(lasso_decay=value), plan, 40), Pace)
    assert isinstance(find_pace(ResRepConfig(lasso_decay=value * 0.9), plan, 40), Refusal)
    assert isinstance(find_pace(ResRepConfig(lasso_decay="auto"), plan, 40), Pace)


def test_the_papers_schedule_is_accepted_as_it_is() -> None:
    pace = find_pace(ResRepConfig(prune_interval=200), schedule(480, 781), updates=300)
    assert isinstance(pace, Pace)
    assert (pace.first, pace.last, pace.interval) == (3905, 3905 + 300 * 200, 200)


def fixed(refused: Refusal, config: ResRepConfig) -> ResRepConfig:
    """The config with what the refusal says; several values are joined by ``and``."""
    changes = {}
    for part in refused.fix.split(" and "):
        key, value = part.split(",")[0].split(": ")
        changes[key] = value if value == "auto" else float(value) if "." in value else int(value)
    return ResRepConfig(**{**config.model_dump(), **changes})


@pytest.mark.parametrize(
    ("keys", "epochs"),
    [
        ({"warmup_epoch": 10, "lasso_decay": "auto"}, 10),
        ({"warmup_epoch": 12, "lasso_decay": "auto"}, 10),
        ({"prune_interval": 200, "lasso_decay": "auto"}, 10),
        ({"prune_interval": 90, "warmup_epoch": 1, "lasso_decay": "auto"}, 4),
        ({"lasso_decay": 1e-4}, 10),
        ({"lasso_decay": 1e-4, "warmup_epoch": 0}, 2),
    ],
)
def test_what_a_refusal_says_works(keys: dict, epochs: int) -> None:
    config = ResRepConfig(**keys)
    plan = schedule(epochs, 50)
    refused = find_pace(config, plan, updates=30)
    assert isinstance(refused, Refusal)
    assert refused.fix, refused
    assert isinstance(find_pace(fixed(refused, config), plan, 30), Pace), refused


def test_a_refusal_does_not_ask_for_what_is_written_already() -> None:
    config = ResRepConfig(warmup_epoch=1, lasso_decay="auto", prune_interval="auto")
    refused = find_pace(config, schedule(5, 8), updates=26)
    assert isinstance(refused, Refusal)
    assert refused.fix == "prune_groups: 2"


def test_too_few_epochs_are_refused_with_the_number_that_works() -> None:
    config = ResRepConfig(warmup_epoch=0, lasso_decay="auto", prune_groups=1000)
    for epochs in (0, 1):
        refused = find_pace(config, schedule(epochs, 5), updates=1)
        assert isinstance(refused, Refusal)
        assert refused.key == "epoch"
        needed = int(refused.fix.split(",")[0].removeprefix("epoch: "))
        assert isinstance(find_pace(config, schedule(needed, 5), updates=1), Pace)
