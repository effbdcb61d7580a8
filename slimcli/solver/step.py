"""One optimizer step: forward, backward, the compressor's word on gradients, step."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from slimcli.compressor import Progress
from slimcli.errors import HookError, Problem, RunError
from slimcli.recipe.binding import RAISED, hook_failed
from slimcli.recipe.frames import is_ours
from slimcli.solver.data import Batch
from slimcli.solver.distill import pull
from slimcli.solver.job import JobHooks
from slimcli.solver.randomness import seed_all
from slimcli.solver.subject import Subject, Surroundings


@dataclass
class StepValues:
    """What one step measured.

    Attributes:
        loss: The mean loss over the samples of the step, by name.
        size: Samples.
        metrics: Training metrics, where they were asked for.
        measured: Samples the metrics were taken on.
    """

    loss: dict[str, float]
    size: int
    metrics: dict[str, float] = field(default_factory=dict)
    measured: int = 1


class NotFinite(Exception):
    """The loss is nan or inf.

    Attributes:
        value: The loss.
        batch: Number of the batch in its epoch.
        data: The batch itself.
    """

    def __init__(self, value: float, batch: int, data: Any) -> None:
        super().__init__(f"loss is {value}")
        self.value = value
        self.batch = batch
        self.data = data


class LateNumber:
    """A number on its way from the device, asked for when the work behind it has been queued.

    ``item()`` here and now would leave a GPU without work until the next call reaches it.
    """

    def __init__(self, scalar: Tensor) -> None:
        self._event: torch.Event | None = None
        self._scalar = scalar.detach()
        if scalar.device.type != "cpu":
            self._scalar = self._scalar.to("cpu", non_blocking=True)
            self._event = torch.Event(scalar.device)
            self._event.record()

    def value(self) -> float:
        """The number; waits for it, and for nothing that was queued later."""
        if self._event is not None:
            self._event.synchronize()
        return float(self._scalar.item())


class Stepper:
    """Takes optimizer steps on one model; knows processes, precision and accumulation."""

    def __init__(self, subject: Subject, around: Surroundings, optimizer: Optimizer) -> None:
        self.subject = subject
        self.around = around
        self.training = around.stage.training
        self.optimizer = optimizer
        self.wrap()

    def wrap(self) -> None:
        """Put the raw model behind Fabric: processes, autocast, compilation. Again after a cut."""
        raw = self.subject.model
        if self.training.channels_last:
            raw.to(memory_format=torch.channels_last)
        module: Any = torch.compile(raw) if self.training.compile else raw
        self.model, self.fabric_optimizer = self.around.fabric.setup(module, self.optimizer)
        known = set(dir(nn.Module))
        for name in dir(type(raw)):
            if name not in known and not name.startswith("_") and callable(getattr(raw, name)):
                # A hook may call model.encode(...): it must go through the wrapper too.
                self._mark(name)

    def _mark(self, name: str) -> None:
        try:
            self.model.mark_forward_method(name)
        except AttributeError:
            return  # a static method or a callable attribute: no way past the wrapper

    def move(self, data: Any) -> Any:
        """A batch on the device, images in the chosen memory format."""
        return move_batch(self.around.fabric, data, self.training.channels_last)

    def step(
        self, window: list[Batch], progress: Progress, first: int, wants_metrics: bool
    ) -> StepValues:
        """One optimizer step on the batches of ``window``.

        Args:
            window: As many batches as gradients are accumulated over.
            progress: For the compressor.
            first: Number of the first batch in its epoch.
            wants_metrics: Whether this is a step whose training metrics are logged.

        Raises:
            NotFinite: The loss of a batch is nan or inf; nothing was changed.
        """
        subject = self.subject
        self.optimizer.zero_grad(set_to_none=True)
        losses: list[LateNumber] = []
        values = StepValues({}, 0)
        for index, batch in enumerate(window):
            parts = (index, len(window))
            loss, prediction, data = self._backward(batch, first + index, progress.epoch, parts)
            losses.append(loss)
            if index == len(window) - 1 and wants_metrics and self.training.train_metrics:
                values.metrics = self._metrics(prediction, data)
                values.measured = batch.size
        numbers = [each.value() for each in losses]
        for index, number in enumerate(numbers):
            if not math.isfinite(number):
                raise NotFinite(number, first + index, window[index].data)
        self._settle_gradients()
        subject.compressor.after_backward(subject.model, progress)
        skipped = self._optimizer_step()
        subject.compressor.after_step(subject.model, progress, skipped)
        values.size = sum(batch.size for batch in window)
        total = sum(number * batch.size for number, batch in zip(numbers, window, strict=True))
        values.loss = {"loss": total / values.size}
        return values

    def _backward(
        self, batch: Batch, number: int, epoch: int, parts: tuple[int, int]
    ) -> tuple[LateNumber, Any, Any]:
        """Forward and backward of one batch, part ``parts[0]`` of ``parts[1]`` of its step.

        Returns:
            Loss, prediction and data.
        """
        fabric, hooks = self.around.fabric, self.around.hooks
        part, count = parts
        seed_all(self.training.seed, "step", epoch, number, fabric.global_rank)
        data = self.move(batch.data)
        with nullcontext() if fabric.world_size == 1 else self._quiet(part < count - 1):
            prediction = hooks.predict_function(self.model, data)
            loss = checked_loss(hooks.calculate_loss_function(prediction, data), hooks)
            if self.around.teacher is not None:
                loss = loss + self._pull(prediction, data)
            value = LateNumber(loss)
            self._run_backward(loss if count == 1 else loss / count)
        return value, prediction, data

    def _pull(self, prediction: Any, data: Any) -> Tensor:
        """The teacher's part of the loss."""
        teacher, training = self.around.teacher, self.training
        assert teacher is not None
        with self.around.fabric.autocast():
            apart = pull(prediction, data, teacher, self.around.hooks, training.teacher_temperature)
        return training.teacher_weight * apart

    def _run_backward(self, loss: Tensor) -> None:
        try:
            self.around.fabric.backward(loss)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, SystemExit) as error:
            # An in-place change or a graph used twice is in the user's forward, not in ours.
            raise hook_failed("calculate_loss_function", error) from error

    def _quiet(self, enabled: bool) -> Any:
        """Gradients are reduced once a step, not once a batch."""
        return self.around.fabric.no_backward_sync(self.model, enabled=enabled)

    def _metrics(self, prediction: Any, data: Any) -> dict[str, float]:
        with torch.no_grad():
            return self.around.evaluator.on_batch(prediction, data)

    def _settle_gradients(self) -> None:
        """Unscaled and clipped: what the compressor and the papers mean by a gradient."""
        self.around.fabric.strategy.precision.unscale_gradients(self.optimizer)
        if self.training.gradient_clip is not None:
            parameters = [each for group in self.optimizer.param_groups for each in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.training.gradient_clip)

    def _optimizer_step(self) -> bool:
        """Step; whether the gradient scaler left it out."""
        scaler = getattr(self.around.fabric.strategy.precision, "scaler", None)
        before = scaler.get_scale() if scaler is not None else 0.0
        try:
            self.fabric_optimizer.step()
        except RAISED as error:
            if is_ours(error) or self.around.hooks.optimizer_generator is None:
                raise
            raise hook_failed("optimizer_generator", error) from error
        return scaler is not None and scaler.get_scale() < before

    def share_buffers(self) -> None:
        """All processes take the statistics of the first, as its checkpoint will."""
        fabric = self.around.fabric
        if fabric.world_size > 1:
            for buffer in self.subject.model.buffers():
                buffer.copy_(fabric.broadcast(buffer))


