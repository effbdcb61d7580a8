"""Surgery: what is left of tensors, attributes and optimizer state after cuts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from slimcli.errors import RunError
from slimcli.network import surgery
from slimcli.network.cuts import Constant, Cut, SlotCut
from slimcli.network.example import Example
from slimcli.network.selection import compose, select
from slimcli.network.structure import analyze
from slimcli.network.structure import zero_channels as zero_group

EXACT = 1e-12
"""Float64: the same sums in another order."""


def keep(*entries: int) -> tuple[tuple[int, ...], ...]:
    return tuple((entry,) for entry in entries)


def cut(*slots: tuple[str, int, tuple], before: int = 4, constants=()) -> Cut:
    after = len(slots[0][2]) if slots else before
    return Cut("group", before, after, tuple(SlotCut(*slot) for slot in slots), tuple(constants))


def run(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch)


def chain(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=bias), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3)
    ).double()


def chain_cut(kept: tuple, names: tuple[str, str, str] = ("0", "1", "3")) -> Cut:
    first, norm, last = names
    slots = [(f"{first}.weight", 0, kept), (f"{first}.bias", 0, kept)]
    slots += [(f"{norm}.{local}", 0, kept) for local in ("weight", "bias")]
    slots += [(f"{norm}.{local}", 0, kept) for local in ("running_mean", "running_var")]
    return cut(*slots, (f"{last}.weight", 1, kept))


def zero_behind_norm(model: nn.Sequential, channels: tuple[int, ...]) -> None:
    with torch.no_grad():
        for channel in channels:
            model[1].weight[channel] = 0
            model[1].bias[channel] = 0


# --- tensors and attributes ------------------------------------------------------------------


def test_cutting_zero_channels_leaves_the_function() -> None:
    model = chain().eval()
    zero_behind_norm(model, (1, 3))
    batch = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    before = model(batch)
    surgery.apply(model, [chain_cut(keep(0, 2))])
    torch.testing.assert_close(model(batch), before, rtol=EXACT, atol=EXACT)
    assert model[0].out_channels == model[1].num_features == model[3].in_channels == 2


def test_merging_equal_channels_sums_the_consumer_and_leaves_the_function() -> None:
    model = chain().eval()
    with torch.no_grad():
        for tensor in (*model[0].parameters(), *model[1].parameters()):
            tensor[2] = tensor[0]
    batch = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    before = model(batch)
    kept = keep(0, 1, 3)
    merged = cut(
        *[(slot.tensor, slot.dim, kept) for slot in chain_cut(kept).slots[:-1]],
        ("3.weight", 1, ((0, 2), (1,), (3,))),
    )
    surgery.apply(model, [merged])
    torch.testing.assert_close(model(batch), before, rtol=EXACT, atol=EXACT)


def test_cuts_of_one_call_mean_the_original_indices_on_the_same_dimension() -> None:
    layer = nn.Linear(6, 2)
    old = layer.weight.detach().clone()
    surgery.apply(
        layer, [cut(("weight", 1, keep(1, 2, 3, 4, 5))), cut(("weight", 1, keep(0, 1, 2, 3, 5)))]
    )
    assert torch.equal(layer.weight, old[:, [1, 2, 3, 5]])
    assert layer.in_features == 4


def test_cuts_of_two_dimensions_of_one_tensor_compose() -> None:
    layer = nn.Linear(6, 4)
    old, old_bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    surgery.apply(layer, [cut(("weight", 1, keep(0, 5))), cut(("weight", 0, keep(3)))])
    assert torch.equal(layer.weight, old[[3]][:, [0, 5]])
    assert torch.equal(layer.bias, old_bias[[3]])  # no slot named it


def test_new_parameters_are_new_objects_that_keep_requires_grad_and_marks() -> None:
    layer = nn.Linear(3, 4)
    layer.weight.requires_grad_(False)
    layer.weight.no_decay = True
    layer(torch.ones(1, 3)).sum().backward()
    old_weight, old_bias = layer.weight, layer.bias
    surgery.apply(layer, [cut(("weight", 0, keep(0, 2)))])
    assert layer.weight is not old_weight
    assert old_weight.shape == (4, 3)
    assert old_bias.shape == (4,)
    assert not layer.weight.requires_grad
    assert layer.weight.no_decay
    assert layer.bias.requires_grad
    assert layer.bias.grad is None


def test_a_tied_weight_stays_tied_and_both_layers_learn_their_size() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(3, 4, bias=False)
            self.decoder = nn.Linear(3, 4, bias=False)
            self.decoder.weight = self.encoder.weight

    model = Tied()
    surgery.apply(model, [cut(("decoder.weight", 0, keep(1, 2)))])
    assert model.encoder.weight is model.decoder.weight
    assert model.encoder.out_features == model.decoder.out_features == 2


def test_a_tensor_named_by_two_of_its_names_is_cut_once() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": shared, "second": shared})
    surgery.apply(
        model, [cut(("first.weight", 0, keep(0, 1, 2)), ("second.weight", 0, keep(0, 1, 2)))]
    )
    assert model["second"].weight.shape == (3, 4)
    assert model["first"] is model["second"]


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_a_parametrized_weight_is_cut_through_its_originals(wrap) -> None:
    layer = wrap(nn.Linear(3, 4).double())
    names = [name for name, _ in layer.named_parameters() if name != "bias"]
    batch = torch.randn(2, 3, dtype=torch.float64)
    before = layer(batch)
    kept = keep(0, 3)
    surgery.apply(layer, [cut(*[(name, 0, kept) for name in names], ("bias", 0, kept))])
    torch.testing.assert_close(layer(batch), before[:, [0, 3]], rtol=EXACT, atol=EXACT)
    assert layer.out_features == 2


def test_buffers_that_are_not_saved_and_bare_parameters_are_cut() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.arange(4.0))
            self.register_buffer("mask", torch.tensor([True, False, True, True]), persistent=False)

    model = Scaled()
    surgery.apply(model, [cut(("scale", 0, keep(1, 3)), ("mask", 0, keep(1, 3)))])
    assert model.scale.tolist() == [1.0, 3.0]
    assert model.mask.tolist() == [False, True]
    assert "mask" not in model.state_dict()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kernel", [1, 3])
def test_memory_format_and_dtype_are_kept(dtype, kernel) -> None:
    layer = nn.Conv2d(4, 6, kernel).to(dtype=dtype, memory_format=torch.channels_last)
    surgery.apply(layer, [cut(("weight", 0, keep(0, 2, 5)), ("weight", 1, keep(1, 2)))])
    assert layer.weight.dtype is dtype
    assert layer.weight.dim_order() == (0, 2, 3, 1)


def layer_cases() -> list:
    two = keep(0, 2)
    return [
        (nn.Conv1d(4, 6, 3), [("weight", 1, two)], {"in_channels": 2, "out_channels": 6}),
        (nn.Conv3d(4, 6, 1), [("weight", 0, two)], {"in_channels": 4, "out_channels": 2}),
        (nn.ConvTranspose2d(4, 6, 3), [("weight", 0, two)], {"in_channels": 2, "out_channels": 6}),
        (nn.ConvTranspose2d(4, 6, 3), [("weight", 1, two)], {"in_channels": 4, "out_channels": 2}),
        (nn.Conv2d(4, 4, 3, groups=4), [("weight", 0, two)], {"groups": 2, "in_channels": 2}),
        (nn.Conv2d(4, 8, 3, groups=4), [("weight", 0, keep(2, 3, 6, 7))], {"groups": 2}),
        (nn.Conv2d(4, 8, 3, groups=4), [("weight", 0, keep(0, 2, 4, 6))], {"groups": 4}),
        (nn.Conv2d(4, 4, 1, groups=2), [("weight", 1, keep(0))], {"groups": 2, "in_channels": 2}),
        (nn.ConvTranspose2d(4, 4, 3, groups=4), [("weight", 0, two)], {"out_channels": 2}),
        (nn.BatchNorm1d(4, affine=False), [("running_mean", 0, two), ("running_var", 0, two)], {}),
        (
            nn.GroupNorm(2, 4),
            [("weight", 0, keep(0, 1)), ("bias", 0, keep(0, 1))],
            {"num_groups": 1},
        ),
        (nn.GroupNorm(2, 4), [("weight", 0, two), ("bias", 0, two)], {"num_groups": 2}),
        (nn.LayerNorm(4), [("weight", 0, two), ("bias", 0, two)], {"normalized_shape": (2,)}),
        (nn.RMSNorm(4), [("weight", 0, two)], {"normalized_shape": (2,)}),
        (
            nn.InstanceNorm2d(4, affine=True),
            [("weight", 0, two), ("bias", 0, two)],
            {"num_features": 2},
        ),
        (nn.PReLU(4), [("weight", 0, two)], {"num_parameters": 2}),
        (nn.Embedding(9, 4), [("weight", 1, two)], {"embedding_dim": 2, "num_embeddings": 9}),
        (nn.Bilinear(3, 4, 5), [("weight", 2, two)], {"in1_features": 3, "in2_features": 2}),
    ]


@pytest.mark.parametrize(("layer", "slots", "expected"), layer_cases())
def test_attributes_follow_the_shapes(layer, slots, expected) -> None:
    surgery.apply(layer, [cut(*slots)])
    assert {name: getattr(layer, name) for name in expected} == expected
    if isinstance(layer, nn.BatchNorm1d):
        assert layer(torch.randn(3, 2)).shape == (3, 2)


def test_a_subclass_of_a_torch_layer_is_refreshed_too() -> None:
    class Mine(nn.Conv2d):
        pass

    layer = Mine(4, 4, 3)
    surgery.apply(layer, [cut(("weight", 0, keep(0)))])
    assert layer.out_channels == 1
    assert layer(torch.randn(1, 4, 5, 5)).shape == (1, 1, 3, 3)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_transposed_conv_loses_exactly_the_outputs_that_are_cut(groups) -> None:
    layer = nn.ConvTranspose2d(4, 8, 3, groups=groups).double()
    per_group = 8 // groups
    batch = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    before = layer(batch)
    surgery.apply(layer, [cut(("weight", 1, keep(*range(1, per_group))))])
    left = [each for each in range(8) if each % per_group]
    torch.testing.assert_close(layer(batch), before[:, left], rtol=EXACT, atol=EXACT)


def test_attention_is_cut_in_all_its_parts() -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    kept = keep(0, 1, 4, 5)
    rows = keep(*[block * 8 + each[0] for block in range(3) for each in kept])
    slots = [("in_proj_weight", 0, rows), ("in_proj_weight", 1, kept), ("in_proj_bias", 0, rows)]
    slots += [
        ("out_proj.weight", 0, kept),
        ("out_proj.weight", 1, kept),
        ("out_proj.bias", 0, kept),
    ]
    surgery.apply(layer, [cut(*slots)])
    batch = torch.randn(2, 3, 4)
    assert layer(batch, batch, batch)[0].shape == (2, 3, 4)
    assert (layer.embed_dim, layer.head_dim) == (4, 2)


# --- what does not fit ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "slots", "message"),
    [
        (nn.Linear(2, 4), [("wait", 0, keep(0))], "dimension 0 of wait"),
        (nn.Linear(2, 4), [("weight", 2, keep(0))], "dimension 2 of weight"),
        (nn.Linear(2, 4), [("weight", 0, keep(7))], "index 7 is outside a dimension of 4"),
        (nn.Linear(2, 4), [("weight", 0, ())], "at least one entry"),
        (nn.Conv2d(4, 4, 1, groups=2), [("weight", 0, keep(0, 1, 2))], "keep equally many"),
        (
            nn.GroupNorm(2, 4, affine=True),
            [("weight", 0, keep(0, 1, 2)), ("bias", 0, keep(0, 1, 2))],
            "keep equally many",
        ),
        (nn.Embedding(4, 4), [("weight", 0, keep(0))], "rows of an embedding"),
        (nn.LSTM(2, 4), [("weight_ih_l0", 0, keep(0))], "recurrent layers"),
        (nn.MultiheadAttention(4, 2), [("in_proj_weight", 1, keep(0, 1))], "share one width"),
    ],
)
def test_a_cut_that_does_not_fit_changes_nothing(layer, slots, message) -> None:
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RunError, match=message):
        surgery.apply(layer, [cut(*slots)])
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_a_norm_whose_tensors_would_differ_in_length_is_refused() -> None:
    with pytest.raises(RunError, match="running_mean and weight"):
        surgery.apply(nn.BatchNorm2d(4), [cut(("weight", 0, keep(0, 1)), ("bias", 0, keep(0, 1)))])


# --- optimizers --------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda params: torch.optim.Adam(params, lr=0.01, amsgrad=True),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.01),
    "adadelta": lambda params: torch.optim.Adadelta(params),
    "radam": lambda params: torch.optim.RAdam(params, lr=0.01),
}


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> None:
    optimizer.zero_grad()
    model(batch).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_step_after_the_cut_equals_the_step_of_the_masked_model(name) -> None:
    """Channels at zero behind a ReLU get no gradient, so cut and masked models train alike."""
    model = chain().eval()
    groups = [{"params": list(model[:2].parameters())}, {"params": list(model[2:].parameters())}]
    optimizer = OPTIMIZERS[name](groups)
    batch = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for _ in range(3):
        train_step(model, optimizer, batch)
    zero_behind_norm(model, (1, 3))
    masked = copy.deepcopy(model)
    mirrored = OPTIMIZERS[name](
        [{"params": list(masked[:2].parameters())}, {"params": list(masked[2:].parameters())}]
    )
    mirrored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    kept = keep(0, 2)
    surgery.apply(model, [chain_cut(kept)], optimizer=optimizer)
    train_step(model, optimizer, batch)
    train_step(masked, mirrored, batch)
    surgery.apply(masked, [chain_cut(kept)])
    for (path, left), right in zip(model.named_parameters(), masked.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=EXACT, atol=EXACT, msg=path)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_groups_hold_the_new_parameters_in_the_old_order_with_fitting_state(name) -> None:
    model = chain()
    optimizer = OPTIMIZERS[name](model.parameters())
    train_step(model, optimizer, torch.randn(2, 3, 8, 8, dtype=torch.float64))
    group = optimizer.param_groups[0]
    surgery.apply(model, [chain_cut(keep(0, 2))], optimizer=optimizer)
    assert optimizer.param_groups[0] is group
    assert [id(each) for each in group["params"]] == [id(each) for each in model.parameters()]
    assert len(optimizer.state) == len(group["params"])
    for parameter, state in optimizer.state.items():
        shapes = {value.shape for value in state.values() if getattr(value, "dim", lambda: 0)()}
        assert shapes == {parameter.shape}


def test_summed_entries_have_summed_momentum() -> None:
    layer = nn.Linear(3, 2, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.tensor([[1.0, 2.0, 4.0]])).sum().backward()
    optimizer.step()
    surgery.apply(layer, [cut(("weight", 1, ((0, 2), (1,))))], optimizer=optimizer)
    assert optimizer.state[layer.weight]["momentum_buffer"].tolist() == [[5.0, 2.0], [5.0, 2.0]]


def test_master_weights_in_another_precision_follow() -> None:
    layer = nn.Linear(3, 4).half()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    master = layer.weight.detach().float()
    optimizer.state[layer.weight] = {"master": master, "step": torch.tensor(3.0), "name": "x"}
    surgery.apply(layer, [cut(("weight", 0, keep(1, 3)))], optimizer=optimizer)
    state = optimizer.state[layer.weight]
    assert torch.equal(state["master"], master[[1, 3]])
    assert state["master"].dtype is torch.float32
    assert (state["step"].item(), state["name"]) == (3.0, "x")


def test_averages_over_a_dimension_follow_in_the_other() -> None:
    layer = nn.Linear(6, 4)
    optimizer = torch.optim.Adafactor(layer.parameters())
    layer(torch.randn(5, 6)).square().sum().backward()
    optimizer.step()
    surgery.apply(layer, [cut(("weight", 0, keep(0, 1)))], optimizer=optimizer)
    shapes = {key: tuple(v.shape) for key, v in optimizer.state[layer.weight].items() if v.dim()}
    assert shapes == {"row_var": (2, 1), "col_var": (1, 6)}


def test_state_that_cannot_follow_is_refused_before_anything_changes() -> None:
    layer = nn.Linear(3, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    optimizer.state[layer.weight] = {"flat": torch.zeros(12)}
    with pytest.raises(RunError, match=r"flat has shape \(12,\)"):
        surgery.apply(layer, [cut(("weight", 0, keep(1)))], optimizer=optimizer)
    assert layer.weight.shape == (4, 3)


class Wrapping(torch.optim.Optimizer):
    """Leaves its steps to another optimizer, as SAM and Lookahead do.

    Args:
        parameters: All.
        shares: The groups of both are one list.
    """

    def __init__(self, parameters: Any, shares: bool) -> None:
        parameters = list(parameters)
        super().__init__(parameters, {"lr": 0.1})
        self.base = torch.optim.SGD(
            self.param_groups if shares else parameters, lr=0.1, momentum=0.9
        )
        if shares:
            self.param_groups = self.base.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.base.step(closure)


@pytest.mark.parametrize("shares", [False, True])
def test_an_optimizer_that_another_one_holds_goes_along(shares: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    masked = copy.deepcopy(net)
    x = torch.randn(5, 3, dtype=torch.float64)
    optimizer = Wrapping(net.parameters(), shares)
    other = torch.optim.SGD(masked.parameters(), lr=0.1, momentum=0.9)
    for model, each in ((net, optimizer), (masked, other)):
        with torch.no_grad():
            model[1].weight[:, 1] = 0.0
            model[0].weight[1] = model[0].bias[1] = 0.0
        model(x).square().sum().backward()
        model[0].weight.grad[1] = model[0].bias.grad[1] = model[1].weight.grad[:, 1] = 0.0
        each.step()
    parts = [("0.weight", 0), ("0.bias", 0), ("1.weight", 1)]
    surgery.apply(net, [cut(*((n, d, keep(0, 2, 3)) for n, d in parts))], optimizer=optimizer)
    for model, each in ((net, optimizer), (masked, other)):
        each.zero_grad()
        model(x).square().sum().backward()
        each.step()
    stays = torch.tensor([0, 2, 3])
    torch.testing.assert_close(net[0].weight, masked[0].weight[stays], rtol=1e-12, atol=0)
    torch.testing.assert_close(net[1].weight, masked[1].weight[:, stays], rtol=1e-12, atol=0)
    held = [each for group in optimizer.base.param_groups for each in group["params"]]
    assert [id(each) for each in held] == [id(each) for each in net.parameters()]
    assert set(optimizer.base.state) == set(held)


def test_lbfgs_is_refused() -> None:
    layer = nn.Linear(3, 4)
    with pytest.raises(RunError, match="LBFGS"):
        surgery.apply(
            layer, [cut(("weight", 0, keep(1)))], optimizer=torch.optim.LBFGS(layer.parameters())
        )


def test_state_that_is_a_list_of_tensors_is_refused() -> None:
    layer = nn.Linear(3, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    optimizer.state[layer.weight]["history"] = [torch.zeros(4, 3)]
    with pytest.raises(RunError, match="history is a list of tensors"):
        surgery.apply(layer, [cut(("weight", 0, keep(1)))], optimizer=optimizer)
    assert layer.weight.shape == (4, 3)


# --- constants ---------------------------------------------------------------------------------


def depthwise_network(consumer: nn.Module) -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False),
        nn.BatchNorm2d(4),
        nn.Sigmoid(),
        consumer,
    )
    for norm in (model[1], model[4]):
        nn.init.normal_(norm.bias)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
        nn.init.normal_(norm.running_mean)
    return model.double().train()


def depthwise_cut(kept: tuple, removed: tuple[int, ...], consumer_dim: int = 1) -> Cut:
    slots = [("0.weight", 0, kept), ("3.weight", 0, kept), ("6.weight", consumer_dim, kept)]
    for norm in ("1", "4"):
        slots += [(f"{norm}.{local}", 0, kept) for local in ("weight", "bias")]
        slots += [(f"{norm}.{local}", 0, kept) for local in ("running_mean", "running_var")]
    return cut(*slots, constants=[Constant("6", removed)])


@pytest.mark.parametrize(
    ("consumer", "dim"),
    [
        (nn.Conv2d(4, 5, 1), 1),
        (nn.Conv2d(4, 5, 1, bias=False), 1),
        (nn.Conv2d(4, 5, 3, bias=False), 1),
        (nn.Conv2d(4, 5, 3, padding=1, padding_mode="reflect"), 1),
        (nn.ConvTranspose2d(4, 5, 1), 0),
    ],
)
def test_a_removed_constant_goes_into_the_bias(consumer, dim) -> None:
    model = depthwise_network(consumer)
    zero_behind_norm(model, (1, 3))
    example = Example(torch.randn(2, 3, 8, 8, dtype=torch.float64), run)
    before = example.run(model.eval())
    model.train()
    later = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([*model.parameters(), later], lr=0.1)
    optimizer.param_groups[0]["names"] = [name for name, _ in model.named_parameters()] + ["later"]
    surgery.apply(
        model, [depthwise_cut(keep(0, 2), (1, 3), dim)], optimizer=optimizer, example=example
    )
    assert model.training
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(example.run(model.eval()), before, rtol=EXACT, atol=EXACT)
    group = optimizer.param_groups[0]
    assert [id(each) for each in group["params"]] == [id(p) for p in (*model.parameters(), later)]
    assert group["names"] == [*dict(model.named_parameters()), "later"]


def test_a_bias_that_appeared_follows_the_next_cut_of_its_layer() -> None:
    model = depthwise_network(nn.Conv2d(4, 5, 1, bias=False))
    zero_behind_norm(model, (1,))
    example = Example(torch.randn(2, 3, 8, 8, dtype=torch.float64), run)
    both = [depthwise_cut(keep(0, 2, 3), (1,)), cut(("6.weight", 0, keep(0, 4)))]
    before = example.run(copy.deepcopy(model).eval())[:, [0, 4]]
    surgery.apply(model, both, example=example)
    torch.testing.assert_close(example.run(model.eval()), before, rtol=EXACT, atol=EXACT)
    surgery.apply(model, [cut(("6.weight", 0, keep(1)))])
    torch.testing.assert_close(example.run(model), before[:, [1]], rtol=EXACT, atol=EXACT)


def test_a_linear_consumer_takes_up_constants() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2, bias=False)).double()
    with torch.no_grad():
        model[0].weight[2] = 0
        model[0].bias[2] = 0
    example = Example(torch.randn(5, 3, dtype=torch.float64), run)
    before = example.run(model)
    kept = keep(0, 1, 3)
    slots = [("0.weight", 0, kept), ("0.bias", 0, kept), ("2.weight", 1, kept)]
    surgery.apply(model, [cut(*slots, constants=[Constant("2", (2,))])], example=example)
    torch.testing.assert_close(example.run(model), before, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize(
    ("consumer", "message"),
    [
        (nn.Conv2d(4, 5, 3, padding=1), "pads with zeros"),
        (nn.Conv2d(4, 5, 3, padding="same"), "pads with zeros"),
        (nn.ConvTranspose2d(4, 5, 3), "a pattern, not a constant"),
    ],
)
def test_a_consumer_that_cannot_take_up_a_constant_is_refused(consumer, message) -> None:
    model = depthwise_network(consumer)
    zero_behind_norm(model, (1, 3))
    example = Example(torch.randn(2, 3, 8, 8, dtype=torch.float64), run)
    with pytest.raises(RunError, match=message):
        surgery.apply(model, [depthwise_cut(keep(0, 2), (1, 3))], example=example)
    assert model[0].out_channels == 4


def test_a_channel_that_is_not_constant_is_refused() -> None:
    model = depthwise_network(nn.Conv2d(4, 5, 1))
    example = Example(torch.randn(2, 3, 8, 8, dtype=torch.float64), run)
    with pytest.raises(RunError, match="do not arrive as constants"):
        surgery.apply(model, [depthwise_cut(keep(0, 2), (1, 3))], example=example)


def test_a_consumer_that_sees_two_constants_is_refused() -> None:
    layer = nn.Linear(2, 2).double()
    model = nn.ModuleDict({"layer": layer})
    batch = torch.ones(3, 2, dtype=torch.float64)
    twice = Example(batch, lambda owner, data: owner["layer"](data) + owner["layer"](data + 1e-7))
    once = cut(("layer.weight", 1, keep(1)), constants=[Constant("layer", (0,))])
    with pytest.raises(RunError, match="different constants"):
        surgery.apply(model, [once], example=twice)


def test_a_grouped_consumer_takes_up_a_constant_in_the_right_group() -> None:
    layer = nn.Conv2d(4, 6, 1, groups=2).double()
    batch = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    batch[:, 0], batch[:, 2] = 3.0, -2.0
    before = layer(batch)
    model = nn.ModuleDict({"layer": layer})
    example = Example(batch, lambda owner, data: owner["layer"](data))
    surgery.apply(
        model,
        [cut(("layer.weight", 1, keep(1)), constants=[Constant("layer", (0, 2))])],
        example=example,
    )
    torch.testing.assert_close(layer(batch[:, [1, 3]]), before, rtol=EXACT, atol=EXACT)


def test_constants_without_an_example_are_refused() -> None:
    with pytest.raises(RunError, match="no example"):
        surgery.apply(nn.Linear(2, 2), [cut(constants=[Constant("", (0,))])])


# --- shapes as data ----------------------------------------------------------------------------


def test_a_fresh_model_takes_the_shapes_and_state_of_a_cut_one() -> None:
    model = depthwise_network(nn.Conv2d(4, 5, 1, bias=False))
    fresh = copy.deepcopy(model)
    zero_behind_norm(model, (1, 3))
    example = Example(torch.randn(2, 3, 8, 8, dtype=torch.float64), run)
    surgery.apply(model, [depthwise_cut(keep(0, 2), (1, 3))], example=example)
    stored = surgery.layout(model)
    for attributes in (None, stored["attributes"]):
        again = copy.deepcopy(fresh)
        surgery.reshape_to(again, stored["shapes"], attributes)
        again.load_state_dict(model.state_dict())
        assert torch.equal(example.run(again.eval()), example.run(model.eval()))
        assert again[3].groups == 2


def test_ambiguous_groups_need_the_attributes() -> None:
    model = nn.Conv2d(8, 8, 1, groups=4)
    surgery.apply(model, [cut(("weight", 0, keep(0, 2, 4, 6)))])
    stored = surgery.layout(model)
    with pytest.raises(RunError, match="2 or 4 groups"):
        surgery.reshape_to(nn.Conv2d(8, 8, 1, groups=4), stored["shapes"])
    again = nn.Conv2d(8, 8, 1, groups=4)
    surgery.reshape_to(again, stored["shapes"], stored["attributes"])
    assert (again.groups, again.in_channels, again.out_channels) == (4, 8, 4)


@pytest.mark.parametrize("shapes", [{"other": [1]}, {"weight": [4]}, {"deep.weight": [4, 4]}])
def test_shapes_of_another_model_are_refused(shapes) -> None:
    with pytest.raises(RunError):
        surgery.reshape_to(nn.Linear(4, 4), shapes)


# --- properties --------------------------------------------------------------------------------


@st.composite
def selections(draw: st.DrawFn, size: int) -> tuple[tuple[int, ...], ...]:
    """Some entries dropped, some summed, in the original order."""
    clusters: dict[int, list[int]] = {}
    for index in range(size):
        label = draw(st.integers(-1, size - 1))
        if label >= 0:
            clusters.setdefault(label, []).append(index)
    return tuple(tuple(each) for each in clusters.values()) or ((0,),)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_select_equals_indexing_by_hand(data) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    tensor = torch.arange(float(torch.Size(shape).numel()), dtype=torch.float64).reshape(shape)
    sources = {dim: data.draw(selections(shape[dim])) for dim in range(len(shape))}
    expected = tensor
    for dim, entries in sources.items():
        parts = [expected.index_select(dim, torch.tensor(each)).sum(dim) for each in entries]
        expected = torch.stack(parts, dim)
    assert torch.equal(select(tensor, sources), expected)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_cuts_of_disjoint_channels_compose_as_one_after_the_other(data) -> None:
    """Two groups meet in one dimension, as behind a concat: each cut keeps the other's entries."""
    left, right = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    first = data.draw(selections(left))
    second = data.draw(selections(right))
    shifted = tuple(tuple(index + left for index in each) for each in second)
    whole_left = tuple((index,) for index in range(left))
    whole_right = tuple((index + left,) for index in range(right))
    both = compose([first + whole_right, whole_left + shifted], left + right)
    assert both == first + shifted


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_apply_equals_indexing_by_hand_on_every_tensor(data) -> None:
    model = chain()
    keeps = {name: data.draw(selections(size)) for name, size in (("a", 4), ("b", 5), ("c", 3))}
    kept = tuple((each[0],) for each in keeps["a"])
    cuts = [
        cut(
            *[(slot.tensor, slot.dim, kept) for slot in chain_cut(kept).slots[:-1]],
            ("3.weight", 1, keeps["a"]),
        ),
        cut(("3.weight", 0, keeps["b"])),
        cut(("0.weight", 1, keeps["c"])),
    ]
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, dim, entries in (
        *[(slot.tensor, slot.dim, slot.sources) for each in cuts for slot in each.slots],
        ("3.bias", 0, keeps["b"]),
    ):
        old = expected[name].movedim(dim, 0)
        expected[name] = torch.stack([old[list(e)].sum(0) for e in entries]).movedim(0, dim)
    surgery.apply(model, cuts)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=EXACT, atol=EXACT, msg=name)


