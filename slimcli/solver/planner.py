"""What can be known before training: the schedule, the plan, and that one batch goes through.

Nothing here changes the model it is given or writes a file.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

from slimcli.compressor import Compressor, Plan, Schedule
from slimcli.errors import GoalError, HookError, Problem, RecipeError, RunError, SlimError
from slimcli.network.copying import deep_copy
from slimcli.network.example import Example
from slimcli.network.nested import tensors_in
from slimcli.recipe.binding import RAISED
from slimcli.recipe.frames import describe
from slimcli.recipe.hooks import check_model
from slimcli.solver.datasets import Data
from slimcli.solver.evaluation import Evaluator, missing_keyword
from slimcli.solver.job import Job, JobHooks, StageJob
from slimcli.solver.randomness import seed_all, untouched_rng
from slimcli.solver.schedule import plan_schedule
from slimcli.solver.step import checked_loss, move_batch

UNINITIALIZED = (nn.UninitializedParameter, nn.UninitializedBuffer)
HALF_PRECISION = (torch.float16, torch.bfloat16)
NO_ONNX = "or train without that file: export.onnx=false"
SINGLE_SAMPLE_WITH_NORM = "Expected more than 1 value per channel"


def fresh_model(hooks: JobHooks, seed: int) -> nn.Module:
    """What the user's ``model`` returns, built with every generator seeded.

    Raises:
        HookError: It is not a module.
    """
    seed_all(seed, "model")
    model: nn.Module = check_model(hooks.build_model(), "model", hooks.where("model"))
    _refuse_lazy(model, hooks)
    _refuse_half(model, hooks)
    return model


def _refuse_lazy(model: nn.Module, hooks: JobHooks) -> None:
    """A lazy module has no shapes yet, and what gives it some is a call only the user knows.

    Raises:
        HookError: The model was not called before it was returned.
    """
    tensors = (*model.named_parameters(), *model.named_buffers())
    lazy = [name for name, tensor in tensors if isinstance(tensor, UNINITIALIZED)]
    if lazy:
        raise HookError(
            Problem(
                "E-HOOK-MODEL",
                "`model` returned a model with lazy modules that have no shapes yet",
                hooks.where("model"),
                expected="every parameter in its shape",
                received=", ".join(lazy[:5]) + (" ..." if lazy[5:] else ""),
                fix="call the model once before you return it: model(torch.zeros(2, ...))",
            )
        )


def _refuse_half(model: nn.Module, hooks: JobHooks) -> None:
    """Weights of 8 or 11 bits: no small step changes them, and no limit of ours can be kept.

    Raises:
        HookError: Some parameters are float16 or bfloat16.
    """
    half = {name: p.dtype for name, p in model.named_parameters() if p.dtype in HALF_PRECISION}
    if half:
        name, dtype = next(iter(half.items()))
        raise HookError(
            Problem(
                "E-HOOK-MODEL",
                "`model` returned a model with weights in half precision",
                hooks.where("model"),
                expected="float32 weights",
                received=f"{str(dtype).removeprefix('torch.')} in {name} and {len(half) - 1} more",
                fix="return model.float(); config.precision: bf16-mixed or 16-mixed computes in "
                "half precision and keeps the weights in float32",
            )
        )


def teacher_model(hooks: JobHooks, seed: int, fabric: Fabric) -> nn.Module | None:
    """The teacher on the device, in eval mode and without gradients; None if there is none."""
    if hooks.teacher is None:
        return None
    seed_all(seed, "teacher")
    teacher: nn.Module = check_model(hooks.teacher(), "teacher", hooks.where("teacher"))
    return teacher.to(fabric.device).eval().requires_grad_(False)


def example_of(
    stage: StageJob, data: Data, hooks: JobHooks, fabric: Fabric, model: nn.Module
) -> Example:
    """A small batch on the device, or random inputs of ``input_shapes`` where those are given.

    Raises:
        RecipeError: The model, which is not changed, can't be run on such inputs.
    """
    training = stage.training
    if training.input_shapes is None:
        batch = move_batch(fabric, data.example_batch, training.channels_last)
        return Example(batch=batch, predict=hooks.predict_function)
    seed_all(training.seed, "input_shapes")
    inputs = tuple(torch.randn(2, *shape, device=fabric.device) for shape in training.input_shapes)
    example = Example(batch=inputs, predict=_call_with_inputs)
    trial = copied(model, hooks).to(fabric.device).eval()
    try:
        with untouched_rng(), torch.no_grad():
            example.run(trial)
    except torch.OutOfMemoryError:
        raise
    except RAISED as error:
        raise RecipeError(_wrong_input_shapes(stage, data, error)) from error
    return example


def _wrong_input_shapes(stage: StageJob, data: Data, error: BaseException) -> Problem:
    sizes = [list(each.shape[1:]) for each in tensors_in(data.example_batch) if each.dim() > 1]
    problem = Problem(
        "E-RECIPE-INPUT-SHAPES",
        f"the model can't be called with inputs of these sizes: {describe(error)}",
        "config.input_shapes",
        expected="sizes without batch"
        + (f"; tensors of a real batch have {sizes}" if sizes else ""),
        received=str([list(shape) for shape in stage.training.input_shapes or ()]),
        fix="leave input_shapes out: sizes then come from a real batch",
    )
    return stage.located(problem)


def _call_with_inputs(model: nn.Module, batch: Any) -> Any:
    return model(*batch)


def schedule_of(stage: StageJob, data: Data, hooks: JobHooks, max_steps: int | None) -> Schedule:
    """The learning rates of the whole stage."""
    accumulated = stage.training.accumulate_grad_batches
    steps = -(-len(data.train) // accumulated)
    if max_steps is not None:
        steps = min(steps, max_steps)
    return plan_schedule(hooks, stage.hook_config(), stage.training, steps)


def check_one_batch(
    model: nn.Module,
    stage: StageJob,
    data: Data,
    hooks: JobHooks,
    evaluator: Evaluator,
    exported: Example | None = None,
) -> dict[str, float]:
    """Train forward and backward and one evaluation, on a copy; returns the metrics.

    Args:
        model: Not changed.
        stage: The stage that would train it.
        data: Its sources.
        hooks: The user's functions.
        evaluator: The user's metric.
        exported: What an ONNX file will be made from; None: no file.

    Raises:
        HookError: A hook returns the wrong thing, or ``save_keyword`` is not among the metrics, or
            no ONNX file can hold what ``predict_function`` calls.
        RecipeError: ``batch_size: 1`` with a norm that needs two.
    """
    training = stage.training
    with untouched_rng():
        trial = copied(model, hooks).train()
        seed_all(training.seed, "one batch")
        batch = next(iter(data.train.batches(0)))
        moved = evaluator.move(batch.data)
        try:
            prediction = hooks.predict_function(trial, moved)
        except (SlimError, ValueError) as error:
            if SINGLE_SAMPLE_WITH_NORM in str(error):
                raise _single_sample(training.batch_size) from error
            raise
        try:
            loss = checked_loss(hooks.calculate_loss_function(prediction, moved), hooks)
        except Exception as error:
            if prediction is None:
                raise _no_prediction(hooks) from error
            raise
        torch.autograd.backward(loss)
        metrics = evaluator.run(trial, data.validation, limit=1)
        if exported is not None:
            _check_call(trial, exported, hooks)
    if training.save_keyword not in metrics:
        raise missing_keyword(hooks, training.save_keyword, metrics)
    return metrics


def exported_from(job: Job, stage: StageJob, example: Example) -> Example | None:
    """The example, if an ONNX file will be made from it at the end of this stage."""
    is_last = stage is job.stages[-1]
    return example if is_last and job.export.onnx and stage.training.save_deploy_format else None


def _check_call(model: nn.Module, example: Example, hooks: JobHooks) -> None:
    """An ONNX file holds one call of the model's forward: is there one, of tensors to tensors?

    Raises:
        HookError: There is none.
    """
    from slimcli.artifacts.onnx.capture import capture

    try:
        with torch.no_grad():
            capture(model, example)
    except RunError as error:
        problem = error.problems[0]
        if problem.code != "E-ONNX-UNSUPPORTED":
            raise
        where = problem.where or hooks.where("predict_function")
        raise HookError(replace(problem, where=where, fix=f"{problem.fix}, {NO_ONNX}")) from error


def copied(model: nn.Module, hooks: JobHooks) -> nn.Module:
    """A copy, as every analysis and every artifact begins with.

    Raises:
        HookError: The model can't be copied.
    """
    try:
        # Of a new model, what was computed from parameters is no trace of a run but a weight.
        return deep_copy(model, takes_history=False)
    except Exception as error:
        raise HookError(
            Problem(
                "E-HOOK-MODEL",
                "`model` returned a model that can't be copied",
                hooks.where("model"),
                expected="copy.deepcopy(model) to work",
                received=f"{type(error).__name__}: {str(error).splitlines()[0]}",
                fix="torch.nn.utils.parametrizations.weight_norm (or spectral_norm) in place of "
                "torch.nn.utils.weight_norm; torch.nn.utils.prune.remove(...) after "
                "torch.nn.utils.prune; "
                "no tensors with a history as attributes: run a model that keeps what it computes "
                "under torch.no_grad() before you return it",
            )
        ) from error


def _no_prediction(hooks: JobHooks) -> HookError:
    """The loss failed, and the hook to blame is the one before it."""
    return HookError(
        Problem(
            "E-HOOK-PREDICTION",
            "hook `predict_function` returned the wrong thing",
            hooks.where("predict_function"),
            expected="a prediction for calculate_loss_function",
            received="None",
            fix="return model(...)",
        )
    )


def _single_sample(batch_size: int) -> RecipeError:
    return RecipeError(
        Problem(
            "E-RECIPE-BATCH-OF-ONE",
            "config.batch_size: BatchNorm can't train on one value a channel",
            expected="at least 2 samples a process",
            received=str(batch_size),
            fix="config.batch_size=2, or a model without BatchNorm",
        )
    )


def prepared(compressor: Compressor, model: nn.Module, example: Example, plan: Plan) -> nn.Module:
    """The model to train on, with the algorithm's modules in it.

    A compiled model does not look at hooks again: code compiled for the model as it was would go on
    to run without the hooks that the algorithm put there. So what was compiled is forgotten.
    """
    model = compressor.prepare(model, example, plan)
    torch.compiler.reset()
    return model


def plan_of(
    stage: StageJob, compressor: Compressor, model: nn.Module, example: Example, schedule: Schedule
) -> Plan:
    """The compressor's plan.

    Raises:
        SlimError: A key of the recipe does not fit the model; with the place where it is written.
    """
    try:
        return compressor.plan(model, example, schedule)
    except SlimError as error:
        located = map(stage.located, error.problems)
        raise type(error)(*located, user_frames=error.user_frames) from error


def refusals_of(stage: StageJob, plan: Plan) -> list[Problem]:
    """What the plan refuses, each with the place of the key to change."""
    return [
        stage.located(
            Problem(
                "E-PLAN-REFUSED",
                f"{stage.algorithm}: {refusal.what}",
                f"config.{refusal.key}" if refusal.key else "",
                fix=refusal.fix,
            )
        )
        for refusal in plan.refusals
    ]


def refuse(stage: StageJob, plan: Plan) -> None:
    """Stop before training where the plan says that it can't work.

    Raises:
        GoalError: With every refusal and the value that would work.
    """
    if problems := refusals_of(stage, plan):
        raise GoalError(*problems)
