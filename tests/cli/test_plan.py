"""What ``slim plan`` says of algorithms that cut channels, change layers, or do neither."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimcli.cli import main
from tests.solver import project


def planned(folder: Path, capsys: pytest.CaptureFixture[str], config: str, *words: str) -> str:
    """What the command prints for the toy project with another algorithm, possible or not."""
    project.write(folder)
    (folder / "recipe.yaml").write_text(project.RECIPE.replace("algorithm: finetune", config))
    with pytest.raises(SystemExit):
        main.main(["plan", str(folder / "recipe.yaml"), *words])
    return capsys.readouterr().out


def lines(text: str, word: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip().startswith(word)]


def test_where_layers_change_but_no_channel_goes_nothing_is_said_of_cutting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = planned(tmp_path, capsys, "algorithm: qat", "skip=[first]")
    assert lines(text, "layers") == ["layers     2: 1 target, 1 left out"]
    assert lines(text, "left out") == ["  left out conv: skip: first"]
    assert "cut" not in text
    assert "frozen" not in text
    whole = planned(tmp_path, capsys, "algorithm: qat")
    assert lines(whole, "layers") == ["layers     2: 2 targets"]


def test_the_table_has_a_column_of_least_widths_only_where_channels_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = planned(tmp_path, capsys, "algorithm: qat", "skip=[first]", "--layers")
    assert "left out because" in text
    assert "at least" not in text
    cut = planned(tmp_path, capsys, "algorithm: csgd", "cluster_percent=0.5", "--layers")
    assert "at least" in cut


def test_where_channels_go_the_plan_counts_what_can_be_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = planned(tmp_path, capsys, "algorithm: csgd", "cluster_percent=0.5")
    assert lines(text, "layers") == ["layers     2: 1 can be cut, 1 frozen · 1 target"]
    assert lines(text, "frozen") == ["  frozen   fc: it is an output of the model"]


def test_where_nothing_happens_to_a_layer_they_are_only_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = planned(tmp_path, capsys, "algorithm: finetune")
    assert lines(text, "layers") == ["layers     2"]
