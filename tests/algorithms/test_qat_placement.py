"""Which tensors get a quantizer, and that the user's model stays the user's."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional

from slimcli.errors import RecipeError, RunError
from slimcli.network.example import Example
from slimcli.network.quantize.audit import float_readers
from slimcli.network.quantize.fake_quant import Phase, quantizers, set_phase
from slimcli.network.quantize.insert import insert, remove
from slimcli.network.quantize.place import place
from slimcli.network.quantize.record import record_forward

from .qat_networks import NETWORKS, Residual, build, conv, example_of, predict


def placed(model, example=None, skip=()):
    return place(copy.deepcopy(model), example or example_of(), skip)


def readers(placement):
    """What the plan says: home of each quantizer -> who reads the tensor."""
    return {f"{each.layer}.{each.role}": each.readers for each in placement.activations}


def quantized(model, example=None, skip=()):
    """The model with quantizers whose ranges are those of one batch."""
    example = example or example_of()
    insert(model, placed(model, example, skip))
    for each in quantizers(model).values():
        each.set_amax(torch.tensor(4.0))
    set_phase(model, Phase.FROZEN)
    return model


def places(placement):
    """Home of each quantizer -> (kind, module) of where it acts."""
    return {
        f"{each.layer}.{each.role}": [(point.kind, point.module) for point in each.points]
        for each in placement.activations
    }


def test_resnet18_has_21_int8_layers_and_each_block_output_is_quantized_once():
    placement = placed(torchvision.models.resnet18(), example_of(64))
    assert len(placement.quantized) == 21
    expected = {"conv1.input": ("conv1",), "fc.input": ("fc",)}
    for stage in range(1, 5):
        for block in range(2):
            name = f"layer{stage}.{block}"
            shortcut = stage > 1 and block == 0
            other = f"{name}.downsample.0" if shortcut else f"+ {name}.conv2"
            expected[f"{name}.conv1.input"] = (f"{name}.conv1", other)
            expected[f"{name}.conv2.input"] = (f"{name}.conv2",)
            if shortcut:
                expected[f"{name}.conv2.residual"] = (f"+ {name}.conv2",)
    assert readers(placement) == expected
    assert places(placement)["layer1.0.conv1.input"] == [("output", "maxpool")]
    assert places(placement)["layer2.0.conv2.residual"] == [("output", "layer2.0.downsample.1")]
    assert placement.notes == ()


def test_mobilenet_v2_has_53_int8_layers_and_ten_shared_skips():
    placement = placed(torchvision.models.mobilenet_v2(), example_of(64))
    assert len(placement.quantized) == 53
    assert len(placement.activations) == 53
    assert all(each.role == "input" for each in placement.activations)
    shared = {home: who for home, who in readers(placement).items() if len(who) > 1}
    blocks = (3, 5, 6, 8, 9, 10, 12, 13, 15, 16)
    assert shared == {
        f"features.{block}.conv.0.0.input": (
            f"features.{block}.conv.0.0",
            f"+ features.{block}.conv.2",
        )
        for block in blocks
    }


@pytest.mark.parametrize("spelling", ["F.relu", "torch.add", "add", "+="])
def test_every_spelling_of_sums_and_activations_gives_the_same_quantizers(spelling):
    plain = placed(Residual("+"))
    assert readers(placed(Residual(spelling))) == readers(plain)
    assert readers(plain) == {
        "conv1.input": ("conv1",),
        "conv2.input": ("conv2", "+ conv3"),
        "conv3.input": ("conv3",),
        "fc.input": ("fc",),
    }


def quantized_sums(model, example):
    """Additions of two tensors of one shape, one of which comes out of a quantizer."""
    record, names = record_forward(copy.deepcopy(model), example), set(quantizers(model))
    on_grid = {
        value for call in record.calls if call.module in names for value in call.outputs.values()
    }
    sums = [op for op in record.ops if op.name in ("add", "iadd") and len(set(op.shapes)) == 1]
    return [len(on_grid & set(op.inputs)) for op in sums if len(op.inputs) == 2]


@pytest.mark.parametrize("spelling", ["+", "F.relu", "torch.add", "add", "+="])
def test_in_every_spelling_the_sum_reads_the_quantized_skip_and_the_float_convolution(spelling):
    model = Residual(spelling).eval()
    assert placed(model).notes == ()
    assert quantized_sums(quantized(model), example_of()) == [1]


def test_the_sums_of_known_networks_read_quantized_skips():
    for name, blocks in (("resnet18", 8), ("mobilenet_v2", 10)):
        model = quantized(getattr(torchvision.models, name)().eval(), example_of(64))
        assert quantized_sums(model, example_of(64)) == [1] * blocks, name
    assert quantized_sums(quantized(build("depthwise")), example_of()) == [1]


@pytest.mark.parametrize("spelling", ["+", "F.relu", "torch.add", "add", "+="])
def test_every_spelling_computes_the_same_quantized_function(spelling):
    example = example_of()
    results = []
    for each in ("+", spelling):
        torch.manual_seed(0)
        results.append(example.run(quantized(Residual(each).eval())))
    assert torch.equal(*results)


SNAPSHOTS = {
    # A pooled tensor keeps the quantizer of the tensor it was pooled from, and a concatenation is
    # quantized once, behind it.
    "concat": {
        "stem.0.input": (("stem.0",), ("input", "stem.0")),
        "left.input": (("left", "right", "pooled"), ("output", "stem.2")),
        "join.input": (("join",), ("input", "join")),
        "fc.input": (("fc",), ("input", "fc")),
    },
    "depthwise": {
        "stem.0.input": (("stem.0",), ("input", "stem.0")),
        "expand.0.input": (("expand.0", "+ project.0"), ("output", "stem.2")),
        "deep.0.input": (("deep.0",), ("input", "deep.0")),
        "project.0.input": (("project.0",), ("input", "project.0")),
        "fc.input": (("fc",), ("input", "fc")),
    },
    # A gate is not quantized where it multiplies.
    "gated": {
        "stem.input": (("stem",), ("input", "stem")),
        "squeeze.input": (("squeeze",), ("input", "squeeze")),
        "excite.input": (("excite",), ("input", "excite")),
        "tail.input": (("tail",), ("input", "tail")),
        "fc.input": (("fc",), ("input", "fc")),
    },
    # Transposed convolutions are quantized like others, and a joined tensor instead of its parts.
    "unet": {
        "enter.0.input": (("enter.0",), ("input", "enter.0")),
        "below.0.input": (("below.0",), ("input", "below.0")),
        "up.input": (("up",), ("input", "up")),
        "merge.0.input": (("merge.0",), ("input", "merge.0")),
        "head.input": (("head",), ("input", "head")),
    },
    "upsampling": {
        "down.0.input": (("down.0",), ("input", "down.0")),
        "up1.input": (("up1",), ("input", "up1")),
        "up2.input": (("up2",), ("input", "up2")),
    },
}


@pytest.mark.parametrize("name", sorted(SNAPSHOTS))
def test_each_tensor_is_quantized_once_and_where(name):
    placement = placed(build(name))
    where = places(placement)
    assert {home: (who, *where[home]) for home, who in readers(placement).items()} == SNAPSHOTS[
        name
    ]
    assert len(placement.quantized) == sum(
        not isinstance(each, nn.BatchNorm2d) and hasattr(each, "weight")
        for each in build(name).modules()
    )
    assert placement.notes == ()


class Separated(nn.Module):
    """One layer of each dimension."""

    def __init__(self):
        super().__init__()
        self.one, self.three = nn.Conv1d(3, 4, 3), nn.Conv3d(3, 4, 1)
        self.up = nn.ConvTranspose1d(4, 4, 2)

    def forward(self, x):
        return self.up(self.one(x.flatten(2))).mean() + self.three(x[..., None]).mean()


def test_convolutions_of_one_and_three_dimensions_are_quantized():
    assert placed(Separated()).quantized == ("one", "up", "three")


class Twice(nn.Module):
    """One layer reads two tensors, as the shared head of a detector does."""

    def __init__(self):
        super().__init__()
        self.stem, self.next, self.head = conv(3, 8), conv(8, 8), conv(8, 4)

    def forward(self, x):
        small = functional.relu(self.stem(x))
        large = functional.relu(self.next(small))
        return self.head(small).sum() + self.head(large).sum()


class TwiceBranching(Twice):
    """The same, but no tracer follows it."""

    def forward(self, x):
        return super().forward(x) if x.mean() < 1000 else x


def test_a_layer_that_reads_two_tensors_has_a_range_for_each():
    placement = placed(Twice())
    assert readers(placement) == {
        "stem.input": ("stem",),
        "next.input": ("next", "head"),
        "head.input": ("head",),
    }
    assert placement.notes == ()
    assert float_readers(quantized(Twice()), example_of()) == []


def test_where_no_tracer_follows_it_has_one_range_for_all_and_the_plan_says_so():
    placement = placed(TwiceBranching())
    assert readers(placement)["head.input"] == ("head",)
    assert readers(placement)["next.input"] == ("next",)
    assert placement.notes == ("head is called several times: one input range for all calls",)
    assert float_readers(quantized(TwiceBranching()), example_of()) == []


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_every_int8_layer_reads_int8_values_only(name):
    model = quantized(build(name))
    assert float_readers(model, example_of()) == []
    assert {id(each) for each in quantizers(model).values()}  # there are some


def test_a_missing_quantizer_is_noticed():
    model = quantized(build("concat"))
    quantizers(model)["join.input_quantizer"].handles[0].remove()
    assert float_readers(model, example_of()) == ["join"]


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_inserting_changes_nothing_until_quantizers_are_switched_on(name):
    model, example = build(name), example_of()
    before, state = example.run(model), copy.deepcopy(model.state_dict())
    torch.manual_seed(0)
    trained_before = example.run(copy.deepcopy(model).train())
    insert(model, placed(model, example))
    assert torch.equal(example.run(model), before)
    torch.manual_seed(0)
    assert torch.equal(example.run(copy.deepcopy(model).train()), trained_before)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in state.items())
    added = set(after) - set(state)
    assert added
    assert all("_quantizer." in key for key in added)


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_removing_gives_the_users_network_back(name):
    model, example = build(name), example_of()
    before, names = example.run(model), list(model.state_dict())
    other = copy.deepcopy(quantized(model))
    assert not torch.equal(example.run(other), before)
    remove(other)
    assert torch.equal(example.run(other), before)
    assert list(other.state_dict()) == names
    assert type(other) is NETWORKS[name]
    assert not torch.equal(example.run(model), before)  # the copy was changed, not the model


def test_the_weight_of_a_quantized_layer_is_the_parameter_for_everybody_else():
    model = quantized(build("residual"))
    weight = model.get_parameter("conv2.weight")
    assert model.conv2.weight is weight
    example_of().run(model)
    assert model.conv2.weight is weight
    with pytest.raises(RuntimeError):
        model.conv2(torch.randn(1, 99, 4, 4))
    assert model.conv2.weight is weight


class WithMethods(nn.Module):
    """What users' models are like: other methods, keyword arguments, a dictionary as result."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(conv(3, 8), nn.ReLU()), nn.Linear(8, 2)
        self.names = ["a", "b"]

    def features(self, images):
        return self.body(images).mean((2, 3))

    def forward(self, images, *, scale=1.0, mask=None):
        out = self.head(self.features(images)) * scale
        return {"logits": out if mask is None else out * mask, "names": self.names}


