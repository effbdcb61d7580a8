"""The trial cut: zero channels, cut them, run; what raises or differs is frozen.

Labels can't see constants in the user's Python (``view(-1, 9216)``, ``num_heads``). Every group is
therefore cut once before anything is trained, all together, on a copy in float64 whose norms and
scales are made unequal so that nothing is right by accident.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from slimcli.errors import SlimError
from slimcli.network import surgery
from slimcli.network.cuts import Cut
from slimcli.network.example import Example
from slimcli.network.nested import tensors_in
from slimcli.network.structure import user_line
from slimcli.network.structure.modes import (
    output_tensors,
    preserved_randomness,
    without_collector,
    without_fast_path,
)
from slimcli.network.structure.precision import copy_as, example_as, run_inside
from slimcli.network.structure.producing import MIXING
from slimcli.network.structure.recheck import first_disorder
from slimcli.network.structure.record import Record
from slimcli.network.structure.rehearse import rehearse
from slimcli.network.structure.run import run_traced
from slimcli.network.structure.sources import Sources
from slimcli.network.structure.structure import Group
from slimcli.network.structure.trace import ORDER_DEPENDENT, base_name
from slimcli.network.structure.traced import Traced
from slimcli.network.structure.train_mode import set_train_mode

LIMITS = {torch.float64: 1e-8, torch.float32: 1e-3}
"""Largest difference, relative to the largest output: far above rounding, far below an error."""


@dataclass(frozen=True)
class Failure:
    """Why a trial cut failed.

    Attributes:
        what: The error or the difference.
        line: The user's line, if it raised.
        module: Path of the module that was entered last, if it raised.
    """

    what: str
    line: str = ""
    module: str = ""

    def __str__(self) -> str:
        """For a frozen reason."""
        return f"a trial cut failed: {self.what}" + (f" at {self.line}" if self.line else "")


@dataclass
class _Log:
    """What hooks note during a run.

    Attributes:
        entered: Path of the module entered last.
        calls: Mixing modules that have run.
        limit: Outputs are kept of this many of them at most.
        whole: Paths of layers that aren't cut: their outputs are kept.
    """

    entered: str = ""
    calls: int = 0
    limit: int = 0
    whole: frozenset[str] = frozenset()
    outputs: list[Tensor] = field(default_factory=list)


@contextlib.contextmanager
def _watched(model: nn.Module, log: _Log) -> Iterator[None]:
    """Notes which module was entered last, and keeps the outputs of layers that are not cut.

    Two hooks for all modules of the process: a hook on each would be copied with each module.
    """
    paths = {id(module): path for path, module in model.named_modules()}

    def enter(module: nn.Module, inputs: Any) -> None:
        log.entered = paths.get(id(module), log.entered)

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(module, MIXING) and id(module) in paths:
            log.calls += 1
            if log.calls <= log.limit and paths[id(module)] in log.whole:
                log.outputs.append(output)

    handles = register_module_forward_pre_hook(enter), register_module_forward_hook(leave)
    try:
        with warnings.catch_warnings():  # what torch says of hooks like these on compiled models
            warnings.filterwarnings("ignore", message="Using `torch.compile")
            yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Ran:
    """What a run gave.

    Attributes:
        final: Tensors of the prediction.
        layers: Outputs of uncut layers, in front of the first operator that sorts or picks.
        picks: What such operators picked.
    """

    final: list[Tensor]
    layers: list[Tensor]
    picks: list[Tensor]

    def picks_as(self, other: Ran) -> bool:
        """Did both runs pick the same places?"""
        return len(self.picks) == len(other.picks) and all(
            map(torch.equal, self.picks, other.picks)
        )


class Picks(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the places that sorting and picking operators found."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Executes the operator."""
        output = func(*args, **(kwargs or {}))
        if base_name(func)[0] in ORDER_DEPENDENT:
            self.found += [t for t in tensors_in(output) if not t.is_floating_point()]
        return output


