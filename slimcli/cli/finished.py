"""A finished run opened again: its recipe, its data, its models in every form it left."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimcli import console
from slimcli.errors import Problem, RecipeError

if TYPE_CHECKING:
    from torch import nn

    from slimcli.artifacts.finish import Finished
    from slimcli.artifacts.run_folder import RunFolder
    from slimcli.network.example import Example
    from slimcli.solver.evaluation import Evaluator
    from slimcli.solver.job import Job, StageJob

VERIFICATION_BATCHES = 4
FORMS = {"onnx": "model.onnx", "trt": "model.engine"}


@dataclass
class FinishedRun:
    """What commands after a run need.

    Attributes:
        folder: The run folder.
        summary: Content of summary.json.
        job: The job, with the user's functions.
        fabric: The device.
        data: Sources of the last stage.
        evaluator: The user's metric.
        example: A small batch and the predict function.
    """

    folder: RunFolder
    summary: dict[str, Any]
    job: Job
    fabric: Any
    data: Any
    evaluator: Evaluator
    example: Example

    @property
    def stage(self) -> StageJob:
        """The last stage, whose result the run is."""
        return self.job.stages[-1]

    @property
    def predict(self) -> Callable[[Any, Any], Any]:
        """The user's predict function."""
        predict: Callable[[Any, Any], Any] = self.job.hooks.predict_function
        return predict

    def validation_batches(self, count: int = VERIFICATION_BATCHES) -> list[Any]:
        """The first validation batches, on the device."""
        from slimcli.solver.evaluation import first_batches

        found = first_batches(self.data.validation, count)
        return [self.evaluator.move(batch.data) for batch in found]

    def evaluate(self, model: Any) -> dict[str, float]:
        """The user's metric over the whole validation set."""
        return self.evaluator.run(model, self.data.validation)

    def fresh_model(self) -> nn.Module:
        """What the user's model hook makes, seeded as in the run."""
        from slimcli.solver.planner import fresh_model

        return fresh_model(self.job.hooks, self.job.stages[0].training.seed)

    def trained(self) -> tuple[Any, nn.Module]:
        """Compressor and model of the best checkpoint, in the form it was trained in."""
        from slimcli.artifacts import checkpoint, deploy
        from slimcli.solver import planner
        from slimcli.solver.starting_weights import start_weights
        from slimcli.solver.state import load_model_state

        model = self.fresh_model()
        if len(self.job.stages) > 1:
            before = self.job.stages[-2].name
            model = deploy.load_deploy(self.folder.handover(before), model)
        else:
            model = start_weights(self.job, model)
        compressor = self.stage.compressor(self.stage.config)
        schedule = planner.schedule_of(self.stage, self.data, self.job.hooks, None)
        model = model.to(self.fabric.device)
        plan = compressor.plan(model, self.example, schedule)
        model = planner.prepared(compressor, model, self.example, plan)
        model = model.to(self.fabric.device)
        best = checkpoint.load(self.folder.best(self.stage.name, True))
        load_model_state(model, compressor, best)
        return compressor, model.eval()

    def result_form(self) -> str:
        """The form the run made: ``deploy``, or ``trained`` with ``save_deploy_format: false``."""
        return "deploy" if self.stage.training.save_deploy_format else "trained"

    @property
    def _has_deploy_files(self) -> bool:
        """Whether the run made deploy files: not where another file is its form, or none is."""
        training, compressor = self.stage.training, self.stage.compressor
        return training.save_deploy_format and compressor.deploys_to == "module"

    def lacks_deploy_files(self) -> bool:
        """Whether the run made deploy files that are not there any more."""
        from slimcli.artifacts.deploy import DESCRIPTION, TENSORS

        files = [self.folder.artifacts / name for name in (DESCRIPTION, TENSORS)]
        return self._has_deploy_files and not all(file.is_file() for file in files)

    def remake_deploy_files(self) -> Finished:
        """The deploy files once more from the best checkpoint, verified as they were in the run.

        Raises:
            RunError: The checkpoint can't be used.
            VerificationError: They do not agree with the trained model.
        """
        from slimcli.artifacts.finish import FinishRequest, finish_run
        from slimcli.solver.data import batch_size_of

        compressor, model = self.trained()
        return finish_run(
            FinishRequest(
                model=model,
                compressor=compressor,
                fresh_model=self.fresh_model,
                example=self.example,
                samples=batch_size_of(self.example.batch),
                predict=self.predict,
                batches=self.validation_batches(),
                evaluate=self.evaluate,
                folder=self.folder.artifacts,
                deploy=True,
                onnx=False,
                metadata={},
                emit=lambda event, **fields: None,
            )
        )

    def deployed(self) -> nn.Module:
        """The deploy form: from the deploy files, or, where the file is the form, as exported."""
        if self._has_deploy_files:
            from slimcli.artifacts import deploy

            plain = deploy.load_deploy(self.folder.path, self.fresh_model())
            return plain.to(self.fabric.device).eval()
        compressor, model = self.trained()
        deployed: nn.Module = compressor.deploy(model).to(self.fabric.device).eval()
        return deployed

    def model_of(self, form: str) -> Any:
        """The model in one form: ``trained``, ``deploy``, ``onnx`` or ``trt``."""
        if form == "trained":
            return self.trained()[1]
        if form == "deploy":
            return self.deployed()
        return load_file(self.folder.artifacts / FORMS[form])


