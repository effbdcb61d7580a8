"""Terminal, file and pipe: who sees a bar, who sees colour, who sees nothing."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slimcli import console
from slimcli.artifacts.event_lines import line_of
from slimcli.artifacts.events import EVENTS
from slimcli.cli import main
from slimcli.errors import Problem, RecipeError
from tests.solver import project


@pytest.fixture(autouse=True)
def usual() -> Any:
    yield
    console.configure(json=False, quiet=False, verbose=False, color=True, traceback=False)


def tick(step: int) -> dict[str, Any]:
    return {
        "event": "tick",
        "stage": "1-toy",
        "epoch": 1,
        "epochs": 2,
        "step": step,
        "steps": 50,
        "loss": 0.5,
        "lr": 0.1,
    }


def test_ticks_make_no_line_in_a_file_before_half_a_minute(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    display = console.RunDisplay()
    for step in range(1, 41):
        now[0] += 1.0
        display(tick(step))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "step 30/50" in lines[0]
    assert "1 min 10 s left" in lines[0]


def test_the_estimate_starts_anew_after_a_cut(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    display = console.RunDisplay()
    for step in range(1, 21):
        now[0] += 2.0
        display(tick(step))
    cut = {"event": "cut", "epoch": 1, "group": "bn1", "before": 8, "after": 6}
    display(cut)
    for step in range(21, 50):
        now[0] += 1.1
        display(tick(step))
    last = capsys.readouterr().err.splitlines()[-1]
    assert "step 48/50" in last
    assert "57 s left" in last


def test_warnings_are_counted_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    display = console.RunDisplay()
    display({"event": "notice", "level": "warning", "text": "mind this"})
    display({"event": "run_end", "status": "finished", "seconds": 3.0, "folder": "runs/a"})
    assert capsys.readouterr().err.splitlines()[-1].endswith("1 warning, see runs/a/log.txt")


def test_quiet_still_warns(capsys: pytest.CaptureFixture[str]) -> None:
    console.configure(quiet=True)
    display = console.RunDisplay()
    display({"event": "notice", "level": "note", "text": "by the way"})
    display({"event": "notice", "level": "warning", "text": "mind this"})
    assert "mind this" in (err := capsys.readouterr().err)
    assert "by the way" not in err


def test_an_error_has_its_five_parts_and_its_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    problem = Problem("E-X", "unknown key", "r.yaml:3:5", "epoch", "epocs", "write epoch")
    console.error(RecipeError(problem))
    out, err = capsys.readouterr()
    assert out == ""
    assert "r.yaml:3:5  unknown key: expected epoch, received epocs" in err
    assert "fix: write epoch" in err
    assert "::error file=r.yaml,line=3,col=5::unknown key" in err
    assert "[exit 2]  E-X" in err


def test_other_processes_keep_silent_but_for_errors_they_put_their_number_to(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    console.result("a")
    console.say("b")
    console.warn("c")
    console.json_line({})
    console.error(RecipeError(Problem("E-X", "d")))
    out, err = capsys.readouterr()
    assert (out, err) == ("", "")
    console.error(RecipeError(Problem("E-X", "d")), "process 1: ")
    assert capsys.readouterr().err == "process 1: d\n[exit 2]  E-X\n"


def test_every_event_that_has_a_line_is_a_documented_event() -> None:
    from slimcli.artifacts.event_lines import _WRITERS

    assert set(_WRITERS) <= set(EVENTS)
    assert line_of({"event": "step"}) == ""


def on_a_terminal(folder: Path, **environment: str) -> str:
    """What ``slim run`` writes to a terminal of its own."""
    main, secondary = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "slimcli", "run", "recipe.yaml", "--name", "tty"],
        cwd=folder,
        env={**project.environment(), "TERM": "xterm", "COLUMNS": "100", **environment},
        stdout=subprocess.DEVNULL,
        stderr=secondary,
        close_fds=True,
    )
    os.close(secondary)
    collected = io.BytesIO()
    while True:
        try:
            chunk = os.read(main, 4096)
        except OSError:
            break
        if not chunk:
            break
        collected.write(chunk)
    assert process.wait(timeout=60) == 0
    return collected.getvalue().decode()


@pytest.mark.slow
def test_a_terminal_gets_a_bar_and_no_color_takes_every_escape_away(tmp_path: Path) -> None:
    project.write(tmp_path)
    assert "\x1b[" in on_a_terminal(tmp_path)
    plain = on_a_terminal(tmp_path, NO_COLOR="1")
    assert "\x1b" not in plain
    assert "epoch 2/2" in plain


def test_flags_of_a_command_do_not_outlive_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.main(["check", "nowhere.yaml", "-q", "--json", "--no-color"])
    assert console.settings() == console.Settings()
    assert '"exit_code": 2' in capsys.readouterr().out
