"""``slim init``: a recipe and hooks that run as they are, on generated data."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from slimcli import console
from slimcli.cli import resources
from slimcli.compressor import AlgorithmInfo
from slimcli.errors import Problem, RecipeError

TASKS = {"synthetic": "acc", "classification": "acc", "segmentation": "miou", "detection": "iou"}
"""Task -> the metric that chooses the best checkpoint."""

BASE = "finetune"
"""The algorithm that trains a model before another one compresses it."""

DEMO = {"epoch": 8, "lr": 0.05, "batch_size": 32, "test_batch_size": 64, "log_interval": 20}
"""Keys of the loop for a run of less than a minute on a CPU."""

HOOKS = (
    "dataset_generator",
    "predict_function",
    "calculate_loss_function",
    "evaluate_function",
)


def complete_algorithms(
    _context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Names of algorithms."""
    from slimcli.recipe import keys

    return [CompletionItem(each) for each in keys.algorithms() if each.startswith(incomplete)]


@click.command(name="init")
@click.argument("folder", type=click.Path(path_type=Path), default=Path("."), metavar="[DIR]")
@click.option("--algo", default=BASE, shell_complete=complete_algorithms, show_default=True)
@click.option("--task", type=click.Choice(list(TASKS)), default="synthetic", show_default=True)
@click.option("--full", is_flag=True, help="Write every key, with what it means.")
@click.option("--force", is_flag=True, help="Overwrite recipe.yaml and hooks.py.")
def command(folder: Path, algo: str, task: str, full: bool, force: bool) -> None:
    """A recipe.yaml and hooks.py that run as they are, on generated data.

    \b
    Examples:
      slim init demo && cd demo && slim run recipe.yaml
      slim init demo --algo NAME --task segmentation
      slim init . --full
    """
    info = _algorithm(algo)
    recipe, hooks = folder / "recipe.yaml", folder / "hooks.py"
    for path in (recipe, hooks):
        if path.exists() and not force:
            fix = "name another folder, or overwrite with --force"
            raise RecipeError(Problem("E-INIT-EXISTS", f"{path} is already there", fix=fix))
    name = folder.resolve().name or "demo"
    template = resources.folder("hooks_templates") / f"{task}.py"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        hooks.write_text(template.read_text(encoding="utf-8"), encoding="utf-8")
        recipe.write_text(recipe_text(name, info, TASKS[task], full), encoding="utf-8")
    except OSError as error:
        what = f"cannot write {error.filename}: {error.strerror}"
        fix = "name a folder that can be written: slim init FOLDER"
        raise RecipeError(Problem("E-INIT-WRITE", what, fix=fix)) from None
    if console.settings().json:
        console.document({"version": 1, "recipe": str(recipe), "hooks": str(hooks)})
    else:
        console.result(str(recipe))
    console.say(f"{hooks}  lines to change are marked # EDIT")
    enter = "" if folder == Path(".") else f"cd {shlex.quote(str(folder))} && "
    console.say(f"Next: {enter}slim run recipe.yaml")


def _algorithm(name: str) -> AlgorithmInfo:
    from slimcli.recipe import keys
    from slimcli.recipe.validate import suggest

    info = keys.find_algorithm(name)
    if info is None:
        close = suggest(name, keys.algorithms())
        fix = f"did you mean {close}?" if close else f"one of {', '.join(keys.algorithms())}"
        raise RecipeError(Problem("E-RECIPE-UNKNOWN-ALGORITHM", f"no algorithm {name}", fix=fix))
    return info


def recipe_text(task_name: str, info: AlgorithmInfo, metric: str, full: bool) -> str:
    """The recipe: a base model is trained, then compressed; keys worth looking at, or all."""
    from slimcli.recipe.dump import dump

    demo = {**DEMO, "save_keyword": metric}
    shared = {key: value for key, value in demo.items() if key not in info.training_defaults}
    base = {key: value for key, value in demo.items() if key in info.training_defaults}
    head: dict[str, Any] = {"task_name": task_name}
    if info.name == BASE:
        head["algorithm"] = info.name
    head |= {"model": "hooks.py:build_model", "hooks": {each: f"hooks.py:{each}" for each in HOOKS}}
    parts = [
        "# slim run recipe.yaml      less than a minute on two CPU cores, generated data\n",
        f"# {info.name}: {info.summary}\n",
        dump(head),
        "config:\n",
        _keys(_loop_keys(info) | shared if full else shared, info, "  "),
    ]
    if info.name != BASE:
        own = _own_keys(info) | info.example if full else info.example
        parts += [
            "stages:\n",
            f"  # {BASE} makes the model to compress; leave it out if yours is trained\n",
            f"  - name: base\n    algorithm: {BASE}\n",
            f"    config:\n{_keys(base, info, ' ' * 6)}" if base else "",
            f"  - name: small\n    algorithm: {info.name}\n",
            f"    config:\n{_keys(own, info, ' ' * 6)}" if own else "",
        ]
    return "".join([*parts, dump({"export": {"onnx": True, "trt": False}})])


def _loop_keys(info: AlgorithmInfo) -> dict[str, Any]:
    """Every key of the loop that stages can share, with its default."""
    from slimcli.solver.config import TrainingConfig

    fields = TrainingConfig.model_fields.items()
    special = info.training_defaults if info.name != BASE else {}
    return {name: field.get_default() for name, field in fields if name not in special}


def _own_keys(info: AlgorithmInfo) -> dict[str, Any]:
    """Every key of the algorithm, and of the loop where it has its own default."""
    fields = info.config.model_fields.items()
    return info.training_defaults | {name: field.get_default() for name, field in fields}


def _keys(values: Mapping[str, Any], info: AlgorithmInfo, indent: str) -> str:
    """The keys, each below what it means."""
    from slimcli.solver.config import TrainingConfig

    fields = {**TrainingConfig.model_fields, **info.config.model_fields}
    return "".join(_key(name, values[name], fields[name].description, indent) for name in values)


def _key(name: str, value: Any, description: str | None, indent: str) -> str:
    """One key below what it means."""
    from slimcli.recipe.dump import dump

    listed = list(value) if isinstance(value, tuple) else value
    lines = textwrap.wrap(description or "", 92 - len(indent), break_on_hyphens=False)
    comment = "".join(f"{indent}# {line}\n" for line in lines)
    return comment + textwrap.indent(dump({name: listed}), indent)
