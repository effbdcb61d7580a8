"""Metrics over a whole data set: averages weighted by batch size, or an object that computes."""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slimcli.errors import HookError, Problem, SlimError
from slimcli.network.nested import tensors_in
from slimcli.recipe.binding import RAISED, hook_failed
from slimcli.solver.data import Batch, Source
from slimcli.solver.job import JobHooks

NAN = "nan"
"""Under which it is kept that predictions hold some."""

MoveToDevice = Callable[[Any], Any]


class Averages:
    """Running means weighted by the number of samples."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.batches = 0
        self.found_in: Counter[str] = Counter()

    def add(self, values: Mapping[str, float], size: int) -> None:
        """Take in the values of a batch of ``size`` samples."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * size
            self.counts[name] = self.counts.get(name, 0) + size
        self.batches += 1
        self.found_in.update(values.keys())

    def means(self) -> dict[str, float]:
        """The averages so far.

        >>> averages = Averages()
        >>> averages.add({"acc": 1.0}, 1)
        >>> averages.add({"acc": 0.0}, 3)
        >>> averages.means()
        {'acc': 0.25}
        """
        return {name: total / self.counts[name] for name, total in self.sums.items()}

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint in the middle of an epoch."""
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what :meth:`state_dict` gave."""
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])


def is_accumulating(evaluate: Any) -> bool:
    """Whether ``evaluate_function`` is an object with ``update`` and ``compute``."""
    return hasattr(evaluate, "update") and hasattr(evaluate, "compute")


def as_numbers(values: Any, hooks: JobHooks) -> dict[str, float]:
    """What ``evaluate_function`` returned, as numbers.

    Raises:
        HookError: It is not a dictionary of numbers.
    """
    if not isinstance(values, Mapping):
        raise _wrong_metrics(hooks, "a dictionary of numbers", type(values).__name__)
    numbers = {}
    for name, value in values.items():
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        try:
            numbers[str(name)] = float(value)
        except (TypeError, ValueError) as error:
            received = f"{type(value).__name__} for {name!r}"
            raise _wrong_metrics(hooks, "one number a name", received) from error
        except OverflowError as error:
            received = f"an int for {name!r} that no float can hold"
            raise _wrong_metrics(hooks, "numbers below 1.8e308", received) from error
    return numbers


def _wrong_metrics(hooks: JobHooks, expected: str, received: str) -> HookError:
    return HookError(
        Problem(
            "E-HOOK-METRICS",
            "hook `evaluate_function` returned the wrong thing",
            hooks.where("evaluate_function"),
            expected,
            received,
            fix='return {"acc": hits.float().mean().item()}, or an object with update and compute',
        )
    )


