"""The Python API: a Solver for each algorithm, deploy files loaded, a Compressor attached.

The keys and callables are those of a recipe; the command line is a thin user of the same parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ValidationError

from slimcli.compressor import AlgorithmConfig, AlgorithmInfo
from slimcli.errors import Problem, RecipeError
from slimcli.solver.config import TrainingConfig

if TYPE_CHECKING:
    from torch import nn

    from slimcli.attachment import Attachment
    from slimcli.network.example import Example
    from slimcli.solver.job import Job, JobHooks, RunResult

REQUIRED = (
    "dataset_generator",
    "predict_function",
    "calculate_loss_function",
    "evaluate_function",
)
OPTIONAL = ("optimizer_generator", "scheduler_generator", "collate_fn", "teacher")
OTHERS = ("task_name", "init_from", "export", "name", "max_steps")


class Solver:
    """Trains and compresses a model, as ``slim run`` does.

    Args:
        model: The model, or a function that makes it. It is left as it is.
        config: Keys of the training loop and of the algorithm, and the callables
            ``dataset_generator``, ``predict_function`` and so on, in one dictionary.

    Raises:
        RecipeError: A key is unknown, missing or has the wrong value; all of them at once.
    """

    info: ClassVar[AlgorithmInfo]

    def __init__(self, model: nn.Module | Callable[[], nn.Module], config: Mapping[str, Any]):
        self.hooks, rest = _split_hooks(dict(config))
        others = {name: rest.pop(name) for name in OTHERS if name in rest}
        self.task_name = str(others.pop("task_name", self.info.name))
        self.others = others
        self.training, self.config = checked_keys(self.info, rest)
        self.model = model

    def run(self, resume: Path | str | None = None) -> RunResult:
        """Train, compress, verify, export.

        Args:
            resume: A stopped run's folder to go on with.

        Raises:
            SlimError: Anything that is not a finished run, with its exit code.
        """
        from slimcli.solver.stages import run

        return run(self.job(Path(resume) if resume else None))

    def job(self, resume: Path | None = None) -> Job:
        """What the solver is asked to do."""
        from slimcli.solver.job import Export, Job, StageJob

        others = dict(self.others)
        if others.get("init_from"):
            others["init_from"] = Path(others["init_from"])
        stage = StageJob(
            name=f"1-{self.info.name}",
            algorithm=self.info.name,
            compressor=self.info.load(),
            config=self.config,
            training=self.training,
        )
        return Job(
            task_name=self.task_name,
            stages=(stage,),
            hooks=self._bound_hooks(),
            export=Export(**others.pop("export", {})),
            recipe=self._recipe,
            changes=tuple(self._changes()),
            resume=resume,
            **others,
        )

    def _bound_hooks(self) -> JobHooks:
        from slimcli.recipe.binding import location
        from slimcli.recipe.hooks import bind
        from slimcli.solver.job import JobHooks

        bound = {name: bind(name, hook) for name, hook in self.hooks.items() if name != "teacher"}
        if "teacher" in self.hooks:
            bound["teacher"] = lambda: _built(self.hooks["teacher"])
        where = {name: location(hook) for name, hook in self.hooks.items()}
        return JobHooks(build_model=self._build_model, locations=where, **bound)

    def _build_model(self) -> Any:
        return _built(self.model)

    def _changes(self) -> Iterator[dict[str, Any]]:
        """Keys that were given and differ from the algorithm's defaults."""
        for keys in (self.training, self.config):
            plain = keys.model_dump(mode="json")
            for name in sorted(keys.model_fields_set):
                default = self.info.training_defaults.get(
                    name, type(keys).model_fields[name].default
                )
                if getattr(keys, name) != default:
                    shown = list(default) if isinstance(default, tuple) else default
                    found = {"key": f"config.{name}", "default": shown, "value": plain[name]}
                    yield {**found, "origin": "Python"}

    def _recipe(self, folder: Path) -> str:
        import yaml

        from slimcli.recipe.load import FROM_PYTHON

        content = {
            "task_name": self.task_name,
            "algorithm": self.info.name,
            "config": {
                **self.training.model_dump(mode="json"),
                **self.config.model_dump(mode="json"),
            },
        }
        head = f"# Run by slimcli.{self.info.solver} {FROM_PYTHON}\n"
        return head + yaml.safe_dump(content, sort_keys=False)


def _built(model: Any) -> Any:
    """A copy of a model, or what a function that makes one returns."""
    from torch import nn

    from slimcli.network.copying import deep_copy

    is_maker = callable(model) and not isinstance(model, nn.Module | type)
    return model() if is_maker else deep_copy(model)


