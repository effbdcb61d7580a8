"""What the solver is asked to do, as data: no file format, no command line, no algorithm's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from slimcli.compressor import AlgorithmConfig, Compressor
from slimcli.errors import Problem
from slimcli.solver.config import TrainingConfig

Hook = Callable[..., Any]


@dataclass(frozen=True)
class JobHooks:
    """The user's functions, each taking our order of arguments by position.

    Attributes:
        build_model: ``() -> nn.Module``, a fresh model.
        dataset_generator: ``() -> (train, validation)`` or ``(train, validation, test)``, datasets
            or DataLoaders.
        predict_function: ``(model, batch) -> prediction``.
        calculate_loss_function: ``(prediction, batch) -> scalar tensor``.
        evaluate_function: ``(prediction, batch) -> {name: number}``, or an object with
            ``update(prediction, batch)`` and ``compute() -> {name: number}``.
        optimizer_generator: ``(config, groups) -> Optimizer``; None: SGD.
        scheduler_generator: ``(config, optimizer) -> scheduler``; None: cosine.
        collate_fn: For the loaders we build; None: torch's default.
        teacher: A teacher model's builder; None: no teacher.
        locations: ``file:line`` of each hook, for messages.
    """

    build_model: Hook
    dataset_generator: Hook
    predict_function: Hook
    calculate_loss_function: Hook
    evaluate_function: Any
    optimizer_generator: Hook | None = None
    scheduler_generator: Hook | None = None
    collate_fn: Hook | None = None
    teacher: Hook | None = None
    locations: Mapping[str, str] = field(default_factory=dict)

    def where(self, name: str) -> str:
        """``hooks.py:20`` of a hook, or an empty string."""
        return self.locations.get(name, "")

    def stateful(self) -> dict[str, Any]:
        """The hooks that carry state: objects with ``state_dict`` and ``load_state_dict``."""
        found = {}
        for name in ("predict_function", "calculate_loss_function", "evaluate_function"):
            hook = getattr(self, name)
            hook = getattr(hook, "__wrapped__", hook)
            if hasattr(hook, "state_dict") and hasattr(hook, "load_state_dict"):
                found[name] = hook
        return found


@dataclass(frozen=True)
class StageJob:
    """One algorithm and the training it gets.

    Attributes:
        name: Unique in the job, e.g. ``1-finetune``.
        algorithm: The algorithm's name, for summary and messages.
        compressor: Its Compressor class.
        config: Its own validated keys.
        training: Keys of the loop.
        places: Key of its config -> (``file:line:column``, the line with carets); empty for a job
            that was made in Python.
    """

    name: str
    algorithm: str
    compressor: type[Compressor]
    config: AlgorithmConfig
    training: TrainingConfig
    places: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def located(self, problem: Problem) -> Problem:
        """A problem with ``config.KEY`` knows where that key is written."""
        key = problem.where.removeprefix("config.")
        if key == problem.where or key not in self.places:
            return problem
        where, excerpt = self.places[key]
        return replace(problem, where=where, excerpt=excerpt)

    def hook_config(self) -> dict[str, Any]:
        """What ``optimizer_generator`` and ``scheduler_generator`` get as ``config``."""
        return {**self.training.model_dump(), **self.config.model_dump()}


@dataclass(frozen=True)
class Requirement:
    """``acc>=0.9``: a condition on the final metrics; missed means exit 4.

    Attributes:
        name: A metric, ``macs`` or ``params``. For the last two a value of at most 1 is a fraction
            of the baseline.
        operator: ``>=`` or ``<=``.
        value: The bound.
    """

    name: str
    operator: str
    value: float

    def holds(self, actual: float) -> bool:
        """Whether the bound is kept.

        >>> Requirement("acc", ">=", 0.9).holds(0.91)
        True
        """
        return actual >= self.value if self.operator == ">=" else actual <= self.value

    def __str__(self) -> str:
        return f"{self.name}{self.operator}{self.value:g}"


@dataclass(frozen=True)
class Export:
    """Which artifacts to make of the result."""

    onnx: bool = True
    trt: bool = False


@dataclass(frozen=True)
class Job:
    """A whole run: stage after stage, one run folder.

    Attributes:
        task_name: Folder below ``save_dir``.
        stages: At least one.
        hooks: The user's functions.
        export: Artifacts to make at the end.
        name: Name of the run folder; empty: the time.
        resume: Run folder to go on with; None: a new one.
        max_steps: Stop each epoch after so many optimizer steps; None: whole epochs.
        requirements: What the result must satisfy.
        recipe: ``(run folder) -> text``: the complete recipe as YAML, runnable from there.
        init_from: Weights the first stage starts from: a run folder or a file; None: the model's.
        recipe_source: The user's own file, untouched; empty for the Python API.
        changes: What differs from the defaults: ``key``, ``default``, ``value``, ``origin``.
        code: Source files of the hooks, copied into the run folder.
        listeners: Called with every event, a dictionary.
        on_signal: Told of the first Ctrl-C, from the signal handler.
        started_in: Where a relative ``save_dir`` begins; absolute, since hooks may change the
            current folder.
    """

    task_name: str
    stages: tuple[StageJob, ...]
    hooks: JobHooks
    export: Export = field(default_factory=Export)
    name: str = ""
    resume: Path | None = None
    max_steps: int | None = None
    requirements: tuple[Requirement, ...] = ()
    recipe: Callable[[Path], str] = lambda folder: ""
    init_from: Path | None = None
    recipe_source: str = ""
    changes: tuple[dict[str, Any], ...] = ()
    code: tuple[Path, ...] = ()
    listeners: tuple[Callable[[dict[str, Any]], None], ...] = ()
    on_signal: Callable[[str], None] = lambda name: None
    started_in: Path = field(default_factory=Path.cwd)


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves.

    Attributes:
        folder: The run folder.
        summary: The content of its summary.json.
    """

    folder: Path
    summary: dict[str, Any]

    @property
    def exit_code(self) -> int:
        """0, or the reason the goal or a check was missed."""
        return int(self.summary["exit_code"])
