"""Every key of every algorithm does something that can be seen."""

from __future__ import annotations

from typing import Any

import pytest

from slimcli.compressor import GroupDefaults, registry
from slimcli.network.example import Example

from .loop import begin, images, predict, schedule_of, train
from .networks import SHAPE, build

EPOCHS = 4
ALGORITHMS = registry()

# Key -> (what it is changed to, what else is set in both runs).
CHANGES: dict[str, dict[str, tuple[Any, dict[str, Any]]]] = {
    "acnet": {
        "acnet_type": ("dbb", {}),
        "init": ("paper", {}),
        "gamma_init": (0.5, {"init": "paper"}),
        "skip": (["block1.*"], {}),
    },
    "csgd": {
        "cluster_percent": (0.5, {}),
        "prune_rate": (0.2, {"cluster_percent": None, "prune_rate": 0.4}),
        "allocation": ("uniform", {"cluster_percent": None, "prune_rate": 0.4}),
        "prune_epoch": (2, {}),
        "centri_strength": (2.0, {}),
        "vector_strength": (0.9, {}),
        "cluster_method": ("even", {}),
        "min_channels": (14, {}),
        "auto_find_module_strategy": ("all_conv", {}),
        "prune_module_names": (["block1.conv1"], {}),
        "skip": (["block1.*"], {}),
        "prune_ratios": ({"block1.*": 0.5}, {}),
        "round_to": (8, {}),
    },
    "qat": {
        "weight_granularity": ("tensor", {}),
        "calibration": ("percentile", {}),
        "calibration_batches": (1, {}),
        "percentile": (90.0, {"calibration": "percentile"}),
        "scale": ("lsq", {}),
        "freeze_scale_epoch": (1, {"scale": "ema"}),
        "freeze_bn_epoch": (2, {}),
        "bn_export": ("fold", {}),
        "skip": (["first"], {}),
    },
    "resrep": {
        "prune_rate": (0.2, {}),
        "warmup_epoch": (2, {}),
        "compactor_momentum": (0.5, {}),
        "lasso_decay": (0.05, {}),
        "prune_groups": (3, {}),
        "groups_size": (1, {}),
        "min_channels": (13, {}),
        "prune_interval": (1, {"prune_groups": 4}),
        "prune_module_names": (["block1.bn1"], {"prune_rate": 0.1}),
        "auto_find_module_strategy": ("linear_bn", {}),
        "skip": (["block1.*"], {}),
        "round_to": (2, {"groups_size": 4}),
        "prune_ratios": ({"block1.*": 0.1}, {}),
    },
}


def seen(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """What a user can see of a plan and a short training."""
    info = ALGORITHMS[name]
    compressor = info.load()(info.config(**config))
    example = Example(images(0, SHAPE), predict)
    plan = compressor.plan(build("residual"), example, schedule_of(EPOCHS, 0.05))
    found: dict[str, Any] = {
        "plan": (plan.targets, plan.layers, plan.goal, plan.settings, plan.notes, plan.refusals)
    }
    if plan.refusals:
        return found
    run = begin(info, config, build("residual"), SHAPE, EPOCHS)
    groups = run.compressor.param_groups(run.model, GroupDefaults(lr=0.05))
    found["groups"] = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    train(run, EPOCHS)
    found["losses"] = run.losses
    state = run.model.state_dict()
    found["weights"] = [(k, v.shape, v.double().sum().item()) for k, v in state.items()]
    return found


@pytest.mark.parametrize(
    ("name", "key"),
    [(name, key) for name, info in ALGORITHMS.items() for key in info.config.model_fields],
)
def test_a_key_has_an_observable_effect(name: str, key: str) -> None:
    info = ALGORITHMS[name]
    value, others = CHANGES[name][key]
    base = {**info.example, **others}
    assert base.get(key, info.config.model_fields[key].default) != value
    assert repr(seen(name, {**base, key: value})) != repr(seen(name, base))
