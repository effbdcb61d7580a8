"""The command group: torch-free, fast, every error with its exit code and its page."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import slimcli
from slimcli import errors
from slimcli.cli import main, told
from slimcli.cli.arguments import complete_overrides
from slimcli.cli.explain import error_pages, explain, names

PACKAGE = Path(slimcli.__file__).parent
CPU_SECONDS = 1.2
"""Three times the budget of 0.4 s: the machine of a test run is shared, and slow at times."""

BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "sklearn", "torchvision", "onnx", "numpy"):
            raise ImportError(f"{name} must not be imported here")
sys.meta_path.insert(0, Blocker())
from slimcli.cli import main
main(sys.argv[1:])
"""


def slim(*words):
    """The command in this process."""
    return CliRunner().invoke(main, list(words))


@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("check", "recipe.yaml"),
        ("check", "recipe.yaml", "--print"),
        ("check", "recipe.yaml", "epoch=3", "--json"),
        ("list",),
        ("list", "recipes"),
        ("list", "runs"),
        ("explain", "finetune"),
        ("explain", "events"),
        ("explain", "lr"),
        ("explain", "recipe", "--json"),
        ("init", "demo"),
        ("run", "--help"),
    ],
)
def test_what_trains_nothing_imports_neither_torch_nor_scikit_learn(folder, words):
    folder.recipe()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", BLOCKED, *words], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < CPU_SECONDS


def test_completion_imports_no_torch_and_knows_keys(folder):
    folder.recipe()
    code = BLOCKED.replace("main(sys.argv[1:])", "main(prog_name='slim')")
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={
            "_SLIM_COMPLETE": "bash_complete",
            "COMP_WORDS": "slim check recipe.yaml config.ep",
            "COMP_CWORD": "3",
            "PATH": "",
        },
    )
    assert "plain,config.epoch=" in done.stdout, done.stderr


def test_completion_offers_the_words_of_a_key(folder):
    context = main.make_context("slim", ["list"])
    context.params["recipe"] = folder.recipe(algorithm="resrep")
    offered = [each.value for each in complete_overrides(context, None, "config.metric_mode=")]
    assert offered == ["config.metric_mode=max", "config.metric_mode=min"]
    offered = [each.value for each in complete_overrides(context, None, "prune")]
    assert "config.prune_rate=" in offered


def test_slim_alone_says_where_to_begin_and_exits_2():
    result = slim()
    assert result.exit_code == 2
    assert "slim init demo" in result.stderr
    assert result.stdout == ""


def test_help_lists_exactly_the_commands_that_exist():
    listed = main.list_commands(main.make_context("slim", ["list"]))
    existing = {path.stem for path in (PACKAGE / "cli").glob("*.py")}
    assert {"check", "list", "explain", "init"} <= set(listed) <= existing
    shown = slim("--help").stdout
    assert all(re.search(rf"^  {name} ", shown, re.MULTILINE) for name in listed)


@pytest.mark.parametrize(
    ("words", "hint"),
    [(("chekc",), "slim check"), (("zzz",), "slim --help"), (("check", "--hoks"), "--hooks")],
)
def test_a_mistyped_command_or_option_is_a_usage_error_with_a_hint(words, hint):
    result = slim(*words)
    assert result.exit_code == 2
    assert hint in result.stderr
    assert "[exit 2]" in result.stderr


@pytest.mark.parametrize("words", [("--json", "check"), ("check", "--json")])
def test_flags_work_before_and_behind_the_command(folder, words):
    folder.recipe()
    result = slim(*words, "recipe.yaml")
    assert json.loads(result.stdout)["ok"] is True


def test_an_error_with_json_is_one_line_of_json_too(folder):
    folder.recipe("config: {epocs: 3}\n")
    result = slim("check", "recipe.yaml", "--json")
    told = json.loads(result.stdout)
    assert told["exit_code"] == result.exit_code == 2
    assert told["problems"][0]["code"] == "E-RECIPE-UNKNOWN-KEY"


def test_an_override_written_as_an_option_is_told_how_to_write_it(folder):
    folder.recipe()
    for words in (["--config.epoch=3"], ["--config.epoch", "3"], ["--epoch=3"]):
        result = slim("check", "recipe.yaml", *words)
        assert result.exit_code == 2
        key = words[0].lstrip("-").partition("=")[0]
        assert f"write {key}=3" in result.stderr


