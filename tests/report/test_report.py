"""report.html and card.md: complete, self-contained, and nothing in them is the user's markup."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from slimcli.artifacts import latency, summary
from slimcli.cli import main
from slimcli.report.content import read_content, verdict_of
from slimcli.report.curves import macs_per_epoch
from slimcli.report.write import write_report
from tests.solver import project

LARGEST_BYTES = 500_000
EVIL = "<script>alert('$x$')</script>|\"&"


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def compressed(name: str = "toy", metric: str = "acc") -> dict[str, Any]:
    found = summary.empty(name, "resrep", 0)
    best = {"metric": metric, "value": 0.9, "epoch": 3, "metrics": {metric: 0.9}}
    numbers = {"metrics": {metric: 0.94}, "macs": 1000, "params": 50}
    forms = {form: {metric: 0.9} for form in ("trained", "deploy", "onnx")}
    seam = {"from": "trained", "to": "deploy", "max_abs": 2e-6, "max_rel": 1e-7, "limit": 1e-4}
    layer = {"name": "conv1", "type": "Conv2d", "channels_before": 64, "channels_after": 20}
    return found | {
        "status": "finished",
        "exit_code": 0,
        "stages": [{"name": "1-a", "algorithm": "resrep", "epochs": 3, "best": best}],
        "baseline": numbers,
        "final": {
            **{"metrics": {metric: 0.9}, "metrics_by_form": forms, "macs": 500, "params": 20},
            "file_bytes": {"deploy.json": 5},
        },
        "goal": {"name": "macs", "target": 510.0, "reached": True, "value": 500},
        "verification": [{**seam, "ok": True}],
        "layers": [
            {**layer, "frozen_reason": ""},
            {**layer, "name": "fc", "channels_after": 64, "frozen_reason": "it is an output"},
        ],
        "changes": [{"key": "config.lr", "default": 0.1, "value": 0.5, "origin": "recipe.yaml:3"}],
        "environment": {"torch": "2"},
    }


def epochs(metric: str = "acc", shares: tuple[float | None, ...] = (1.0, 0.7, 0.5)) -> list[Any]:
    goal = {"name": "macs", "target": 510.0}
    lines: list[Any] = [{"event": "prepared", "stage": "1-a", "macs": 1000, "goal": goal}]
    for number, share in enumerate(shares, 1):
        status = {} if share is None else {"macs": share}
        lines.append(
            {
                **{"event": "epoch_end", "stage": "1-a", "epoch": number, "status": status},
                **{"train": {"loss": 1 / number}, "val": {metric: 0.3 * number}},
            }
        )
    cut = {"event": "cut", "stage": "1-a", "epoch": 3, "group": "bn", "before": 64, "after": 20}
    return [*lines[:-1], cut, lines[-1]]


def folder(path: Path, found: dict[str, Any], lines: list[Any]) -> Path:
    summary.write(path / "summary.json", found)
    (path / "events.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    return path


def page_of(path: Path) -> Page:
    return Page(write_report(path).read_text(encoding="utf-8"))


def test_the_verdict_has_metric_macs_and_the_largest_difference() -> None:
    assert verdict_of(compressed()) == (
        "toy reaches acc 0.9 (-0.04) at 50.0% of the MACs; trained, deployed and exported forms "
        "agree within 2.0e-06."
    )


def test_a_missed_goal_is_the_first_thing_said() -> None:
    assert verdict_of({**compressed(), "status": "goal_missed"}).startswith("The goal was missed.")


def test_a_difference_is_never_called_agreement() -> None:
    found = compressed()
    found["verification"][0]["ok"] = False
    assert "agree" not in verdict_of({**found, "status": "not_verified"})


def test_a_run_that_made_nothing_still_has_a_report(tmp_path: Path) -> None:
    page = page_of(folder(tmp_path, {**summary.empty("toy", "qat", 0), "status": "failed"}, []))
    assert "The run failed" in page.text
    assert "svg" not in page.tags


def test_a_summary_of_an_earlier_version_still_has_a_report(tmp_path: Path) -> None:
    found = compressed()
    del found["changes"], found["notes"]
    assert "acc" in page_of(folder(tmp_path, found, [])).text


def test_the_report_shows_layers_reasons_seams_changes_and_how_to_load(tmp_path: Path) -> None:
    page = page_of(folder(tmp_path, compressed(), epochs()))
    for text in ("64 → 20", "it is an output", "2.0e-06", "config.lr", "recipe.yaml:3"):
        assert text in page.text
    assert f"slimcli.load_deploy('{tmp_path}')" in page.text
    assert page.tags.count("svg") == 2
    widths = [value for name, value in page.attributes if name == "style"]
    assert widths[:2] == ["width:100.0%", "width:31.2%"]


def test_latencies_stand_under_the_form_they_were_measured_in(tmp_path: Path) -> None:
    path = folder(tmp_path, compressed(), epochs())
    times = {"median_ms": 1.5, "p99_ms": 2.25, "per_second": 667.0}
    entry = {"device": "cuda:0", "batch": 1, "repeats": 9, "forms": {"original": times}}
    latency.note(path, entry)
    latency.note(path, {**entry, "batch": 8})
    latency.note(path, {**entry, "forms": {"original": times, "deploy": {**times, "p99_ms": 2.0}}})
    columns = read_content(path).columns
    rows = [dict(zip(columns, row, strict=True)) for row in read_content(path).rows[-2:]]
    assert [row[""] for row in rows] == ["latency, batch 8, cuda:0", "latency, batch 1, cuda:0"]
    assert rows[1]["before"] == "1.5 ms (p99 2.25)"
    assert rows[1]["deploy"] == "1.5 ms (p99 2)"
    assert rows[0]["deploy"] == ""
    assert "latency, batch 8, cuda:0" in page_of(path).text


def test_nothing_is_loaded_and_nothing_is_run(tmp_path: Path) -> None:
    path = folder(tmp_path, compressed(), epochs())
    page = page_of(path)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    links = [v for name, v in page.attributes if name in ("href", "src", "xlink:href")]
    assert all(link.startswith("#") for link in links)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert (path / "report.html").stat().st_size < LARGEST_BYTES


def test_what_the_user_wrote_is_text(tmp_path: Path) -> None:
    found = compressed(EVIL, EVIL)
    found["layers"][1]["frozen_reason"] = EVIL
    found["changes"][0]["value"] = EVIL
    path = folder(tmp_path, found, epochs(EVIL))
    page = page_of(path)
    assert "script" not in page.tags
    assert page.text.count(EVIL) >= 4
    card = (path / "card.md").read_text(encoding="utf-8")
    assert "<script>" not in card


def test_both_files_are_the_same_every_time(tmp_path: Path) -> None:
    path = folder(tmp_path, compressed(), epochs())
    first = write_report(path).read_bytes(), (path / "card.md").read_bytes()
    assert (write_report(path).read_bytes(), (path / "card.md").read_bytes()) == first


def test_macs_per_epoch_come_from_the_share_the_algorithm_reports(tmp_path: Path) -> None:
    content = read_content(folder(tmp_path, compressed(), epochs()))
    assert macs_per_epoch(content) == [1000.0, 700.0, 500.0]


def test_without_a_share_the_last_cut_leaves_the_final_macs(tmp_path: Path) -> None:
    content = read_content(folder(tmp_path, compressed(), epochs(shares=(None, None, None))))
    assert macs_per_epoch(content) == [1000, 1000, 500]


def test_every_run_ends_with_a_report_that_can_be_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main.main(["run", "recipe.yaml", "--name", "a"])
    run = tmp_path / "checkpoints" / "toy" / "a"
    assert f"report {run / 'report.html'}" in capsys.readouterr().out.replace(
        "report checkpoints", f"report {tmp_path}/checkpoints"
    )
    before = (run / "report.html").read_text()
    assert "acc" in before
    (run / "report.html").unlink()
    with pytest.raises(SystemExit) as caught:
        main.main(["report", str(run)])
    assert caught.value.code == 0
    assert (run / "report.html").read_text() == before


def test_a_report_that_cannot_be_drawn_changes_nothing_but_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(folder: Path) -> Path:
        raise ValueError("no ink")

    project.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("slimcli.report.write.write_report", broken)
    with pytest.raises(SystemExit) as caught:
        main.main(["run", "recipe.yaml", "-q", "--name", "a"])
    assert caught.value.code == 0
    log = (tmp_path / "checkpoints" / "toy" / "a" / "log.txt").read_text()
    assert "warning: no report: ValueError: no ink; try slim report" in log