def move_batch(fabric: Any, data: Any, channels_last: bool) -> Any:
    """A nested batch on the device; 4-dimensional tensors as channels-last if asked for."""
    moved = fabric.to_device(data)
    if not channels_last:
        return moved
    from lightning_utilities.core.apply_func import apply_to_collection

    def convert(tensor: Tensor) -> Tensor:
        return tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor

    return apply_to_collection(moved, Tensor, convert)


def checked_loss(loss: Any, hooks: JobHooks) -> Tensor:
    """The loss as a scalar tensor with a graph.

    Raises:
        HookError: ``calculate_loss_function`` returned something else.
    """
    received = fix = ""
    if not isinstance(loss, Tensor):
        received = f"a {type(loss).__name__}"
        fix = "return one tensor; of several losses, their sum"
    elif loss.numel() != 1:
        received = f"a tensor of shape {tuple(loss.shape)}"
        fix = "return its mean()"
    elif not loss.requires_grad:
        received = "a tensor that no parameter leads to"
        fix = "no detach(), item() or no_grad() on the way; is every parameter frozen?"
    if received:
        raise HookError(
            Problem(
                "E-HOOK-LOSS",
                "hook `calculate_loss_function` returned the wrong thing",
                hooks.where("calculate_loss_function"),
                expected="one scalar tensor with a gradient",
                received=received,
                fix=fix,
            )
        )
    assert isinstance(loss, Tensor)
    return loss if loss.dim() == 0 else loss.reshape(())


def not_finite_error(error: NotFinite, where: str, last_good: str, saved: str) -> RunError:
    """The message for a loss that is nan or inf."""
    return RunError(
        Problem(
            "E-LOSS-NOT-FINITE",
            f"loss became {error.value} in {where}, batch {error.batch + 1}",
            expected="a finite number",
            received=f"{error.value} (last good checkpoint: {last_good}; the batch: {saved})",
            fix="a smaller config.lr, config.gradient_clip, or look at the batch",
        )
    )
