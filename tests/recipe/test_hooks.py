"""The user's functions: found, imported once, called by the names of their parameters."""

from __future__ import annotations

import functools
import pickle
import sys

import pytest

from slimcli.errors import HookError, Problem, RecipeError, RunError
from slimcli.recipe import load
from slimcli.recipe.binding import bind, call_order
from slimcli.recipe.compressors import load_compressor
from slimcli.recipe.hooks import check_model, import_target, resolve


def test_hooks_take_our_order(folder):
    hooks = resolve(load(folder.recipe()))
    assert hooks.predict_function("m", "d") == ("prediction", "m", "d")
    assert hooks.dataset_generator() == ([1], [2])
    assert hooks.evaluate_function("p", "d") == {"acc": 1.0}
    assert hooks.optimizer_generator is None
    assert hooks.locations["model"] == "my_hooks.py:2"
    assert hooks.files == (folder.path / "my_hooks.py",)


def test_the_command_that_runs_is_no_hook_file(folder, monkeypatch):
    """joblib, which scikit-learn imports, gives the main module a second name."""
    source = folder.path / "my_hooks.py"
    command = folder.path / "bin_slim"
    command.touch()
    lines = "import sys, types\nmain = types.ModuleType('__mp_main__')\n"
    lines += f"main.__file__ = {str(command)!r}\nsys.modules['__mp_main__'] = main\n"
    recipe = folder.recipe()
    source.write_text(source.read_text() + lines)
    monkeypatch.delitem(sys.modules, "__mp_main__", raising=False)
    assert resolve(load(recipe)).files == (source,)
    assert sys.modules.pop("__mp_main__").__file__ == str(command)


@pytest.mark.parametrize(
    "function",
    [
        lambda config, params: ("c" + config, "p" + params),
        lambda params, config: ("c" + config, "p" + params),
        lambda config, parameters: ("c" + config, "p" + parameters),
        lambda a, b: ("c" + a, "p" + b),
        lambda cfg, things: ("c" + cfg, "p" + things),
        lambda params, things: ("c" + things, "p" + params),
        lambda *both: ("c" + both[0], "p" + both[1]),
        lambda *, params, config: ("c" + config, "p" + params),
        lambda params, extra=3, *, config: ("c" + config, "p" + params),
        lambda params, extra=3, config="": ("c" + config, "p" + params),
        functools.partial(lambda x, params, config: ("c" + config, "p" + params), 1),
    ],
)
def test_both_argument_orders_work(function):
    assert bind("optimizer_generator", function)("1", "2") == ("c1", "p2")


@pytest.mark.parametrize(
    ("name", "function", "order"),
    [
        ("scheduler_generator", lambda config, optimizer: None, (0, 1)),
        ("scheduler_generator", lambda optimizer, config: None, (1, 0)),
        ("scheduler_generator", lambda optmizer, config: None, (1, 0)),
        ("evaluate_function", lambda data, prediction: None, (1, 0)),
        ("evaluate_function", lambda outputs, targets: None, (0, 1)),
        ("predict_function", lambda batch, net: None, (1, 0)),
    ],
)
def test_order_of_every_hook(name, function, order):
    assert call_order(name, function, {}).positional == order


async def asynchronous(model, data):
    return model(data)


@pytest.mark.parametrize(
    ("name", "function", "said"),
    [
        ("calculate_loss_function", lambda prediction: None, "takes 1 argument"),
        ("predict_function", lambda model, data, more: None, "takes 3 arguments"),
        ("dataset_generator", lambda root: None, "takes 1 argument"),
        ("evaluate_function", lambda prediction, threshold=0.5: None, "takes 1 argument"),
        ("model", 3, "is the number 3, which cannot be called"),
        ("predict_function", None, "is null, which cannot be called"),
        ("predict_function", asynchronous, "is async, and nothing awaits it"),
    ],
)
def test_a_wrong_signature_is_told_before_anything_is_called(name, function, said):
    with pytest.raises(HookError, match=said) as caught:
        bind(name, function)
    assert caught.value.exit_code == 3


def test_keywords_of_the_recipe_reach_the_function(folder):
    folder.write("keyed.py", "def data(count):\n    return [0] * count, []\n")
    words = ["hooks.dataset_generator.target=keyed.py:data", "hooks.dataset_generator.count=3"]
    hooks = resolve(load(folder.recipe(), words))
    assert hooks.dataset_generator() == ([0, 0, 0], [])


def test_an_object_with_update_and_compute_is_handed_on():
    class Meter:
        def update(self, prediction, data): ...
        def compute(self): ...

    meter = Meter()
    assert bind("evaluate_function", meter) is meter
    assert isinstance(bind("evaluate_function", Meter), Meter)


