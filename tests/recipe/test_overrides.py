"""``key=value`` on the command line does what the same line in the recipe does."""

from __future__ import annotations

import pytest

from slimcli.errors import RecipeError
from slimcli.recipe import load

STAGES = """
stages:
  - {algorithm: finetune, config: {epoch: 2}}
  - {name: prune, algorithm: resrep, config: {prune_rate: 0.3}}
"""


def training(path, *words):
    return load(path, words).stages[0].training


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("config.epoch=3", "epoch", 3),
        ("epoch=3", "epoch", 3),
        ("lr=1e-4", "lr", 1e-4),
        ("devices=0,1", "devices", (0, 1)),
        ("devices=[0,1]", "devices", (0, 1)),
        ("devices=1,", "devices", (1,)),
        ("devices=[]", "devices", ()),
        ("devices=cpu", "devices", "cpu"),
        ("no_decay=norm,bias", "no_decay", ("norm", "bias")),
        ("input_shapes=[[3,32,32]]", "input_shapes", ((3, 32, 32),)),
        ("gradient_clip=null", "gradient_clip", None),
        ("compile=true", "compile", True),
        ("precision=32", "precision", "32"),
        ("save_dir=a=b", "save_dir", "a=b"),
    ],
)
def test_value_arrives(folder, word, key, value):
    assert getattr(training(folder.recipe(), word), key) == value


def test_the_command_line_wins_over_the_recipe_and_is_named_as_origin(folder):
    recipe = load(folder.recipe("config: {epoch: 7, lr: 0.5}\n"), ["epoch=3"])
    assert recipe.stages[0].training.epoch == 3
    origins = {
        change.key: (change.default, change.value, change.origin) for change in recipe.changes
    }
    assert origins["config.epoch"] == (360, 3, "command line")
    assert origins["config.lr"][2].endswith("recipe.yaml:8")


def test_the_default_given_again_is_no_change(folder):
    assert load(folder.recipe("config: {lr: 0.1}\n")).changes == ()


def test_an_alias_in_the_recipe_gives_way_to_the_proper_name(folder):
    path = folder.recipe("config: {group_size: 4}\n", algorithm="resrep")
    assert load(path, ["groups_size=2"]).stages[0].config.groups_size == 2
    assert load(path, ["config.group_size=2"]).stages[0].config.groups_size == 2


def test_the_algorithm_can_be_changed(folder):
    recipe = load(folder.recipe(), ["algorithm=resrep", "prune_rate=0.25"])
    assert recipe.stages[0].algorithm.name == "resrep"
    assert recipe.stages[0].config.prune_rate == 0.25


def test_keywords_of_a_hook_can_be_set(folder):
    recipe = load(folder.recipe(), ["model.width=4", "hooks.collate_fn=my_hooks.py:build_model"])
    assert recipe.model.target == "my_hooks.py:build_model"
    assert recipe.model.keywords == {"width": 4}
    assert recipe.hooks["collate_fn"].target == "my_hooks.py:build_model"


def test_export_and_hooks_can_be_named_short(folder):
    recipe = load(folder.recipe(), ["onnx=false", "evaluate_function=my_hooks.py:build_model"])
    assert recipe.export.onnx is False
    assert recipe.hooks["evaluate_function"].target == "my_hooks.py:build_model"


@pytest.mark.parametrize("which", ["1", "prune"])
def test_a_stage_is_named_by_number_or_name(folder, which):
    recipe = load(folder.staged(STAGES), [f"stages.{which}.config.lr=0.5"])
    assert [stage.training.lr for stage in recipe.stages] == [0.1, 0.5]


def test_a_stage_without_a_name_has_number_and_algorithm(folder):
    recipe = load(folder.staged(STAGES), ["stages.1-finetune.config.lr=0.5"])
    assert [stage.name for stage in recipe.stages] == ["1-finetune", "prune"]
    assert [stage.training.lr for stage in recipe.stages] == [0.5, 0.1]


def test_a_bare_key_of_the_loop_goes_to_all_stages_if_none_sets_it(folder):
    recipe = load(folder.staged(STAGES), ["batch_size=4"])
    assert [stage.training.batch_size for stage in recipe.stages] == [4, 4]


def test_a_bare_key_of_one_stage_goes_to_that_stage(folder):
    assert load(folder.staged(STAGES), ["prune_rate=0.2"]).stages[1].config.prune_rate == 0.2


@pytest.mark.parametrize("word", ["epoch=5", "algorithm=csgd", "stages.7.config.lr=1"])
def test_what_could_mean_two_stages_or_none_is_refused(folder, word):
    with pytest.raises(RecipeError) as caught:
        load(folder.staged(STAGES), [word])
    assert "stages.1-finetune" in caught.value.problems[0].fix


def test_stage_config_wins_over_the_shared_one(folder):
    recipe = load(folder.staged(STAGES + "config: {epoch: 9}\n"))
    assert [stage.training.epoch for stage in recipe.stages] == [2, 9]


def test_all_problems_of_the_command_line_are_told_with_those_of_the_file(folder):
    path = folder.recipe("config: {epocs: 3, lr: fast}\n")
    with pytest.raises(RecipeError) as caught:
        load(path, ["momentum=2", "nope=1", "--lr=1", "x="])
    codes = sorted(each.code for each in caught.value.problems)
    assert codes == [
        "E-OVERRIDE-EMPTY",
        "E-OVERRIDE-SYNTAX",
        "E-RECIPE-RANGE",
        "E-RECIPE-TYPE",
        "E-RECIPE-UNKNOWN-KEY",
        "E-RECIPE-UNKNOWN-KEY",
    ]
