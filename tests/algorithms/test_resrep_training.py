"""ResRep from the first step to the folded network, on a task of a few seconds."""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from slimcli.algorithms.resrep.config import ResRepConfig
from slimcli.algorithms.resrep.method import ResRepCompressor
from slimcli.compressor import GroupDefaults, Progress, Schedule
from slimcli.network import surgery
from slimcli.network.count import count_macs
from slimcli.network.example import Example

EPOCHS, STEPS = 6, 12
# Float64 sums of a few hundred terms of order 1 in another order.
EXACT = 1e-9


class Net(nn.Module):
    """Stem, one residual block, Linear after a flatten with H*W = 4."""

    def __init__(self, has_norm: bool = True) -> None:
        super().__init__()
        norm = nn.BatchNorm2d if has_norm else nn.Identity
        self.stem, self.bn = nn.Conv2d(1, 12, 3, padding=1), norm(12)
        self.conv1, self.bn1 = nn.Conv2d(12, 16, 3, padding=1), norm(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 12, 3, padding=1), norm(12)
        self.fc = nn.Linear(12 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + x)
        return self.fc(nn.functional.max_pool2d(x, 3).flatten(1))


def predict(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return model(batch[0])


def batch(seed: int, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (size,), generator=generator)
    noise = torch.randn(size, 1, 6, 6, generator=generator, dtype=torch.float64)
    return 0.5 * noise + labels.view(-1, 1, 1, 1), labels


def cosine(lr: float, is_sgd: bool) -> Schedule:
    count = EPOCHS * STEPS
    rates = tuple(lr * 0.5 * (1 + math.cos(math.pi * step / count)) for step in range(count))
    return Schedule(EPOCHS, STEPS, rates, is_sgd=is_sgd)


MakeOptimizer = Callable[[list], torch.optim.Optimizer]
OPTIMIZERS: dict[str, tuple[MakeOptimizer, float, bool]] = {
    "sgd": (lambda groups: torch.optim.SGD(groups, lr=0.05), 0.05, False),
    "sgd with nesterov": (lambda groups: torch.optim.SGD(groups, lr=0.05), 0.05, True),
    "adam": (lambda groups: torch.optim.Adam(without_momentum(groups)), 0.005, False),
    "adamw": (lambda groups: torch.optim.AdamW(without_momentum(groups)), 0.005, False),
    "rmsprop": (lambda groups: torch.optim.RMSprop(groups), 0.001, False),
}


def without_momentum(groups: list[dict]) -> list[dict]:
    drop = ("momentum", "nesterov")
    return [{key: value for key, value in each.items() if key not in drop} for each in groups]


@dataclass
class Run:
    compressor: ResRepCompressor
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    saves: list[bool] = field(default_factory=list)
    masked: list[float] = field(default_factory=list)
    step: int = 0

    def progress(self) -> Progress:
        step = min(self.step, self.schedule.steps - 1)
        rate = self.schedule.learning_rates[step]
        return Progress(step // STEPS, step, rate, self.schedule)


def begin(kind: str = "sgd", *, has_norm: bool = True, **keys: object) -> Run:
    make, lr, nesterov = OPTIMIZERS[kind]
    defaults = {
        "lasso_decay": "auto",
        "warmup_epoch": 1,
        "prune_rate": 0.5,
        "groups_size": 3,
        "min_channels": 2,
        "auto_find_module_strategy": "all_bn",
    }
    compressor = ResRepCompressor(ResRepConfig(**{**defaults, **keys}))
    torch.manual_seed(0)
    model = Net(has_norm).double()
    example = Example(batch(0), predict)
    schedule = cosine(lr, kind.startswith("sgd"))
    plan = compressor.plan(model, example, schedule)
    assert plan.refusals == []
    model = compressor.prepare(model, example, plan)
    groups = compressor.param_groups(model, GroupDefaults(lr=lr, nesterov=nesterov))
    return Run(compressor, model, make(groups), schedule)


def one_step(run: Run, pieces: int = 1) -> None:
    progress = run.progress()
    for group in run.optimizer.param_groups:
        group["lr"] = progress.learning_rate
    run.model.train()
    run.optimizer.zero_grad()
    images, labels = batch(run.step % STEPS)
    for part, truth in zip(images.chunk(pieces), labels.chunk(pieces), strict=True):
        (nn.functional.cross_entropy(run.model(part), truth) / pieces).backward()
    run.compressor.after_backward(run.model, progress)
    run.optimizer.step()
    run.compressor.after_step(run.model, progress, False)
    run.step += 1


def epochs(run: Run, count: int = EPOCHS, *, may_cut: bool = True) -> Run:
    for _ in range(count):
        cuts = run.compressor.before_epoch(run.model, run.progress())
        if cuts and may_cut:
            surgery.apply(run.model, cuts, optimizer=run.optimizer)
            run.compressor.after_cut(run.model, cuts)
        for _ in range(STEPS):
            one_step(run)
        if run.step == run.schedule.steps:
            run.compressor.finish(run.model, run.progress())
        run.saves.append(run.compressor.may_save(run.model, run.progress()))
        run.masked.append(run.compressor.status(run.model)["masked"])
    return run


def outputs(model: nn.Module) -> Tensor:
    copied = copy.deepcopy(model).eval()
    with torch.no_grad():
        return torch.cat([predict(copied, batch(seed)) for seed in range(STEPS)])


@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_masked_channel_ends_at_exactly_zero_without_a_projection(
    kind: str, has_norm: bool
) -> None:
    run = epochs(begin(kind, has_norm=has_norm))
    status = run.compressor.status(run.model)
    assert status["macs"] <= 0.5
    assert status["zero"] == status["masked"] > 0
    assert run.compressor.projected == {}
    assert run.saves[-1]
    assert not run.saves[0]


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_converting_loses_nothing(kind: str) -> None:
    run = epochs(begin(kind))
    plain = run.compressor.deploy(run.model)
    trained, deployed = outputs(run.model), outputs(plain)
    labels = torch.cat([batch(seed)[1] for seed in range(STEPS)])
    assert (deployed - trained).abs().max() <= EXACT * trained.abs().max()
    assert torch.equal(deployed.argmax(1), trained.argmax(1))
    assert (deployed.argmax(1) == labels).double().mean() > 0.9
    full = run.compressor.analysis.structure.macs
    assert count_macs(plain, Example(batch(0), predict)).total <= 0.5 * full


def test_cutting_while_training_does_not_change_the_result() -> None:
    cut, whole = epochs(begin(), 5), epochs(begin(), 5, may_cut=False)
    assert sum(p.numel() for p in cut.model.parameters()) < sum(
        p.numel() for p in whole.model.parameters()
    )
    a, b = outputs(cut.model), outputs(whole.model)
    # Float64 sums of fewer terms round differently, and sixty steps amplify it.
    assert (a - b).abs().max() <= 1e-6 * b.abs().max()
    assert cut.masked == whole.masked


def test_masks_only_grow_and_stop_at_the_target() -> None:
    run = epochs(begin())
    assert run.masked == sorted(run.masked)
    full = run.compressor.analysis.structure
    widths = {each.target.name: each.unmasked for each in run.compressor.bundles}
    assert full.macs_with(widths) <= 0.5 * full.macs
    one_more = [{**widths, name: width + 1} for name, width in widths.items()]
    assert any(full.macs_with(each) > 0.5 * full.macs for each in one_more)


def test_nothing_is_masked_before_warm_up_ends() -> None:
    run = begin(warmup_epoch=2)
    for _ in range(2 * STEPS):
        one_step(run)
        assert run.compressor.status(run.model)["masked"] == 0
    epochs(run, 1)
    assert run.masked[-1] > 0


def test_a_number_as_interval_is_obeyed() -> None:
    run = begin(prune_interval=4, groups_size=2, prune_groups=2)
    history = []
    for _ in range(40):
        one_step(run)
        history.append(run.compressor.status(run.model)["masked"])
    changes = [step for step in range(1, 40) if history[step] > history[step - 1]]
    assert changes[0] == STEPS + 3
    assert {later - now for now, later in itertools.pairwise(changes)} == {4}
    assert max(b - a for a, b in itertools.pairwise(history)) <= 4


def test_a_skipped_step_changes_nothing() -> None:
    run = epochs(begin(), 3)
    before = copy.deepcopy((run.model.state_dict(), run.compressor.state_dict()))
    progress = run.progress()
    nn.functional.cross_entropy(run.model(batch(0)[0]), batch(0)[1]).backward()
    state = {key: value.clone() for key, value in run.model.state_dict().items()}
    run.compressor.after_backward(run.model, progress)
    run.compressor.after_step(run.model, progress, True)
    assert all(torch.equal(state[key], value) for key, value in run.model.state_dict().items())
    assert repr(run.compressor.state_dict()) == repr(before[1])


def test_accumulated_batches_make_the_same_step() -> None:
    whole, pieces = begin(has_norm=False), begin(has_norm=False)
    for _ in range(3 * STEPS):
        one_step(whole)
        one_step(pieces, pieces=4)
    a, b = outputs(whole.model), outputs(pieces.model)
    assert (a - b).abs().max() <= EXACT * b.abs().max()
    assert repr(whole.compressor.state_dict()["groups"]["conv1"]["masked"]) == repr(
        pieces.compressor.state_dict()["groups"]["conv1"]["masked"]
    )


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_going_on_from_a_saved_state_is_bit_identical(kind: str) -> None:
    run = epochs(begin(kind), 3)
    assert run.compressor.status(run.model)["shrink_left"] > 0
    twin = copy.deepcopy(run.model)
    again = begin(kind)
    again.model = twin
    again.compressor.load_state_dict(copy.deepcopy(run.compressor.state_dict()))
    names = [list(group["names"]) for group in run.optimizer.param_groups]
    parameters = dict(twin.named_parameters())
    groups = [
        {**group, "params": [parameters[name] for name in group_names]}
        for group, group_names in zip(run.optimizer.param_groups, names, strict=True)
    ]
    again.optimizer = type(run.optimizer)(groups)
    again.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    again.step = run.step
    epochs(run, 3)
    epochs(again, 3)
    assert torch.equal(outputs(run.model), outputs(again.model))
    assert repr(run.compressor.state_dict()) == repr(again.compressor.state_dict())


def test_rows_that_could_not_reach_zero_are_projected_and_reported() -> None:
    run = epochs(begin(), may_cut=False)
    first = run.compressor.bundles[0]
    first.locked[:2] = False
    first.masked[:2] = True
    first.weights(run.model)[0].data[:2] = 0.01
    assert not run.compressor.may_save(run.model, run.progress())
    run.compressor.finish(run.model, run.progress())
    status = run.compressor.status(run.model)
    assert status["projected_channels"] == 2
    assert 0 < status["projected_norm"] < 2
    assert status["projected_output_change"] > 0
    assert status["shrink_left"] == 0


def test_the_goal_is_missed_while_masked_rows_are_not_zero() -> None:
    run = epochs(begin(), may_cut=False)
    assert run.compressor.may_save(run.model, run.progress())
    bundles = next(each for each in run.compressor.bundles if bool(each.masked.any()))
    weight = bundles.weights(run.model)[0]
    weight.data[bundles.masked.nonzero()[0]] = 1e-30
    assert not run.compressor.may_save(run.model, run.progress())


def test_a_learning_rate_that_fell_early_is_made_up_for() -> None:
    run = begin()
    slow = run.schedule
    for _ in range(EPOCHS):
        run.compressor.before_epoch(run.model, dropped(run))
        for _ in range(STEPS):
            one_slow_step(run)
    assert run.schedule is slow
    status = run.compressor.status(run.model)
    assert status["zero"] == status["masked"] > 0


def dropped(run: Run) -> Progress:
    """The progress of a run whose plateau scheduler cut the rate to a tenth after two epochs."""
    planned = run.progress()
    rate = planned.learning_rate * (0.1 if planned.epoch >= 2 else 1.0)
    return Progress(planned.epoch, planned.step, rate, planned.schedule)


def one_slow_step(run: Run) -> None:
    progress = dropped(run)
    for group in run.optimizer.param_groups:
        group["lr"] = progress.learning_rate
    run.optimizer.zero_grad()
    nn.functional.cross_entropy(predict(run.model, batch(run.step)), batch(run.step)[1]).backward()
    run.compressor.after_backward(run.model, progress)
    run.optimizer.step()
    run.compressor.after_step(run.model, progress, False)
    run.step += 1


class Reads(TorchDispatchMode):
    """Counts what makes Python wait for a device: a number, a truth value, a list of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero")
        self.count += function.name() in waits
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_step_asks_the_device_for_nothing_unless_channels_are_masked(kind: str) -> None:
    run = begin(kind, prune_interval=4)
    quiet = 0
    for _ in range(3 * STEPS):
        before = run.compressor.updates_done
        read_in_step = reads_of(run)
        if run.compressor.updates_done == before:
            assert read_in_step == 0
            quiet += any(bool(each.masked.any()) for each in run.compressor.bundles)
    assert quiet > 3


def reads_of(run: Run) -> int:
    """One step; how often the compressor made Python wait."""
    compressor, reads = run.compressor, Reads()
    run.compressor = Watched(compressor, reads)  # type: ignore[assignment]
    one_step(run)
    run.compressor = compressor
    return reads.count


class Watched:
    """A compressor whose part of a step is counted."""

    def __init__(self, compressor: ResRepCompressor, reads: Reads) -> None:
        self.compressor, self.reads = compressor, reads

    def after_backward(self, *arguments: object) -> None:
        with self.reads:
            self.compressor.after_backward(*arguments)  # type: ignore[arg-type]

    def after_step(self, *arguments: object) -> None:
        with self.reads:
            self.compressor.after_step(*arguments)  # type: ignore[arg-type]