def test_a_class_with_call_is_constructed_with_its_keywords():
    class Loss:
        def __init__(self, weight):
            self.weight = weight

        def __call__(self, prediction, data):
            return self.weight * prediction

    assert bind("calculate_loss_function", Loss, {"weight": 3})(2, None) == 6


def test_a_module_as_hook_is_bound_by_the_names_of_its_forward():
    from torch import nn

    class Loss(nn.Module):
        def forward(self, data, prediction):
            return ("loss", prediction, data)

    assert bind("calculate_loss_function", Loss)("p", "d") == ("loss", "p", "d")
    with pytest.raises(HookError, match="takes 1 argument"):
        bind("predict_function", nn.ReLU)


def test_a_collate_function_can_travel_to_worker_processes():
    assert pickle.loads(pickle.dumps(bind("collate_fn", len))) is len


def test_an_exception_in_a_hook_shows_only_the_users_lines(folder):
    folder.write(
        "my_hooks.py",
        folder.hooks
        + (
            "\n\ndef inner(data):\n    return data['missing']\n\n\n"
            "def fails(model, data):\n    return inner(data)\n"
        ),
    )
    hooks = resolve(load(folder.recipe(), ["predict_function=my_hooks.py:fails"]))
    with pytest.raises(RunError) as caught:
        hooks.predict_function(None, {})
    assert caught.value.problems[0].what == "hook `predict_function` failed: KeyError: 'missing'"
    assert caught.value.problems[0].where == "my_hooks.py:23"
    assert caught.value.user_frames == (
        "my_hooks.py:27 in fails   return inner(data)",
        "my_hooks.py:23 in inner   return data['missing']",
    )
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_exception_of_slim_passes_a_hook_unchanged():
    error = RecipeError(Problem("E-X", "ours"))

    def hook(model, data):
        raise error

    with pytest.raises(RecipeError) as caught:
        bind("predict_function", hook)(1, 2)
    assert caught.value is error


def test_a_bug_of_slim_below_a_hook_is_not_blamed_on_the_hook():
    from slimcli.recipe.validate import suggest

    with pytest.raises(AttributeError):
        bind("predict_function", lambda model, data: suggest(model, data))(3, [])


def test_a_hook_that_does_not_take_its_arguments_after_all_is_to_blame():
    hook = functools.wraps(lambda model, data: None)(lambda model: None)
    with pytest.raises(RunError, match="TypeError"):
        bind("predict_function", hook)(1, 2)


def test_an_import_error_inside_the_users_module_is_told_as_that(folder):
    folder.write("helper.py", "import package_nobody_has\n")
    folder.write("my_hooks.py", "import helper\n" + folder.hooks)
    with pytest.raises(HookError) as caught:
        resolve(load(folder.recipe()))
    assert len(caught.value.problems) == 1
    assert "No module named 'package_nobody_has'" in caught.value.problems[0].what
    assert caught.value.problems[0].where == "helper.py:1"
    assert caught.value.user_frames[0].startswith("my_hooks.py:1 in <module>")


def test_a_relative_import_beside_the_recipe_is_told_what_to_write(folder):
    folder.write("my_hooks.py", "from .helper import x\n" + folder.hooks)
    with pytest.raises(HookError, match="write `from other import x`"):
        resolve(load(folder.recipe()))


def test_a_module_that_exits_at_import_is_told_as_an_import_error(folder):
    folder.write("my_hooks.py", folder.hooks + "\nraise SystemExit(0)\n")
    with pytest.raises(HookError, match="SystemExit"):
        resolve(load(folder.recipe()))


def test_siblings_and_packages_import_each_other(folder):
    folder.write("pkg/__init__.py", "")
    folder.write("pkg/parts.py", "VALUE = 5\n")
    folder.write("pkg/net.py", "from .parts import VALUE\n\ndef build():\n    return VALUE\n")
    folder.write("sub/part.py", "VALUE = 6\n")
    folder.write("sub/net.py", "import part\n\ndef build():\n    return part.VALUE\n")
    recipe = load(folder.recipe())
    assert import_target(recipe, "pkg/net.py:build")[0]() == 5
    assert import_target(recipe, "pkg.net.build")[0]() == 5
    assert import_target(recipe, "sub/net.py:build")[0]() == 6


def test_a_file_is_imported_once_for_all_its_hooks(folder):
    folder.write(
        "my_hooks.py",
        "import builtins\nbuiltins.times = getattr(builtins, 'times', 0) + 1\n" + folder.hooks,
    )
    import builtins

    resolve(load(folder.recipe()))
    times = builtins.times
    del builtins.times
    assert times == 1


