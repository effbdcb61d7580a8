"""Flips, rolls, turns, triangles, diagonals: along the image they pass, among channels rarely."""

from __future__ import annotations

import pytest
import torch

from .paired import Case, check_case

ONE = {"a": 16}
ROLLED = "channels are rolled at "
DIAGONAL = "a diagonal over channels at "
CASES = {
    "flipped": Case(lambda x, _: x.flip(2, 3), ONE),
    "channels flipped": Case(lambda x, _: x.flip(1), ONE),
    "rolled": Case(lambda x, _: x.roll((3, -2), (2, 3)), ONE),
    "channels rolled": Case(lambda x, _: x.roll(1, 1), frozen={"a": ROLLED}),
    "channels rolled back": Case(lambda x, _: x.roll(-3, 1).sigmoid(), frozen={"a": ROLLED}),
    "rolled as one row": Case(lambda x, _: x.roll(1), frozen={"a": ROLLED}),
    "turned": Case(lambda x, _: torch.rot90(x, 1, (2, 3)), ONE),
    "turned round": Case(lambda x, _: torch.rot90(torch.sigmoid(x), 2, (2, 3)), {}, ("a",)),
    "channels turned": Case(
        lambda x, _: torch.rot90(x, 1, (1, 2)), frozen={"a": "channels are turned at "}
    ),
    "lower triangle": Case(lambda x, _: x.tril(-1), ONE),
    "upper triangle": Case(lambda x, _: x.triu(), ONE),
    "triangle of one number": Case(lambda x, _: torch.sigmoid(x).tril(), merge=("a",)),
    "triangle among channels": Case(
        lambda x, _: x.transpose(1, 2).tril().transpose(1, 2),
        frozen={"a": "tril along channels at "},
    ),
    "diagonal": Case(lambda x, _: x * x.diagonal(1, 2, 3).mean(-1)[..., None, None], ONE),
    "diagonal put in place": Case(lambda x, _: torch.diag_embed(x[..., 0]), ONE),
    "diagonal put apart": Case(
        lambda x, _: torch.diag_embed(x[..., 0], 0, -2, 1).permute(0, 3, 1, 2), ONE
    ),
    "diagonal of channels and pixels": Case(
        lambda x, _: x * x.diagonal(0, 1, 2).mean(-1)[:, None, None],
        frozen={"a": DIAGONAL},
    ),
    "channels along a diagonal": Case(
        lambda x, _: torch.diag_embed(x.mean((2, 3)))[:, None] * x, frozen={"a": DIAGONAL}
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_group_is_cut_through_a_turn_exactly_where_the_table_says(name: str) -> None:
    check_case(CASES[name])
