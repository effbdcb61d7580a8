"""``slim eval``: the user's own metric on a run or a file, in any of its forms."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slimcli import console
from slimcli.cli.arguments import existing
from slimcli.errors import Problem, RecipeError

if TYPE_CHECKING:
    from slimcli.artifacts.verify import Seam
    from slimcli.cli.finished import FinishedRun

ALL_FORMS = ("trained", "deploy", "onnx", "trt")
DISAGREES = 6


def _forms(_context: click.Context, _parameter: click.Parameter, text: str) -> tuple[str, ...]:
    forms = tuple(part.strip() for part in text.split(",") if part.strip())
    unknown = [form for form in forms if form not in ALL_FORMS]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(ALL_FORMS)}")
    return forms


@click.command(name="eval")
@click.argument(
    "target",
    metavar="RUN|FILE",
    type=click.Path(path_type=Path),
    callback=existing("a run folder, model.onnx or model.engine"),
)
@click.option(
    "--compare",
    callback=_forms,
    default="",
    metavar="FORM,FORM",
    help="Forms to evaluate and compare in this order: trained, deploy, onnx, trt.",
)
@click.option(
    "--run",
    "run_path",
    type=click.Path(path_type=Path),
    callback=existing("a run folder"),
    help="The run whose data and hooks to use, for a file that lies elsewhere.",
)
def command(target: Path, compare: tuple[str, ...], run_path: Path | None) -> int:
    """Evaluate a run's deploy form, or a file, with the hooks of the run.

    With --compare each form is also compared with the one before it on validation batches; exit 6
    if they differ by more than the limit.

    \b
    Examples:
      slim eval checkpoints/digits/latest
      slim eval checkpoints/digits/latest --compare trained,deploy,onnx
      slim eval checkpoints/digits/latest/artifacts/model.onnx --json
    """
    from slimcli.cli import finished

    target = target.absolute()  # the hooks, imported below, may change the current folder
    if target.is_file():
        if compare:
            raise click.UsageError("--compare is for runs; a file has one form")
        run = finished.open_finished(run_path or run_around(target))
        models = {target.name: finished.load_file(target)}
    else:
        run = finished.open_finished(run_path or target)
        models = {form: run.model_of(form) for form in compare or (run.result_form(),)}
    metrics = {name: run.evaluate(model) for name, model in models.items()}
    seams = _seams(run, models)
    if console.settings().json:
        console.document(
            {
                "version": 1,
                "run": str(run.folder.path),
                "metrics": metrics,
                "verification": [seam.summary() for seam in seams],
            }
        )
    else:
        _tell(metrics, seams)
    return 0 if all(seam.ok for seam in seams) else DISAGREES


def run_around(file: Path) -> Path:
    """The run whose artifacts folder holds the file.

    Raises:
        RecipeError: The file lies elsewhere.
    """
    folder = file.resolve().parent
    if folder.name == "artifacts" and (folder.parent / "recipe.yaml").is_file():
        return folder.parent
    raise RecipeError(
        Problem(
            "E-EVAL-RUN", "the file is in no run folder, so there are no data to evaluate it on",
            str(file), fix="name the run: --run RUN",
        )
    )  # fmt: skip


def _seams(run: FinishedRun, models: dict[str, Any]) -> list[Seam]:
    """Each form against the one before it."""
    from slimcli.artifacts import verify

    batches = run.validation_batches() if len(models) > 1 else []
    runners = {name: verify.runner(model, run.predict) for name, model in models.items()}
    return [
        verify.compare(runners[names[0]], runners[names[1]], batches, names=names)
        for names in itertools.pairwise(models)
    ]


def _tell(metrics: dict[str, dict[str, float]], seams: list[Seam]) -> None:
    columns = list(dict.fromkeys(name for values in metrics.values() for name in values))
    rows = [
        (form, *(f"{values[name]:.6g}" if name in values else "-" for name in columns))
        for form, values in metrics.items()
    ]
    console.table(("form", *columns), rows)
    for seam in seams:
        console.say(str(seam))
