"""Which channels belong together: cut exactly, or frozen with a reason."""

from __future__ import annotations

import contextlib
import copy
import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library, nn

from slimcli.errors import RecipeError
from slimcli.network import surgery
from slimcli.network.count import count_macs
from slimcli.network.cuts import Cut
from slimcli.network.example import Example
from slimcli.network.structure import Structure, analyze, select_groups, zero_channels
from slimcli.network.structure.analyze import trace
from slimcli.network.structure.edits import carry_out, equals
from slimcli.network.structure.modes import output_tensors
from slimcli.network.structure.recheck import first_disorder
from slimcli.network.structure.record import Record
from slimcli.network.structure.rehearse import rehearse
from slimcli.network.structure.run import run_traced
from slimcli.network.structure.sources import Sources

from . import structures
from .proving import (
    EXACT,
    call,
    difference,
    network,
    outputs,
    prepared,
    prunable,
    zeroed_and_cut,
)


@pytest.mark.parametrize("name", structures.NETWORKS)
def test_zeroed_equals_cut_for_random_channels_of_all_groups_together(name: str) -> None:
    model, example, structure = network(name)
    assert structure.notes == ()
    for seed in range(3):
        error, effect = zeroed_and_cut(model, example, prunable(structure), seed)
        assert error <= EXACT
        assert effect > 1e-6  # the channels meant something


@pytest.mark.parametrize("name", structures.NETWORKS)
def test_zeroed_equals_cut_for_each_group_alone(name: str) -> None:
    model, example, structure = network(name)
    for group in prunable(structure):
        assert zeroed_and_cut(model, example, [group], 5)[0] <= EXACT, group.name


CHANNELS = {
    "Chain": 36,
    "Residual": 60,
    "ConcatUneven": 44,
    "ChannelShuffle": 32,
    "SplitChunk": 44,
    "SplitFixed": 28,
    "GroupConv": 64,
    "Depthwise": 56,
    "DepthwiseMultiplier": 72,
    "Transposed": 48,
    "Unflatten": 20,
    "UnflattenFree": 148,
    "FlattenFC": 36,
    "PixelShuffle": 60,
    "SE": 60,
    "ECA": 20,
    "SpatialGate": 20,
    "PReLUNet": 36,
    "LayerScaleParam": 28,
    "FunctionalConv": 16,
    "SharedConv": 44,
    "TiedWeight": 52,
    "FrozenBN": 36,
    "FrozenStem": 60,
    "AuxHead": 36,
    "PermuteLinear": 64,
    "OneChannelConv": 36,
    "GroupNormNet": 24,
    "MaxoutOverChannels": 36,
    "DictOutputTwoInputs": 32,
    "PreAct": 32,
    "DenseBlock": 32,
}


@pytest.mark.parametrize("name", structures.NETWORKS)
def test_as_many_channels_are_prunable_as_can_be_cut_exactly(name: str) -> None:
    _, _, structure = network(name)
    found = sum(row.channels for row in structure.layers if not row.frozen_reason)
    assert found == CHANNELS[name]


@pytest.mark.parametrize("name", structures.NETWORKS)
def test_equal_channels_are_merged_exactly_where_it_is_promised(name: str) -> None:
    model, example, structure = network(name)
    for group in structure.groups:
        assert group.exact_duplicate != bool(group.duplicate_reason)
        if not group.exact_duplicate:
            continue
        twins = copy.deepcopy(model)
        last = group.size - 1
        clusters = [[0, last], *([channel] for channel in range(1, last))]
        carry_out(equals(twins, group, clusters))
        before = outputs(twins, example)
        surgery.apply(twins, [group.merge(clusters)], example=example)
        assert difference(before, outputs(twins, example)) <= EXACT, group.name


def test_channels_that_arrive_at_a_border_as_constants_can_be_merged_but_not_removed() -> None:
    model, example, structure = network("PreAct")
    group = structure.group("stem.1")
    assert (group.is_prunable, group.exact_zero, group.exact_duplicate) == (True, False, True)
    assert group.zero_reason == (
        "a removed channel would arrive at a as a constant that no bias can take up"
    )
    assert group.constants == ()
    assert "stem.1" in [each.name for each in select_groups(structure, "all_bn")]
    random = torch.Generator().manual_seed(0)
    for _ in range(3):
        order = torch.randperm(group.size, generator=random).tolist()
        twins = copy.deepcopy(model)
        cut, edits = rehearse(twins, group, order, 4)
        carry_out(edits)
        before = outputs(twins, example)
        surgery.apply(twins, [cut], example=example)
        assert difference(before, outputs(twins, example)) <= EXACT
        assert dict(twins.named_parameters())["stem.0.weight"].shape[0] == 4


