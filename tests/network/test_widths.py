"""Patterns of layer names and what they say about widths."""

from __future__ import annotations

import pytest

from slimcli.errors import RecipeError
from slimcli.network.structure import Group, Site
from slimcli.network.widths import kept, ratios_of, reasons_by_name, skipped


def group(name: str, *sites: Site, reason: str = "") -> Group:
    return Group(name, 8, (), (), (), sites or (Site(name),), frozen_reason=reason)


COUPLED = group("layer1.bn2", Site("layer1.conv2", "layer1.bn2"), Site("layer1.down", None))
INNER = group("layer1.bn1", Site("layer1.conv1", "layer1.bn1"))
HEAD = group("fc", reason="it is an output of the model")


@pytest.mark.parametrize(
    ("size", "fraction", "minimum", "round_to", "stays"),
    [
        (64, 0.25, 1, 1, 48),
        (100, 0.29, 1, 1, 71),
        (3, 0.99, 1, 1, 1),
        (16, 0.9, 8, 1, 8),
        (4, 0.9, 8, 1, 4),
        (64, 0.3, 1, 8, 48),
        (64, 0.99, 9, 8, 16),
        (20, 0.5, 1, 16, 16),
        (20, 0.1, 1, 16, 20),
        (8, 1.0, 1, 1, 1),
    ],
)
def test_the_fraction_is_what_is_removed(
    size: int, fraction: float, minimum: int, round_to: int, stays: int
) -> None:
    assert kept(size, fraction, minimum, round_to) == stays


@pytest.mark.parametrize(
    "pattern", ["layer1.bn2", "self.layer1.bn2", "*.conv2", "layer1.dow?", "layer1.*2"]
)
def test_a_pattern_means_a_group_by_any_of_its_layers(pattern: str) -> None:
    assert ratios_of({pattern: 0.5}, [INNER, COUPLED], {}) == {"layer1.bn2": 0.5}
    assert skipped([pattern], [INNER, COUPLED]) == {"layer1.bn2"}


def test_a_pattern_that_fits_nothing_gets_the_nearest_names() -> None:
    with pytest.raises(RecipeError) as caught:
        ratios_of({"layer1.cnv1": 0.5, "other": 0.5}, [INNER, COUPLED], {})
    first, second = caught.value.problems
    assert first.received == "layer1.cnv1"
    assert first.fix.startswith("did you mean layer1.conv1")
    assert second.fix == "slim inspect RECIPE lists the layers"
    with pytest.raises(RecipeError, match=r"no layer that would be pruned is called layer1\.cnv1"):
        skipped(["layer1.cnv1"], [INNER, COUPLED])


def test_a_pattern_that_fits_only_what_is_not_pruned_gets_the_reasons() -> None:
    others = reasons_by_name([HEAD, COUPLED], {"layer1.bn2": "left alone by skip"})
    with pytest.raises(RecipeError, match="fc: it is an output of the model"):
        ratios_of({"f*": 0.5}, [INNER], others)
    with pytest.raises(RecipeError, match=r"layer1.down: left alone by skip"):
        ratios_of({"layer1.down": 0.5}, [INNER], others)


def test_two_patterns_for_one_group_must_say_the_same() -> None:
    equal = {"layer1.*": 0.5, "layer1.bn1": 0.5}
    assert ratios_of(equal, [INNER, COUPLED], {}) == {"layer1.bn2": 0.5, "layer1.bn1": 0.5}
    coupled = {"layer1.conv2": 0.5, "layer1.down": 0.25}
    with pytest.raises(RecipeError, match=r"layer1.conv2: 0.5, layer1.down: 0.25"):
        ratios_of(coupled, [INNER, COUPLED], {})


def test_everything_may_be_skipped_where_there_is_nothing() -> None:
    assert skipped(["*"], []) == set()
    assert skipped(["*"], [INNER, COUPLED]) == {"layer1.bn1", "layer1.bn2"}
