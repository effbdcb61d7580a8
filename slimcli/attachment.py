"""An algorithm in somebody else's training loop: it counts steps and calls the compressor.

::

    slim = slimcli.attach(model, "name", {"epoch": 90, "lr": 0.1}, example, steps_per_epoch=391)
    optimizer = torch.optim.SGD(slim.param_groups(), lr=0.1)
    for epoch in range(90):
        slim.before_epoch(optimizer)
        for batch in loader:
            loss(slim.model, batch).backward()
            slim.after_backward()
            optimizer.step()
            slim.after_step()
            optimizer.zero_grad()
    slim.finish(optimizer)
    plain = slim.deploy()
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from slimcli.compressor import Compressor, Progress, Schedule
from slimcli.errors import GoalError, Problem
from slimcli.network import surgery
from slimcli.network.cuts import Cut
from slimcli.network.example import Example
from slimcli.solver import planner
from slimcli.solver.config import TrainingConfig
from slimcli.solver.job import JobHooks
from slimcli.solver.schedule import group_defaults, plan_schedule


def _unused(*_: Any) -> None:
    """Stands for the hooks of a loop that is not ours."""


class Attachment:
    """A compressor at work on one model.

    Args:
        model: Becomes :attr:`model`, with the algorithm's modules in it.
        compressor: The algorithm.
        training: Epochs, learning rate and the rest the schedule is made of.
        example: A real batch and the way to run the model on it.
        steps_per_epoch: Optimizer steps in an epoch of the loop.

    Raises:
        GoalError: The plan refuses.
    """

    def __init__(
        self,
        model: nn.Module,
        compressor: Compressor,
        training: TrainingConfig,
        example: Example,
        steps_per_epoch: int,
    ) -> None:
        self.compressor = compressor
        self.training = training
        self.example = example
        hooks = JobHooks(_unused, _unused, _unused, _unused, _unused)
        self.schedule: Schedule = plan_schedule(
            hooks, training.model_dump(), training, steps_per_epoch
        )
        self.plan = compressor.plan(model, example, self.schedule)
        if self.plan.refusals:
            raise GoalError(
                *(
                    Problem("E-PLAN-REFUSED", each.what, each.key, fix=each.fix)
                    for each in self.plan.refusals
                )
            )
        self.model = planner.prepared(compressor, model, example, self.plan)
        self.step = 0

    def progress(self) -> Progress:
        """Where the loop is, by the steps it has taken."""
        rates = self.schedule.learning_rates
        rate = rates[min(self.step, len(rates) - 1)] if rates else self.training.lr
        epoch = self.step // max(1, self.schedule.steps_per_epoch)
        return Progress(epoch, self.step, rate, self.schedule)

    def calibrate(self, batches: Iterable[Any]) -> None:
        """Show the algorithm some training batches before the first step."""
        predict = self.example.predict
        self.compressor.calibrate(
            self.model, (Example(batch=each, predict=predict) for each in batches)
        )

    def param_groups(self) -> list[dict[str, Any]]:
        """Groups for your optimizer."""
        return self.compressor.param_groups(self.model, group_defaults(self.training))

    def before_epoch(self, optimizer: Optimizer) -> list[Cut]:
        """Apply the cuts that are due to the model and the optimizer; returns them.

        After a cut the parameters are new objects: wrap the model again where it is wrapped.
        """
        return self._cut(self.compressor.before_epoch(self.model, self.progress()), optimizer)

    def after_backward(self) -> None:
        """Between backward (unscaled, clipped) and the optimizer's step."""
        self.compressor.after_backward(self.model, self.progress())

    def after_step(self, skipped: bool = False) -> None:
        """After the optimizer's step; ``skipped``: a gradient scaler left it out."""
        self.compressor.after_step(self.model, self.progress(), skipped)
        self.step += 1

    def finish(self, optimizer: Optimizer | None = None) -> list[Cut]:
        """After the last step: what makes deploying exact."""
        last = self.progress()
        before = Progress(
            min(last.epoch, max(0, self.schedule.epochs - 1)),
            max(0, self.step - 1),
            last.learning_rate,
            self.schedule,
        )
        return self._cut(self.compressor.finish(self.model, before), optimizer)

    def _cut(self, cuts: list[Cut], optimizer: Optimizer | None) -> list[Cut]:
        if cuts:
            surgery.apply(self.model, cuts, optimizer=optimizer, example=self.example)
            self.compressor.after_cut(self.model, cuts)
        return cuts

    def may_save(self) -> bool:
        """Whether the model as it is meets the goal."""
        return self.compressor.may_save(self.model, self.progress())

    def status(self) -> dict[str, float]:
        """The algorithm's numbers."""
        return self.compressor.status(self.model)

    def deploy(self) -> nn.Module:
        """A new plain model with the same function."""
        return self.compressor.deploy(self.model)

    def state_dict(self) -> dict[str, Any]:
        """For your checkpoint, beside the model's own state."""
        return {"step": self.step, "compressor": self.compressor.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what :meth:`state_dict` gave."""
        self.step = int(state["step"])
        self.compressor.load_state_dict(state["compressor"])
