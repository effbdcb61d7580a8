"""The plan of every stage before anything starts, and a trial on copies; leaves nothing behind."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

from slimcli.artifacts import deploy, verify
from slimcli.artifacts.events import EventLog
from slimcli.compressor import Compressor, Plan, Refusal, Schedule
from slimcli.errors import Problem, RecipeError, RunError, VerificationError
from slimcli.network.copying import deep_copy
from slimcli.network.example import Example
from slimcli.solver import planner
from slimcli.solver.data import Sharding
from slimcli.solver.datasets import Data, build_data, generate_datasets
from slimcli.solver.devices import make_fabric
from slimcli.solver.evaluation import Evaluator
from slimcli.solver.job import Job, StageJob
from slimcli.solver.loop import Trainer
from slimcli.solver.starting_weights import start_weights
from slimcli.solver.step import move_batch
from slimcli.solver.subject import Subject, Surroundings

TRIAL_STEPS = 3


@dataclass(frozen=True)
class StageForecast:
    """What is known of a stage before training.

    Attributes:
        name: The stage.
        algorithm: Its algorithm.
        plan: What its compressor plans on today's model.
        schedule: Its learning rates.
        is_certain: No stage before it changes widths, so that its plan is about the very model it
            will get, but for the weights; or it is refused, and would be with any model.
        metrics: The metrics of one validation batch.
        notices: What to know about the data.
        trial: What a trial step and deployment showed, by name; empty without a trial.
        refusals: What the plan refuses.
    """

    name: str
    algorithm: str
    plan: Plan
    schedule: Schedule
    is_certain: bool
    metrics: dict[str, float]
    notices: tuple[str, ...]
    trial: dict[str, str] = field(default_factory=dict)
    refusals: tuple[Problem, ...] = ()


def forecast(job: Job, *, trial: bool = False) -> list[StageForecast]:
    """Plan every stage on the user's model as it is today.

    Args:
        job: What would be run.
        trial: Also take a few steps on a copy, deploy it and make the ONNX file that is asked for.

    Raises:
        SlimError: Data, model or hooks are wrong, or no ONNX file can be made.
        VerificationError: The trial's deployed model differs from the trained one.
    """
    first = job.stages[0].training
    fabric = make_fabric(first.model_copy(update={"num_processes": None, "devices": _one(first)}))
    datasets = generate_datasets(job.hooks, first.seed)
    found = []
    is_certain = True
    for stage in job.stages:
        found.append(_stage(job, stage, fabric, datasets, (is_certain, trial)))
        is_certain = is_certain and _keeps_widths(stage)
    return found


def _one(training: Any) -> Any:
    """A plan needs one device."""
    return training.devices if training.devices == "cpu" else training.devices[:1]


@dataclass(frozen=True)
class Look:
    """One stage looked at with a model that is not changed."""

    data: Data
    evaluator: Evaluator
    example: Example
    schedule: Schedule
    metrics: dict[str, float]
    compressor: Compressor
    plan: Plan


def look(
    job: Job, stage: StageJob, fabric: Fabric, datasets: tuple[Any, ...], model: nn.Module
) -> Look:
    """Schedule, one batch and plan of a stage, were it to start from ``model``."""
    data = build_data(datasets, job.hooks, stage.training, model, Sharding(), lambda each: each)
    evaluator = Evaluator(
        job.hooks, lambda each: move_batch(fabric, each, stage.training.channels_last)
    )
    example = planner.example_of(stage, data, job.hooks, fabric, model)
    schedule = planner.schedule_of(stage, data, job.hooks, job.max_steps)
    exported = planner.exported_from(job, stage, example)
    metrics = planner.check_one_batch(model, stage, data, job.hooks, evaluator, exported)
    compressor = stage.compressor(stage.config)
    plan = planner.plan_of(stage, compressor, model, example, schedule)
    return Look(data, evaluator, example, schedule, metrics, compressor, plan)


def refuse_later_stages(
    job: Job, fabric: Fabric, datasets: tuple[Any, ...], model: nn.Module
) -> None:
    """Stop before the first stage where a later one is certain to fail.

    Certain are the stages up to and with the first one that changes widths: the model they get is
    the one at hand, but for the weights. Of the others only what no model could change is certain.

    Raises:
        GoalError: A later stage refuses.
    """
    is_certain = True
    for before, stage in zip(job.stages, job.stages[1:], strict=False):
        is_certain = is_certain and _keeps_widths(before)
        try:
            plan = look(job, stage, fabric, datasets, model).plan
        except RecipeError:
            if is_certain:
                raise
            continue  # names may mean something only in the model of the stage before
        if not is_certain:
            plan.refusals = for_any_model(plan)
        planner.refuse(stage, plan)


def _keeps_widths(stage: StageJob) -> bool:
    return not stage.compressor.compresses or stage.compressor.keeps_widths


def for_any_model(plan: Plan) -> list[Refusal]:
    """The refusals that another model would not change, though it may need another value."""
    again = "as far as today's model tells: judged again on the one that the stage gets"
    return [
        replace(refusal, fix=f"{refusal.fix}, {again}" if refusal.fix else "")
        for refusal in plan.refusals
        if refusal.is_for_any_model
    ]


def _stage(
    job: Job, stage: StageJob, fabric: Fabric, datasets: tuple[Any, ...], flags: tuple[bool, bool]
) -> StageForecast:
    is_certain, wants_trial = flags
    model = start_weights(job, planner.fresh_model(job.hooks, job.stages[0].training.seed))
    model.to(fabric.device)
    seen = look(job, stage, fabric, datasets, model)
    if not is_certain and (refusals := for_any_model(seen.plan)):
        seen.plan.refusals, is_certain = refusals, True
    result = StageForecast(
        stage.name,
        stage.algorithm,
        seen.plan,
        seen.schedule,
        is_certain,
        seen.metrics,
        seen.data.notices,
        refusals=tuple(planner.refusals_of(stage, seen.plan)),
    )
    if not wants_trial or seen.plan.refusals:
        return result
    subject = Subject(deep_copy(model), seen.compressor, seen.plan, seen.example)
    around = Surroundings(
        fabric=fabric,
        stage=_short(stage),
        hooks=job.hooks,
        data=seen.data,
        schedule=seen.schedule,
        evaluator=seen.evaluator,
        events=EventLog(None),
        check_stop=lambda: None,
        save=lambda is_best: None,
    )
    shown, plain = _trial(subject, around)
    if stage is not job.stages[-1]:
        shown["handover"] = _hand_over(subject, around, job.stages[0].training.seed)
    if planner.exported_from(job, stage, seen.example) is not None:
        shown["onnx"] = _export(plain, seen.example)
    return replace(result, trial=shown)


def _short(stage: StageJob) -> StageJob:
    """The same stage without compilation, whose minutes a trial should not cost."""
    return replace(stage, training=stage.training.model_copy(update={"compile": False}))


def _trial(subject: Subject, around: Surroundings) -> tuple[dict[str, str], nn.Module]:
    """A few real steps on a copy, then deploy and compare; what that showed, and the result."""
    compressor, example = subject.compressor, subject.example
    subject.model = planner.prepared(compressor, subject.model, example, subject.plan)
    subject.model.to(around.fabric.device)
    compressor.calibrate(subject.model, _examples(around, example))
    shown: dict[str, str] = {}
    if around.stage.training.epoch > 0:
        shown["trial"] = _steps(Trainer(subject, around), around)
    shown["deploy"], plain = _deploy(compressor, subject.model, example)
    return shown, plain


def _examples(around: Surroundings, example: Example) -> list[Example]:
    batch = next(iter(around.data.train.batches(0)))
    return [Example(around.evaluator.move(batch.data), around.hooks.predict_function)]


def _steps(trainer: Trainer, around: Surroundings) -> str:
    """Timed steps, and what the whole stage would take at that pace."""
    seconds: list[float] = []
    for batch, _ in zip(around.data.train.batches(0), range(TRIAL_STEPS), strict=False):
        started = time.perf_counter()
        trainer.try_step(batch)
        seconds.append(time.perf_counter() - started)
    pace = min(seconds)
    total = pace * around.schedule.steps
    from slimcli.artifacts.event_lines import seconds as in_words

    device = around.fabric.device
    return (
        f"{len(seconds)} steps ok · {1000 * pace:.0f} ms/step on {device} · "
        f"{around.schedule.steps} steps take about {in_words(total)}"
    )


def _deploy(compressor: Compressor, model: nn.Module, example: Example) -> tuple[str, nn.Module]:
    """Deploy the copy as it is and compare; returns what to say and the deployed model.

    Raises:
        VerificationError: The two differ.
    """
    with torch.no_grad():
        plain = compressor.deploy(model)
    seam = verify.compare(
        verify.runner(model, example.predict),
        verify.runner(plain, example.predict),
        [example.batch],
        names=("trained", "deploy"),
    )
    _require(seam, "E-VERIFY-DEPLOY", "deploy differs from trained in the trial")
    return _agreement(seam), plain


def _hand_over(subject: Subject, around: Surroundings, seed: int) -> str:
    """Make of the copy what the next stage would get, and load it as that stage would.

    Raises:
        RunError: The next stage could get nothing, whatever training does to the weights.
        VerificationError: It would get another model.
    """
    batches = _examples(around, subject.example)
    plain = subject.compressor.handover(subject.model, batches).eval()
    tensors, description = deploy.describe(plain, planner.fresh_model(around.hooks, seed))
    loaded = deploy.apply(planner.fresh_model(around.hooks, seed), description, tensors)
    loaded.to(around.fabric.device)
    predict, batch = subject.example.predict, subject.example.batch
    seam = verify.compare(
        verify.runner(plain, predict),
        verify.runner(loaded, predict),
        [batch],
        names=("handed over", "loaded"),
    )
    what = "the next stage would load another model than was handed over, in the trial"
    _require(seam, "E-VERIFY-HANDOVER", what)
    return _agreement(seam)


def _require(seam: verify.Seam, code: str, what: str) -> None:
    """Raise a VerificationError unless the two sides agree."""
    if not seam.ok:
        limit, received = f"at most {seam.limit:.1e}", f"{seam.max_abs:.1e}"
        raise VerificationError(Problem(code, what, expected=limit, received=received))


def _agreement(seam: verify.Seam) -> str:
    return f"ok  max difference {seam.max_abs:.1e} (limit {seam.limit:.1e})"


def _export(plain: nn.Module, example: Example) -> str:
    """Make the ONNX file of the deployed copy, check it, throw it away.

    Raises:
        RunError: There can be no such file, whatever training does to the weights.
        VerificationError: It computes something else.
    """
    from slimcli.artifacts import onnx

    with tempfile.TemporaryDirectory(prefix="slim-trial-") as folder:
        try:
            report = onnx.export(plain, example, Path(folder) / "model.onnx")
        except (RunError, VerificationError) as error:
            problem = error.problems[0]
            in_trial = Path(problem.where).is_relative_to(folder)  # a file that is gone by then
            told = replace(
                problem,
                what=f"{problem.what} (tried on the model before training)",
                where="" if in_trial else problem.where,
                fix=f"{problem.fix}, {planner.NO_ONNX}" if problem.fix else planner.NO_ONNX[3:],
            )
            raise type(error)(told, user_frames=error.user_frames) from error
    return f"{_agreement(report.seam)}, tried with {report.exporter}"
