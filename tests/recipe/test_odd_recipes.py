"""Whatever stands in a recipe, the answer is a recipe or a list of problems, never a traceback."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slimcli.compressor import registry
from slimcli.errors import RecipeError
from slimcli.recipe import Recipe, keys, load
from slimcli.recipe.dump import dump

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 400)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["auto", "cpu", "max", "a.py:f", "a.b", "torchslim.x.Y", *registry()]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["target", "name", "config", "algorithm", "x"]), inner)
    ),
    max_leaves=5,
)
config_keys = [
    *keys.TRAINING_KEYS,
    *(key for info in registry().values() for key in info.config.model_fields),
    "group_size",
    "nonsense",
]
recipes = st.dictionaries(
    st.sampled_from([*keys.TOP_KEYS, "nonsense"]), values, max_size=5
) | st.builds(
    lambda algorithm, config: {"algorithm": algorithm, "model": "a.py:f", "config": config},
    st.sampled_from(list(registry())),
    st.dictionaries(st.sampled_from(config_keys), values, max_size=4),
)
words_for_keys = [
    *("epoch", "config.lr", "config.", "algorithm", "model", "model.w", "hooks.a", "export"),
    *("stages.0.config.lr", "stages.x", "stages.0.name", "stages.0.algorithm", "a.b.c", "."),
]
overrides = st.lists(
    st.builds(
        lambda key, value: f"{key}={value}",
        st.sampled_from(words_for_keys),
        st.sampled_from(["1", "[1", "{a: b}", "x", "1,2", "null", "012", "'"]),
    )
    | st.text(max_size=8),
    max_size=3,
)


def outcome(path, words):
    """The recipe, or the error that lists the problems."""
    try:
        return load(path, words, find_hooks=False)
    except RecipeError as error:
        return error


@settings(
    deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(recipes, overrides)
def test_any_values_and_words_give_a_recipe_or_problems(folder, content, words):
    found = outcome(folder.write("odd.yaml", dump(content)), words)
    assert isinstance(found, Recipe) or all(str(problem) for problem in found.problems)


@pytest.mark.parametrize("words", [["="], ["=1"], ["a="], ["."], ["-"], ["--"], [".=1"], [" =1"]])
def test_words_that_are_hardly_anything_are_told_as_such(folder, words):
    with pytest.raises(RecipeError):
        load(folder.recipe(), words)