def test_a_group_whose_channels_can_go_in_no_way_says_both_reasons() -> None:
    class Summed(Custom):
        """A constant at a padded conv, and a sum over the channels."""

        def __init__(self) -> None:
            super().__init__()
            self.a = structures.conv(8, 16)

        def body(self, x: Tensor) -> Tensor:
            x = F.relu(self.a(x) + 1)
            return self.b(x) * x.sum(1, keepdim=True)

    model, example = prepared(Summed(), structures.image())
    group = analyze(model, example).group("a")
    assert not group.is_prunable
    assert "constant that no bias can take up" in group.frozen_reason
    assert "sum over channels" in group.duplicate_reason


@pytest.mark.parametrize("name", structures.NETWORKS)
def test_macs_under_smaller_widths_equal_a_recount_on_the_cut_model(name: str) -> None:
    model, example, structure = network(name)
    assert structure.macs == count_macs(model, example).total
    widths = {group.name: (group.size + 1) // 2 for group in prunable(structure)}
    cuts = [structure.group(name).cut(range(width)) for name, width in widths.items()]
    for group in prunable(structure):
        zero_channels(model, group, range(widths[group.name], group.size))
    surgery.apply(model, cuts, example=example)
    assert structure.macs_with(widths) == count_macs(model, example).total


@pytest.mark.parametrize("name", ["Residual", "AuxHead", "SharedConv"])
def test_a_cut_model_trains_one_step(name: str) -> None:
    model, example, structure = network(name)
    surgery.apply(model, [group.cut([0, 1]) for group in prunable(structure)])
    loss = sum(tensor.sum() for tensor in output_tensors(example.run(model.train())))
    loss.backward()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    after = list(model.parameters())
    assert all(parameter.grad is not None for parameter in after)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_nothing_of_the_model_is_changed_by_the_analysis() -> None:
    torch.manual_seed(0)
    model = structures.AuxHead().train()
    before = copy.deepcopy(model.state_dict())
    state = torch.random.get_rng_state()
    analyze(model, Example(structures.image(), call))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("is_enabled", [False, True])
@pytest.mark.parametrize("works", [False, True])
def test_the_garbage_collector_is_as_it_was(is_enabled: bool, works: bool) -> None:
    def predict(net: nn.Module, batch: Any) -> Any:
        return net(batch if works else batch[:, :1])

    (gc.enable if is_enabled else gc.disable)()
    try:
        with contextlib.nullcontext() if works else pytest.raises(RuntimeError):
            analyze(structures.AuxHead(), Example(structures.image(), predict))
        assert gc.isenabled() == is_enabled
    finally:
        gc.enable()


class Fixed(structures.Net):
    """The size of something is a number in the code."""

    def __init__(self, how: str) -> None:
        super().__init__(12)
        self.how = how
        self.a = structures.conv_bn(8, 16)
        if how == "view":
            self.wide = nn.Linear(16 * 256, 12)
        else:
            self.b = structures.conv_bn(16 if how == "heads" else 8, 12)

    def body(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.how == "view":
            return self.wide(x.view(-1, 4096))[:, :, None, None]
        if self.how == "slice":
            return self.b(x[:, :8] + x[:, 8:])
        if self.how == "split":
            left, right = torch.split(x, [8, 8], dim=1)
            return self.b(left * right)
        heads = x.flatten(2).view(2, 4, 4, 256).transpose(1, 2)
        return self.b(heads.transpose(1, 2).reshape(2, 16, 16, 16))


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("view", "x.view(-1, 4096)"),
        ("slice", "x[:, :8] + x[:, 8:]"),
        ("split", "torch.split(x, [8, 8], dim=1)"),
        ("heads", "x.flatten(2).view(2, 4, 4, 256)"),
    ],
)
def test_a_size_fixed_in_the_users_code_freezes_with_its_line(how: str, line: str) -> None:
    model, example = prepared(Fixed(how), structures.image())
    structure = analyze(model, example)
    frozen = [group for group in structure.groups if group.name == "a.1"]
    assert len(frozen) == 1
    assert "trial cut" in frozen[0].frozen_reason
    assert line in frozen[0].frozen_reason
    assert structure.group("stem.1").is_prunable


