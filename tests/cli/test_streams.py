"""Pipes that end, streams that are closed, disks that are full: the exit code stays right."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from slimcli.cli import main
from tests.solver import project


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    project.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shell(folder: Path, line: str) -> subprocess.CompletedProcess[str]:
    """A line of bash, with ``slim`` as the command of this interpreter."""
    slim = f'slim() {{ {shlex.quote(sys.executable)} -m slimcli "$@"; }}; '
    return subprocess.run(
        ["bash", "-c", slim + line],
        cwd=folder,
        env=project.environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def slim(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main.main(list(words))
    return int(caught.value.code or 0)


@pytest.mark.slow
def test_a_reader_that_goes_away_does_not_end_the_run(here: Path) -> None:
    done = shell(here, "slim run recipe.yaml --json --name a | head -1; exit ${PIPESTATUS[0]}")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert "nobody reads stdout any more" in done.stderr
    folder = here / "checkpoints" / "toy" / "a"
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"


def test_what_c_code_of_a_hook_prints_is_not_among_the_results(here: Path) -> None:
    talking = """
import os
os.write(1, b"loading\\n")
_plain = dataset_generator
def dataset_generator():
    os.system("echo from a program")
    return _plain()
"""
    project.write(here, project.HOOKS + talking)
    done = shell(here, "slim run recipe.yaml -q epoch=0 --name a")
    assert done.stdout == "checkpoints/toy/a\n", done.stderr
    assert "loading" in done.stderr
    assert "from a program" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("words", ["plan recipe.yaml", "inspect recipe.yaml --json"])
def test_letters_that_stdout_lacks_are_escaped(here: Path, words: str) -> None:
    done = shell(here, f"PYTHONIOENCODING=ascii slim {words}")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    if "--json" in words:
        assert json.loads(done.stdout)["version"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("stream", [1, 2])
def test_a_stream_that_is_closed_is_no_error(here: Path, stream: int) -> None:
    done = shell(here, f"slim plan recipe.yaml {stream}>&-")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert ("one batch" in done.stdout) == (stream == 2)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_result_that_cannot_be_written_is_told_in_our_words(here: Path) -> None:
    done = shell(here, "slim list > /dev/full")
    assert done.returncode == 1
    assert "E-STDOUT" in done.stderr
    assert "Traceback" not in done.stderr


def test_json_before_or_behind_a_wrong_word_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (("run", "r.yaml", "--bad", "--json"), ("--json", "run", "r.yaml", "--bad")):
        assert slim(*words) == 2
        assert json.loads(capsys.readouterr().out)["exit_code"] == 2


def test_init_names_its_files_as_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert slim("init", "x", "--json") == 0
    named = json.loads(capsys.readouterr().out)
    assert Path(named["recipe"]).is_file()
    assert Path(named["hooks"]).is_file()


def test_resuming_a_finished_run_tells_its_end_as_json(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert slim("run", "recipe.yaml", "-q", "--name", "a", "epoch=0") == 0
    capsys.readouterr()
    assert slim("resume", "checkpoints/toy/a", "--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    end = json.loads(line)
    assert (end["event"], end["status"], end["exit_code"]) == ("run_end", "finished", 0)