def load_file(path: Path) -> Any:
    """An ONNX file or an engine as something that is called like a module.

    Raises:
        RecipeError: The file is not there or of another kind.
    """
    if not path.is_file():
        fix = "slim export RUN --trt" if path.suffix == ".engine" else "slim export RUN --onnx"
        raise RecipeError(Problem("E-FILE-MISSING", "there is no such file", str(path), fix=fix))
    if path.suffix == ".onnx":
        from slimcli.artifacts.onnx import OnnxModel

        return OnnxModel(path)
    if path.suffix == ".engine":
        from slimcli.artifacts.tensorrt.model import EngineModel

        return EngineModel(path)
    expected = "model.onnx or model.engine"
    raise RecipeError(Problem("E-FILE-KIND", "no artifact of slim", str(path), expected))


def newest(save_dir: Path = Path("checkpoints")) -> Path:
    """The newest finished run, said aloud; only for a person at a terminal.

    Raises:
        RecipeError: There is none, or nobody would see which one was taken.
    """
    from slimcli.cli.list import runs

    if os.environ.get("CI", "").lower() in ("1", "true") or not sys.stderr.isatty():
        raise RecipeError(
            Problem(
                "E-RUN-NAME", "name the run", "command line",
                received="no RUN, in a script or without a terminal", fix="slim list runs",
            )
        )  # fmt: skip
    finished = [row["run"] for row in runs(save_dir) if row["state"] == "finished"]
    if not finished:
        problem = Problem("E-RUN-NONE", "there is no finished run", str(save_dir), fix="slim run")
        raise RecipeError(problem)
    console.say(f"run {finished[0]} (the newest finished one)")
    return Path(finished[0])


def open_finished(path: Path) -> FinishedRun:
    """Opens a run that is finished, with its hooks, data and device.

    Args:
        path: Run folder or its artifacts folder.

    Raises:
        RecipeError: It is no run folder, or the run is not finished.
    """
    from slimcli.artifacts import process, run_folder, summary
    from slimcli.recipe import load
    from slimcli.recipe.job import job_of

    is_artifacts = path.resolve().name == "artifacts"
    folder = run_folder.open_run(path.resolve().parent if is_artifacts else path)
    content = summary.read(folder.summary)
    if content["status"] not in ("finished", "not_verified"):
        raise RecipeError(
            Problem(
                "E-RUN-UNFINISHED", "the run is not finished", str(folder.path),
                "finished", process.state(folder.path, content["status"]),
                console.command('resume', folder.path),
            )
        )  # fmt: skip
    return _opened(folder, content, job_of(load(folder.recipe)))


def _opened(folder: RunFolder, content: dict[str, Any], job: Job) -> FinishedRun:
    from slimcli.solver import planner
    from slimcli.solver.data import Sharding
    from slimcli.solver.datasets import build_data, generate_datasets
    from slimcli.solver.devices import make_fabric
    from slimcli.solver.evaluation import Evaluator
    from slimcli.solver.step import move_batch

    stage = job.stages[-1]
    # One process is enough: nothing is trained.
    training = stage.training.model_copy(update={"num_processes": None, "precision": "32"})
    devices = training.devices if training.devices == "cpu" else training.devices[:1]
    fabric = make_fabric(training.model_copy(update={"devices": devices}))
    datasets = generate_datasets(job.hooks, job.stages[0].training.seed)
    model = planner.fresh_model(job.hooks, job.stages[0].training.seed)
    data = build_data(datasets, job.hooks, training, model, Sharding(0, 1), lambda loader: loader)

    def move(batch: Any) -> Any:
        return move_batch(fabric, batch, training.channels_last)

    example = planner.example_of(stage, data, job.hooks, fabric, model)
    evaluator = Evaluator(job.hooks, move, warn=console.warn)
    return FinishedRun(folder, content, job, fabric, data, evaluator, example)