class Trial:
    """Cuts groups on copies of a model and compares.

    Args:
        model: Not changed.
        example: The batch.
        traced: What is predicted.
        seed: For kept channels and for what replaces equal numbers.
    """

    def __init__(self, model: nn.Module, example: Example, traced: Traced, seed: int = 0) -> None:
        self._random = torch.Generator().manual_seed(seed)
        self._traced = traced
        self._rechecks = False
        self.note = ""
        self._log = _Log(limit=traced.record.static_calls or 0)
        self._origin = model, example
        self._use(torch.float64)

    def _use(self, dtype: torch.dtype) -> None:
        """Runs in this dtype from now on."""
        self._dtype = dtype
        self._example = example_as(self._origin[1], dtype)

    def _fresh(self) -> nn.Module:
        """A copy to be cut; only one is held at a time."""
        model = copy_as(self._origin[0], self._dtype).eval()
        unequal(model, self._random)
        return model

    def run(self, model: nn.Module, record: Record | None = None) -> Ran:
        """Runs the model, same random numbers every time.

        Args:
            model: Run as it is.
            record: Its channels are followed into this.
        """
        self._log.calls, self._log.outputs = 0, []
        picks = Picks()
        example = run_inside(picks, self._example) if self._log.limit else self._example
        with torch.no_grad(), preserved_randomness(), without_fast_path():
            torch.manual_seed(0)
            if record is None:
                prediction = example.run(model)
            else:
                prediction = run_traced(model, example, record).output
        return Ran(list(output_tensors(prediction)), self._log.outputs, picks.found)

    def _run_zeroed(self, model: nn.Module) -> Ran | None:
        """The same; None where the user's code wants float32 and everything must begin again."""
        try:
            ran = self.run(model)
            if not self._log.limit and not any(each.is_floating_point() for each in ran.final):
                self._log.limit = sys.maxsize  # class numbers tell little: layers tell more
                ran = self.run(model)
            return ran
        except Exception as error:  # the user's code fixes a dtype
            if self._dtype == torch.float32:
                raise error
            self.note = f"trial cuts ran in float32, float64 fails: {str(error).splitlines()[0]}"
            self._use(torch.float32)
            return None

    def attempt(
        self, groups: Sequence[Group], *, thorough: bool = False, merging: bool = False
    ) -> Failure | None:
        """Cuts about half of the channels of all these groups together.

        Args:
            groups: Prunable ones.
            thorough: Also compare the order of channels, and run the cut model in train mode.
            merging: Of channels that can be zeroed or merged, as many are merged as zeroed.
        """
        with without_collector():
            model = self._fresh()
            with _watched(model, self._log):
                return self._attempt(model, groups, thorough, merging)

    def _attempt(
        self, model: nn.Module, groups: Sequence[Group], thorough: bool, merging: bool
    ) -> Failure | None:
        self._log.whole = self._uncut_layers(groups)
        cuts = []
        for group in groups:
            order = torch.randperm(group.size, generator=self._random).tolist()
            cuts.append(rehearse(model, group, order, merging))
        after = None
        try:
            zeroed = self._run_zeroed(model)
            if zeroed is None:
                return self.attempt(groups, thorough=thorough, merging=merging)
            surgery.apply(model, cuts, example=self._example)
            if thorough or self._rechecks:
                after = Record(Sources(model))
            cut = self.run(model, after)
            if thorough and self._traced.train_path_differs:
                set_train_mode(model)
                self.run(model)
        except SlimError as error:
            cause = error.__cause__  # where a hook raised, slim tells it in its own words
            if cause is not None and user_line.of_error(cause):
                return self._raised(cause)
            return Failure(error.problems[0].what)
        except Exception as error:  # the user's code on other sizes: anything can come
            return self._raised(error)
        failure = self._compare(zeroed, cut)
        return self._recheck(after, cuts) if failure is None and after is not None else failure

    def _uncut_layers(self, groups: Sequence[Group]) -> frozenset[str]:
        cut = {slot.tensor for group in groups for slot in group.producers + group.followers}
        touched = {name.rpartition(".")[0] for name in cut}
        layers = {name.removeprefix("tensor:") for name in self._traced.record.layers}
        return frozenset(
            path
            for path in layers
            if path not in touched and not any(each.startswith(f"{path}.") for each in touched)
        )

    def _raised(self, error: BaseException) -> Failure:
        """What the user's code said, where, and in which module it was."""
        first = str(error).splitlines()[0] if str(error) else ""
        what = f"{type(error).__name__}: {first}"
        return Failure(what, user_line.of_error(error), self._log.entered)

    def _recheck(self, after: Record, cuts: Sequence[Cut]) -> Failure | None:
        """Looks at the trace of the cut model; from the first disorder on, in every attempt."""
        consumers = self._traced.record.consumers[: self._traced.consumers_in_eval]
        path = first_disorder(self._traced.record, consumers, after, cuts)
        if not path:
            return None
        self._rechecks = True
        return Failure(f"the channels do not arrive at {path} in the predicted order", "", path)

    def _compare(self, zeroed: Ran, cut: Ran) -> Failure | None:
        """Where sorting or suppression makes the output jump, the layers before that count.

        If both runs picked the same, the output counts, too.
        """
        failure = None
        if self._log.limit:
            failure = self._compare_all(zeroed.layers, cut.layers)
        if failure is None and (not self._log.limit or zeroed.picks_as(cut)):
            failure = self._compare_all(zeroed.final, cut.final)
        return failure

    def _compare_all(self, zeroed: Sequence[Tensor], cut: Sequence[Tensor]) -> Failure | None:
        if len(zeroed) != len(cut):
            return Failure("the number of outputs changes")
        for before, after in zip(zeroed, cut, strict=True):
            if before.shape != after.shape:
                return Failure(
                    f"an output changes its shape {(*before.shape,)} to {(*after.shape,)}"
                )
            if not before.numel():
                continue
            before, after = before.to(torch.float64), after.to(torch.float64)
            finite = torch.isfinite(before)
            if not bool((finite == torch.isfinite(after)).all()):
                return Failure("other outputs are infinite or not a number")
            before, after = before[finite], after[finite]
            if not before.numel():
                continue
            size = max(float(before.abs().max()), 1e-30)
            difference = float((before - after).abs().max()) / size
            if not difference <= LIMITS[self._dtype]:
                return Failure(f"zeroed and cut differ by {difference:.1e} of the output")
        return None

    def find_bad(
        self, groups: Sequence[Group], failure: Failure, *, merging: bool = False
    ) -> list[tuple[Group, Failure]]:
        """The groups that fail, by halving; ``failure`` is what all of them together gave."""
        if len(groups) == 1:
            return [(groups[0], failure)]
        middle = len(groups) // 2
        found: list[tuple[Group, Failure]] = []
        for half in (groups[:middle], groups[middle:]):
            problem = self.attempt(half, merging=merging)
            if problem is not None:
                found += self.find_bad(half, problem, merging=merging)
        return found or self._find_interaction(groups, merging)

    def _find_interaction(
        self, groups: Sequence[Group], merging: bool
    ) -> list[tuple[Group, Failure]]:
        """Both halves pass alone: adds groups one at a time and drops those that break it."""
        good: list[Group] = []
        found = []
        for group in groups:
            problem = self.attempt([*good, group], merging=merging)
            if problem is None:
                good.append(group)
            else:
                found.append((group, problem))
        return found