def _split_hooks(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Callables and keys.

    Raises:
        RecipeError: A required hook is missing, or one is no callable.
    """
    from slimcli.recipe.keys import HOOK_ALIASES

    config = {HOOK_ALIASES.get(name, name): value for name, value in config.items()}
    hooks = {n: config.pop(n) for n in (*REQUIRED, *OPTIONAL) if config.get(n) is not None}
    config = {name: value for name, value in config.items() if name not in OPTIONAL}
    problems = [
        Problem("E-RECIPE-MISSING-HOOK", f"config has no {name!r}", "config", "a callable")
        for name in REQUIRED
        if name not in hooks
    ]
    for name, hook in hooks.items():
        if not callable(hook) and not (hasattr(hook, "update") and hasattr(hook, "compute")):
            received = type(hook).__name__
            problems.append(Problem("E-HOOK-NOT-CALLABLE", name, "config", "a callable", received))
    if problems:
        raise RecipeError(*problems)
    return hooks, config


def checked_keys(
    info: AlgorithmInfo, config: Mapping[str, Any]
) -> tuple[TrainingConfig, AlgorithmConfig]:
    """The two parts of a flat dictionary of keys, aliases resolved, validated.

    Raises:
        RecipeError: With every wrong key.
    """
    from slimcli.recipe.keys import config_table
    from slimcli.recipe.validate import suggest

    table = config_table(info)
    training: dict[str, Any] = dict(info.training_defaults)
    own: dict[str, Any] = {}
    problems: list[Problem] = []
    for key, value in config.items():
        name = table.canonical(key)
        if name is None:
            near = suggest(key, (*table.keys, *REQUIRED, *OPTIONAL, *OTHERS))
            fix = f"did you mean {near}?" if near else f"all keys: slim explain {info.name}"
            problems.append(
                Problem("E-RECIPE-UNKNOWN-KEY", f"unknown key {key!r}", "config", fix=fix)
            )
        elif name in TrainingConfig.model_fields:
            training[name] = value
        else:
            own[name] = value
    loop = _validated(TrainingConfig, training, problems)
    chosen = _validated(info.config, own, problems)
    if problems or loop is None or chosen is None:
        raise RecipeError(*problems)
    return loop, chosen


def _validated(schema: type[Any], values: dict[str, Any], problems: list[Problem]) -> Any:
    model: type[BaseModel] = schema
    try:
        return model.model_validate(values)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            key = ".".join(str(part) for part in detail["loc"])
            received = repr(detail["input"])
            problems.append(
                Problem("E-RECIPE-VALUE", f"{key}: {detail['msg']}", "config", received=received)
            )
        return None


@cache
def solver_class(info_name: str) -> type[Solver]:
    """The Solver of an algorithm, by the algorithm's name."""
    from slimcli.compressor import registry

    info = registry()[info_name]
    doc = f"{info.summary}\n\n{Solver.__doc__}"
    return type(info.solver, (Solver,), {"info": info, "__doc__": doc, "__module__": "slimcli"})


def load_deploy(run: Path | str, model: nn.Module | None = None) -> nn.Module:
    """The compressed model of a finished run, in eval mode.

    Args:
        run: Run folder, its artifacts folder, or a ``deploy.json``.
        model: A fresh model as the run's ``model`` hook makes it, changed in place; None: the
            hook named in the run's recipe is called.

    Raises:
        SlimError: A file can't be used, or the model is not the one the run started from.
    """
    from slimcli.artifacts import deploy

    loaded: nn.Module = deploy.load_deploy(run, model, build_model=_model_of_run)
    return loaded


def _model_of_run(folder: Path) -> nn.Module:
    from slimcli.recipe import load
    from slimcli.recipe.job import job_of
    from slimcli.solver.planner import fresh_model

    try:
        job = job_of(load(folder / "recipe.yaml"))
    except RecipeError as error:
        *others, last = error.problems
        if last.code == "E-RUN-PYTHON":
            raise  # it says so already
        way = "load_deploy(run, model=...), with a fresh model, needs none of the hooks"
        fix = f"{last.fix}; or {way}" if last.fix else way
        raise RecipeError(*others, replace(last, fix=fix)) from error
    return fresh_model(job.hooks, job.stages[0].training.seed)


def attach(
    model: nn.Module,
    algorithm: str,
    config: Mapping[str, Any],
    example: Example,
    *,
    steps_per_epoch: int = 1,
) -> Attachment:
    """An algorithm for a training loop of your own; see :class:`slimcli.attachment.Attachment`.

    Args:
        model: The model; use the attachment's ``model`` from here on.
        algorithm: An algorithm's name.
        config: Keys of the training loop that matter (``epoch``, ``lr``, ...) and the algorithm's.
        example: ``slimcli.Example(batch, predict)``: a real batch on the model's device, and
            ``predict(model, batch)``, which calls the model on it.
        steps_per_epoch: Optimizer steps in one of your epochs.

    Raises:
        RecipeError: A key, the algorithm or the example is wrong.
        GoalError: The plan says that it can't work.
    """
    from slimcli.attachment import Attachment
    from slimcli.recipe.keys import algorithms, find_algorithm
    from slimcli.recipe.validate import suggest

    info = find_algorithm(algorithm)
    if info is None:
        near = suggest(algorithm, algorithms())
        fix = f"did you mean {near}?" if near else ", ".join(algorithms())
        raise RecipeError(
            Problem("E-RECIPE-UNKNOWN-ALGORITHM", f"no algorithm called {algorithm!r}", fix=fix)
        )
    _check_example(example)
    training, own = checked_keys(info, config)
    return Attachment(model, info.load()(own), training, example, steps_per_epoch)


def _check_example(example: Any) -> None:
    """A batch alone does not say how the model is run on it.

    Raises:
        RecipeError: It is no example, or its parts have changed places.
    """
    from slimcli.network.example import Example

    predict: Any = getattr(example, "predict", None)
    received = ""
    if not isinstance(example, Example):
        received = f"a {type(example).__name__}"
    elif not callable(predict):
        received = f"a {type(predict).__name__} as predict"
    if received:
        raise RecipeError(
            Problem(
                "E-ATTACH-EXAMPLE",
                "attach: the example is none",
                expected="slimcli.Example(batch, predict)",
                received=received,
                fix="slimcli.Example(next(iter(loader)), lambda model, batch: model(batch[0])), or "
                "whatever runs your model on a batch",
            )
        )
