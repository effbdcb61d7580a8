"""Deploy format: a fresh user model and two files give the compressed model back."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from slimcli.artifacts import deploy
from slimcli.errors import RunError
from slimcli.network import fuse, surgery
from slimcli.network.cuts import Constant, Cut, SlotCut
from slimcli.network.example import Example

MODEL_FILE = """
from torch import nn

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.act = nn.ReLU()
        self.extra = nn.ModuleDict({"scale": nn.Conv2d(width, width, 1)})

    def forward(self, x):
        return self.extra["scale"](self.act(self.bn(self.conv(x))))

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.blocks = nn.ModuleList([Block(4), Block(4)])
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

def build():
    return Network()
"""

INPUT = (2, 3, 8, 8)


def build() -> nn.Module:
    space: dict = {"__name__": "user_file"}
    exec(compile(MODEL_FILE, "user.py", "exec"), space)
    return space["build"]()


def keep(*entries: int) -> tuple[tuple[int, ...], ...]:
    return tuple((entry,) for entry in entries)


def compressed() -> nn.Module:
    """Norms folded, the first block's inner width cut from 4 to 3."""
    torch.manual_seed(0)
    model = build().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
    fuse.fold_pairs(model, [("blocks.0.conv", "blocks.0.bn"), ("blocks.1.conv", "blocks.1.bn")])
    kept = keep(0, 1, 3)
    names = [("conv.weight", 0), ("conv.bias", 0), ("extra.scale.weight", 1)]
    slots = tuple(SlotCut(f"blocks.0.{name}", dim, kept) for name, dim in names)
    surgery.apply(model, [Cut("blocks.0.conv", 4, 3, slots)])
    return model


def round_trip(model: nn.Module, fresh: nn.Module, reference: nn.Module, folder: Path) -> nn.Module:
    deploy.save(folder, model, reference)
    return deploy.load_deploy(folder, fresh)


def same_state(left: nn.Module, right: nn.Module) -> bool:
    first, second = left.state_dict(), right.state_dict()
    return list(first) == list(second) and all(
        torch.equal(first[name], second[name])
        and first[name].dtype == second[name].dtype
        and first[name].dim_order() == second[name].dim_order()
        for name in first
    )


def test_folded_and_cut_models_come_back_bit_for_bit(tmp_path: Path):
    model = compressed()
    loaded = round_trip(model, build(), build(), tmp_path)
    batch = torch.randn(INPUT)
    assert torch.equal(loaded(batch), model(batch))
    assert same_state(loaded, model)
    assert str(loaded) == str(model)
    assert not loaded.training


def test_two_files_are_written_and_nothing_else(tmp_path: Path):
    paths = deploy.save(tmp_path, compressed(), build())
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(each.name for each in paths)
    assert json.loads((tmp_path / "deploy.json").read_text())["version"] == 1


def test_writing_twice_gives_the_same_bytes(tmp_path: Path):
    written = []
    for _ in range(2):
        written.append([path.read_bytes() for path in deploy.save(tmp_path, compressed(), build())])
    assert written[0] == written[1]


def test_a_run_folder_its_artifacts_and_the_file_itself_are_accepted(tmp_path: Path):
    (tmp_path / "artifacts").mkdir()
    model = compressed()
    deploy.save(tmp_path / "artifacts", model, build())
    built_from = []

    def from_recipe(folder: Path) -> nn.Module:
        built_from.append(folder)
        return build()

    for place in (tmp_path, tmp_path / "artifacts", tmp_path / "artifacts" / "deploy.json"):
        assert same_state(deploy.load_deploy(place, build_model=from_recipe), model)
    assert built_from == [tmp_path] * 3


