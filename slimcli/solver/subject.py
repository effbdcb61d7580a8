"""What a stage trains, and what its loop works with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lightning_fabric import Fabric
from torch import nn

from slimcli.artifacts.events import EventLog
from slimcli.compressor import Compressor, Plan, Schedule
from slimcli.network.example import Example
from slimcli.solver.datasets import Data
from slimcli.solver.evaluation import Evaluator
from slimcli.solver.job import JobHooks, StageJob


@dataclass
class Subject:
    """What is trained.

    Attributes:
        model: The raw model, prepared, on its device.
        compressor: The algorithm at work on it.
        plan: What was planned.
        example: A small batch on the device.
    """

    model: nn.Module
    compressor: Compressor
    plan: Plan
    example: Example


@dataclass
class Surroundings:
    """What the loop works with and does not own.

    Attributes:
        fabric: Devices, precision, processes.
        stage: The stage's keys.
        hooks: The user's functions.
        data: Sources of batches.
        schedule: The planned learning rates.
        evaluator: Runs the user's metric.
        events: Where everything is reported.
        check_stop: Raises where a signal asked to stop.
        save: Writes the last checkpoint; told whether this model is also the best.
        note: Takes a warning that is to be read with the result, too.
        teacher: A model whose predictions the loss pulls towards; None: no teacher.
    """

    fabric: Fabric
    stage: StageJob
    hooks: JobHooks
    data: Data
    schedule: Schedule
    evaluator: Evaluator
    events: EventLog
    check_stop: Callable[[], None]
    save: Callable[[bool], None]
    note: Callable[[str], None] = lambda text: None
    teacher: nn.Module | None = None
