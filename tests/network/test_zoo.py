"""Twenty-five known networks of as many families; benchmarks/zoo.py does the same to hundreds."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import zoo_build
import zoo_measure

NETWORKS = {
    "torchvision/resnet18": 1.0,
    "torchvision/squeezenet1_1": 1.0,
    "torchvision/googlenet": 1.0,
    "torchvision/inception_v3": 0.9,
    "torchvision/densenet121": 1.0,
    "torchvision/mobilenet_v2": 1.0,
    "torchvision/mobilenet_v3_small": 1.0,
    "torchvision/mnasnet0_5": 1.0,
    "torchvision/shufflenet_v2_x0_5": 0.9,
    "torchvision/regnet_y_400mf": 1.0,
    "torchvision/efficientnet_b0": 1.0,
    "torchvision/convnext_tiny": 0.8,
    "torchvision/swin_t": 0.4,
    "torchvision/lraspp_mobilenet_v3_large": 1.0,
    "torchvision/retinanet_resnet50_fpn": 0.9,
    "torchvision/ssdlite320_mobilenet_v3_large": 0.75,
    "timm/skresnet18": 0.5,
    "timm/resnest14d": 0.5,
    "timm/ghostnet_050": 0.5,
    "timm/repghostnet_050": 0.5,
    "timm/nf_regnet_b0": 0.3,
    "timm/edgenext_xx_small": 0.5,
    "timm/levit_128s": 0.5,
    "timm/mobilevit_xxs": 0.5,
    "timm/vit_tiny_patch16_224": 0.4,
}
"""Name -> the least share of all groups, those of outputs aside, that must be cut."""


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_zeroed_equals_cut_the_files_load_and_training_goes_on(tmp_path: Path, name: str) -> None:
    case = zoo_build.build(name)
    before = {key: value.clone() for key, value in case.model.state_dict().items()}
    row, structure, cut = zoo_measure.measure_ours(case)
    after = case.model.state_dict()
    assert all(value.equal(after[key]) for key, value in before.items())
    outputs = sum(group.zero_reason == "it is an output of the model" for group in structure.groups)
    assert row["groups_prunable"] / (row["groups"] - outputs) >= NETWORKS[name], row["reasons"]
    assert row["error"] <= case.tolerance
    assert row["effect"] > 1e-7  # layer scales begin at 1e-6
    assert cut is not None
    zoo_measure.save(case, cut, tmp_path)
    assert zoo_measure.reload_error(zoo_build.build(name, seed=1), tmp_path) == 0.0
    if zoo_measure.train_step(case, copy.deepcopy(case.model)) == "ok":
        assert zoo_measure.train_step(case, cut) == "ok"
