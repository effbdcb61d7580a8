"""After a cut: does every reader still meet the channels in the order that was predicted?

A cut can fit all shapes and be wrong (different offsets cut from the halves of a channel shuffle),
and numbers can hide it (weights that start at zero). Labels can't: the cut model is traced again,
and what arrives at each weight is compared with what was expected.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from operator import itemgetter

import numpy as np

from slimcli.network.cuts import Cut
from slimcli.network.structure.planes import Labels
from slimcli.network.structure.record import Consumer, Record, Split


def first_disorder(
    before: Record, consumers: Sequence[Consumer], after: Record, cuts: Sequence[Cut]
) -> str:
    """Path of the first reader whose channels are not the predicted ones; empty if all are.

    Args:
        before: Record of the whole model.
        consumers: Its consumers in eval mode.
        after: Record of the cut model, run in eval mode.
        cuts: What was cut.
    """
    kept, alone, old_label = _translation(before, after, cuts)
    expected, found = _by_path(consumers), _by_path(after.consumers)
    for path, pairs in expected.items():
        wanted = [each[:, kept[each].all(0)] for each in pairs]
        met = [old_label[each] for each in found.get(path, [])]
        wanted = [each for each in wanted if each.shape[1] > 1]
        met = [each for each in met if each.shape[1] > 1]
        if len(wanted) != len(met) or any(alone[each].any() for each in wanted):
            continue  # an axis of one entry carries no labels: only the numbers can tell
        if not all(map(np.array_equal, wanted, met)):
            return path
    return ""


def _note_alone_in_blocks(alone: Labels, kept: Labels, split: Split) -> None:
    """Blocks of which a single channel stays are axes of one entry, too."""
    labels, firsts = split.block_pairs
    stays = kept[labels] & (labels != 0)
    pairs = np.unique(np.stack([firsts[stays], labels[stays]]), axis=1)
    blocks, counts = np.unique(pairs[0], return_counts=True)
    alone[pairs[1][np.isin(pairs[0], blocks[counts == 1])]] = True


def _by_path(consumers: Sequence[Consumer]) -> dict[str, list[Labels]]:
    found: dict[str, list[Labels]] = defaultdict(list)
    for consumer in consumers:
        if consumer.path and (consumer.pairs != 0).all():
            found[consumer.path].append(consumer.pairs)
    return found


def _translation(
    before: Record, after: Record, cuts: Sequence[Cut]
) -> tuple[Labels, Labels, Labels]:
    """Which old labels stay, which of them stay alone, and the old label of every new one."""
    kept = np.ones(before.sources.count, dtype=bool)
    first = {(each.tensor, each.dim): each for each in before.sources.dims}
    known: dict[int, Labels] = {}  # a conv and its norm share their selections
    for cut in cuts:
        for slot in cut.slots:
            dim = first.get((slot.tensor, slot.dim))
            if dim is None:
                continue
            if id(slot.sources) not in known:
                stays = np.fromiter(map(itemgetter(0), slot.sources), np.int64)
                known[id(slot.sources)] = np.delete(np.arange(dim.size), stays)
            kept[dim.first + known[id(slot.sources)]] = False
    alone = np.zeros_like(kept)
    for dim in before.sources.dims:
        mine = slice(dim.first, dim.first + dim.size)
        alone[mine] = kept[mine] & (kept[mine].sum() == 1)
    for split in before.splits:
        _note_alone_in_blocks(alone, kept, split)
    old_label = np.zeros(after.sources.count, dtype=np.int64)
    for new in after.sources.dims:
        dim = first.get((new.tensor, new.dim))
        if dim is None:  # a bias that was made to take up constants
            continue
        labels = np.arange(dim.first, dim.first + dim.size)
        labels = labels[kept[labels]]
        if len(labels) == new.size:
            old_label[new.first : new.first + new.size] = labels
    return kept, alone, old_label