class Evaluator:
    """Runs the user's metric over a source.

    Args:
        hooks: The user's functions.
        move: Moves a batch to the device of the model.
        check_stop: Called between batches; may raise to stop.
        warn: Takes a sentence about metrics that are not what they seem, once a metric.
    """

    def __init__(
        self,
        hooks: JobHooks,
        move: MoveToDevice,
        check_stop: Callable[[], None] = lambda: None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.hooks = hooks
        self.move = move
        self.check_stop = check_stop
        self.warn = warn
        self._warned: set[str] = set()
        # An object with state is used as a fresh copy for each pass.
        self.pristine = copy.deepcopy(hooks.evaluate_function)

    def on_batch(self, prediction: Any, data: Any) -> dict[str, float]:
        """The metrics of one batch alone."""
        if not is_accumulating(self.pristine):
            return as_numbers(self.hooks.evaluate_function(prediction, data), self.hooks)
        metric = copy.deepcopy(self.pristine)
        call_metric(metric.update, prediction, data)
        return as_numbers(call_metric(metric.compute), self.hooks)

    def run(self, model: Any, source: Source, limit: int | None = None) -> dict[str, float]:
        """Metrics of ``model`` in eval mode without gradients; its mode comes back.

        Args:
            model: A module, or anything ``predict_function`` accepts as one.
            source: The batches.
            limit: Stop after so many batches; None: all.
        """
        modes = [(each, each.training) for each in model.modules()] if _is_module(model) else []
        if modes:
            model.eval()
        try:
            with torch.no_grad():
                return self._pass(model, source, limit)
        finally:
            for module, training in modes:
                module.training = training

    def _pass(self, model: Any, source: Source, limit: int | None) -> dict[str, float]:
        averages = Averages()
        accumulates = is_accumulating(self.pristine)
        metric = copy.deepcopy(self.pristine) if accumulates else None
        flags: list[Tensor] = []
        for batch in itertools.islice(source.batches(0), limit):
            self.check_stop()
            data = self.move(batch.data)
            prediction = self._predict(model, data)
            if limit is None and NAN not in self._warned:  # of a part of the data it says little
                flags.append(_holds_nan(prediction))
            if metric is not None:
                call_metric(metric.update, prediction, data)
            else:
                values = as_numbers(self.hooks.evaluate_function(prediction, data), self.hooks)
                averages.add(values, batch.size)
        self._warn_of_nan(flags)
        if metric is not None:
            return as_numbers(call_metric(metric.compute), self.hooks)
        self._warn_of_gaps(averages)
        return averages.means()

    def _predict(self, model: Any, data: Any) -> Any:
        """The prediction of one batch.

        Raises:
            HookError: The hook put the model into train mode, in which it is not used later.
        """
        was_training = _is_module(model) and model.training
        prediction = self.hooks.predict_function(model, data)
        if _is_module(model) and model.training and not was_training:
            raise HookError(
                Problem(
                    "E-HOOK-MODE",
                    "hook `predict_function` put the model into train mode",
                    self.hooks.where("predict_function"),
                    expected="eval mode to stay in an evaluation",
                    received="train mode",
                    fix="no model.train() in the hook: training and evaluation set the mode",
                )
            )
        return prediction

    def _warn_of_nan(self, flags: list[Tensor]) -> None:
        """One flag a batch: the device is waited for here, not for each of them."""
        count = sum(map(bool, flags))
        if count:
            self._warned.add(NAN)
            self.warn(
                f"predictions of {count} of {len(flags)} validation batches hold nan; "
                "evaluate_function got them as they are"
            )

    def _warn_of_gaps(self, averages: Averages) -> None:
        """An average over some of the batches is not one over the data set."""
        for name, count in averages.found_in.items():
            if count < averages.batches and name not in self._warned:
                self._warned.add(name)
                self.warn(
                    f"evaluate_function returned {name} for {count} of {averages.batches} batches, "
                    "and its average is that of those; return it for each, or an object with "
                    "update and compute"
                )


def call_metric(method: Callable[..., Any], *arguments: Any) -> Any:
    """A method of the user's metric object.

    Raises:
        RunError: It raised; only the user's frames are told.
    """
    try:
        return method(*arguments)
    except SlimError:
        raise
    except RAISED as error:
        raise hook_failed("evaluate_function", error) from error


def _holds_nan(prediction: Any) -> Tensor:
    """Whether one of its tensors does, as a tensor on the device of the first."""
    flags = [each.isnan().any() for each in tensors_in(prediction) if _is_plain(each)]
    if not flags:
        return torch.tensor(False)
    return torch.stack([flag.to(flags[0].device) for flag in flags]).any()


def _is_plain(tensor: Tensor) -> bool:
    """Has it numbers that can be asked whether they are any? Sparse ones can't."""
    is_strided = tensor.layout is torch.strided and not tensor.is_nested
    return is_strided and tensor.is_floating_point()


def _is_module(model: Any) -> bool:
    return isinstance(model, nn.Module)


def is_better(value: float, best: float | None, mode: str) -> bool:
    """Whether ``value`` beats ``best``; nan never does.

    >>> is_better(0.5, None, "max"), is_better(0.5, 0.5, "max"), is_better(0.4, 0.5, "min")
    (True, False, True)
    """
    if math.isnan(value):
        return False
    if best is None:
        return True
    return value > best if mode == "max" else value < best


def missing_keyword(hooks: JobHooks, keyword: str, metrics: Mapping[str, float]) -> HookError:
    """The error for a ``save_keyword`` that ``evaluate_function`` does not return."""
    return HookError(
        Problem(
            "E-HOOK-SAVE-KEYWORD",
            f"config.save_keyword: evaluate_function returns no {keyword!r}",
            hooks.where("evaluate_function"),
            expected=f"{keyword!r} among its keys",
            received=", ".join(metrics) or "an empty dictionary",
            fix=f"config.save_keyword={next(iter(metrics))}"
            if metrics
            else f"return {{{keyword!r}: hits.float().mean().item()}}",
        )
    )


def first_batches(source: Source, count: int) -> list[Batch]:
    """The first few batches of epoch 0."""
    found: list[Batch] = []
    for batch in source.batches(0):
        found.append(batch)
        if len(found) == count:
            break
    return found