@library.custom_op("structures::scale", mutates_args=())
def scale(x: Tensor) -> Tensor:
    return x * 2


@scale.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Custom(structures.Net):
    def __init__(self) -> None:
        super().__init__(12)
        self.a, self.b = structures.conv_bn(8, 16), structures.conv_bn(16, 12)

    def body(self, x: Tensor) -> Tensor:
        return self.b(torch.ops.structures.scale(self.a(x)))


def test_an_unknown_operator_freezes_exactly_its_neighbourhood_and_is_named() -> None:
    model, example = prepared(Custom(), structures.image())
    structure = analyze(model, example)
    assert "structures::scale" in structure.group("a.1").frozen_reason
    assert "torch.ops.structures.scale(self.a(x))" in structure.group("a.1").frozen_reason
    assert [g.name for g in prunable(structure)] == ["stem.1", "b.1"]


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class Seen(Custom):
    def body(self, x: Tensor) -> Tensor:
        return self.b(Square.apply(self.a(x)))


def test_a_custom_autograd_function_is_seen_through() -> None:
    model, example = prepared(Seen(), structures.image())
    assert [g.name for g in prunable(analyze(model, example))] == ["stem.1", "a.1", "b.1"]


class WrittenThroughViews(structures.Net):
    def __init__(self) -> None:
        super().__init__(12)
        self.a, self.b = structures.conv_bn(8, 16), structures.conv_bn(16, 12)

    def body(self, x: Tensor) -> Tensor:
        x = self.a(x)
        result = torch.empty_like(x)
        half = x.shape[1] // 2
        result[:, :half] = x[:, half:]
        result[:, half:] = x[:, :half]
        result.add_(1).mul_(2)
        return self.b(result[:, :, 1:-1, 1:-1].clone())


def test_writes_through_views_move_labels_with_the_memory() -> None:
    model, example = prepared(WrittenThroughViews(), structures.image())
    structure = analyze(model, example)
    for seed in range(3):
        assert zeroed_and_cut(model, example, prunable(structure), seed)[0] <= EXACT


def resnet50() -> Structure:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet50()
    return analyze(model, Example(torch.randn(1, 3, 224, 224), call), trial=False)


def test_resnet_50_has_the_32_inner_norms_and_the_published_macs() -> None:
    structure = resnet50()
    chosen = [group.name for group in select_groups(structure, "linear_bn")]
    blocks = [f"layer{n}.{i}" for n, count in enumerate((3, 4, 6, 3), 1) for i in range(count)]
    assert chosen == [f"{block}.bn{i}" for block in blocks for i in (1, 2)]
    assert structure.macs == 4_089_184_256  # conv and fc, as in the ResRep paper (4.089 G)
    assert len(select_groups(structure, "all_bn")) == 37
    assert len(structure.conv_batch_norms) == 53


class TwoGroups(structures.Net):
    """A depthwise conv behind a concatenation has outputs of two groups."""

    def __init__(self) -> None:
        super().__init__(12)
        self.a, self.b = structures.conv_bn(8, 12), structures.conv_bn(8, 10)
        self.deep, self.last = structures.conv(22, 22, groups=22), structures.conv_bn(22, 12)

    def body(self, x: Tensor) -> Tensor:
        return self.last(self.deep(torch.cat([self.a(x), self.b(x)], 1)))


def test_the_outputs_of_a_layer_in_two_groups_follow_both() -> None:
    model, example = prepared(TwoGroups(), structures.image())
    structure = analyze(model, example)
    deep = next(row for row in structure.layers if row.name == "deep")
    (first, count), (second, others) = deep.parts
    assert (count, others) == (12, 10)
    for widths, left in (({first: 8}, 18), ({second: 8}, 20), ({first: 8, second: 8}, 16)):
        assert structure.outputs_with(deep, widths) == left
        cuts = [structure.group(name).cut(range(width)) for name, width in widths.items()]
        cut = copy.deepcopy(model)
        surgery.apply(cut, cuts, example=example)
        assert cut.deep.out_channels == left