@pytest.mark.slow
def test_a_new_process_loads_it_without_any_algorithm(tmp_path: Path):
    model = compressed()
    deploy.save(tmp_path, model, build())
    (tmp_path / "user.py").write_text(MODEL_FILE)
    batch = torch.randn(INPUT)
    torch.save({"batch": batch, "output": model(batch).detach()}, tmp_path / "expected.pt")
    script = """
import sys, torch, user
from slimcli.artifacts import deploy
model = deploy.load_deploy(".", user.build())
saved = torch.load("expected.pt", weights_only=True)
assert torch.equal(model(saved["batch"]), saved["output"])
assert not [name for name in sys.modules if name.startswith("slimcli.algorithms.")]
print("equal")
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(deploy.__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.strip() == "equal", result.stderr


def test_tied_weights_stay_tied(tmp_path: Path):
    def tied() -> nn.Module:
        model = nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(4, 6)})
        model["b"].weight = model["a"].weight
        return model

    model = tied()
    surgery.apply(model, [Cut("g", 6, 2, (SlotCut("a.weight", 0, keep(1, 2)),))])
    loaded = round_trip(model, tied(), tied(), tmp_path)
    assert loaded["a"].weight is loaded["b"].weight
    assert loaded["b"].out_features == 2
    assert same_state(loaded, model)


def test_a_module_used_twice_stays_one_module(tmp_path: Path):
    def shared() -> nn.Module:
        conv = nn.Conv2d(3, 3, 1)
        return nn.Sequential(conv, nn.ReLU(), conv)

    model = shared()
    model[0].weight.data.fill_(2.0)
    loaded = round_trip(model, shared(), shared(), tmp_path)
    assert loaded[0] is loaded[2]
    assert same_state(loaded, model)


def test_a_replacement_used_twice_stays_one_module(tmp_path: Path):
    def shared() -> nn.Module:
        norm = nn.BatchNorm2d(3)
        return nn.Sequential(norm, nn.ReLU(), norm)

    model = shared()
    model[0] = model[2] = nn.Conv2d(3, 3, 1)
    loaded = round_trip(model, shared(), shared(), tmp_path)
    assert loaded[0] is loaded[2]
    assert same_state(loaded, model)


def test_a_module_that_was_shared_and_is_no_more_is_refused():
    conv = nn.Conv2d(3, 3, 1)
    fresh = nn.Sequential(conv, conv)
    with pytest.raises(RunError, match="one module in the model hook's model only"):
        deploy.describe(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)), fresh)


def test_a_bias_that_appeared_and_one_that_went_are_restored(tmp_path: Path):
    def fresh() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 2, 1, bias=False))

    model = fresh()
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].bias[1] = 0
    kept = keep(0, 2, 3)
    slots = [SlotCut("0.weight", 0, kept), SlotCut("0.bias", 0, kept), SlotCut("2.weight", 1, kept)]
    example = Example(torch.randn(2, 3, 4, 4), lambda module, batch: module(batch))
    surgery.apply(model, [Cut("g", 4, 3, tuple(slots), (Constant("2", (1,)),))], example=example)
    model[0].register_parameter("bias", None)
    loaded = round_trip(model, fresh(), fresh(), tmp_path)
    assert loaded[0].bias is None
    assert same_state(loaded, model)


def test_layers_become_sequences_of_plain_layers(tmp_path: Path):
    def fresh() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())

    model = fresh()
    model[0] = nn.Sequential(
        nn.ConvTranspose2d(3, 4, 2, stride=2, groups=1, bias=False),
        nn.BatchNorm2d(4, affine=False, momentum=None),
        nn.Conv2d(4, 4, (1, 3), padding="same", padding_mode="reflect", dilation=(1, 2)),
    )
    model.eval()
    loaded = round_trip(model, fresh(), fresh(), tmp_path)
    batch = torch.randn(INPUT)
    assert str(loaded) == str(model)
    assert torch.equal(loaded(batch), model(batch))


def test_a_new_layer_has_no_more_tensors_than_the_stored_one(tmp_path: Path):
    model = nn.Sequential(nn.BatchNorm2d(3))
    model[0].register_parameter("bias", None)
    loaded = round_trip(model, nn.Sequential(nn.Identity()), nn.Sequential(nn.Identity()), tmp_path)
    assert [name for name, _ in loaded.named_parameters()] == ["0.weight"]
    assert same_state(loaded, model)


def test_a_conv_with_another_stride_is_made_anew(tmp_path: Path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2))
    loaded = round_trip(
        model, nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential(nn.Conv2d(3, 4, 3)), tmp_path
    )
    assert loaded[0].stride == (2, 2)
    assert same_state(loaded, model)


def test_added_and_removed_layers_are_restored(tmp_path: Path):
    def fresh() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.Linear(3, 2))

    model = fresh()
    del model[1]
    model.add_module("last", nn.Linear(2, 2))
    with pytest.raises(RunError, match="can't be stored"):
        deploy.describe(nn.Sequential(nn.GRU(3, 3), nn.Dropout(), nn.Linear(3, 2)), fresh())
    kept = nn.Sequential()
    kept.add_module("0", nn.Linear(3, 3))
    kept.add_module("2", nn.Linear(3, 2))
    kept.add_module("last", nn.Linear(2, 2))
    loaded = round_trip(kept, fresh(), fresh(), tmp_path)
    assert str(loaded) == str(kept)
    assert same_state(loaded, kept)


def test_a_norm_that_activates_leaves_the_users_activation_in_its_place(tmp_path: Path):
    timm_layers = pytest.importorskip("timm.layers")

    def fresh() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 1), timm_layers.BatchNormAct2d(4, act_layer=nn.Mish))

    model = fresh().eval()
    fuse.fold_pairs(model, [("0", "1")])
    loaded = round_trip(model, fresh(), fresh(), tmp_path)
    assert type(loaded[1]) is nn.Mish
    batch = torch.randn(INPUT)
    assert torch.equal(loaded(batch), model(batch))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_and_memory_format_come_back(tmp_path: Path, dtype):
    model = compressed().to(dtype=dtype, memory_format=torch.channels_last)
    loaded = round_trip(model, build(), build(), tmp_path)
    assert same_state(loaded, model)
    assert loaded.stem.weight.is_contiguous(memory_format=torch.channels_last)


def test_parameters_that_are_frozen_stay_frozen(tmp_path: Path):
    model = compressed()
    model.stem.requires_grad_(False)
    loaded = round_trip(model, build(), build(), tmp_path)
    flags = {name: each.requires_grad for name, each in model.named_parameters()}
    assert {name: each.requires_grad for name, each in loaded.named_parameters()} == flags
    assert not loaded.stem.weight.requires_grad


class Positions(nn.Module):
    """A buffer that is not saved, and one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("table", torch.arange(4.0), persistent=False)
        self.register_buffer("count", torch.tensor(3))


