"""The group ``slim``: finds a command, hands it the arguments, turns an error into its exit code.

Nothing here imports torch or a command: each command is a module of this folder with a ``command``
object, loaded when it is called. A command whose module does not exist is not listed.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click

from slimcli import __version__, console
from slimcli.cli import stopping
from slimcli.errors import AnotherFailed, Interrupted, SlimError

SECTIONS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        "Start",
        (
            ("init", "a recipe and hooks that run as they are"),
            ("check", "find mistakes in a recipe, with line and column"),
            ("inspect", "which channels belong together, and what can be cut"),
            ("plan", "what would be done, and whether it can work; writes nothing"),
            ("run", "train, compress, verify, export"),
            ("resume", "go on with a stopped run"),
        ),
    ),
    (
        "Results",
        (
            ("eval", "evaluate a run or an artifact with your own hook"),
            ("export", "ONNX and TensorRT from a finished run, verified"),
            ("lint", "check an ONNX file against the rules of TensorRT"),
            ("bench", "measure latency and throughput"),
            ("report", "the report of a run"),
            ("diff", "settings, results and channels of two runs side by side"),
        ),
    ),
    (
        "Know",
        (
            ("list", "algorithms, recipes, hooks, runs"),
            ("explain", "an algorithm, a key, an error code, exit-codes ..."),
            ("doctor", "what this machine can do, and the fix for what it cannot"),
        ),
    ),
)

GLOBAL_FLAGS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("--json",), "json", "Only JSON on stdout."),
    (("-q", "--quiet"), "quiet", "Only the result on stdout."),
    (("-v", "--verbose"), "verbose", "Say more."),
    (("--no-color",), "no_color", "No escape sequences."),
    (("--traceback",), "traceback", "Show all frames of an error."),
)


def _set_flag(_context: click.Context, parameter: click.Parameter, value: bool) -> bool:
    """Hands a global flag to the console."""
    if value:
        assert parameter.name is not None
        name = parameter.name.removeprefix("global_")
        console.configure(**({"color": False} if name == "no_color" else {name: True}))
    return value


def _global_options(taken: set[str]) -> list[click.Parameter]:
    """The flags every command accepts, without those it defines itself."""
    return [
        click.Option(
            (*spellings, f"global_{name}"),
            is_flag=True,
            expose_value=False,
            callback=_set_flag,
            help=text,
        )
        for spellings, name, text in GLOBAL_FLAGS
        if not taken.intersection(spellings)
    ]


class SlimGroup(click.Group):
    """A group whose commands are modules, imported one at a time."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the commands that exist, in the order of the help page."""
        return [
            name
            for _, rows in SECTIONS
            for name, _ in rows
            if importlib.util.find_spec(f"slimcli.cli.{name}") is not None
        ]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports the module of one command and adds the global flags to it."""
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = copy.copy(
            importlib.import_module(f"slimcli.cli.{cmd_name}").command
        )
        taken = {spelling for each in command.params for spelling in each.opts}
        command.params = [*command.params, *_global_options(taken)]
        assert command.callback is not None
        command.callback = stopping.exits_are_errors()(command.callback)
        command.callback = console.results_only()(command.callback)
        if console.settings().json:
            own = [each.name for each in command.params if "--json" in each.opts]
            ctx.default_map = {cmd_name: {name: True for name in own if name}}
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with a suggestion for a mistyped name."""
        name = args[0]
        if name not in self.list_commands(ctx) and not name.startswith("-"):
            close = difflib.get_close_matches(name, self.list_commands(ctx), n=1)
            hint = f" Did you mean: slim {close[0]}?" if close else " All commands: slim --help"
            ctx.fail(f"no command called {name!r}.{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands by topic, one line each, without importing any."""
        existing = self.list_commands(ctx)
        for title, rows in SECTIONS:
            shown = [row for row in rows if row[0] in existing]
            if shown:
                with formatter.section(title):
                    formatter.write_dl(shown, col_max=10)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Runs a command and exits with the code its outcome has (``slim explain exit-codes``)."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode, **extra)
        stopping.open_closed_streams()
        stopping.escape_unprintable()
        # No list(...): that name is a command's module here once it has been imported.
        words = [*(sys.argv[1:] if args is None else args)]
        if "--json" in words[: words.index("--") if "--" in words else None]:
            console.configure(json=True)  # known before a word behind which it stands is refused
        # Before torch is loaded: threads that spin while they wait slow a busy machine tenfold.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        try:
            with stopping.signals_unwind():
                outcome = super().main(args, prog_name or "slim", complete_var, False, **extra)
        except Exception as error:
            if isinstance(error, Interrupted | click.Abort):
                stopping.ignore_signals()
            sys.exit(told(error))
        finally:
            console.configure(json=False, quiet=False, verbose=False, color=True, traceback=False)
        sys.exit(outcome if isinstance(outcome, int) else 0)


def told(error: Exception) -> int:
    """Prints an error the way its kind deserves and returns the exit code."""
    speaker = "" if console.is_main_process() else stopping.speaker(error)
    if speaker is None:
        is_abort = isinstance(error, click.Abort)
        return stopping.exit_code_of(error) if is_abort else getattr(error, "exit_code", 1)
    if isinstance(error, AnotherFailed):
        return _report_another(error, speaker)
    if isinstance(error, SlimError):
        return _report_slim_error(error, speaker)
    if isinstance(error, click.Abort):
        code = stopping.exit_code_of(error)
        click.echo(f"{speaker}{stopping.STOPPED[code]}  [exit {code}]", err=True)
        return _told_as_json(code, [])
    if isinstance(error, click.ClickException):
        error.show()
        click.echo(f"[exit {error.exit_code}]", err=True)
        return _told_as_json(error.exit_code, [{"code": "", "what": error.format_message()}])
    click.echo(speaker, err=True, nl=False)
    traceback.print_exception(error)
    click.echo(
        "This is a bug in slim, not in your recipe. Please report it with the lines above and the"
        " output of: slim doctor --issue  [exit 1]",
        err=True,
    )
    return _told_as_json(1, [{"code": "", "what": f"{type(error).__name__}: {error}"}])


def _report_another(error: AnotherFailed, speaker: str) -> int:
    """One line: what failed is said by the process that it failed in."""
    if console.settings().traceback:
        traceback.print_exception(error)
    (problem,) = error.problems
    if error.is_told or speaker:
        click.echo(f"{speaker}{problem.what}  [exit {error.exit_code}]  {problem.code}", err=True)
    else:
        console.error(error, speaker)
    return _told_as_json(error.exit_code, [asdict(problem)])


def _report_slim_error(error: SlimError, speaker: str) -> int:
    """The problems in their five parts."""
    if console.settings().traceback:
        traceback.print_exception(error)
    console.error(error, speaker)
    return _told_as_json(error.exit_code, [asdict(each) for each in error.problems])


def _told_as_json(exit_code: int, problems: list[dict[str, str]]) -> int:
    """Says with ``--json`` on stdout what stderr said in words; returns the exit code.

    Not behind a document, which would be none any more: a plan holds its refusals itself.
    """
    if console.settings().json and not console.has_document():
        console.json_line({"v": 1, "event": "error", "exit_code": exit_code, "problems": problems})
    return exit_code


def welcome(names: Sequence[str]) -> str:
    """What ``slim`` alone says: every command on three lines, and where to begin."""
    lines = [f"slim {__version__}: compress a PyTorch model from a recipe"]
    for title, rows in SECTIONS:
        shown = "  ".join(name for name, _ in rows if name in names)
        lines.append(f"{title + ':':<10}{shown}")
    return "\n".join([*lines, "First time? slim init demo      Help: slim --help"])


@click.group(
    cls=SlimGroup,
    invoke_without_command=True,
    subcommand_metavar="COMMAND [ARGUMENTS]...",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, "-V", "--version", message="slim %(version)s")
@click.pass_context
def main(context: click.Context) -> None:
    """Make a trained PyTorch network smaller, and prove that it still works.

    \b
    Examples:
      slim init demo && cd demo       a recipe and hooks that run as they are
      slim check recipe.yaml          find mistakes before anything starts
      slim run recipe.yaml            train, compress, verify, export
    """
    if context.invoked_subcommand is None:
        group = context.command
        assert isinstance(group, SlimGroup)
        click.echo(welcome(group.list_commands(context)), err=True)
        context.exit(2)


main.params += _global_options(set())
