"""Promises of the contract, tested on every algorithm that the registry knows.

A new algorithm is tested the moment its folder exists. Float64 throughout.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from slimcli.compressor import AlgorithmInfo, GroupDefaults, registry
from slimcli.network.example import Example

from .loop import Run, begin, images, outputs, predict, schedule_of, train
from .networks import NETWORKS, SHAPE, build

# Folding and cutting reorder float64 sums; 1e-9 relative leaves three digits of slack over what was
# seen on these networks and still catches any term that is dropped.
EXACT = 1e-9
# Inserting modules that compute the identity may still round once.
ROUNDING = 1e-12
EPOCHS = 4

ALGORITHMS = registry()
MODULE_ALGORITHMS = [
    name for name, info in ALGORITHMS.items() if info.load().deploys_to == "module"
]


def info_of(name: str) -> AlgorithmInfo:
    return ALGORITHMS[name]


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item()


def clone_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(params=sorted(NETWORKS))
def network(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def started(name: str, network: str) -> Run:
    info = info_of(name)
    return begin(info, info.example, build(network), SHAPE, EPOCHS)


@pytest.mark.parametrize("name", MODULE_ALGORITHMS)
def test_deploy_equals_the_trained_model_after_every_epoch(name: str, network: str) -> None:
    run = started(name, network)
    seen: list[float] = []

    def compare(at: Run) -> None:
        plain = at.compressor.deploy(at.model)
        seen.append(relative(outputs(plain, at.batches), outputs(at.model, at.batches)))

    compare(run)
    train(run, EPOCHS, compare)
    assert len(seen) == EPOCHS + 1
    assert max(seen) <= EXACT, seen


@pytest.mark.parametrize("name", MODULE_ALGORITHMS)
def test_deploy_leaves_the_model_alone_and_repeats_itself(name: str, network: str) -> None:
    run = started(name, network)
    train(run, 1)
    mode = run.model.training
    before = clone_state(run.model)
    first = run.compressor.deploy(run.model)
    second = run.compressor.deploy(run.model)
    after = run.model.state_dict()
    assert run.model.training is mode
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert list(first.state_dict()) == list(second.state_dict())
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    shared = {id(p) for p in first.parameters()} & {id(p) for p in run.model.parameters()}
    assert shared == set()


@pytest.mark.parametrize("name", MODULE_ALGORITHMS)
def test_prepare_does_not_change_the_function(name: str, network: str) -> None:
    model = build(network)
    batches = [images(seed, SHAPE) for seed in range(3)]
    before = outputs(model, batches)
    run = started(name, network)
    assert relative(outputs(run.model, batches), before) <= ROUNDING


@pytest.mark.parametrize("name", MODULE_ALGORITHMS)
def test_prepare_does_not_change_the_function_in_train_mode(name: str, network: str) -> None:
    model = build(network).train()
    batch = images(0, SHAPE)
    with torch.no_grad():
        before = predict(model, batch)
    run = started(name, network)
    run.model.train()
    with torch.no_grad():
        after = predict(run.model, batch)
    assert relative(after, before) <= ROUNDING


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_every_trainable_parameter_is_in_exactly_one_group(name: str, network: str) -> None:
    run = started(name, network)
    groups = run.compressor.param_groups(run.model, GroupDefaults(lr=0.1))
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = [id(p) for p in run.model.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trainable)
    names = {id(p): name for name, p in run.model.named_parameters()}
    for group in groups:
        assert [names[id(p)] for p in group["params"]] == list(group["names"])


@pytest.mark.parametrize("name", MODULE_ALGORITHMS)
def test_the_deployed_model_has_nothing_of_ours_and_no_batch_norm_left(
    name: str, network: str
) -> None:
    run = started(name, network)
    train(run, EPOCHS)
    plain = run.compressor.deploy(run.model)
    ours = [type(m).__name__ for m in plain.modules() if type(m).__module__.startswith("slimcli")]
    hooks = [
        path
        for path, module in plain.named_modules()
        if module._forward_hooks or module._forward_pre_hooks
    ]
    norms = [path for path, m in plain.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert (ours, hooks, norms) == ([], [], [])
    assert not plain.training


@pytest.mark.parametrize("name", MODULE_ALGORITHMS)
def test_handover_keeps_the_function_and_can_be_trained(name: str, network: str) -> None:
    run = started(name, network)
    train(run, EPOCHS)
    examples = [Example(batch=batch, predict=predict) for batch in run.batches[:4]]
    handed = run.compressor.handover(run.model, examples)
    assert relative(outputs(handed, run.batches), outputs(run.model, run.batches)) <= EXACT
    norms_before = sum(isinstance(m, nn.BatchNorm2d) for m in build(network).modules())
    norms_after = sum(isinstance(m, nn.BatchNorm2d) for m in handed.modules())
    assert norms_after >= norms_before
    assert not any(type(m).__module__.startswith("slimcli") for m in handed.modules())
    handed.train()
    nn.functional.cross_entropy(predict(handed, run.batches[0]), run.batches[0][1]).backward()
    assert all(p.grad is not None for p in handed.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_state_survives_a_save_and_a_load(name: str, tmp_path: object) -> None:
    run = started(name, "residual")
    train(run, 2)
    state = run.compressor.state_dict()
    path = f"{tmp_path}/state.pt"
    torch.save(state, path)
    loaded = torch.load(path, weights_only=True)
    fresh = started(name, "residual")
    fresh.compressor.load_state_dict(loaded)
    again = fresh.compressor.state_dict()
    assert repr(again) == repr(state)


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_planning_changes_nothing(name: str, network: str) -> None:
    model = build(network)
    model.train()
    before = clone_state(model)
    random_state = torch.get_rng_state()
    info = info_of(name)
    compressor = info.load()(info.config(**info.example))
    compressor.plan(model, Example(images(0, SHAPE), predict), schedule_of(EPOCHS, 0.05))
    assert model.training
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", MODULE_ALGORITHMS)
def test_the_goal_is_reached_at_the_end_and_never_saved_before(name: str) -> None:
    run = started(name, "residual")
    train(run, EPOCHS)
    assert run.may_save[-1]
    if run.plan.goal is not None and run.plan.goal.name == "macs":
        from slimcli.network.count import count_macs

        plain = run.compressor.deploy(run.model)
        macs = count_macs(plain, Example(images(0, SHAPE), predict)).total
        assert macs <= run.plan.goal.target


def test_finetune_is_the_plain_loop_step_by_step() -> None:
    run = started("finetune", "residual")
    twin = copy.deepcopy(run.model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    train(run, 1)
    losses = []
    twin.train()
    for rate, (batch, labels) in zip(schedule_of(1, 0.05).learning_rates, run.batches, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(twin(batch), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert run.losses == losses


NOTHING = {"skip": ["*"], "prune_module_names": []}


@pytest.mark.parametrize(
    ("name", "key"),
    [
        (name, key)
        for name, info in ALGORITHMS.items()
        for key in NOTHING
        if key in info.config.model_fields
    ],
)
def test_with_nothing_selected_training_is_the_plain_loop_step_by_step(name: str, key: str) -> None:
    info = info_of(name)
    config = {**info.example, key: NOTHING[key]}
    run = begin(info, config, build("residual"), SHAPE, EPOCHS)
    plain = started("finetune", "residual")
    train(run, 1)
    train(plain, 1)
    assert run.losses == plain.losses


class Float32Only(nn.Module):
    """It keeps a plain tensor that nothing converts, so that no trial can run in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.colors = torch.eye(3).view(3, 3, 1, 1)
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv1(torch.nn.functional.conv2d(x, self.colors)))
        return self.fc(torch.relu(self.conv2(x)).mean((2, 3)))


@pytest.mark.parametrize("name", ["resrep", "csgd"])
def test_the_plan_says_when_trial_cuts_could_not_run_in_float64(name: str) -> None:
    info = info_of(name)
    example = Example((torch.randn(4, 3, 8, 8), torch.zeros(4)), predict)
    plan = info.load()(info.config(**info.example)).plan(
        Float32Only(), example, schedule_of(EPOCHS, 0.05)
    )
    assert [note for note in plan.notes if note.startswith("trial cuts ran in float32")]
    assert plan.targets
