"""The training loop of one stage: epochs, steps, cuts, evaluation, the best checkpoint.

The one object that changes the model, the compressor, is called here by name, in the order its
contract states. What watches (log, terminal, files) hears events.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import replace

from torch.optim import Optimizer

from slimcli.compressor import Progress
from slimcli.errors import RunError
from slimcli.network import surgery
from slimcli.network.cuts import Cut
from slimcli.solver import cut_seam
from slimcli.solver.data import Batch, has_more, no_batches, wrong_length
from slimcli.solver.evaluation import Averages, is_better, missing_keyword
from slimcli.solver.optimizers import check_groups
from slimcli.solver.schedule import (
    LearningRates,
    group_defaults,
    make_optimizer,
    make_scheduler,
    scheduler_steps,
    scheduler_told,
)
from slimcli.solver.state import Best, Position
from slimcli.solver.step import Stepper
from slimcli.solver.subject import Subject, Surroundings


class Trainer:
    """Trains one subject to the end of its stage."""

    def __init__(self, subject: Subject, around: Surroundings) -> None:
        self.subject = subject
        self.around = around
        self.training = around.stage.training
        self.position = Position()
        self.best = Best()
        self.has_nan_metric = False
        self.averages = Averages()
        self._length = len(around.data.train)
        self._build_optimizer()
        self._last_save = time.monotonic()
        self._epoch_seconds = 0.0

    # Building

    def _build_optimizer(self) -> None:
        around, model = self.around, self.subject.model
        groups = self.subject.compressor.param_groups(model, group_defaults(self.training))
        config = around.stage.hook_config()
        self.optimizer: Optimizer = make_optimizer(around.hooks, config, groups)
        check_groups(self.optimizer, model, around.hooks)
        per_epoch = around.schedule.steps_per_epoch
        steps = scheduler_steps(self.training, per_epoch)
        scheduler = make_scheduler(around.hooks, config, self.optimizer, steps)
        told = functools.partial(scheduler_told, around.hooks, self.training, per_epoch)
        self.rates = LearningRates(self.optimizer, scheduler, self.training, told)
        self.stepper = Stepper(self.subject, around, self.optimizer)

    # Where training is

    def progress(self) -> Progress:
        """The step that comes next."""
        return self._progress_at(self.position.step)

    def last_progress(self) -> Progress:
        """The last step that was taken: what ``finish`` and ``may_save`` look back on."""
        return self._progress_at(max(0, self.position.step - 1))

    def _progress_at(self, step: int) -> Progress:
        schedule = self.around.schedule
        rates = schedule.learning_rates
        planned = rates[min(step, len(rates) - 1)] if rates else self.training.lr
        rate = self.rates.current(step, planned)
        return Progress(self.position.epoch, step, rate, schedule)

    def state(self) -> dict[str, float]:
        """The compressor's numbers."""
        return self.subject.compressor.status(self.subject.model)

    # The run

    def train(self) -> None:
        """From the position to the end of the last epoch.

        Raises:
            StopRequested: A signal asked to stop; the position is where to go on.
        """
        if self.training.epoch == 0 and not self.position.is_finished:
            self._finish()
            self._close_epoch()
        while self.position.epoch < self.training.epoch:
            self._epoch()

    def _epoch(self) -> None:
        started = time.monotonic()
        model = self.subject.model
        if self.position.batch == 0:
            self._epoch_seconds = 0.0
            progress = self.progress()
            self._cut(self.subject.compressor.before_epoch(model, progress), progress)
        model.train()
        batches = self.around.data.train.batches(self.position.epoch, skip=self.position.batch)
        for window in self._windows(batches):
            self._step(window, self.progress())
        self._compare_length(batches)
        if self.position.epoch == self.training.epoch - 1 and not self.position.is_finished:
            self._finish()
        self._epoch_seconds += time.monotonic() - started
        self._close_epoch()

    def _windows(self, batches: Iterator[Batch]) -> Iterator[list[Batch]]:
        """The batches of each optimizer step that is left in this epoch."""
        size = self.training.accumulate_grad_batches
        steps_left = self.around.schedule.steps_per_epoch - self.position.batch // size
        for _ in range(steps_left):
            window = list(itertools.islice(batches, size))
            if not window:
                return
            yield window

    def _compare_length(self, rest: Iterator[Batch]) -> None:
        """Tell once of a training loader with fewer or more batches than its length says.

        Raises:
            RunError: It has none at all.
        """
        position, length = self.position, self._length
        if not position.batch:
            raise no_batches(self.around.hooks, position.epoch + 1, length)
        planned = self.around.schedule.steps_per_epoch * self.training.accumulate_grad_batches
        has_fewer = position.batch < min(length, planned)
        if not position.is_length_told and (has_fewer or (planned >= length and has_more(rest))):
            position.is_length_told = True
            self.around.note(wrong_length(position.epoch + 1, position.batch, length))

    def _step(self, window: list[Batch], progress: Progress) -> None:
        is_logged = progress.step % self.training.log_interval == 0
        with self.rates.warmed_up(progress.step):
            values = self.stepper.step(window, progress, self.position.batch, is_logged)
        self.averages.add(values.loss, values.size)
        self.averages.add(values.metrics, values.measured)
        self.rates.after_step()
        self.position.batch += len(window)
        self.position.step += 1
        self._report_step(values.loss["loss"], values.metrics, progress, is_logged)
        if self._is_save_due():
            self._save(False)
        self.around.check_stop()

    def try_step(self, batch: Batch) -> None:
        """One step that nobody hears of: a trial on a copy."""
        self.subject.model.train()
        with self.rates.warmed_up(self.position.step):
            self.stepper.step([batch], self.progress(), self.position.batch, False)
        self.position.step += 1

    def _report_step(
        self, loss: float, metrics: dict[str, float], progress: Progress, is_logged: bool
    ) -> None:
        events, stage = self.around.events, self.around.stage
        per_epoch = self.around.schedule.steps_per_epoch
        events.tick(
            stage=stage.name,
            epoch=progress.epoch + 1,
            epochs=self.training.epoch,
            step=progress.step - progress.epoch * per_epoch + 1,
            steps=per_epoch,
            loss=loss,
            lr=progress.learning_rate,
        )
        if is_logged:
            events.emit(
                "step",
                stage=stage.name,
                epoch=progress.epoch + 1,
                step=progress.step,
                loss=loss,
                lr=progress.learning_rate,
                metrics=metrics,
                status=self.state(),
            )

    # Cuts

    def _finish(self) -> None:
        progress = self.last_progress()
        self._cut(self.subject.compressor.finish(self.subject.model, progress), progress)
        self.position.is_finished = True

    def _cut(self, cuts: list[Cut], progress: Progress) -> None:
        if self.around.fabric.world_size > 1:
            cuts = self.around.fabric.broadcast(cuts)
        if not cuts:
            return
        subject = self.subject
        emit = self.around.events.emit
        with cut_seam.measured(subject.model, subject.example, emit):
            surgery.apply(subject.model, cuts, optimizer=self.optimizer, example=subject.example)
            subject.compressor.after_cut(subject.model, cuts)
            for cut in cuts:
                emit(
                    "cut",
                    stage=self.around.stage.name,
                    epoch=progress.epoch + 1,
                    group=cut.group,
                    before=cut.before,
                    after=cut.after,
                )
        self.stepper.wrap()

    # The end of an epoch

    def _close_epoch(self) -> None:
        around, subject, progress = self.around, self.subject, self.last_progress()
        self.stepper.share_buffers()
        metrics = around.evaluator.run(subject.model, around.data.validation)
        keyword = self.training.save_keyword
        if keyword not in metrics:
            (problem,) = missing_keyword(around.hooks, keyword, metrics).problems
            what = f"{problem.what} in epoch {self.position.epoch + 1}"
            # No error of a hook that nothing was trained with: it was there before training.
            raise RunError(replace(problem, what=what, fix=f"{problem.fix}; then slim resume"))
        value = metrics[keyword]
        may_save = subject.compressor.may_save(subject.model, progress)
        self._go_to_next_epoch(value)
        around.events.emit(
            "epoch_end",
            stage=around.stage.name,
            epoch=self.position.epoch,
            epochs=self.training.epoch,
            train=self.averages.means(),
            val=metrics,
            status=self.state(),
            lr=progress.learning_rate,
            seconds=round(self._epoch_seconds, 3),
            may_save=may_save,
        )
        self.averages = Averages()
        if math.isnan(value):
            self.has_nan_metric |= may_save
            text = f"{keyword} is nan in epoch {self.position.epoch}: it can't be the best model"
            around.events.emit("notice", text=text, level="warning")
        is_best = may_save and is_better(value, self.best.value, self.training.metric_mode)
        if is_best:
            self.best = Best(value, self.position.epoch, metrics)
            around.events.emit(
                "best",
                stage=around.stage.name,
                epoch=self.position.epoch,
                metric=keyword,
                value=value,
            )
        self._save(is_best)

    def _go_to_next_epoch(self, metric: float) -> None:
        """Every epoch starts at its place in the schedule, however many batches there were."""
        position, per_epoch = self.position, self.around.schedule.steps_per_epoch
        position.batch = 0
        if self.training.epoch:
            start = (position.epoch + 1) * per_epoch
            self.rates.leave_out(start - position.step)
            position.epoch, position.step = position.epoch + 1, start
        self.rates.after_epoch(metric)

    # Saving

    def _is_save_due(self) -> bool:
        age = (time.monotonic() - self._last_save) / 60
        due = age >= self.training.save_every_minutes
        return bool(self.around.fabric.broadcast(due)) if self.around.fabric.world_size > 1 else due

    def _save(self, is_best: bool) -> None:
        self.around.save(is_best)
        self._last_save = time.monotonic()
