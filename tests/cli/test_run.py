"""``slim run``, ``plan`` and ``resume`` as a user meets them: streams, exit codes, what is kept."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
from pathlib import Path

import pytest
import torch

from slimcli.artifacts import checkpoint, process
from slimcli.cli import main
from slimcli.cli.list import runs
from slimcli.recipe import load
from tests.solver import project

SLOW = """
import time
_plain = predict_function
def predict_function(model, data):
    if model.training:
        time.sleep(0.05)
    return _plain(model, data)
"""
KILLED_WHILE_SAVING = """
import os
_replace, _count = os.replace, [0]
def _dying(source, target):
    if str(target).endswith("last.pt"):
        _count[0] += 1
        if _count[0] == 3:
            os.kill(os.getpid(), 9)
    _replace(source, target)
os.replace = _dying
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    project.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    return tmp_path


def slim(*words: str) -> int:
    """The exit code of a command run in this process."""
    with pytest.raises(SystemExit) as caught:
        main.main(list(words))
    return int(caught.value.code or 0)


def files(folder: Path) -> list[str]:
    return sorted(str(each.relative_to(folder)) for each in folder.rglob("*"))


def best(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = checkpoint.load(folder / "checkpoints" / "best.pt")["model"]
    return found


def test_quiet_prints_the_folder_and_nothing_else(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert slim("run", "recipe.yaml", "-q") == 0
    out, err = capsys.readouterr()
    (line,) = out.splitlines()
    assert (here / line).is_dir()
    assert err == ""


LEAVING = {
    "on import": "os.chdir(ELSEWHERE)\n",
    "for the data": "dataset_generator = leaving(dataset_generator)\n",
    "for the model": "build_model = leaving(build_model)\n",
}


@pytest.mark.parametrize("moment", LEAVING)
def test_hooks_that_change_the_folder_do_not_change_where_the_run_is(
    here: Path, capsys: pytest.CaptureFixture[str], moment: str
) -> None:
    (here / "elsewhere").mkdir()
    leaving = f"""
import os
ELSEWHERE = {str(here / "elsewhere")!r}
def leaving(hook):
    def called():
        os.chdir(ELSEWHERE)
        return hook()
    return called
"""
    recipe = project.write(here / "project", project.HOOKS + leaving + LEAVING[moment])
    assert slim("run", "project/recipe.yaml", "-q", "epoch=1", "--name", "a") == 0
    folder = here / "checkpoints" / "toy" / "a"
    assert capsys.readouterr().out == "checkpoints/toy/a\n"
    assert (folder / "report.html").is_file()
    assert (folder / "command.txt").read_text().endswith(f"# in {here}\n")
    assert list((here / "elsewhere").iterdir()) == []
    last = json.loads((folder / "events.jsonl").read_text().splitlines()[-1])
    assert last["folder"] == "checkpoints/toy/a"
    os.chdir(here)
    assert load(folder / "recipe.yaml").code == (recipe.parent,)
    assert slim("eval", "checkpoints/toy/a", "--compare", "trained,deploy") == 0


def test_json_prints_one_event_a_line_and_the_same_as_the_file(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert slim("run", "recipe.yaml", "--json", "--name", "a") == 0
    out, err = capsys.readouterr()
    events = [json.loads(line) for line in out.splitlines()]
    stored = (here / "checkpoints" / "toy" / "a" / "events.jsonl").read_text().splitlines()
    assert events == [json.loads(line) for line in stored]
    assert [events[0]["event"], events[-1]["event"]] == ["run_start", "run_end"]
    assert events[-1]["exit_code"] == 0
    assert "epoch" not in err


def test_the_result_is_on_stdout_and_the_conversation_on_stderr(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert slim("run", "recipe.yaml", "--name", "a") == 0
    out, err = capsys.readouterr()
    assert "deploy.safetensors" in out
    assert "epoch" not in out
    assert err.splitlines()[-1].startswith("Next: slim ")
    assert not {"\r", "\x1b"} & set(out + err)
    per_epoch = sum("epoch" in line for line in err.splitlines()) / 2
    assert per_epoch <= 5


def test_a_run_folder_explains_itself(here: Path) -> None:
    assert slim("run", "recipe.yaml", "-q", "--name", "a") == 0
    folder = here / "checkpoints" / "toy" / "a"
    expected = {
        *("recipe.yaml", "recipe.source.yaml", "command.txt", "env.json", "code/hooks.py"),
        *("events.jsonl", "metrics.csv", "log.txt", "tensorboard", "summary.json"),
        *("checkpoints/last.pt", "checkpoints/best.pt"),
        *("artifacts/deploy.json", "artifacts/deploy.safetensors"),
    }
    assert expected <= set(files(folder))
    assert (here / "checkpoints" / "toy" / "latest").resolve() == folder
    assert (folder / "recipe.source.yaml").read_text() == (here / "recipe.yaml").read_text()


def test_the_stored_recipe_runs_again_and_gives_the_same_bits(here: Path) -> None:
    assert slim("run", "recipe.yaml", "-q", "--name", "a") == 0
    first = here / "checkpoints" / "toy" / "a"
    assert slim("run", str(first / "recipe.yaml"), "-q", "--name", "b") == 0
    second = here / "checkpoints" / "toy" / "b"
    assert all(torch.equal(value, best(second)[name]) for name, value in best(first).items())


def test_a_name_that_is_taken_gets_a_number(here: Path) -> None:
    assert slim("run", "recipe.yaml", "-q", "epoch=0", "--name", "a") == 0
    assert slim("run", "recipe.yaml", "-q", "epoch=0", "--name", "a") == 0
    assert (here / "checkpoints" / "toy" / "a-2" / "summary.json").is_file()


@pytest.mark.parametrize("words", [("plan", "recipe.yaml"), ("run", "recipe.yaml", "--dry-run")])
def test_plan_and_dry_run_write_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    before = files(here)
    assert slim(*words) == 0
    after = [each for each in files(here) if "__pycache__" not in each]
    assert after == before
    out = capsys.readouterr().out
    assert "one batch  ok" in out
    assert ("trial" in out) == ("--dry-run" in words)


def test_plan_as_json_is_one_document(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert slim("plan", "recipe.yaml", "--json") == 0
    (stage,) = json.loads(capsys.readouterr().out)["stages"]
    assert stage["macs"] > 0
    assert [row["name"] for row in stage["layers"]] == ["conv", "fc"]


def test_a_plan_that_cannot_work_is_exit_code_4_and_starts_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = project.RECIPE.replace("finetune", "resrep").replace("lr: 0.1", "prune_rate: 0.99")
    (here / "recipe.yaml").write_text(recipe)
    assert slim("plan", "recipe.yaml") == 4
    capsys.readouterr()
    assert slim("plan", "recipe.yaml", "--json") == 4
    (stage,) = json.loads(capsys.readouterr().out)["stages"]
    assert stage["refusals"][0]["fix"]
    assert slim("run", "recipe.yaml") == 4
    summary = json.loads((here / "checkpoints" / "toy" / "latest" / "summary.json").read_text())
    assert summary["exit_code"] == 4
    assert "fix" in capsys.readouterr().err


def test_a_requirement_that_is_missed_is_exit_code_4_and_keeps_the_result(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert slim("run", "recipe.yaml", "--name", "a", "--require", "acc>=2") == 4
    assert "--require acc>=2 is not met" in capsys.readouterr().err
    folder = here / "checkpoints" / "toy" / "a"
    assert (folder / "artifacts" / "deploy.safetensors").is_file()
    assert json.loads((folder / "summary.json").read_text())["status"] == "goal_missed"
    assert slim("run", "recipe.yaml", "-q", "--require", "acc<=1", "--require", "macs<=1e9") == 0


def test_a_requirement_on_an_unknown_number_is_refused_before_training(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert slim("run", "recipe.yaml", "--name", "a", "--require", "f1>=0.1") == 2
    assert "expected acc, macs, params, received f1" in capsys.readouterr().err
    events = (here / "checkpoints" / "toy" / "a" / "events.jsonl").read_text()
    assert "epoch_end" not in events


def test_a_share_of_the_macs_can_be_required_where_nothing_is_compressed(here: Path) -> None:
    assert slim("run", "recipe.yaml", "-q", "epoch=0", "--require", "macs<=1") == 0
    assert slim("run", "recipe.yaml", "-q", "epoch=0", "--require", "macs<=0.9") == 4


def test_another_algorithm_on_resume_is_one_problem(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stopped(here)
    capsys.readouterr()
    assert slim("resume", str(folder), "algorithm=qat", "--allow-recipe-change") == 2
    first, *rest = capsys.readouterr().err.splitlines()
    assert first == "the run trains finetune, now it is qat"
    assert len(rest) == 2


def test_a_requirement_that_is_no_condition_is_exit_code_2(here: Path) -> None:
    assert slim("run", "recipe.yaml", "--require", "acc") == 2
    assert not (here / "checkpoints").exists()


def test_max_steps_shortens_every_epoch(here: Path) -> None:
    assert slim("run", "recipe.yaml", "-q", "--name", "a", "--max-steps", "2") == 0
    stored = checkpoint.load(here / "checkpoints" / "toy" / "a" / "checkpoints" / "last.pt")
    assert stored["position"]["step"] == 4


def test_a_hook_that_fails_shows_the_users_frames_only(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = project.HOOKS.replace("return model(data[0])", "return model(data[0][:, :0])")
    (here / "hooks.py").write_text(broken)
    assert slim("run", "recipe.yaml") == 1
    err = capsys.readouterr().err
    assert "hook `predict_function` failed" in err
    assert "hooks.py:" in err
    assert "slimcli" not in err.replace("slimcli/", "")


def test_a_broken_sample_is_told_as_the_users(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = project.HOOKS.replace(
        "return data(40, 1), data(20, 2)", "return [(torch.zeros(1, 6, 6), 0), None], data(20, 2)"
    )
    (here / "hooks.py").write_text(broken)
    assert slim("run", "recipe.yaml") == 1
    assert "hook `dataset_generator` failed" in capsys.readouterr().err


def test_a_resume_of_a_run_that_another_process_works_on_changes_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert slim("run", "recipe.yaml", "-q", "--name", "busy") == 0
    folder = here / "checkpoints" / "toy" / "busy"
    process.claim(folder)
    claimed = json.loads((folder / process.NAME).read_text())
    other = {**claimed, "pid": os.getppid(), "started": process._start_of(os.getppid())}
    (folder / process.NAME).write_text(json.dumps(other))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    words = ["epoch=4", "--allow-recipe-change"]
    assert slim("resume", str(folder), *words) == 2
    assert "still running" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    (folder / process.NAME).unlink()
    assert slim("resume", str(folder), "-q", *words) == 0
    assert not (folder / process.NAME).exists()


@pytest.mark.slow
def test_a_finished_run_of_two_processes_is_trained_longer_by_two(here: Path) -> None:
    words = ("run", "recipe.yaml", "-q", "--name", "two", "num_processes=2")
    assert project.slim(here, *words).returncode == 0
    folder = here / "checkpoints" / "toy" / "two"
    words = ("resume", str(folder), "-q", "epoch=3", "--allow-recipe-change")
    assert project.slim(here, *words).returncode == 0
    assert checkpoint.load(folder / "checkpoints" / "last.pt")["position"]["epoch"] == 3


@pytest.mark.slow
def test_ctrl_c_saves_and_resuming_equals_a_run_that_never_stopped(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "hooks.py").write_text(project.HOOKS + SLOW)
    done = project.interrupted(here, signal.SIGINT)
    assert done.returncode == 130, done.stderr
    assert "slim resume " in done.stderr
    assert done.stdout == ""
    stopped = here / "checkpoints" / "toy" / "stopped"
    position = checkpoint.load(stopped / "checkpoints" / "last.pt")["position"]
    assert 0 < position["step"] < 10
    assert slim("resume", str(stopped), "-q") == 0
    assert slim("run", "recipe.yaml", "-q", "--name", "straight") == 0
    straight = best(here / "checkpoints" / "toy" / "straight")
    assert all(torch.equal(value, best(stopped)[name]) for name, value in straight.items())


@pytest.mark.slow
def test_a_process_killed_while_saving_leaves_the_checkpoint_before(here: Path) -> None:
    (here / "hooks.py").write_text(project.HOOKS + KILLED_WHILE_SAVING)
    done = project.slim(here, "run", "recipe.yaml", "--name", "killed")
    assert done.returncode == -signal.SIGKILL
    folder = here / "checkpoints" / "toy" / "killed"
    assert checkpoint.load(folder / "checkpoints" / "last.pt")["position"]["epoch"] == 1
    (row,) = runs(here / "checkpoints")
    assert row["state"] == "died"
    assert row["process"].startswith("pid ")
    (here / "hooks.py").write_text(project.HOOKS)
    assert slim("resume", str(folder), "-q", "--allow-code-change") == 0


def test_resume_refuses_what_would_change_the_training(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert slim("run", "recipe.yaml", "-q", "--name", "a") == 0
    folder = str(here / "checkpoints" / "toy" / "a")
    capsys.readouterr()
    assert slim("resume", folder) == 0
    assert "nothing to resume" in capsys.readouterr().err
    assert slim("resume", folder, "lr=0.5") == 2
    assert "--allow-recipe-change" in capsys.readouterr().err
    assert slim("resume", folder, "seed=1", "--allow-recipe-change") == 2
    assert slim("resume", folder, "epoch=3", "--allow-recipe-change", "-q") == 0
    stored = checkpoint.load(Path(folder) / "checkpoints" / "last.pt")
    assert stored["position"]["epoch"] == 3
    assert (Path(folder) / "recipe.2.yaml").is_file()
    capsys.readouterr()
    assert slim("resume", folder) == 0
    assert "nothing to resume" in capsys.readouterr().err
    (here / "hooks.py").write_text(project.HOOKS + "\n# changed\n")
    assert slim("resume", folder, "epoch=4", "--allow-recipe-change") == 2
    assert "hook files are not what they were" in capsys.readouterr().err


def test_resume_needs_a_run_folder(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert slim("resume", str(here)) == 2
    assert "not a run folder" in capsys.readouterr().err


def test_resume_auto_starts_a_run_or_goes_on_with_the_unfinished_one(here: Path) -> None:
    assert slim("run", "recipe.yaml", "-q", "--resume", "auto", "--name", "a") == 0
    folder = here / "checkpoints" / "toy" / "a"
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "status": "interrupted"}))
    assert slim("run", "recipe.yaml", "-q", "--resume", "auto", "--name", "b") == 0
    assert not (here / "checkpoints" / "toy" / "b").exists()
    assert slim("run", "recipe.yaml", "-q", "--resume", "auto", "--name", "b") == 0
    assert (here / "checkpoints" / "toy" / "b").is_dir()


@pytest.mark.parametrize("flag", ["-q", "--json"])
def test_what_a_hook_prints_is_no_result(
    here: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    printing = project.HOOKS.replace(
        "    return model(data[0])", "    print('mine')\n    return model(data[0])"
    )
    (here / "hooks.py").write_text("print('at import')\n" + printing)
    assert slim("run", "recipe.yaml", flag, "epoch=1", "num_workers=1") == 0
    out, err = capsys.readouterr()
    assert "mine" not in out
    assert "at import" not in out
    assert {"mine", "at import"} <= set(err.splitlines())


@pytest.mark.parametrize("words", [("check",), ("plan",), ("run", "epoch=0", "--name", "a b")])
def test_the_next_command_can_be_pasted_though_a_path_has_spaces(
    here: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    project.write(spaced := here / "my recipes")
    assert slim(words[0], str(spaced / "recipe.yaml"), *words[1:]) == 0
    following = capsys.readouterr().err.splitlines()[-1].removeprefix("Next: ")
    slim_word, _, path, *_ = shlex.split(following)
    assert slim_word == "slim"
    assert Path(path).exists()


def test_a_file_that_hides_the_standard_library_is_named(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "random.py").write_text(project.HOOKS)
    (here / "recipe.yaml").write_text(project.RECIPE.replace("hooks.py", "random.py"))
    assert slim("run", "recipe.yaml", "-q", "epoch=0") == 0
    assert "random.py hides the standard library's module random" in capsys.readouterr().err


def test_an_epoch_without_training_says_nothing_of_it(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert slim("run", "recipe.yaml", "epoch=0") == 0
    (line,) = [each for each in capsys.readouterr().err.splitlines() if "epoch 0/0" in each]
    assert "train" not in line


def test_a_run_that_cannot_even_store_its_recipe_leaves_no_folder(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert slim("run", "recipe.yaml") == 1
    assert "no space left on the disk" in capsys.readouterr().err
    assert list((here / "checkpoints" / "toy").iterdir()) == []


def stopped(here: Path) -> Path:
    """A run that looks interrupted."""
    assert slim("run", "recipe.yaml", "-q", "--name", "a", "epoch=1") == 0
    folder = here / "checkpoints" / "toy" / "a"
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "status": "interrupted"}))
    return folder


def test_resuming_from_something_else_than_a_checkpoint_says_so(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stopped(here)
    torch.save({"version": 1, "stage": 0}, folder / "checkpoints" / "last.pt")
    assert slim("resume", str(folder)) == 1
    assert "this is no checkpoint of a run" in capsys.readouterr().err
    (folder / "checkpoints" / "last.pt").unlink()
    assert slim("resume", str(folder)) == 1
    assert "fix: a run that can't go on is started again: slim run" in capsys.readouterr().err


def test_without_a_record_of_the_code_resuming_asks(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stopped(here)
    (folder / "code" / "files.json").unlink()
    assert slim("resume", str(folder)) == 2
    assert "--allow-code-change" in capsys.readouterr().err
    assert slim("resume", str(folder), "--allow-code-change", "-q") == 0


def test_a_run_without_deploy_files_is_evaluated_as_trained_and_exported(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("-q", "--name", "a", "epoch=1", "save_deploy_format=false")
    assert slim("run", "recipe.yaml", *words) == 0
    capsys.readouterr()
    assert slim("eval", "checkpoints/toy/a", "--json") == 0
    assert list(json.loads(capsys.readouterr().out)["metrics"]) == ["trained"]
    assert slim("export", "checkpoints/toy/a", "--onnx", "-q") == 0
    assert (here / "checkpoints" / "toy" / "a" / "artifacts" / "model.onnx").is_file()


def test_a_mistyped_hook_file_is_found_beside_the_recipe_from_anywhere(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "recipe.yaml").write_text(project.RECIPE.replace("hooks.py", "hook.py"))
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (elsewhere / "zoo.py").touch()
    monkeypatch.chdir(elsewhere)
    assert slim("check", "../recipe.yaml") == 2
    assert "did you mean hooks.py?" in capsys.readouterr().err
