"""One stage of a run: planned, prepared, trained, its best model found again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from slimcli.artifacts import checkpoint
from slimcli.compressor import Compressor, Plan
from slimcli.errors import GoalError, Problem, RunError
from slimcli.network.copying import deep_copy
from slimcli.network.example import Example
from slimcli.solver import planner, requirements
from slimcli.solver.devices import make_fabric
from slimcli.solver.loop import Trainer
from slimcli.solver.optimizers import optimizer_state
from slimcli.solver.randomness import rng_state
from slimcli.solver.restore import restore
from slimcli.solver.run import Run
from slimcli.solver.schedule import schedule_keys
from slimcli.solver.state import load_model_state, model_state, position_state
from slimcli.solver.step import NotFinite, not_finite_error
from slimcli.solver.subject import Subject, Surroundings


class Stage:
    """Stage ``index`` of a run, fresh or from a checkpoint.

    Args:
        run: The run.
        index: Number of the stage.
        stored: The checkpoint to go on from, or None.
    """

    def __init__(self, run: Run, index: int, stored: dict[str, Any] | None) -> None:
        self.run = run
        self.index = index
        self.job = run.job.stages[index]
        if (
            index > 0
            and self.job.training.precision != run.job.stages[index - 1].training.precision
        ):
            run.fabric = make_fabric(self.job.training)
        model = run.start_model(index)
        self.data = run.data(self.job, model)
        self.evaluator = run.evaluator(self.job)
        hooks = run.job.hooks
        self.example = planner.example_of(self.job, self.data, hooks, run.fabric, model)
        self.schedule = planner.schedule_of(self.job, self.data, hooks, run.job.max_steps)
        exported = planner.exported_from(run.job, self.job, self.example)
        metrics = planner.check_one_batch(
            model, self.job, self.data, hooks, self.evaluator, exported
        )
        requirements.check_names(run.job.requirements, metrics)
        compressor = self.job.compressor(self.job.config)
        self.plan = planner.plan_of(self.job, compressor, model, self.example, self.schedule)
        planner.refuse(self.job, self.plan)
        self._announce(is_new=stored is None)
        self._take_layers()
        self._take_baseline(model)
        model = planner.prepared(compressor, model, self.example, self.plan)
        model = model.to(run.fabric.device)
        # What a checkpoint is loaded into: with cuts, the model in training has other shapes.
        self._template = deep_copy((compressor, model))
        if stored is None:
            compressor.calibrate(model, self.training_batches(0))
        else:
            load_model_state(model, compressor, stored)
        if run.fabric.world_size > 1:
            compressor.load_state_dict(run.fabric.broadcast(compressor.state_dict()))
        self.trainer = Trainer(
            Subject(model, compressor, self.plan, self.example), self._surroundings()
        )
        if stored is None:
            self.save(False)
        else:
            restore(self.trainer, stored)

    @property
    def is_last(self) -> bool:
        """Whether no stage follows."""
        return self.index == len(self.run.job.stages) - 1

    def _surroundings(self) -> Surroundings:
        run = self.run
        return Surroundings(
            fabric=run.fabric,
            stage=self.job,
            hooks=run.job.hooks,
            data=self.data,
            schedule=self.schedule,
            evaluator=self.evaluator,
            events=run.events,
            check_stop=run.check_stop,
            save=self.save,
            note=run.note,
            teacher=planner.teacher_model(run.job.hooks, run.seed, run.fabric),
        )

    def _announce(self, is_new: bool) -> None:
        emit, plan, stage = self.run.events.emit, self.plan, self.job
        if not is_new:
            return
        emit(
            "stage_start",
            stage=stage.name,
            algorithm=stage.algorithm,
            epochs=stage.training.epoch,
            steps_per_epoch=self.schedule.steps_per_epoch,
        )
        for text in (*self.data.notices, *plan.notes):
            emit("notice", text=text, level="note")
        for text in dict.fromkeys((*self.schedule.warnings, *plan.warnings)):
            emit("notice", text=text, level="warning")
        emit(
            "prepared",
            stage=stage.name,
            targets=plan.targets,
            macs=plan.macs,
            params=plan.params,
            reachable_macs=plan.reachable_macs,
            goal={"name": plan.goal.name, "target": plan.goal.target} if plan.goal else None,
            budget=plan.budget,
            settings=plan.settings,
        )

    def _take_layers(self) -> None:
        """The table of layers is that of the model the result is compared with."""
        record = self.run.record
        if record["baseline"] is None:
            record["layers"] = _layer_rows(self.plan)

    def _take_baseline(self, model: nn.Module) -> None:
        """The first compressing stage starts from what the result is compared with."""
        run = self.run
        if not self.job.compressor.compresses or run.record["baseline"] is not None:
            return
        metrics = self.evaluator.run(model, self.data.validation)
        run.record["baseline"] = {
            "metrics": metrics,
            "macs": self.plan.macs,
            "params": self.plan.params,
        }
        run.events.emit("baseline", metrics=metrics, macs=self.plan.macs, params=self.plan.params)

    def training_batches(self, epoch: int) -> Iterator[Example]:
        """Training batches on the device, for calibration; as many as are asked for."""
        for batch in self.data.train.batches(epoch):
            data = self.evaluator.move(batch.data)
            yield Example(batch=data, predict=self.run.job.hooks.predict_function)

    # Training

    def train(self) -> None:
        """To the end of the stage.

        Raises:
            RunError: The loss is nan or inf.
            StopRequested: A signal asked to stop; the checkpoint is where to go on.
        """
        try:
            self.trainer.train()
        except NotFinite as error:
            raise self._not_finite(error) from error
        except torch.OutOfMemoryError as error:
            raise RunError(
                Problem(
                    "E-OUT-OF-MEMORY",
                    f"the device is out of memory: {str(error).splitlines()[0]}",
                    self.run.shown(self.run.folder.last),
                    fix="a smaller config.batch_size with config.accumulate_grad_batches, "
                    "then slim resume",
                )
            ) from error

    def _not_finite(self, error: NotFinite) -> RunError:
        folder, position = self.run.folder, self.trainer.position
        path = folder.path / "nan-batch.pt"
        try:
            checkpoint.save(path, {"batch": error.data})
            saved = self.run.shown(path)
        except RunError:
            saved = "not storable"
        where = f"epoch {position.epoch + 1}, step {position.step + 1}"
        return not_finite_error(error, where, self.run.shown(folder.last), saved)

    # Checkpoints

    def save(self, is_best: bool) -> None:
        """Write last.pt, and the best checkpoint if this is it."""
        run, trainer, subject = self.run, self.trainer, self.trainer.subject
        if not run.is_main:
            return
        run.write_summary("running", None)
        content = {
            **position_state(trainer.position, trainer.best),
            **model_state(subject.model, subject.compressor),
            "stage": self.index,
            "record": run.record,
            "events_bytes": run.events.length,
            "schedule": schedule_keys(self.job.training),
            "torch": str(torch.__version__),
            "threads": torch.get_num_threads(),
        }
        if is_best:
            checkpoint.save(run.folder.best(self.job.name, self.is_last), content)
        scheduler = trainer.rates.scheduler
        content |= {
            "optimizer": optimizer_state(trainer.optimizer, subject.model),
            "scheduler": scheduler.state_dict() if scheduler is not None else None,
            "scaler": run.fabric.strategy.precision.state_dict(),
            "averages": trainer.averages.state_dict(),
            "rng": rng_state(),
            "hooks": {name: hook.state_dict() for name, hook in run.job.hooks.stateful().items()},
        }
        checkpoint.save(run.folder.last, content, read_back=run.saves == 0)
        run.saves += 1
        position = trainer.position
        run.events.emit(
            "saved",
            path=str(run.folder.last),
            stage=self.job.name,
            epoch=position.epoch,
            step=position.step,
        )

    # The result

    def best_model(self) -> tuple[Compressor, nn.Module]:
        """The best checkpoint's model, in the form it was trained in.

        Raises:
            GoalError: No checkpoint meets the goal.
            RunError: The metric that chooses was nan.
        """
        trainer = self.trainer
        if trainer.best.value is None:
            raise self._metric_is_nan() if trainer.has_nan_metric else self._goal_missed()
        path = self.run.folder.best(self.job.name, self.is_last)
        if self.run.fabric.world_size > 1:
            self.run.fabric.barrier()
        compressor, model = deep_copy(self._template)
        load_model_state(model, compressor, checkpoint.load(path))
        return compressor, model.to(self.run.fabric.device).eval()

    def _metric_is_nan(self) -> RunError:
        keyword = self.job.training.save_keyword
        return RunError(
            Problem(
                "E-METRIC-NAN",
                f"no best model of stage {self.job.name} can be chosen: {keyword} was nan",
                self.run.job.hooks.where("evaluate_function"),
                expected="a number from evaluate_function",
                received="nan",
                fix="return a number for every validation batch, or choose by another metric: "
                f"config.save_keyword; trained weights: {self.run.shown(self.run.folder.last)}",
            )
        )

    def _goal_missed(self) -> GoalError:
        goal, trainer = self.plan.goal, self.trainer
        status = trainer.state()
        reached = ", ".join(f"{name} {value:g}" for name, value in status.items())
        return GoalError(
            Problem(
                "E-GOAL-MISSED",
                f"{self.job.algorithm}: no checkpoint of stage {self.job.name} meets the goal",
                self.run.shown(self.run.folder.last),
                expected=f"{goal.name} of at most {goal.target:g}" if goal else "",
                received=reached,
                fix="a longer schedule or a weaker goal; the checkpoints are kept",
            )
        )


def _layer_rows(plan: Plan) -> list[dict[str, Any]]:
    """The rows of ``layers`` in summary.json; ``channels_after`` is filled in at the end."""
    return [
        {
            "name": row.name,
            "type": row.type,
            "channels_before": row.channels,
            "channels_after": row.channels,
            "frozen_reason": row.frozen_reason,
        }
        for row in plan.layers
    ]
