"""``slim inspect``: the table of coupled groups, and that nothing else happens."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from slimcli.cli import main
from tests.solver import project

NETWORK = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.inner = nn.Conv2d(8, 6, 3, padding=1)
        self.outer = nn.Conv2d(6, 8, 1)
        self.tail = nn.Conv2d(8, 10, 1)
        self.fc = nn.Linear(10, 3)
    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.outer(torch.relu(self.inner(x))))
        x = torch.sigmoid(self.tail(x))
        return self.fc(x.mean((2, 3)))
"""
ONE_LAYER = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(36, 3)
    def forward(self, x):
        return self.fc(x.flatten(1))
"""
FIXED_SIZE = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc = nn.Linear(64, 3)
    def forward(self, x):
        x = torch.relu(self.conv(x))
        return self.fc(x.view(len(x), 64))
"""
ASKS_FOR_ITS_WIDTH = NETWORK.replace(
    "torch.sigmoid(self.tail(x))", "torch.sigmoid(-y if (y := self.tail(x)).shape[1] > 4 else y)"
)
RECIPE = project.RECIPE.replace("algorithm: finetune", "algorithm: resrep").replace(
    "lr: 0.1,",
    "lr: 0.1, auto_find_module_strategy: all_bn, min_channels: 2, warmup_epoch: 0, "
    "prune_rate: 0.2,",
)
PIXELS = 36


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    return tmp_path


def with_network(here: Path, network: str, recipe: str = project.RECIPE) -> Path:
    before, _, rest = project.HOOKS.partition("class Net")
    after = rest[rest.index("def build_model") :]
    return project.write(here, hooks=f"{before}{network}\n{after}", recipe=recipe)


def slim(*words: str) -> int:
    """The exit code of a command run in this process."""
    with pytest.raises(SystemExit) as caught:
        main.main(list(words))
    return int(caught.value.code or 0)


