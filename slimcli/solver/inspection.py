"""A model looked into before anything is planned or trained; nothing is changed or written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from slimcli.compressor import LayerPlan
from slimcli.network import surgery
from slimcli.network.copying import deep_copy
from slimcli.network.count import count_macs, count_params
from slimcli.network.example import Example
from slimcli.network.inspection import GroupFacts, facts_of
from slimcli.network.structure import Structure, analyze, zero_channels
from slimcli.solver import planner
from slimcli.solver.data import Sharding
from slimcli.solver.datasets import build_data, generate_datasets
from slimcli.solver.devices import make_fabric
from slimcli.solver.job import Job
from slimcli.solver.starting_weights import start_weights


@dataclass(frozen=True)
class LayerFacts:
    """One layer that makes channels.

    Attributes:
        name: Module path.
        type: Class name.
        channels: Outputs today.
        macs: Multiply-accumulates of one sample today.
        group: Name of the coupled group; empty for none.
        frozen_reason: Why nothing can be cut here; empty if something can.
        channels_minimum: The fewest outputs the recipe's plan can reach; None: not planned.
        macs_minimum: Its multiply-accumulates with every layer at that minimum.
    """

    name: str
    type: str
    channels: int
    macs: int
    group: str
    frozen_reason: str
    channels_minimum: int | None = None
    macs_minimum: int | None = None


@dataclass(frozen=True)
class Inspection:
    """What one batch teaches about a model.

    Attributes:
        macs: Multiply-accumulates of one sample.
        params: Parameters.
        groups: Coupled groups.
        layers: Layers that make channels.
        notes: What could not be looked at.
    """

    macs: int
    params: int
    groups: tuple[GroupFacts, ...]
    layers: tuple[LayerFacts, ...]
    notes: tuple[str, ...]


def inspect(job: Job, *, with_plan: bool = False) -> Inspection:
    """Learn the structure of the recipe's model from one batch.

    Args:
        job: What would be run.
        with_plan: Also ask the first stage that compresses for the fewest channels it can reach.

    Raises:
        SlimError: Data, model or hooks are wrong, or a key of the plan is.
    """
    stage = job.stages[0]
    training = stage.training
    devices = training.devices if training.devices == "cpu" else training.devices[:1]
    fabric = make_fabric(training.model_copy(update={"num_processes": None, "devices": devices}))
    datasets = generate_datasets(job.hooks, training.seed)
    model = start_weights(job, planner.fresh_model(job.hooks, training.seed))
    model = planner.copied(model, job.hooks)
    model.to(fabric.device)
    data = build_data(datasets, job.hooks, training, model, Sharding(), lambda each: each)
    example = planner.example_of(stage, data, job.hooks, fabric, model)
    structure = analyze(model, example)
    compressing = next((each for each in job.stages if each.compressor.compresses), None)
    smaller = None
    if with_plan and compressing is not None:
        schedule = planner.schedule_of(compressing, data, job.hooks, job.max_steps)
        compressor = compressing.compressor(compressing.config)
        plan = planner.plan_of(compressing, compressor, model, example, schedule)
        smaller = _at_minimum(model, structure, example, plan.layers)
    return Inspection(
        structure.macs,
        count_params(model),
        tuple(facts_of(structure)),
        tuple(_layers(model, structure, example, smaller)),
        structure.notes,
    )


def _at_minimum(
    model: nn.Module, structure: Structure, example: Example, layers: Sequence[LayerPlan]
) -> dict[str, tuple[int, int]]:
    """Layer -> channels and MACs once every group is as narrow as the plan allows."""
    of_one_group = {row.name for row in structure.layers if len(row.parts) == 1}
    widths = {
        row.group: -(-structure.group(row.group).size * row.channels_minimum // row.channels)
        for row in layers
        if row.channels_minimum < row.channels and row.name in of_one_group
    }
    narrow = deep_copy(model)
    cuts = []
    for name, width in widths.items():
        group = structure.group(name)
        zero_channels(narrow, group, range(width, group.size))
        cuts.append(group.cut(range(width)))
    surgery.apply(narrow, cuts, example=example)
    macs = count_macs(narrow, example, structure.samples).by_module
    return {row.name: (row.channels_minimum, macs.get(row.name, 0)) for row in layers}


def _layers(
    model: nn.Module,
    structure: Structure,
    example: Example,
    smaller: dict[str, tuple[int, int]] | None,
) -> list[LayerFacts]:
    macs = count_macs(model, example, structure.samples).by_module
    rows = []
    for row in structure.layers:
        least = (smaller or {}).get(row.name, (None, None))
        rows.append(
            LayerFacts(
                row.name,
                row.type,
                row.channels,
                macs.get(row.name, 0),
                row.group,
                row.frozen_reason,
                *least,
            )
        )
    return rows
