"""The weights that training starts from: the model's own, or those that ``init_from`` names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from slimcli.artifacts.checkpoint import STATE_DICT, stored_weights
from slimcli.errors import HookError, Problem, RecipeError, RunError
from slimcli.solver.job import Job

CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def start_weights(job: Job, model: nn.Module) -> nn.Module:
    """The model with the weights of ``init_from``, where that is given.

    Raises:
        RecipeError: They are not weights of this model.
        HookError: Layers are float64 and an ONNX file is asked for that can't hold them.
    """
    _refuse_double(job, model)
    if job.init_from is None:
        return model
    try:
        state = stored_weights(job.init_from)
    except RunError as error:  # not a run of ours that is damaged: a file that the recipe names
        (problem,) = error.problems
        fix = STATE_DICT if job.init_from.is_file() else problem.fix
        what = f"init_from: {problem.what}"
        raise RecipeError(
            replace(problem, code="E-RECIPE-INIT-FROM", what=what, fix=fix)
        ) from error
    wrong = model_differences(model, state)
    if wrong:
        raise RecipeError(
            Problem(
                "E-RECIPE-INIT-FROM",
                "init_from: these are not weights of this model",
                str(job.init_from),
                expected="every tensor of the model, in its shape",
                received=", ".join(wrong[:5]) + (" ..." if wrong[5:] else ""),
                fix=_without_prefix(model, state)
                or "a checkpoint of the same model in its training form",
            )
        )
    model.load_state_dict(state)
    return model


def _without_prefix(model: nn.Module, state: dict[str, Any]) -> str:
    """What to do about names that a wrapper (DataParallel, torch.compile) put something before."""
    own = next(iter(model.state_dict()), "")
    prefixes = (name.removesuffix(own) for name in state if name.endswith(f".{own}"))
    prefix = next((each for each in prefixes if all(n.startswith(each) for n in state)), "")
    if not prefix:
        return ""
    return (
        f"all names begin with {prefix!r}, which a wrapper put there (DataParallel, "
        "DistributedDataParallel, torch.compile); store them without it: torch.save({name."
        f"removeprefix({prefix!r}): value for name, value in state.items()}}, path)"
    )


def model_differences(model: nn.Module, state: dict[str, Any]) -> list[str]:
    """Tensors that are missing, unexpected, or of another shape."""
    own = model.state_dict()
    wrong = [f"no {name}" for name in own if name not in state]
    wrong += [f"unexpected {name}" for name in state if name not in own]
    wrong += [
        f"{name} {tuple(state[name].shape)} for {tuple(value.shape)}"
        for name, value in own.items()
        if name in state and getattr(value, "shape", ()) != getattr(state[name], "shape", ())
    ]
    return wrong


def _refuse_double(job: Job, model: nn.Module) -> None:
    """No runtime of ONNX files convolves in float64: the run would end without its file.

    Nor can a file hold linear layers in float64 where the last algorithm makes its own for it.

    Raises:
        HookError: Such layers are float64 and an ONNX file is asked for.
    """
    last = job.stages[-1]
    kinds = (*CONVOLUTIONS, nn.Linear) if last.compressor.deploys_to == "onnx" else CONVOLUTIONS
    double = {
        f"{name}.weight": each
        for name, each in model.named_modules()
        if isinstance(each, kinds) and each.weight.dtype is torch.float64
    }
    if double and job.export.onnx:
        convolves = any(isinstance(each, CONVOLUTIONS) for each in double.values())
        raise HookError(
            Problem(
                "E-HOOK-MODEL",
                "`model` returned a model with convolutions in float64, and no runtime takes an "
                "ONNX file of it"
                if convolves
                else "`model` returned a model with linear layers in float64, and the operators "
                f"that {last.algorithm} writes to an ONNX file take float32",
                job.hooks.where("model"),
                expected="float32 weights",
                received=f"float64 in {next(iter(double))} and {len(double) - 1} more",
                fix="return model.float(), or train without that file: export: {onnx: false}",
            )
        )
