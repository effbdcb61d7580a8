"""The part of YAML a recipe may use means the same to everyone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimcli.errors import RecipeError
from slimcli.recipe import load
from slimcli.recipe.dump import dump
from slimcli.recipe.nodes import Source, parse, plain


def read(text: str):
    problems: list = []
    node = parse(Source("r.yaml", text), problems)
    assert not problems, problems
    return plain(node) if node else None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("12", 12),
        ("+3", 3),
        ("0", 0),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("y", "y"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("12:30", "12:30"),
        ("1:30:00", "1:30:00"),
        ("1_000", "1_000"),
        ("0x1F", "0x1F"),
        ("2026-01-02", "2026-01-02"),
        ("'12'", "12"),
        ("!!str 12", "12"),
    ],
)
def test_plain_text_is_read_as(text, value):
    found = read(f"key: {text}")["key"]
    assert found == value
    assert type(found) is type(value)


def test_a_learning_rate_of_1e_4_trains_with_1e_4(folder):
    recipe = load(folder.recipe("config: {lr: 1e-4}\n"))
    assert recipe.stages[0].training.lr == 1e-4


def test_an_integer_is_accepted_for_a_number(folder):
    assert load(folder.recipe("config: {lr: 1}\n")).stages[0].training.lr == 1.0


def test_a_byte_order_mark_is_no_part_of_the_recipe(folder):
    path = folder.recipe("config: {epoch: 3}\n")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load(path).stages[0].training.epoch == 3


def test_an_alias_repeats_a_value(folder):
    more = "config: {no_decay: &names [norm, bias], prune_module_names: *names}\n"
    stage = load(folder.recipe(more, algorithm="resrep")).stages[0]
    assert stage.training.no_decay == ("norm", "bias")
    assert stage.keys()["prune_module_names"] == ["norm", "bias"]


@pytest.mark.parametrize(
    ("make", "code", "said"),
    [
        (lambda path: path.mkdir(), "E-RECIPE-FILE", "is a folder"),
        (lambda path: path.write_bytes(b"\x80\x02}q"), "E-RECIPE-ENCODING", "not UTF-8"),
        (lambda path: None, "E-RECIPE-FILE", "no file"),
        (lambda path: path.write_text(""), "E-RECIPE-EMPTY", "is empty"),
        (lambda path: path.write_text("a: \x07"), "E-RECIPE-SYNTAX", "special characters"),
        (lambda path: path.write_text("[" * 5000), "E-RECIPE-ALIASES", "nested deeper"),
    ],
)
def test_what_is_no_recipe_is_told_as_such(folder, make, code, said):
    path = folder.path / "odd.yaml"
    make(path)
    with pytest.raises(RecipeError, match=said) as caught:
        load(path)
    assert caught.value.problems[0].code == code
    assert caught.value.exit_code == 2


@settings(deadline=None, max_examples=150)
@given(st.text())
def test_any_text_is_a_tree_or_a_list_of_problems(text):
    problems: list = []
    node = parse(Source("r.yaml", text), problems)
    assert node is None or isinstance(plain(node), dict | list | str | float | int | None)
    assert all(str(problem) for problem in problems)


words = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | words
    | st.sampled_from(
        ["yes", "012", "1e-4", "12:30", "1_000", "~", "<<", "2026-01-01", "a: b", "#"]
    )
)


values = scalars | st.lists(scalars) | st.lists(st.lists(scalars))


@settings(deadline=None, max_examples=150)
@given(st.dictionaries(words, values))
def test_what_is_written_is_read_back_as_the_same(values):
    assert read(dump(values)) == values