def unequal(model: nn.Module, random: torch.Generator) -> None:
    """Gives norms, and parameters whose entries are all equal, different entries, in place."""
    with torch.no_grad():
        for module in model.modules():
            statistics = hasattr(module, "running_mean") and hasattr(module, "running_var")
            named: list[tuple[str, Tensor]] = [*module.named_parameters(recurse=False)]
            named += [*module.named_buffers(recurse=False)] if statistics else []
            for name, tensor in named:
                if _is_uniform(tensor) or (statistics and tensor.is_floating_point()):
                    positive = name == "running_var" or float(tensor.flatten()[0]) > 0
                    tensor.copy_(_spread(tensor, positive, random))


def _is_uniform(tensor: Tensor) -> bool:
    if not tensor.numel() or not tensor.is_floating_point():
        return False
    if tensor.numel() == 1:  # a gate that starts at zero would hide what lies behind it
        return not bool(tensor.any())
    flat = tensor.flatten()
    return bool(flat[0] == flat[-1]) and bool((flat == flat[0]).all())


def _spread(tensor: Tensor, positive: bool, random: torch.Generator) -> Tensor:
    if positive:
        return 0.75 + 0.5 * torch.rand(tensor.shape, generator=random, dtype=torch.float64)
    return 0.1 * torch.randn(tensor.shape, generator=random, dtype=torch.float64)
