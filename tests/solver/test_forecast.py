"""What is refused before the first stage of several trains."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from slimcli.algorithms.finetune.config import FinetuneConfig
from slimcli.algorithms.finetune.method import FinetuneCompressor
from slimcli.compressor import Plan, Refusal, Schedule
from slimcli.errors import GoalError, HookError, Problem, RecipeError, RunError
from slimcli.network.example import Example
from slimcli.network.handover import NormLeftOut
from slimcli.recipe.binding import location
from slimcli.solver.forecast import forecast
from slimcli.solver.job import Export, Job, StageJob
from slimcli.solver.stages import run
from tests.solver import toys


def refusing(is_for_any_model: bool) -> type[FinetuneCompressor]:
    class Refusing(FinetuneCompressor):
        def plan(self, model: nn.Module, example: Example, schedule: Schedule) -> Plan:
            too_few = Refusal("5 steps are too few", "epoch", "more", is_for_any_model)
            return Plan(refusals=[too_few])

    return Refusing


def chain(folder: Path, last: type[Any]) -> Job:
    """A stage that cuts the model, and a second one."""
    one = toys.job(folder, toys.Cutter)
    second = StageJob("2-toy", "toy", last, FinetuneConfig(), one.stages[0].training)
    return replace(one, stages=(*one.stages, second))


def test_what_no_model_could_change_is_refused_before_a_stage_that_cuts_trains(
    tmp_path: Path,
) -> None:
    job = chain(tmp_path, refusing(is_for_any_model=True))
    with pytest.raises(GoalError, match="5 steps are too few"):
        run(job)
    assert list(tmp_path.rglob("handover")) == []
    found = forecast(job)
    assert [stage.is_certain for stage in found] == [True, True]
    assert found[1].refusals[0].fix.startswith("more, as far as today's model tells")


def test_what_another_model_may_change_waits_until_the_cut_model_is_there(tmp_path: Path) -> None:
    job = chain(tmp_path, refusing(is_for_any_model=False))
    assert [stage.is_certain for stage in forecast(job)] == [True, False]
    with pytest.raises(GoalError, match="5 steps are too few"):
        run(job)
    assert list(tmp_path.rglob("handover"))


class Widening(toys.Cutter):
    """Compresses, but no layer is another one for the next stage."""

    keeps_widths = True


def test_behind_a_stage_that_keeps_the_widths_a_refusal_is_told_before_any_training(
    tmp_path: Path,
) -> None:
    job = chain(tmp_path, refusing(is_for_any_model=False))
    first = replace(job.stages[0], compressor=Widening)
    job = replace(job, stages=(first, job.stages[1]))
    assert [stage.is_certain for stage in forecast(job)] == [True, True]
    with pytest.raises(GoalError, match="5 steps are too few"):
        run(job)
    assert list(tmp_path.rglob("handover")) == []


class Keeping(FinetuneCompressor):
    """Has something to say, or to complain of, when it hands its model over."""

    def handover(self, model: nn.Module, batches: Any) -> nn.Module:
        warnings.warn("conv9 gets no batch norm", NormLeftOut, stacklevel=1)
        return super().handover(model, batches)


class Failing(FinetuneCompressor):
    def handover(self, model: nn.Module, batches: Any) -> nn.Module:
        raise RunError(Problem("E-HANDOVER", "nothing can be handed over"))


def two_stages(folder: Path, first: type[Any]) -> Job:
    job = toys.job(folder, first, epoch=1)
    second = StageJob("2-toy", "toy", FinetuneCompressor, FinetuneConfig(), job.stages[0].training)
    return replace(job, stages=(*job.stages, second))


def test_a_trial_hands_over_what_the_next_stage_would_get(tmp_path: Path) -> None:
    first, last = forecast(two_stages(tmp_path, FinetuneCompressor), trial=True)
    assert first.trial["handover"].startswith("ok  max difference 0.0e+00")
    assert "handover" not in last.trial
    with pytest.raises(RunError, match="nothing can be handed over"):
        forecast(two_stages(tmp_path, Failing), trial=True)
    assert list(tmp_path.iterdir()) == []


def test_what_a_stage_could_not_hand_over_is_told_with_the_result(tmp_path: Path) -> None:
    summary = run(two_stages(tmp_path, Keeping)).summary
    assert "1-toy: conv9 gets no batch norm" in summary["notes"]


class Naming(FinetuneCompressor):
    """Its recipe names a layer that the user's own model does not have."""

    def plan(self, model: nn.Module, example: Example, schedule: Schedule) -> Plan:
        raise RecipeError(Problem("E-NAME", "no layer is called layer9", fix="another name"))


