"""What a recipe may be called by, what it resolves to, and that it loads again as the same."""

from __future__ import annotations

import pytest

from slimcli.compressor import registry
from slimcli.errors import RecipeError
from slimcli.recipe import load
from slimcli.recipe.keys import TRAINING_KEYS

STAGES = """
task_name: both
config: {batch_size: 16}
stages:
  - {name: base, algorithm: finetune, config: {epoch: 2, devices: [0, 1]}}
  - {algorithm: resrep, config: {epoch: 3, lr: 1e-5, group_size: 4, prune_module_names: [a, b]}}
export: {onnx: false}
"""
ALIASES = [(alias, info.name) for info in registry().values() for alias in info.aliases]
KEY_ALIASES = [
    (info.name, alias, name)
    for info in registry().values()
    for alias, name in info.key_aliases.items()
]


def test_defaults_are_those_of_the_loop_and_the_file_names_the_task(folder):
    recipe = load(folder.recipe())
    assert recipe.task_name == "recipe"
    assert [stage.name for stage in recipe.stages] == ["1-finetune"]
    assert recipe.stages[0].training.epoch == 360
    assert recipe.changes == ()


@pytest.mark.parametrize(("alias", "name"), ALIASES)
def test_class_paths_are_accepted_as_algorithm(folder, alias, name):
    needed = "config: {cluster_percent: 0.25}\n" if name == "csgd" else ""
    assert load(folder.recipe(needed, algorithm=alias)).stages[0].algorithm.name == name


@pytest.mark.parametrize(("algorithm", "alias", "name"), KEY_ALIASES)
def test_other_spellings_of_a_key_are_the_key(folder, algorithm, alias, name):
    default = registry()[algorithm].config.model_fields[name].get_default()
    recipe = load(folder.recipe(f"config: {{{alias}: {default}}}\n", algorithm=algorithm))
    assert getattr(recipe.stages[0].config, name) == default


@pytest.mark.parametrize("spelling", ["schduler_generator", "scheduler_generator"])
def test_both_spellings_of_the_scheduler_hook_are_accepted(folder, spelling):
    recipe = load(folder.recipe(f"  {spelling}: my_hooks.py:predict_function\n"))
    assert recipe.hooks["scheduler_generator"].target == "my_hooks.py:predict_function"


def test_an_algorithm_may_have_its_own_default_for_a_key_of_the_loop(folder):
    lr = {info.name: info.training_defaults.get("lr", 0.1) for info in registry().values()}
    assert load(folder.recipe(algorithm="qat")).stages[0].training.lr == lr["qat"]
    assert load(folder.recipe("config: {lr: 0.3}\n", "qat")).stages[0].training.lr == 0.3


@pytest.mark.parametrize("more", [None, "config: {lr: 1e-5, devices: [0]}\ncode: .\n"])
def test_the_resolved_recipe_loads_again_as_the_same(folder, more):
    path = folder.staged(STAGES) if more is None else folder.recipe(more, algorithm="resrep")
    first = load(path)
    again = load(folder.write("again.yaml", first.to_yaml()))
    assert again.stages == first.stages
    assert (again.model, again.hooks, again.export) == (first.model, first.hooks, first.export)
    assert again.code == first.code
    assert {**again.resolved(), "task_name": first.task_name} == first.resolved()


def test_the_resolved_recipe_is_complete(folder):
    keys = load(folder.recipe(algorithm="resrep")).resolved()["config"]
    assert len(keys) == len(registry()["resrep"].config.model_fields) + len(TRAINING_KEYS)
    assert keys["epoch"] == 360


def test_the_resolved_recipe_leads_to_the_same_files_from_a_run_folder(folder, monkeypatch):
    folder.write("lib/helper.py", "def collate(samples):\n    return samples\n")
    more = "  collate_fn: helper.collate\ncode: lib\n"
    first = load(folder.recipe(more))
    run = folder.path / "checkpoints" / "task" / "1"
    text = first.to_yaml(run)
    moved = folder.write("checkpoints/task/1/recipe.yaml", text)
    monkeypatch.chdir(run)
    again = load(moved)
    assert again.stages == first.stages
    assert again.hooks["collate_fn"].target == "helper.collate"
    assert again.model.target == str(folder.path / "my_hooks.py:build_model")


def test_keys_of_a_users_class_are_left_alone_until_hooks_are_imported(folder):
    folder.write("mine.py", "class Mine:\n    pass\n")
    recipe = load(folder.recipe("config: {strength: 3, epoch: 2}\n", algorithm="mine.Mine"))
    assert recipe.stages[0].config == {"strength": 3}
    assert recipe.stages[0].training.epoch == 2
    assert recipe.stages[0].name == "1-mine"


def test_hook_files_can_be_left_unchecked(folder):
    path = folder.recipe()
    (folder.path / "my_hooks.py").unlink()
    with pytest.raises(RecipeError):
        load(path)
    assert load(path, find_hooks=False).model.target == "my_hooks.py:build_model"


def test_hooks_are_found_beside_the_recipe_before_the_current_folder(folder, monkeypatch):
    path = folder.recipe()
    elsewhere = folder.path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "my_hooks.py").write_text("")
    monkeypatch.chdir(elsewhere)
    assert load(path).folder == folder.path


def test_names_a_file_may_define_in_odd_ways_are_believed(folder):
    folder.write(
        "odd.py", "if True:\n    def build_a(): pass\ntry:\n    build_b = 3\nfinally:\n    pass\n"
    )
    folder.write("open.py", "from somewhere import *\n")
    for target in ("odd.py:build_a", "odd.py:build_b", "open.py:anything"):
        assert load(folder.recipe(), [f"model={target}"]).model.target == target


def test_a_value_that_is_the_default_in_another_spelling_is_no_change(folder):
    (change,) = load(folder.recipe(), ["precision=32", "epoch=7"]).changes
    assert change.key == "config.epoch"


def test_a_task_name_that_no_folder_can_have_is_refused(folder):
    with pytest.raises(RecipeError, match="at most 255 bytes, received 300 bytes"):
        load(folder.recipe(), ["task_name=" + "n" * 300])


def test_a_fraction_of_more_than_one_is_taken_for_percent_only_where_it_may_be(folder):
    def fix(value):
        with pytest.raises(RecipeError) as caught:
            load(folder.recipe(), ["algorithm=resrep", f"prune_rate={value}"])
        return caught.value.problems[0].fix

    assert fix(50) == "write 0.5 for 50 %"
    assert fix(1.5) == ""