def test_a_model_keeps_its_class_its_methods_and_its_results():
    example = Example(
        {"x": torch.randn(4, 3, 8, 8)},
        lambda model, batch: (
            model(images=batch["x"], scale=2.0)["logits"] + model.features(batch["x"]).sum()
        ),
    )
    model = quantized(WithMethods(), example)
    assert type(model) is WithMethods
    assert isinstance(model.body[0], nn.Conv2d)
    assert model(example.batch["x"], mask=torch.zeros(2))["names"] == ["a", "b"]
    assert [name for name, _ in model.named_children()] == ["body", "head"]
    assert float_readers(model, example) == []


class Branching(nn.Module):
    """Data-dependent control flow, which no symbolic tracer follows, and a skip in flat code."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.fc = conv(3, 8), conv(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        if x.mean() > 1000:
            return self.fc(x.mean((2, 3)).repeat(1, 3)[:, :8])
        x = functional.relu(self.stem(x))
        return self.fc((x + self.body(x)).mean((2, 3)))


def test_a_model_that_cannot_be_traced_is_quantized_and_its_flat_skip_stays_float():
    placement = placed(Branching())
    assert placement.quantized == ("stem", "body", "fc")
    assert len(placement.notes) == 1
    assert placement.notes[0].startswith("the skip input of the addition after body stays float")
    assert "+ body" not in [who for each in placement.activations for who in each.readers]
    assert "torch.fx cannot follow the model" in placement.notes[0]
    assert float_readers(quantized(Branching()), example_of()) == []


class TrainingOnly(Residual):
    """A second head that only training uses, and dropout in flat code."""

    def __init__(self):
        super().__init__("F.relu")
        self.auxiliary = nn.Linear(8, 5)

    def forward(self, x):
        x = self.act(self.bn1(self.conv1(x)))
        y = self.act(self.bn2(self.conv2(x)))
        y = functional.dropout(self.act(self.bn3(self.conv3(y)) + x), 0.5, self.training)
        y = y.mean((2, 3))
        return (self.fc(y), self.auxiliary(y)) if self.training else self.fc(y)


def test_a_rewritten_forward_has_both_the_training_and_the_evaluation_path():
    model = TrainingOnly()
    placement = placed(model)
    assert places(placement)["conv2.input"] == [("value", "")]
    reasons = {layer.name: layer.reason for layer in placement.layers if layer.reason}
    assert reasons == {"auxiliary": "not called on the example batch in eval mode"}
    example = example_of()
    torch.manual_seed(0)
    expected = example.run(copy.deepcopy(model).train())
    insert(model, placement)
    torch.manual_seed(0)
    found = example.run(model.train())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert example.run(model.eval()).shape == (4, 5)
    assert isinstance(model, TrainingOnly)


class Told(nn.Module):
    """A part with two readers of what it gets; it may return more in training."""

    def __init__(self, returns_more):
        super().__init__()
        self.left, self.right, self.returns_more = conv(8, 8), conv(8, 8), returns_more

    def forward(self, x, mask=None):
        x = x if mask is None else x * mask
        x = functional.relu(self.left(x) + self.right(x))
        return (x, x.abs().mean()) if self.returns_more and self.training else x


class OtherInTraining(nn.Module):
    def __init__(self, returns_more):
        super().__init__()
        self.stem, self.part, self.left, self.right = (
            conv(3, 8),
            Told(returns_more),
            conv(8, 8),
            conv(8, 8),
        )

    def forward(self, x):
        x = functional.relu(self.stem(x))
        is_masked = self.training and not self.part.returns_more
        x = self.part(x, torch.ones_like(x)) if is_masked else self.part(x=x)
        x = x[0] if isinstance(x, tuple) else x
        return (self.left(x) + self.right(x)).mean((2, 3))


@pytest.mark.parametrize(
    ("returns_more", "received"),
    [(True, r"part \(Told\) returns"), (False, r"part \(Told\) is called")],
)
def test_a_part_that_training_calls_or_leaves_otherwise_is_named_with_a_way_out(
    returns_more, received
):
    model = quantized(OtherInTraining(returns_more))
    with pytest.raises(RunError, match=f"{received} in another way than in evaluation mode"):
        example_of().run(model.train())
    assert example_of().run(model.eval()).shape == (4, 8)


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (("first",), ["conv1"]),
        (("last",), ["fc"]),
        (("first", "last"), ["conv1", "fc"]),
        (("conv2",), ["conv2"]),
        (("self.conv2",), ["conv2"]),
        (("conv[12]",), ["conv1", "conv2"]),
        (("Linear",), ["fc"]),
        (("*",), ["conv1", "conv2", "conv3", "fc"]),
    ],
)
def test_skip_takes_names_patterns_types_first_and_last(skip, left):
    placement = placed(Residual(), skip=skip)
    assert [layer.name for layer in placement.layers if layer.reason] == left
    assert all(layer.reason.startswith("skip: ") for layer in placement.layers if layer.reason)


def test_skip_takes_a_container_and_all_that_is_in_it():
    placement = placed(torchvision.models.resnet18(), example_of(64), skip=("layer4",))
    assert len(placement.quantized) == 21 - 5


def test_a_skip_that_matches_nothing_is_an_error_with_the_nearest_names():
    with pytest.raises(RecipeError, match=r"'conv22' matches no .*\n.*\n?.*did you mean conv2"):
        placed(Residual(), skip=("conv22",))


def test_a_skipped_layer_has_neither_weight_nor_input_quantizer():
    model = quantized(Residual(), skip=("conv3",))
    assert not hasattr(model.conv3, "weight_quantizer")
    assert all("conv3" not in name for name in quantizers(model))


class Standardized(nn.Conv2d):
    """A convolution that computes with another weight than the one it stores."""

    def forward(self, x):
        weight = (self.weight - self.weight.mean()) / self.weight.std()
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding)


def test_a_weight_that_is_computed_on_the_way_stays_float_with_the_reason():
    model = nn.Sequential(Standardized(3, 4, 3), nn.Conv2d(4, 2, 1))
    layers = placed(model).layers
    assert [layer.reason for layer in layers] == ["its weight is computed from other tensors", ""]


def test_tied_weights_stay_float_with_the_reason():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    model[1].weight = model[0].weight
    assert [layer.reason for layer in placed(model).layers] == [
        "",
        "its weight is shared with 0.weight",
    ]


def test_a_position_embedding_is_no_skip():
    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.place = conv(3, 8), nn.Parameter(torch.ones(4, 8, 16, 16))

        def forward(self, x):
            return self.stem(x) + self.place

    placement = placed(Embedded())
    assert list(readers(placement)) == ["stem.input"]
    assert placement.notes == ()


def test_of_two_convolutions_that_are_added_the_shorter_way_is_the_skip():
    class Shortcut(nn.Module):
        def __init__(self, swapped):
            super().__init__()
            self.stem, self.long1, self.long2 = conv(3, 8), conv(8, 8), conv(8, 8)
            self.short, self.swapped = conv(8, 8, 1), swapped

        def forward(self, x):
            x = self.stem(x)
            long, short = self.long2(self.long1(x)), self.short(x)
            return short + long if self.swapped else long + short

    for swapped in (True, False):
        placement = placed(Shortcut(swapped))
        assert readers(placement)["long2.residual"] == ("+ long2",)
        assert places(placement)["long2.residual"] == [("output", "short")]


def test_the_model_is_only_looked_at():
    model = build("residual").train()
    state = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    place(copy.deepcopy(model), Example(torch.randn(2, 3, 8, 8), predict))
    torch.set_rng_state(random_state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())


def test_what_is_fed_in_keeps_its_calibrated_scale_where_others_are_learned():
    example = Example(torch.randn(4, 3, 16, 16), lambda model, batch: model((batch - 0.5) / 0.2))
    model = build("residual")
    insert(model, placed(model, example), policy="lsq")
    learned = {
        name: isinstance(each.scale, nn.Parameter) for name, each in quantizers(model).items()
    }
    assert [name for name, is_learned in learned.items() if not is_learned] == [
        "conv1.input_quantizer"
    ]
    assert len(learned) == 8


class OverwrittenSkip(nn.Module):
    """The skip has no other reader, and the sum overwrites it."""

    def __init__(self):
        super().__init__()
        self.stem, self.long, self.short = conv(3, 8), conv(8, 8), nn.Sequential(conv(8, 8, 1))
        self.tail = conv(8, 8)

    def forward(self, x):
        x = functional.relu(self.stem(x))
        skip = self.short(x)
        skip += self.tail(self.long(x))
        return functional.relu_(skip)


def test_learned_scales_train_through_a_skip_that_is_overwritten():
    example, model = example_of(), OverwrittenSkip().train()
    insert(model, placed(model), policy="lsq")
    for each in quantizers(model).values():
        each.set_amax(torch.tensor(4.0))
    set_phase(model, Phase.TRAIN)
    example.predict(model, example.batch).square().sum().backward()
    assert quantizers(model)["tail.residual_quantizer"].scale.grad != 0