def inspected(*words: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert slim("inspect", "recipe.yaml", *words, "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_coupled_layers_are_one_group(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_network(here, NETWORK)
    groups = {each["name"]: each for each in inspected(capsys=capsys)["groups"]}
    assert list(groups) == ["stem", "inner", "tail", "fc"]
    assert groups["stem"]["producers"] == ["stem", "outer"]
    assert groups["stem"]["consumers"] == ["inner", "tail"]
    assert groups["stem"]["strategies"] == ["all_bn", "all_conv"]
    assert groups["inner"]["strategies"] == ["linear_bn", "all_bn", "linear_conv", "all_conv"]


def test_a_channel_costs_what_making_and_reading_it_costs(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_network(here, NETWORK)
    groups = {each["name"]: each for each in inspected(capsys=capsys)["groups"]}
    made, read = 8 * 9 * PIXELS, 8 * PIXELS  # by a 3x3 conv over 8 channels; by a 1x1 conv to 8
    assert groups["inner"]["macs_per_channel"] == made + read


def test_a_channel_that_becomes_a_constant_names_who_takes_it_up(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_network(here, NETWORK)
    groups = {each["name"]: each for each in inspected(capsys=capsys)["groups"]}
    assert groups["tail"]["constants"] == ["fc"]  # sigmoid(0) is 0.5
    assert groups["inner"]["constants"] == []


def test_an_output_is_frozen_and_selected_by_nobody(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_network(here, NETWORK)
    (output,) = [each for each in inspected(capsys=capsys)["groups"] if each["name"] == "fc"]
    assert output["is_prunable"] is False
    assert output["frozen_reason"] == "it is an output of the model"
    assert output["strategies"] == []
    assert output["is_zero_removal_exact"] is False


def test_a_frozen_group_names_the_line_of_the_user(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_network(here, FIXED_SIZE)
    assert slim("inspect", "recipe.yaml") == 0
    line = (
        (here / "hooks.py")
        .read_text()
        .splitlines()
        .index("        return self.fc(x.view(len(x), 64))")
    )
    out = capsys.readouterr().out
    assert f"hooks.py:{line + 1}" in out
    assert "nothing can be pruned in this model" in out


def test_a_model_without_anything_to_prune_is_no_error(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_network(here, ONE_LAYER)
    assert slim("inspect", "recipe.yaml") == 0
    out = capsys.readouterr().out
    assert "nothing can be pruned in this model" in out
    assert "it is an output of the model" in out


def test_channels_that_must_stay_because_the_code_asks_for_the_width_are_told_and_kept(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_network(here, ASKS_FOR_ITS_WIDTH, RECIPE)
    groups = {each["name"]: each for each in inspected(capsys=capsys)["groups"]}
    assert {name: each["channels_least"] for name, each in groups.items()} == {
        **{"stem": 1, "inner": 1, "tail": 5, "fc": 1}
    }
    assert slim("inspect", "recipe.yaml") == 0
    assert "tail: 5 channels must stay: your code asks for the width" in capsys.readouterr().out


@pytest.mark.parametrize("algorithm", ["resrep", "csgd"])
def test_no_plan_goes_below_what_must_stay(
    here: Path, capsys: pytest.CaptureFixture[str], algorithm: str
) -> None:
    recipe = RECIPE.replace("algorithm: resrep", f"algorithm: {algorithm}")
    recipe = recipe.replace("all_bn", "all_conv").replace("min_channels: 2, ", "min_channels: 1, ")
    if algorithm == "csgd":
        recipe = recipe.replace(" warmup_epoch: 0,", "")
        recipe = recipe.replace("prune_rate: 0.2", "cluster_percent: 0.9")
    with_network(here, ASKS_FOR_ITS_WIDTH, recipe)
    layers = inspected("--picture", "layers.svg", capsys=capsys)["layers"]
    fewest = {each["name"]: each["channels_minimum"] for each in layers}
    assert fewest["tail"] == 5
    assert fewest["inner"] < 5


def test_the_fields_of_the_document_are_fixed(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_network(here, NETWORK)
    document = inspected(capsys=capsys)
    assert list(document) == ["version", "macs", "params", "groups", "layers", "notes"]
    assert document["version"] == 1
    assert list(document["groups"][0]) == [
        *("name", "channels", "producers", "followers", "consumers", "macs_per_channel"),
        *("is_prunable", "frozen_reason", "strategies", "is_zero_removal_exact"),
        *("zero_reason", "is_duplicate_merging_exact", "duplicate_reason", "constants"),
        "channels_least",
    ]
    assert list(document["layers"][0]) == [
        *("name", "type", "channels", "macs", "group", "frozen_reason"),
        *("channels_minimum", "macs_minimum"),
    ]
    assert sum(each["macs"] for each in document["layers"]) == document["macs"]


def test_a_model_that_cannot_be_copied_is_the_users_error(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    linear = "self.fc = nn.Linear(36, 3)"
    pruned = ONE_LAYER.replace(
        linear, f"{linear}\n        prune.random_unstructured(self.fc, 'weight', 0.5)"
    )
    with_network(here, f"from torch.nn.utils import prune\n{pruned}")
    assert slim("inspect", "recipe.yaml") == 3
    told = capsys.readouterr().err
    assert "`model` returned a model that can't be copied" in told
    assert "prune.remove" in told


@pytest.mark.parametrize(
    ("key", "code"),
    [
        ("prune_module_names: [inner2]", "E-STRUCTURE-NAME"),
        ("prune_module_names: [stem]", "E-STRUCTURE-COUPLED"),
        ("prune_module_names: [fc]", "E-STRUCTURE-FROZEN"),
        ("skip: [nobody]", "E-RECIPE-SKIP"),
        ("prune_ratios: {nobody: 0.5}", "E-RECIPE-PRUNE-RATIOS"),
        ("prune_rate: 0.99", "E-PLAN-REFUSED"),
    ],
)
def test_a_key_that_does_not_fit_the_model_is_told_with_its_place(
    here: Path, capsys: pytest.CaptureFixture[str], key: str, code: str
) -> None:
    recipe = RECIPE.replace("prune_rate: 0.2,", "").replace("all_bn,", f"all_conv, {key},")
    path = with_network(here, NETWORK, recipe)
    lines = path.read_text().splitlines() if path.is_file() else recipe.splitlines()
    number, line = next((n, text) for n, text in enumerate(lines, 1) if key in text)
    column = line.index(key) + key.index(": ") + 3
    assert slim("plan", "recipe.yaml") in (2, 4)
    told = capsys.readouterr().err
    assert f"recipe.yaml:{number}:{column}  " in told
    assert code in told


def test_nothing_is_written(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_network(here, NETWORK)
    before = {each for each in here.rglob("*") if "__pycache__" not in each.parts}
    inspected(capsys=capsys)
    assert {each for each in here.rglob("*") if "__pycache__" not in each.parts} == before


def test_the_picture_knows_the_fewest_channels_of_the_plan(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_network(here, NETWORK, RECIPE)
    document = inspected("--picture", "layers.svg", capsys=capsys)
    layers = {each["name"]: each for each in document["layers"]}
    assert layers["inner"]["channels_minimum"] == 2
    assert layers["inner"]["macs_minimum"] == 2 * 2 * 9 * PIXELS
    assert layers["fc"]["channels_minimum"] == 3
    assert ElementTree.parse(here / "layers.svg").getroot().tag.endswith("svg")
    assert slim("inspect", "recipe.yaml", "--picture", "layers.png") == 0
    assert (here / "layers.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_another_kind_is_refused(here: Path) -> None:
    with_network(here, NETWORK)
    assert slim("inspect", "recipe.yaml", "--picture", "layers.gif") == 2
    assert not (here / "layers.gif").exists()