def test_a_name_that_a_cut_model_may_have_waits_for_that_model(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no layer is called layer9"):
        run(chain(tmp_path, Naming))
    assert list(tmp_path.rglob("handover"))


def test_a_name_that_the_model_at_hand_must_have_is_refused_before_any_training(
    tmp_path: Path,
) -> None:
    job = chain(tmp_path, Naming)
    plain = StageJob(
        "1-finetune", "finetune", FinetuneCompressor, FinetuneConfig(), job.stages[0].training
    )
    with pytest.raises(RecipeError, match="no layer is called layer9"):
        run(replace(job, stages=(plain, job.stages[1])))
    assert list(tmp_path.rglob("handover")) == []


def test_a_model_that_keeps_features_of_its_last_step_is_tried_and_deployed(
    tmp_path: Path,
) -> None:
    class Tapped(toys.Net):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Any] = []
            self.bn2.register_forward_hook(lambda layer, inputs, output: self.tap(output))

        def tap(self, output: Any) -> None:
            self.seen[:] = [output]

        def forward(self, x: Any) -> Any:
            x = super().forward(x)
            return x + self.seen[0].mean()

    job = toys.with_hooks(toys.job(tmp_path), build_model=Tapped)
    (stage,) = forecast(job, trial=True)
    assert stage.trial["deploy"].startswith("ok  max difference ")


def by_parts(model: Any, data: Any) -> Any:
    """A prediction without a call of the model itself."""
    x = torch.relu(model.bn1(model.conv1(data[0])))
    return model.fc(torch.relu(model.bn2(model.conv2(x))).mean((2, 3)))


def exporting(job: Job, **hooks: Any) -> Job:
    where = {name: location(hook) for name, hook in hooks.items()}
    return replace(toys.with_hooks(job, **hooks, locations=where), export=Export(onnx=True))


@pytest.mark.parametrize("start", [forecast, run])
def test_a_prediction_that_never_calls_the_model_is_refused_before_training(
    tmp_path: Path, start: Any
) -> None:
    job = exporting(toys.job(tmp_path), predict_function=by_parts)
    with pytest.raises(HookError) as caught:
        start(job)
    (problem,) = caught.value.problems
    assert problem.code == "E-ONNX-UNSUPPORTED"
    assert problem.where.endswith(f"test_forecast.py:{by_parts.__code__.co_firstlineno}")
    assert problem.fix.endswith(
        "belongs into forward, or train without that file: export.onnx=false"
    )
    assert list(tmp_path.rglob("last.pt")) == []


@pytest.mark.parametrize(
    ("keys", "onnx"), [({}, False), ({"save_deploy_format": False}, True)], ids=["off", "no deploy"]
)
def test_a_prediction_that_never_calls_the_model_is_no_matter_without_an_onnx_file(
    tmp_path: Path, keys: dict[str, Any], onnx: bool
) -> None:
    job = exporting(toys.job(tmp_path, **keys), predict_function=by_parts)
    (stage,) = forecast(replace(job, export=Export(onnx=onnx)), trial=True)
    assert stage.trial["deploy"].startswith("ok")
    assert "onnx" not in stage.trial


def test_a_trial_makes_the_onnx_file_and_says_how_far_it_is_from_the_model(tmp_path: Path) -> None:
    (stage,) = forecast(exporting(toys.job(tmp_path)), trial=True)
    assert re.fullmatch(
        r"ok  max difference \d\.\de-\d\d \(limit 1\.\de-04\), tried with dynamo",
        stage.trial["onnx"],
    )
    assert list(tmp_path.iterdir()) == []


class Products(toys.Net):
    """An operator that no exporter knows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).sigmoid().cumprod(1)


def test_an_operator_without_onnx_form_is_told_by_a_trial_and_costs_a_plan_nothing(
    tmp_path: Path,
) -> None:
    job = exporting(toys.job(tmp_path), build_model=Products)
    (stage,) = forecast(job)
    assert stage.trial == {}
    with pytest.raises(RunError, match="cumprod") as caught:
        forecast(job, trial=True)
    (problem,) = caught.value.problems
    assert problem.code == "E-ONNX-EXPORT"
    assert "(tried on the model before training)" in problem.what
    assert problem.fix.endswith(", or train without that file: export.onnx=false")