def test_github_gets_an_annotation_with_file_and_line(folder, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    folder.recipe("config: {epocs: 3}\n")
    result = slim("check", "recipe.yaml")
    assert "::error file=recipe.yaml,line=8,col=10::unknown key config.epocs" in result.stderr


def test_check_print_is_a_recipe_that_loads_again_and_marks_defaults(folder):
    folder.recipe("config: {lr: 0.5}\n", algorithm="resrep")
    printed = slim("check", "recipe.yaml", "epoch=3", "--print").stdout
    assert re.search(r"^  epoch: 3$", printed, re.MULTILINE)
    assert re.search(r"^  prune_rate: 0.5 +# default$", printed, re.MULTILINE)
    folder.write("again.yaml", printed)
    again = slim("check", "again.yaml", "--print").stdout
    assert again == printed


def test_check_hooks_says_where_each_hook_is_and_how_it_is_called(folder):
    folder.recipe("  optimizer_generator: more.py:adam\n")
    folder.write("more.py", "def adam(params, config):\n    pass\n")
    told = slim("check", "recipe.yaml", "--hooks").stderr
    assert re.search(r"optimizer_generator +more.py:1 +\(config, params\) by name", told)
    assert "6 of 6 hooks ok" in told


def test_several_recipes_are_checked_and_all_their_problems_told(folder):
    folder.write("good.yaml", folder.recipe().read_text())
    folder.recipe("config: {epocs: 3}\n")
    folder.write("other.yaml", folder.recipe("config: {lr: fast}\n").read_text())
    folder.recipe("config: {epocs: 3}\n")
    result = slim("check", "good.yaml", "recipe.yaml", "other.yaml", "batch_size=4")
    assert result.exit_code == 2
    assert result.stdout == "good.yaml  ok\n"
    assert "recipe.yaml:8:10  unknown key" in result.stderr
    assert "other.yaml:8:14  config.lr" in result.stderr


def test_check_says_that_keys_of_an_own_class_are_not_checked(folder):
    folder.write("mine.py", "class Mine: pass\n")
    folder.recipe("config: {strength: 3}\n", algorithm="mine.Mine")
    assert "only with --hooks: strength" in slim("check", "recipe.yaml").stderr


def test_ctrl_c_exits_130():
    import click

    assert told(click.Abort()) == 130


def test_a_bug_of_ours_shows_its_traceback_and_asks_for_a_report(capsys):
    with pytest.raises(ZeroDivisionError) as caught:
        raise ZeroDivisionError("ours")
    assert told(caught.value) == 1
    shown = capsys.readouterr().err
    assert "ZeroDivisionError: ours" in shown
    assert "slim doctor --issue" in shown


@pytest.mark.parametrize("kind", errors.SlimError.__subclasses__())
def test_every_kind_of_error_exits_with_its_code(kind, capsys):
    assert told(kind(errors.Problem("E-X", "wrong"))) == kind.exit_code
    assert f"[exit {kind.exit_code}]" in capsys.readouterr().err


def test_the_page_of_exit_codes_has_every_code():
    page = explain("exit-codes")
    kinds = [errors.SlimError, *errors.SlimError.__subclasses__(), errors.Terminated]
    shown = {int(number) for number in re.findall(r"^ +(\d+)  ", page, re.MULTILINE)}
    assert shown == {0} | {kind.exit_code for kind in kinds}


def codes_in(folder: Path) -> set[str]:
    """Every error code that occurs in a folder, without the one of a doctest."""
    texts = [path.read_text(encoding="utf-8") for path in folder.rglob("*.py")]
    return {code for text in texts for code in re.findall(r'"(E-[A-Z0-9-]+)"', text)} - {"E-X"}


def test_every_error_code_has_a_page_and_every_page_a_code():
    codes = codes_in(PACKAGE)
    assert set(error_pages()) - codes == set()
    assert codes - set(error_pages()) == set(), "write their pages in cli/pages/errors.yaml"


@pytest.mark.parametrize("code", sorted(error_pages()))
def test_a_page_has_cause_example_and_fix(code):
    page = error_pages()[code]
    assert set(page) == {"cause", "example", "fix"}
    assert all(isinstance(text, str) and text.strip() for text in page.values())
    assert explain(code).startswith(code)


def test_the_page_of_events_is_the_table_the_code_writes_by():
    from slimcli.artifacts.events import EVENTS

    page = explain("events")
    assert all(
        re.search(rf"^  {name} +{re.escape(fields)}$", page, re.MULTILINE)
        for name, fields in EVENTS.items()
    )


def test_everything_that_has_a_name_can_be_explained():
    assert len(names()) > 100
    assert all(explain(name) for name in names())
    result = slim("explain", "lerning_rate")
    assert result.exit_code == 2


def test_every_key_says_what_it_means_accepts_and_has_as_default():
    from slimcli.recipe import keys

    for info in keys.algorithms().values():
        for key in (*keys.TRAINING_KEYS, *info.config.model_fields):
            text = explain(key)
            assert "accepts" in text
            assert "default" in text
            assert "None" not in text.split(":", 1)[1].split("\n")[0]


def test_the_json_schema_knows_every_key_of_every_algorithm():
    from slimcli.recipe import keys
    from slimcli.recipe.json_schema import json_schema

    branches = {
        each["if"]["properties"]["algorithm"]["enum"][0]: each["then"]
        for each in json_schema()["allOf"]
    }
    for name, info in keys.algorithms().items():
        known = branches[name]["properties"]["config"]["properties"]
        assert set(keys.TRAINING_KEYS) | set(info.config.model_fields) <= set(known)
    assert json.loads(slim("explain", "recipe", "--json").stdout) == json_schema()


@pytest.mark.parametrize("what", ["algorithms", "recipes", "hooks", "runs"])
def test_list_as_json_is_one_document(folder, what):
    assert what in json.loads(slim("list", what, "--json").stdout)


def test_list_runs_says_how_each_run_ended(folder):
    folder.write("checkpoints/a/1/recipe.yaml", "")
    folder.write("checkpoints/a/1/summary.json", '{"status": "finished", "exit_code": 0}')
    folder.write("checkpoints/a/2/recipe.yaml", "")
    rows = json.loads(slim("list", "runs", "--json").stdout)["runs"]
    assert [row["run"] for row in rows] == ["checkpoints/a/2", "checkpoints/a/1"]
    assert [row["state"] for row in rows] == ["unfinished", "finished"]