def test_buffers_that_are_not_saved_come_back_where_they_differ(tmp_path: Path):
    model = Positions()
    tensors, description = deploy.describe(model, Positions())
    assert set(tensors) == {"weight", "count"}
    assert description["untouched"] == ["table"]
    slots = (SlotCut("weight", 0, keep(0, 2)), SlotCut("table", 0, keep(0, 2)))
    surgery.apply(model, [Cut("g", 4, 2, slots)])
    loaded = round_trip(model, Positions(), Positions(), tmp_path)
    assert loaded.table.tolist() == [0.0, 2.0]
    assert "table" not in loaded.state_dict()
    assert loaded.count.item() == 3


def test_parametrized_layers_keep_their_parametrization(tmp_path: Path):
    def fresh() -> nn.Module:
        return nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)))

    model = fresh()
    kept = keep(0, 3)
    names = [name for name, _ in model.named_parameters()]
    surgery.apply(model, [Cut("g", 4, 2, tuple(SlotCut(name, 0, kept) for name in names))])
    loaded = round_trip(model, fresh(), fresh(), tmp_path)
    batch = torch.randn(2, 3)
    assert parametrize.is_parametrized(loaded[0])
    assert torch.equal(loaded(batch), model(batch))


def test_marks_on_fresh_parameters_stay(tmp_path: Path):
    model, fresh = compressed(), build()
    fresh.stem.weight.no_decay = True
    assert round_trip(model, fresh, build(), tmp_path).stem.weight.no_decay


def test_a_compressed_model_is_a_reference_for_nothing_but_itself(tmp_path: Path):
    model = compressed()
    loaded = round_trip(model, copy.deepcopy(model), model, tmp_path)
    assert same_state(loaded, model)


# --- refused, with the first difference ----------------------------------------------------------


def other_models() -> list:
    def wider() -> nn.Module:
        model = build()
        model.head[2] = nn.Linear(4, 6)
        return model

    def deeper() -> nn.Module:
        model = build()
        model.blocks.append(copy.deepcopy(model.blocks[0]))
        return model

    def shallower() -> nn.Module:
        model = build()
        del model.blocks[1]
        return model

    def another_layer() -> nn.Module:
        model = build()
        model.stem = nn.Conv1d(3, 4, 3)
        return model

    def with_bias() -> nn.Module:
        model = build()
        model.blocks[1].conv = nn.Conv2d(4, 4, 3, padding=1)
        return model

    def with_buffer() -> nn.Module:
        model = build()
        model.register_buffer("mean", torch.zeros(3))
        return model

    return [
        (wider, r"head\.2\.weight: expected shape \(5, 4\), received shape \(6, 4\)"),
        (deeper, r"blocks\.2: expected nothing, received Block"),
        (shallower, r"blocks\.1: expected Block, received nothing"),
        (another_layer, r"stem: expected torch\.nn\.Conv2d, received torch\.nn\.Conv1d"),
        (with_bias, r"blocks\.1\.conv\.bias: expected nothing"),
        (with_buffer, r"mean: expected nothing, received shape \(3,\)"),
    ]


