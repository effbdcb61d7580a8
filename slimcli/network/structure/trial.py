"""The trial cut: zero channels, cut them, run; what raises or differs is frozen.

Labels can't see constants in the user's Python (``view(-1, 9216)``, ``num_heads``). Every group is
therefore cut once before anything is trained, all together, on a copy in float64 whose norms and
scales are made unequal so that nothing is right by accident.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from slimcli.errors import SlimError
from slimcli.network import constants, surgery
from slimcli.network.copying import deep_copy
from slimcli.network.cuts import Cut
from slimcli.network.example import Example
from slimcli.network.nested import tensors_in
from slimcli.network.structure import user_line
from slimcli.network.structure.comparison import (
    Failure,
    Picks,
    Ran,
    compare,
    is_the_same_for_all,
    raised,
    tells_little,
)
from slimcli.network.structure.draws import Draws
from slimcli.network.structure.edits import Edit, carry_out
from slimcli.network.structure.hollow import Hollow, is_large
from slimcli.network.structure.modes import (
    output_tensors,
    preserved_randomness,
    random_states,
    share_copy,
    without_collector,
    without_fast_path,
)
from slimcli.network.structure.precision import copy_as, in_double, run_inside, to_dtype
from slimcli.network.structure.recheck import first_disorder
from slimcli.network.structure.record import Record
from slimcli.network.structure.rehearse import goes_alone, rehearse
from slimcli.network.structure.remembering import Memory, attributes_of
from slimcli.network.structure.run import run_traced
from slimcli.network.structure.situations import (
    NO_OTHER,
    ONE_NUMBER,
    OUT_OF_REACH,
    Situation,
    holds_numbers,
    other_batches,
    unlike,
)
from slimcli.network.structure.sources import Sources
from slimcli.network.structure.structure import Group
from slimcli.network.structure.traced import Traced
from slimcli.network.structure.unequal import is_uniform, unequal, wake
from slimcli.network.structure.watching import Log, uncut_layers, watched


class Trial:
    """Cuts groups on copies of a model and compares.

    The copies' large weights are hollow; where the code reads numbers by other means than operators
    or a cut fails, they are whole, to be sure that it is not for that.

    Args:
        model: Not changed.
        example: The batch.
        traced: What is predicted.
        seed: For kept channels and for what replaces equal numbers.
    """

    def __init__(self, model: nn.Module, example: Example, traced: Traced, seed: int = 0) -> None:
        self._random = torch.Generator().manual_seed(seed)
        self._traced = traced
        self._rechecks = self._trains = self._wakes = self._is_blind = False
        self._copies = traced.record.leaves
        self._names = {id(each): name for name, each in model.named_parameters()}
        self._is_sure = False
        self._draws = Draws(self._random)
        self.notes: dict[str, None] = {}
        self._warm: set[int] = set()
        self._log = Log(limit=traced.record.static_calls or 0)
        self._origin = model, example
        self._use(torch.float64)

    def _use(self, dtype: torch.dtype) -> None:
        """Runs in this dtype from now on."""
        self._dtype = dtype
        example = self._origin[1]
        self._example = Example(to_dtype(example.batch, dtype), example.predict)

    def _fresh(self) -> nn.Module:
        """A copy to be cut; only one is held at a time."""
        self._hollow = Hollow() if self._dtype == torch.float64 else None
        model = copy_as(self._origin[0], self._dtype, self._stand_in).eval()
        unequal(model, self._random, self._hollow)
        if self._wakes:
            wake(model, self._random)
        return model

    def _stand_in(self, parameter: nn.Parameter) -> Tensor | None:
        """A hollow tensor for a large parameter that operators read, if its numbers are unequal."""
        if self._copies or self._hollow is None:
            return None
        is_read = self._names[id(parameter)] in self._traced.record.sources.seen
        is_read &= self._names[id(parameter)] not in self._traced.record.written
        is_taken = is_read and is_large(parameter) and not is_uniform(parameter)
        return self._hollow.shell(parameter) if is_taken else None

    def run(self, model: nn.Module, record: Record | None = None) -> Ran:
        """Runs the model, same random numbers every time.

        Args:
            model: Run as it is.
            record: Its channels are followed into this.
        """
        self._log.calls, self._log.outputs = 0, []
        picks, hollow = Picks(), self._hollow
        example = self._example
        if hollow is not None and record is None:
            example = run_inside(hollow, example)
        if self._log.limit:
            example = run_inside(picks, example)
        with torch.no_grad(), preserved_randomness(model), without_fast_path():
            torch.manual_seed(0)
            dice = random_states(model)
            if record is None:
                prediction = example.run(model)
            elif hollow is None:
                prediction = run_traced(model, example, record).output
            else:
                with in_double():
                    prediction = run_traced(model, example, record, hollow.execute).output
            self._log.drew = not all(map(torch.equal, dice, random_states(model)))
        if hollow is not None:
            hollow.forget()
        return Ran(list(output_tensors(prediction)), self._log.outputs, picks.found)

    def _run_zeroed(self, model: nn.Module) -> Ran | None:
        """The same; None where the user's code can't be run so and everything must begin again."""
        if self._wakes:
            return self.run(model)
        try:
            ran = self.run(model)
            if not self._log.limit and all(map(tells_little, ran.final)):
                self._log.limit = sys.maxsize  # class numbers tell little: layers tell more
                ran = self.run(model)
        except Exception as error:
            if self._dtype == torch.float32:
                raise error
            if not self._copies:  # it may look at a weight without asking an operator
                self._copies = True
                return None
            # the code fixes a dtype
            is_seen = any(True for _ in tensors_in(self._example.batch))
            why = (str(error) or type(error).__name__) if is_seen else OUT_OF_REACH
            self.notes[f"trial cuts ran in float32, float64 fails: {why.splitlines()[0]}"] = None
            self._use(torch.float32)
            return None
        if not self._copies and any(bool(each.isnan().any()) for each in ran.final):
            self._copies = True  # a shell that was looked at shows that it holds no number
            return None
        self._is_blind = bool(ran.final) and all(map(is_the_same_for_all, ran.final))
        return ran

    def attempt(
        self, groups: Sequence[Group], *, thorough: bool = False, merging: bool = False
    ) -> Failure | None:
        """Cuts about half of the channels of all these groups together.

        Args:
            groups: Prunable ones.
            thorough: Also compare the order of channels, and run the cut model in train mode.
            merging: Of channels that can be zeroed or merged, as many are merged as zeroed.
        """
        failure = self._attempt_once(groups, thorough, merging)
        if failure is None and self._is_blind:
            return self._attempt_woken(groups, thorough, merging)
        if failure is None or self._copies or self._is_sure:
            return failure
        self._copies = True  # is it the code, or that its weights are hollow? once is enough
        with self._draws.repeated():
            failure = self._attempt_once(groups, thorough, merging)
        self._is_sure = failure is not None
        self._copies = failure is None or self._dtype == torch.float32
        return failure

    def _attempt_woken(
        self, groups: Sequence[Group], thorough: bool, merging: bool
    ) -> Failure | None:
        """The same cut where activations live: of a network of dead ones any cut is right.

        What the code says to other biases does not count.
        """
        self._wakes = True
        try:
            with self._draws.repeated():
                failure = self._attempt_once(groups, thorough, merging)
        finally:
            self._wakes = False
        return failure if failure is not None and failure.differs else None

    def opposite(self, groups: Sequence[Group]) -> Failure | None:
        """The last attempt twice more, each group once the other way round: what stayed goes."""
        for turn in (0, 1):
            with self._draws.turned(turn):
                failure = self.attempt(groups, thorough=True)
            if failure is not None:
                return failure
        return None

    def repeated(self) -> contextlib.AbstractContextManager[None]:
        """Meanwhile the channels of the last attempt go again."""
        return self._draws.repeated()

    def merged_all(self, groups: Sequence[Group]) -> bool:
        """Was there one in the last attempt of which all that went were merged, if any were?"""
        return any(goes_alone(group, self._draws.kept(group)) for group in groups)

    def exactly(self, groups: Sequence[Group], counts: Mapping[str, int]) -> Failure | None:
        """One attempt in which the groups of these names keep so many channels."""
        with self._draws.exactly(counts):
            return self.attempt(groups)

    def _attempt_once(
        self, groups: Sequence[Group], thorough: bool, merging: bool
    ) -> Failure | None:
        with without_collector():
            model = self._fresh()
            with watched(model, self._log):
                return self._attempt(model, groups, thorough, merging)

    def _attempt(
        self, model: nn.Module, groups: Sequence[Group], thorough: bool, merging: bool
    ) -> Failure | None:
        self._log.whole = uncut_layers(groups, self._traced.record.layers)
        cuts = []
        for group, (order, keep) in zip(groups, self._draws.of(groups), strict=True):
            cut, edits = rehearse(model, group, order, keep, merging)
            cuts.append(cut)
            self._edit(edits)
        after = None
        try:
            capture = constants.Capture(model, cuts)
            before = Memory(attributes_of(model) if self._traced.keeps_state else ())
            with capture:
                zeroed = self._run_zeroed(model)
            if zeroed is None:
                return self._attempt_once(groups, thorough, merging)
            self._read_again(model, capture)
            elsewhere = self._zeroed_elsewhere(model, groups, thorough)
            if self._traced.keeps_state:  # cut, it may go on, or begin anew in another process
                elsewhere.append((Situation(self._example, undoes=before.changes()), zeroed))
                now = Memory(attributes_of(model))
                zeroed = self.run(model)
                now.undo()
            self._cut(model, cuts, capture)
            if (thorough and self._traced.record.may_reorder) or self._rechecks:
                after = Record(Sources(model))
            cut_ran = self.run(model, after)
            failure = self._compared_elsewhere(model, elsewhere)
            if failure is not None:
                return failure
        except SlimError as error:
            cause = error.__cause__  # where a hook raised, slim tells it in its own words
            if cause is not None and user_line.of_error(cause):
                return raised(cause, self._log.entered)
            problem = error.problems[0]
            return Failure(problem.what, is_no_constant=problem.code == constants.REFUSED)
        except Exception as error:  # the user's code on other sizes: anything can come
            return raised(error, self._log.entered)
        failure = self._compared(zeroed, cut_ran)
        return self._recheck(after, cuts) if failure is None and after is not None else failure

    def _read_again(self, model: nn.Module, capture: constants.Capture) -> None:
        """A constant that was a single number says little: it must be the same on another batch."""
        if not capture.is_single:
            return
        batch = to_dtype(unlike(self._example.batch), self._dtype)
        try:
            with capture.of_another_batch():
                self._run_in(Situation(Example(batch, self._example.predict)), model)
        except Exception:  # the model refuses this batch, as it may
            self.notes[ONE_NUMBER] = None

    def _zeroed_elsewhere(
        self, model: nn.Module, groups: Sequence[Group], thorough: bool
    ) -> list[tuple[Situation, Ran | None]]:
        """What the zeroed model gives where the cut one must give the same, too.

        On a batch unlike the example, if what becomes of a zero may hang on the batch: the code
        makes numbers of tensors or sizes, or the batch has some. In train mode, if the code is
        another one there.
        """
        record, found = self._traced.record, []
        is_counted = bool(record.reads or record.leaves or record.counts_sizes)
        # What becomes of a size can't always be heard.
        may_count = record.asks_sizes and any(group.constants for group in groups)
        if is_counted or may_count or holds_numbers(self._example.batch):
            is_seen = any(True for _ in tensors_in(self._example.batch))
            batches = other_batches(self._example.batch) if is_seen else ()
            for number, batch in enumerate(batches):
                situation = Situation(Example(batch, self._example.predict))
                try:
                    self._warm_up(number)
                    found.append((situation, self._run_in(situation, model)))
                    break
                except Exception:  # the model refuses this batch, as it may
                    continue
            else:
                self.notes[NO_OTHER] = None
        if (thorough or self._trains) and self._traced.train_path_differs:
            training = Situation(self._example, trains=True, written=frozenset(record.written))
            is_same = not self._traced.keeps_state
            found.append((training, self._run_in(training, model) if is_same else None))
        return found

    def _warm_up(self, number: int) -> None:
        """Runs the model as it is on the other batch of this number, the first time.

        What its code keeps by the size of images, wherever that is, it makes in its own dtype.
        """
        if number in self._warm:
            return
        self._warm.add(number)
        model, example = self._origin
        twin = (deep_copy if self._traced.record.writes else share_copy)(model).eval()
        batch = next(itertools.islice(other_batches(example.batch), number, None))
        with torch.no_grad(), preserved_randomness(twin), without_fast_path():
            Example(batch, example.predict).run(twin)

    def _run_in(self, situation: Situation, model: nn.Module) -> Ran | None:
        """What the model gives; None if it drew numbers, whose count is another one after a cut."""
        whole, self._example = self._example, situation.example
        try:
            with situation.entered(model):
                ran = self.run(model)
        finally:
            self._example = whole
        return ran if not (situation.trains and self._log.drew) else None

    def _compared_elsewhere(
        self, model: nn.Module, zeroed: Sequence[tuple[Situation, Ran | None]]
    ) -> Failure | None:
        """Does the cut model give the same in these situations? Where nothing is known, it runs."""
        for situation, before in zeroed:
            known, self._trains = self._trains, self._trains or situation.trains
            after = self._run_in(situation, model)  # if it raises, every attempt must train
            failure = None
            if before is not None and after is not None:
                failure = self._compared(before, after)
            self._trains = self._trains if failure else known
            if failure is not None:
                where = " in train mode" if situation.trains else ""
                is_other = situation.example is not self._example
                return replace(failure, what=failure.what + where, is_other_batch=is_other)
        return None

    def _compared(self, zeroed: Ran, cut: Ran) -> Failure | None:
        return compare(zeroed, cut, self._dtype, may_jump=bool(self._log.limit))

    def _edit(self, edits: Sequence[Edit]) -> None:
        """Makes channels removable."""
        if self._hollow is None:
            carry_out(edits)
            return
        with torch.no_grad():
            for edit in edits:
                self._hollow.edit(edit)

    def _cut(self, model: nn.Module, cuts: Sequence[Cut], capture: constants.Capture) -> None:
        """Removes the channels, whose constants were captured."""
        if self._hollow is None:
            surgery.apply(model, cuts, gains=capture.gains())
            return
        with self._hollow:
            gains = capture.gains()
        surgery.apply(model, cuts, gains=gains, selecting=self._hollow.select)

    def _recheck(self, after: Record, cuts: Sequence[Cut]) -> Failure | None:
        """Looks at the trace of the cut model; from the first disorder on, in every attempt."""
        consumers = self._traced.record.consumers[: self._traced.consumers_in_eval]
        path = first_disorder(self._traced.record, consumers, after, cuts)
        if not path:
            return None
        self._rechecks = True
        return Failure(f"the channels do not arrive at {path} in the predicted order", "", path)
