"""What a checkpoint holds, and how a model gets it back: weights, shapes, optimizer, position."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from slimcli.compressor import Compressor
from slimcli.errors import Problem, RunError
from slimcli.network import reshape


@dataclass
class Position:
    """Where training is; the next thing to do is batch ``batch`` of epoch ``epoch``.

    Attributes:
        epoch: Epochs that are complete.
        batch: Batches of the current epoch that are complete, a multiple of the accumulation.
        step: Place in the schedule: the planned steps of complete epochs and those taken since.
        is_finished: The compressor's ``finish`` has been applied.
        is_length_told: It was said that the training loader's length is wrong.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    is_finished: bool = False
    is_length_told: bool = False


@dataclass
class Best:
    """The best model so far among those that meet the goal.

    Attributes:
        value: Its ``save_keyword`` metric; None while there is none.
        epoch: Epochs that were complete when it was saved.
        metrics: All its metrics.
    """

    value: float | None = None
    epoch: int = 0
    metrics: dict[str, float] = field(default_factory=dict)


def model_state(model: nn.Module, compressor: Compressor) -> dict[str, Any]:
    """Weights, buffers (those that are not saved by torch too), final shapes, algorithm state."""
    saved = model.state_dict()
    return {
        "model": saved,
        "buffers": {name: value for name, value in model.named_buffers() if name not in saved},
        "layout": reshape.layout(model),
        "compressor": compressor.state_dict(),
    }


def load_model_state(model: nn.Module, compressor: Compressor, content: dict[str, Any]) -> None:
    """Give a freshly prepared model the shapes and values of a checkpoint.

    Raises:
        RunError: The model is not the one that was saved.
    """
    try:
        reshape.reshape_to(model, content["layout"]["shapes"], content["layout"]["attributes"])
        model.load_state_dict(content["model"])
    except (RunError, RuntimeError, KeyError) as error:
        raise RunError(
            Problem(
                "E-RESUME-MODEL",
                f"the checkpoint does not fit the model: {str(error).splitlines()[0]}",
                fix="resume with the code the run was started with",
            )
        ) from error
    buffers = dict(model.named_buffers())
    with torch.no_grad():
        for name, value in content["buffers"].items():
            buffers[name].copy_(value)
    compressor.load_state_dict(content["compressor"])


def position_state(position: Position, best: Best) -> dict[str, Any]:
    """Plain values for the checkpoint."""
    return {"position": asdict(position), "best": asdict(best)}


def load_position(content: dict[str, Any]) -> tuple[Position, Best]:
    """Takes back what :func:`position_state` gave."""
    return Position(**content["position"]), Best(**content["best"])