def test_gradient_hooks_of_parameters_go_on_after_a_cut_and_can_still_be_removed() -> None:
    model, seen, gradients = chain().eval(), [], []
    doubled = model[0].weight.register_hook(lambda gradient: 2 * gradient)
    model[0].weight.register_post_accumulate_grad_hook(lambda each: seen.append(each.shape))
    surgery.apply(model, [chain_cut(keep(0, 2))])
    batch = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for _ in range(2):
        model.zero_grad()
        model(batch).square().sum().backward()
        gradients.append(model[0].weight.grad.clone())
        doubled.remove()
    assert seen == [model[0].weight.shape] * 2
    torch.testing.assert_close(gradients[0], 2 * gradients[1], rtol=EXACT, atol=EXACT)


def test_a_bias_made_by_a_cut_has_a_momentum_where_one_step_takes_all_of_them() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Sigmoid()),
        *(nn.Conv2d(8, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1)),
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=True)
    example = Example(torch.randn(2, 3, 9, 9), lambda model, batch: model(batch))

    def step() -> None:
        optimizer.zero_grad()
        net.train()(example.batch).square().mean().backward()
        optimizer.step()

    step()
    group = analyze(net.eval(), example).group("1")
    zero_group(net, group, range(4))
    surgery.apply(net, [group.cut(range(4, 8))], example=example, optimizer=optimizer)
    assert optimizer.state[net[3].bias]["momentum_buffer"].tolist() == [0.0] * 4
    step()
    assert optimizer.state[net[3].bias]["momentum_buffer"].abs().max() > 0
