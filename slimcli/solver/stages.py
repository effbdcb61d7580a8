"""A whole run: stage after stage, then the artifacts; how it ends is written down in any case."""

from __future__ import annotations

import shlex
import signal
import warnings
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric
from torch import nn

from slimcli.artifacts import checkpoint, deploy, process, run_folder
from slimcli.artifacts.finish import Finished, FinishRequest, finish_run
from slimcli.compressor import Compressor
from slimcli.errors import Problem, RunError, SlimError
from slimcli.network.handover import NormLeftOut
from slimcli.solver import peers, requirements
from slimcli.solver.data import batch_size_of
from slimcli.solver.devices import determinism, make_fabric
from slimcli.solver.evaluation import Evaluator, first_batches
from slimcli.solver.forecast import refuse_later_stages
from slimcli.solver.interrupts import Signals, StopNow, StopRequested, as_error
from slimcli.solver.job import Job, RunResult
from slimcli.solver.planner import fresh_model
from slimcli.solver.run import Run, begin
from slimcli.solver.stage import Stage

VERIFICATION_BATCHES = 4
STORED = ("stage", "record", "events_bytes", "position", "model", "optimizer", "rng")
"""What every checkpoint of a run holds, among other things."""


def run(job: Job) -> RunResult:
    """Do the whole job.

    Returns:
        The run folder and its summary; the goal is met and every artifact verified.

    Raises:
        SlimError: Anything else, with its exit code; summary.json says the same.
    """
    stored = _stored(job.resume) if job.resume else None
    with Signals(job.on_signal) as signals, determinism(job.stages[0].training):
        current: Run | None = None
        fabric: Fabric | None = None
        try:
            fabric = make_fabric(job.stages[0].training)
            peers.meet()
            current = begin(job, fabric, signals, stored)
            with current.events.hearing_warnings():
                _all_stages(current, stored)
        except StopRequested as stop:
            raise _interrupted(current, stop.number, is_saved=True) from None
        except StopNow as stop:
            raise _interrupted(current, stop.number, is_saved=False) from None
        except BaseException as error:
            signals.is_ending = True
            failed = _failed(current, fabric, error)
            if failed is error:
                raise
            raise failed from error
        else:
            _end(current, "finished", 0)
        finally:
            if current is not None and current.is_main:
                process.release(current.folder.path)
    assert current is not None
    return RunResult(current.folder.path, current.record)


def _stored(path: Path) -> dict[str, Any]:
    """The checkpoint a run goes on from.

    Raises:
        RunError: There is none, or it is none of a run.
    """
    last = run_folder.open_run(path).last
    content = checkpoint.load(last)
    missing = [key for key in STORED if key not in content]
    if missing:
        raise RunError(
            Problem(
                "E-CHECKPOINT-DAMAGED",
                "this is no checkpoint of a run",
                str(last),
                expected="everything a run goes on from",
                received=f"nothing under {', '.join(missing[:3])}",
                fix=checkpoint.START_AGAIN,
            )
        )
    return content


STATUS = {4: "goal_missed", 6: "not_verified", 130: "interrupted", 143: "interrupted"}
"""What an exit code says of a run; any other says that it failed."""


def _failed(current: Run | None, fabric: Fabric | None, error: BaseException) -> BaseException:
    """Write down how the run ended, here and for its other processes; the error to raise."""
    folder = current.folder.path if current is not None else None
    another = peers.another_failed(error, fabric, folder)
    failed = another or error
    # Raised by the user's code, as no signal raises it here: the command ends as after Ctrl-C.
    code = 130 if isinstance(failed, KeyboardInterrupt) else 1
    exit_code = failed.exit_code if isinstance(failed, SlimError) else code
    if another is None:
        peers.report(error, exit_code)
    elif current is not None:
        current.record["notes"].append(another.note)
        with suppress(SlimError):
            # Not for the listeners: whoever reads them also reads the other process, or the error.
            current.events.keep("notice", text=another.note, level="warning")
    _end(current, STATUS.get(exit_code, "failed"), exit_code)
    return failed


def _end(current: Run | None, status: str, exit_code: int) -> None:
    """Write down how the run ended; a disk that is full must not hide why."""
    if current is None:
        return
    current.signals.is_ending = True
    must_tell = status in ("finished", "interrupted")
    with nullcontext() if must_tell else suppress(SlimError):
        current.write_summary(status, exit_code)
        current.events.emit(
            "run_end",
            status=status,
            exit_code=exit_code,
            seconds=round(current.seconds(), 3),
            folder=str(current.folder.path),
        )
    with nullcontext() if must_tell else suppress(SlimError):
        current.events.close()


def _interrupted(current: Run | None, number: int, is_saved: bool) -> SlimError:
    name = signal.Signals(number).name
    if current is not None and not current.is_main:
        raise SystemExit(0)  # the first process tells how it ended
    if current is None or not current.folder.last.exists():
        return as_error(number, f"{name}: stopped before the first checkpoint", "")
    current.signals.is_ending = True
    last = current.shown(current.folder.last)
    if is_saved:
        current.events.emit("interrupted", signal=name, path=last)
    error = as_error(
        number,
        f"{name}: saved {last}" if is_saved else f"{name}: stopped; the last checkpoint is {last}",
        f"slim resume {shlex.quote(current.shown(current.folder.path))}",
    )
    _end(current, "interrupted", error.exit_code)
    return error