@pytest.mark.parametrize(("other", "message"), other_models())
def test_another_model_is_refused_by_its_first_difference_and_left_alone(tmp_path, other, message):
    deploy.save(tmp_path, compressed(), build())
    model = other()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RunError, match=message):
        deploy.load_deploy(tmp_path, model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Ours(nn.Module):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs


def test_a_class_that_is_no_plain_layer_is_refused_when_it_is_written(tmp_path: Path):
    model = compressed()
    model.blocks[1].bn = Ours()
    with pytest.raises(RunError, match=r"blocks\.1\.bn is a Ours"):
        deploy.save(tmp_path, model, build())
    assert list(tmp_path.iterdir()) == []


def test_a_patched_forward_is_refused_when_it_is_written():
    model = compressed()
    model.stem.forward = lambda inputs: inputs
    with pytest.raises(RunError, match="stem has a forward function of its own"):
        deploy.describe(model, build())


def test_a_layer_put_in_the_middle_is_refused_when_it_is_written():
    model = nn.Sequential()
    for name in ("0", "new", "1"):
        model.add_module(name, nn.Linear(2, 2))
    with pytest.raises(RunError, match="new was put between"):
        deploy.describe(model, nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "deploy.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "deploy.safetensors").write_bytes(content)


def truncate(folder: Path) -> None:
    content = (folder / "deploy.safetensors").read_bytes()
    (folder / "deploy.safetensors").write_bytes(content[:100])


def remove_tensors(folder: Path) -> None:
    (folder / "deploy.safetensors").unlink()


def described_as(text: str):
    return lambda folder: (folder / "deploy.json").write_text(text)


def described_with(**changes: object):
    """Changes sections of the description; None takes one away."""

    def change(folder: Path) -> None:
        data = json.loads((folder / "deploy.json").read_text()) | changes
        data = {key: value for key, value in data.items() if value is not None}
        (folder / "deploy.json").write_text(json.dumps(data))

    return change


def tensors_from_elsewhere(folder: Path) -> None:
    """A description must not make us read other places of the disk."""
    elsewhere = folder.parent / f"{folder.name}.safetensors"
    elsewhere.write_bytes((folder / "deploy.safetensors").read_bytes())
    described_with(tensors_file=f"../{elsewhere.name}")(folder)


USER_CLASS = {"blocks.0.bn": {"class": "Identity", "arguments": {}}} | {
    "blocks.1.bn": {"class": "Module", "arguments": {}}
}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_bit, "sha256 differs"),
        (truncate, "sha256 differs"),
        (remove_tensors, "are missing"),
        (described_as(""), "can't be used"),
        (described_as("[]"), "not a description"),
        (described_as('{"layers": 3}'), "not in the format"),
        (described_with(version=99), "expected version 1, received version 99"),
        (tensors_from_elsewhere, "are missing"),
        (described_with(modules=USER_CLASS), "Module is not a class that is made from a file"),
        (described_with(aliases=None), "it has no aliases"),
        (described_with(aliases={"a": "b"}), "b, which is not stored"),
        (described_with(attributes={"stem": {"forward": 1}}), "forward"),
    ],
)
def test_a_damaged_file_is_refused_and_the_model_left_alone(tmp_path: Path, damage, message):
    deploy.save(tmp_path, compressed(), build())
    damage(tmp_path)
    model = build()
    with pytest.raises(RunError, match=message):
        deploy.load_deploy(tmp_path, model)
    assert type(model.blocks[0].bn) is nn.BatchNorm2d


def test_a_folder_without_the_file_is_refused(tmp_path: Path):
    with pytest.raises(RunError, match=r"there is no deploy\.json"):
        deploy.load_deploy(tmp_path, build())


def test_loading_without_a_model_is_refused(tmp_path: Path):
    deploy.save(tmp_path, compressed(), build())
    with pytest.raises(RunError, match="no model was given"):
        deploy.load_deploy(tmp_path)
