"""Mixed precision: the compressor sees unscaled gradients and is told of skipped steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision.amp import MixedPrecision
from torch import nn

from slimcli.compressor import Progress
from slimcli.errors import RecipeError
from slimcli.solver import stages
from slimcli.solver.stages import run
from tests.solver import toys

HUGE = 2.0**60  # times any gradient of the toys: more than float16 holds
HALF_PRECISION = 0.05  # relative; ten bits of mantissa through two convs and back


class Watching(toys.Counting):
    """Notes gradients and skipped steps."""

    gradients: ClassVar[list[torch.Tensor]] = []
    skipped: ClassVar[list[bool]] = []

    def after_backward(self, model: nn.Module, progress: Progress) -> None:
        gradient = model.get_parameter("fc.weight").grad
        assert gradient is not None
        self.gradients.append(gradient.clone())

    def after_step(self, model: nn.Module, progress: Progress, skipped: bool) -> None:
        self.skipped.append(skipped)


def watched(folder: Path, **keys: Any) -> tuple[list[torch.Tensor], list[bool]]:
    Watching.gradients.clear()
    Watching.skipped.clear()
    run(toys.job(folder, Watching, epoch=1, **keys))
    return list(Watching.gradients), list(Watching.skipped)


def scaled_by(start: float) -> Any:
    """A Fabric with float16 and a gradient scaler on the CPU, where a recipe may not have one."""

    def make(training: Any) -> Fabric:
        scaler = torch.amp.GradScaler("cpu", init_scale=start)
        fabric = Fabric(accelerator="cpu", plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
        fabric.launch()
        return fabric

    return make


def test_the_compressor_sees_gradients_without_the_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _ = watched(tmp_path / "a")
    monkeypatch.setattr(stages, "make_fabric", scaled_by(1024.0))
    scaled, skipped = watched(tmp_path / "b")
    assert not any(skipped)
    assert torch.allclose(plain[0], scaled[0], rtol=HALF_PRECISION, atol=1e-3)


def test_a_step_the_scaler_leaves_out_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "make_fabric", scaled_by(HUGE))
    _, skipped = watched(tmp_path)
    assert skipped[0]


def test_clipping_bounds_the_gradient_the_compressor_sees(tmp_path: Path) -> None:
    gradients, _ = watched(tmp_path, gradient_clip=0.01)
    assert all(each.norm() <= 0.01 + 1e-6 for each in gradients)


def test_float16_on_a_cpu_is_refused_instead_of_replaced(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="float16 needs a GPU"):
        run(toys.job(tmp_path, precision="16-mixed"))


def test_weights_and_metrics_stay_float32_under_mixed_precision(tmp_path: Path) -> None:
    seen: set[torch.dtype] = set()

    def accuracy(prediction: torch.Tensor, data: Any) -> dict[str, float]:
        seen.add(prediction.dtype)
        return toys.accuracy(prediction, data)

    job = toys.job(tmp_path, epoch=1, precision="bf16-mixed")
    done = run(toys.with_hooks(job, evaluate_function=accuracy))
    assert seen == {torch.float32}
    assert all(each["ok"] for each in done.summary["verification"])
