"""What a plan says of an optimizer whose state can't follow a cut."""

from __future__ import annotations

from slimcli.compressor import Refusal, Schedule


def state_refusals(schedule: Schedule) -> list[Refusal]:
    """For algorithms that cut tensors while training: can the optimizer's state follow?"""
    if not schedule.state_misfit or not schedule.epochs:
        return []
    fix = "hooks.optimizer_generator: an optimizer whose state has the parameter's shape"
    return [Refusal(schedule.state_misfit, fix=fix, is_for_any_model=True)]