def test_another_folder_may_have_hooks_of_the_same_name(folder, tmp_path):
    resolve(load(folder.recipe()))
    other = tmp_path / "other"
    text = folder.hooks.replace('"acc": 1.0', '"acc": 2.0')
    folder.write("other/my_hooks.py", text)
    folder.write("other/recipe.yaml", folder.recipe().read_text())
    hooks = resolve(load(other / "recipe.yaml"))
    assert hooks.evaluate_function(0, 0) == {"acc": 2.0}


def test_a_hook_file_called_like_an_installed_module_does_not_replace_it(folder):
    import yaml

    folder.write("yaml.py", "def build():\n    return 1\n")
    recipe = load(folder.recipe(), ["model=yaml.py:build"])
    resolve(recipe)
    assert sys.modules["yaml"] is yaml


def test_a_file_that_hides_the_standard_library_is_warned_of(folder):
    folder.write("queue.py", "")
    warnings = resolve(load(folder.recipe())).warnings
    assert warnings == ("queue.py hides the standard library's module queue: rename it",)


def test_code_folders_are_searched(folder):
    folder.write("lib/far.py", "def build_model():\n    return 4\n")
    recipe = load(folder.recipe("code: [lib]\n"), ["model=far.build_model"])
    assert resolve(recipe).locations["model"] == "lib/far.py:1"


def test_a_model_that_is_a_class_or_nothing_is_refused():
    from torch import nn

    with pytest.raises(HookError, match="received the class Linear") as caught:
        check_model(nn.Linear)
    assert caught.value.problems[0].code == "E-HOOK-MODEL"
    with pytest.raises(HookError, match="received None"):
        check_model(None)
    linear = nn.Linear(1, 1)
    assert check_model(linear) is linear


def test_a_model_hook_may_be_a_class_but_must_not_return_one(folder):
    from torch import nn

    folder.write(
        "net.py",
        "from torch import nn\n\nclass Net(nn.Module):\n    pass\n\ndef build():\n    return Net\n",
    )
    path = folder.recipe()
    assert isinstance(resolve(load(path, ["model=net.py:Net"])).build_model(), nn.Module)
    with pytest.raises(HookError, match="received the class Net"):
        resolve(load(path, ["model=net.py:build"])).build_model()


MINE = """
from pydantic import Field
from slimcli.compressor import AlgorithmConfig, AlgorithmInfo, Compressor


class MineConfig(AlgorithmConfig):
    strength: float = Field(1.0, gt=0)


class Mine(Compressor):
    info = AlgorithmInfo(
        name="mine", summary="", paper="", config=MineConfig, compressor="mine:Mine", solver="",
        training_defaults={"lr": 0.5},
    )


class Other:
    pass
"""


def test_keys_of_a_users_class_are_checked_when_it_is_imported(folder):
    folder.write("mine.py", MINE)
    recipe = load(folder.recipe("config: {strength: 3}\n", algorithm="mine.py:Mine"))
    cls, stage = load_compressor(recipe, recipe.stages[0])
    assert cls.__name__ == "Mine"
    assert stage.config.strength == 3.0
    assert stage.training.lr == 0.5

    recipe = load(folder.recipe("config: {strenght: 3, strength: -1}\n", algorithm="mine.Mine"))
    with pytest.raises(RecipeError) as caught:
        load_compressor(recipe, recipe.stages[0])
    assert [each.code for each in caught.value.problems] == [
        "E-RECIPE-UNKNOWN-KEY",
        "E-RECIPE-RANGE",
    ]
    assert caught.value.problems[1].where.endswith("recipe.yaml:8:33")


def test_a_users_class_that_is_no_compressor_is_refused(folder):
    folder.write("mine.py", MINE)
    recipe = load(folder.recipe(algorithm="mine.Other"))
    with pytest.raises(HookError, match="not a subclass"):
        load_compressor(recipe, recipe.stages[0])


def test_a_hook_file_that_is_gone_is_one_problem_with_all_hooks_that_want_it(folder):
    path = folder.recipe()
    (folder.path / "my_hooks.py").unlink()
    with pytest.raises(RecipeError) as caught:
        load(path)
    (problem,) = caught.value.problems
    assert problem.what.startswith("model, hooks.dataset_generator, hooks.predict_function")
    assert problem.what.endswith("no file my_hooks.py")
    folder.write("code/my_hooks.py", "")  # where a run folder keeps its copy
    with pytest.raises(RecipeError, match=r"a copy is code/my_hooks\.py"):
        load(path)


def test_a_hook_file_that_fails_to_import_is_one_problem(folder):
    folder.write("my_hooks.py", folder.hooks + "\nimport no_such_package\n")
    with pytest.raises(HookError) as caught:
        resolve(load(folder.recipe()))
    assert [each.code for each in caught.value.problems] == ["E-HOOK-IMPORT"]