def test_a_bare_parameter_is_selected_by_its_name() -> None:
    class Bare(structures.Net):
        def __init__(self) -> None:
            super().__init__(12)
            self.kernel, self.b = nn.Parameter(torch.randn(10, 8, 3, 3)), structures.conv_bn(10, 12)

        def body(self, x: Tensor) -> Tensor:
            return self.b(F.relu(F.conv2d(x, self.kernel, padding=1)))

    model, example = prepared(Bare(), structures.image())
    structure = analyze(model, example)
    chosen = select_groups(structure, "all_conv", ["kernel"])
    assert [group.name for group in chosen] == ["kernel"]


def test_names_select_with_and_without_self() -> None:
    _, _, structure = network("Residual")
    assert [g.name for g in select_groups(structure, "linear_bn", ["self.a.1"])] == ["a.1"]
    assert [g.name for g in select_groups(structure, "linear_conv", ["a.0"])] == ["a.1"]
    both = select_groups(structure, "linear_bn", ["c.1", "skip.0"])
    assert [g.name for g in both] == ["c.1"]
    assert select_groups(structure, "linear_bn", []) == []


@pytest.mark.parametrize(
    ("network_name", "names", "message"),
    [
        ("Residual", ["c.1"], "name all of c.1, skip.1"),
        ("Residual", ["b.2"], "no layer with channels is called b.2"),
        ("Residual", ["head"], "head can't be pruned: it is an output of the model"),
        ("Depthwise", ["b.1"], "it follows a.1"),
    ],
)
def test_a_name_that_cannot_be_cut_is_an_error(
    network_name: str, names: list[str], message: str
) -> None:
    _, _, structure = network(network_name)
    with pytest.raises(RecipeError) as error:
        select_groups(structure, "linear_bn", names)
    assert message in str(error.value)


def test_an_unknown_strategy_names_the_known_ones() -> None:
    _, _, structure = network("Chain")
    with pytest.raises(RecipeError, match="linear_bn, all_bn, linear_conv, all_conv"):
        select_groups(structure, "linear")


def test_a_whole_attention_layer_is_exact_or_frozen() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model, example = prepared(nn.Sequential(nn.Linear(8, 16), layer, nn.Linear(16, 5)), None)
    example = Example(torch.randn(2, 6, 8, dtype=torch.float64), call)
    structure = analyze(model, example)
    assert structure.group("1.linear1").is_prunable
    assert zeroed_and_cut(model, example, prunable(structure), 0)[0] <= EXACT


def test_relu_after_a_padded_reader_is_not_mistaken_for_a_gate() -> None:
    class Biased(Custom):
        def __init__(self) -> None:
            super().__init__()
            self.a = structures.conv(8, 16)

        def body(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x) + 1))

    model, example = prepared(Biased(), structures.image())
    reason = analyze(model, example).group("a").zero_reason
    assert "constant that no bias can take up" in reason


def test_different_offsets_cut_from_the_halves_of_a_shuffle_are_noticed_by_the_labels() -> None:
    model, example, structure = network("ChannelShuffle")
    group = structure.group("a.1")
    right, wrong = group.cut([0, 1, 2, 3]), group.cut([4, 5, 6, 7])
    slots = [
        w if w.tensor.startswith("b.") else r for r, w in zip(right.slots, wrong.slots, strict=True)
    ]
    mixed = Cut(right.group, right.before, right.after, tuple(slots))
    traced = trace(model, example)
    consumers = traced.record.consumers[: traced.consumers_in_eval]
    for cut, path in ((right, ""), (mixed, "c.0")):
        other = copy.deepcopy(model)
        surgery.apply(other, [cut])
        after = Record(Sources(other))
        run_traced(other.eval(), example, after)
        assert first_disorder(traced.record, consumers, after, [cut]) == path


def test_clusters_may_be_given_in_any_order() -> None:
    _, _, structure = network("Chain")
    group = structure.group("stem.1")
    assert group.size == 8
    assert group.merge([[6, 5], [7, 0, 3], [], [4]]) == group.merge([[0, 3, 7], [4], [5, 6]])