def _all_stages(current: Run, stored: dict[str, Any] | None) -> None:
    first = stored["stage"] if stored else 0
    if stored is None and len(current.job.stages) > 1:
        model = current.start_model(0)
        refuse_later_stages(current.job, current.fabric, current.datasets, model)
    for index in range(first, len(current.job.stages)):
        stage = Stage(current, index, stored if index == first else None)
        try:
            stage.train()
        except StopRequested:
            stage.save(False)
            if current.fabric.world_size > 1:
                current.fabric.barrier()  # a process that ends early would take the first with it
            raise
        _note_stage(current, stage)
        _note_goal(current, stage)
        compressor, model = stage.best_model()
        if stage.is_last:
            _finish(current, stage, compressor, model)
        else:
            _hand_over(current, stage, compressor, model)


def _note_stage(current: Run, stage: Stage) -> None:
    """One entry a stage in the summary; a stage that is done again replaces its entry."""
    best, goal = stage.trainer.best, stage.plan.goal
    entry = {
        "name": stage.job.name,
        "algorithm": stage.job.algorithm,
        "epochs": stage.job.training.epoch,
        "best": {
            "metric": stage.job.training.save_keyword,
            "value": best.value,
            "epoch": best.epoch,
            "metrics": best.metrics,
        },
        "goal": {"name": goal.name, "target": goal.target} if goal else None,
        "settings": stage.plan.settings,
        "notes": stage.plan.notes,
        "warnings": [*stage.schedule.warnings, *stage.plan.warnings],
    }
    stages = [each for each in current.record["stages"] if each["name"] != stage.job.name]
    current.record["stages"] = [*stages, entry]


def _note_goal(current: Run, stage: Stage, numbers: Mapping[str, float] | None = None) -> None:
    """Whether the goal was reached, and by which number; without a result the number is null."""
    goal = stage.plan.goal
    if goal is None:
        current.record["goal"] = None
        return
    value = (numbers or {}).get(goal.name)
    is_met = stage.trainer.best.value is not None and (value is None or value <= goal.target)
    current.record["goal"] = {
        "name": goal.name,
        "target": goal.target,
        "reached": is_met,
        "value": value,
    }


def _hand_over(current: Run, stage: Stage, compressor: Compressor, model: nn.Module) -> None:
    """Leave the next stage a plain model, as files, so that a resume finds it too."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", NormLeftOut)
        plain = compressor.handover(model, stage.training_batches(stage.job.training.epoch))
    for each in told:
        if issubclass(each.category, NormLeftOut):
            current.note(f"{stage.job.name}: {each.message}")
        else:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    if current.is_main:
        folder = current.folder.handover(stage.job.name)
        folder.mkdir(parents=True, exist_ok=True)
        deploy.save(folder, plain, fresh_model(current.job.hooks, current.seed))
    if current.fabric.world_size > 1:
        current.fabric.barrier()


def _finish(current: Run, stage: Stage, compressor: Compressor, model: nn.Module) -> None:
    """Artifacts, numbers for the summary, and what was required of them."""
    if not current.is_main:
        return
    job, training = current.job, stage.job.training
    # The other processes have gone: no stop signal is asked of them any more.
    evaluator = Evaluator(job.hooks, stage.evaluator.move, current.signals.check, current.note)
    request = FinishRequest(
        model=model,
        compressor=compressor,
        fresh_model=lambda: fresh_model(job.hooks, current.seed),
        example=stage.example,
        samples=batch_size_of(stage.example.batch),
        predict=job.hooks.predict_function,
        batches=[
            evaluator.move(batch.data)
            for batch in first_batches(stage.data.validation, VERIFICATION_BATCHES)
        ],
        evaluate=lambda each: evaluator.run(each, stage.data.validation),
        folder=current.folder.artifacts,
        deploy=training.save_deploy_format,
        onnx=job.export.onnx,
        metadata={"task_name": job.task_name, "algorithm": stage.job.algorithm},
        emit=current.events.emit,
    )
    finished = Finished(model, 0, 0)
    try:
        finish_run(request, finished)
    finally:
        _note_result(current, stage, finished)
    if stage.data.test is not None:
        tested = evaluator.run(finished.plain, stage.data.test)
        current.record["final"]["test_metrics"] = tested
    else:
        current.record["notes"].append(
            "no test set was given: the validation set also chose the checkpoint"
        )
    requirements.check_result(job.requirements, current.record, current.shown(current.folder.path))


def _note_result(current: Run, stage: Stage, finished: Finished) -> None:
    record = current.record
    record["final"] = {
        "metrics": finished.metrics.get("deploy", finished.metrics.get("trained", {})),
        "metrics_by_form": finished.metrics,
        "macs": finished.macs,
        "params": finished.params,
        "file_bytes": finished.file_bytes,
    }
    record["verification"] = finished.seams
    record["notes"] += finished.notes
    _note_goal(current, stage, {"macs": finished.macs, "params": finished.params})
    modules = dict(finished.plain.named_modules())
    for row in record["layers"]:
        row["channels_after"] = _channels(modules.get(row["name"]), row["channels_before"])


def _channels(module: nn.Module | None, before: int) -> int:
    for name in ("out_channels", "out_features", "num_features"):
        if isinstance(value := getattr(module, name, None), int):
            return value
    return before
