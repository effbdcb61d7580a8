"""Analysis of a model: run it under the tracer (twice if modes differ), group, judge, try."""

from __future__ import annotations

import contextlib

from torch import Tensor, nn

from slimcli.network.count import samples_in
from slimcli.network.example import Example
from slimcli.network.structure.assemble import assemble
from slimcli.network.structure.groups import build, first_choices
from slimcli.network.structure.left_alone import freeze_rewired, freeze_uncuttable, freeze_unseen
from slimcli.network.structure.modes import (
    preserved_randomness,
    share_copy,
    without_collector,
    without_fast_path,
)
from slimcli.network.structure.record import Record
from slimcli.network.structure.remembering import Memory, attributes_of, emptied_caches
from slimcli.network.structure.run import run_traced
from slimcli.network.structure.search import try_cuts
from slimcli.network.structure.shapes import told_widths
from slimcli.network.structure.skipping import NumbersAsked, Skipping
from slimcli.network.structure.sources import Sources
from slimcli.network.structure.structure import Structure
from slimcli.network.structure.traced import Traced
from slimcli.network.structure.train_mode import (
    keeps_its_own_mode,
    noted_readers,
    set_train_mode,
)
from slimcli.network.structure.untraced import nothing_followed


def analyze(model: nn.Module, example: Example, *, trial: bool = True) -> Structure:
    """Finds out which channels of a model belong together, and which can be removed.

    The model is run on the example in eval mode and, if anything but a norm or a dropout layer asks
    for the mode or the model keeps something between runs, again in train mode (norms in eval
    mode), on a copy that shares its parameters; modes, buffers and random states are as before
    afterwards.

    Args:
        model: Any module.
        example: A real batch and the way to run the model on it.
        trial: Also cut every group once, on a copy in float64, and freeze what raises or differs.

    Raises:
        Exception: Whatever the model raises on the example in eval mode.
    """
    try:
        samples = samples_in(example.batch)
    except ValueError:
        samples = 1
    with emptied_caches(model), without_collector():
        try:
            traced = trace(model, example)
        except Exception as error:  # of the model, or of an operator that no mode can look into
            return nothing_followed(model, example, samples, error)
        if not trial:
            groups = build(traced.record, first_choices(traced.record), ())
            return assemble(model, traced.record, groups, traced.norm_after, samples, traced.notes)
    with emptied_caches(model):
        return try_cuts(model, example, traced, samples)


def trace(model: nn.Module, example: Example) -> Traced:
    """Runs the model, in both modes if need be, and records what happens to its channels.

    Products of activations are not computed, unless the run turns out to hang on their numbers.
    """
    with contextlib.suppress(NumbersAsked, Exception):  # zeros may be the reason of any error
        return _traced(model, example, Skipping())
    return _traced(model, example, None)  # out of a handler, which would hold the first copy


def _traced(model: nn.Module, example: Example, skipping: Skipping | None) -> Traced:
    twin = share_copy(model)
    record = Record(Sources(twin))
    freeze_uncuttable(record)
    notes: list[str] = []
    trained, train_path_differs = None, False
    with preserved_randomness(model), without_fast_path(), told_widths(record):
        twin.eval()
        memory, buffers = Memory(attributes_of(twin)), dict(twin.named_buffers())
        with noted_readers() as readers:
            evaluated = run_traced(twin, example, record, skipping=skipping)
        consumers_in_eval = len(record.consumers)
        keeps_state = bool(memory.changes()) or _differ(buffers, dict(twin.named_buffers()))
        if keeps_state and skipping is not None and skipping.has_skipped:
            raise NumbersAsked  # what is kept would be made up
        if readers or keeps_its_own_mode(twin) or keeps_state:
            set_train_mode(twin)
            macs = list(record.macs)
            try:
                trained = run_traced(twin, example, record, skipping=skipping)
                train_path_differs = trained.ops != evaluated.ops
            except Exception as error:  # the user's code: anything can come
                if skipping is not None:
                    raise
                notes.append(f"train mode could not be traced: {type(error).__name__}: {error}")
            record.macs = macs
    pairs, in_train = evaluated.norm_after, trained.norm_after if trained else {}
    clash = {key for key in pairs if in_train.get(key, pairs[key]) != pairs[key]}
    merged = {key: norm for key, norm in {**in_train, **pairs}.items() if key not in clash}
    notes += [f"not followed: {each}" for each in dict.fromkeys(record.rule_errors)]
    notes += freeze_unseen(twin, record)
    freeze_rewired(record)
    norm_after = {key: norm for key, norm in merged.items() if norm}
    return Traced(
        record, norm_after, tuple(notes), train_path_differs, consumers_in_eval, keeps_state
    )


def _differ(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    """Are there other buffers, or other tensors in their places?"""
    return before.keys() != after.keys() or any(after[name] is not before[name] for name in before)
