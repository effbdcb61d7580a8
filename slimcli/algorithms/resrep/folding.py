"""Conv, norm and compactor become one conv, in a copy of the model; rows that are zero go.

With the conv and its norm fused to (K, b) and the compactor's rows C, the new conv is (C K, C b):
one product in float64, rounded once (arXiv:2007.03260, section 3.3).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from slimcli.algorithms.resrep.compactor import detach
from slimcli.algorithms.resrep.cutting import (
    Removed,
    cut_when_folded,
    present_rows,
    removed_entries,
)
from slimcli.algorithms.resrep.targets import Place, Target, Transposed
from slimcli.network import attributes, fuse, handover, surgery
from slimcli.network.copying import deep_copy
from slimcli.network.cuts import Cut, SlotCut
from slimcli.network.example import Example


def deployed(
    model: nn.Module,
    kept: Sequence[tuple[Target, Sequence[int]]],
    pairs: Sequence[tuple[str, str]],
    example: Example,
) -> nn.Module:
    """A new plain model in eval mode: compactors and all foldable norms folded, zero rows cut.

    Args:
        model: With compactors; stays as it is.
        kept: The targets, each with the channels it still has.
        pairs: (conv, norm) of every norm that can be folded.
        example: Run once where a removed channel is a constant further on.
    """
    plain = deep_copy(model)
    zero = _zero_channels(plain, kept)
    places = _places(kept)
    _fold_compactors(plain, places, removed_entries(kept))
    folded = {place.norm for place in places}
    fuse.fold_pairs(plain, [pair for pair in pairs if pair[1] not in folded])
    _cut(plain, kept, zero, example)
    return plain.eval()


def handed_over(
    model: nn.Module,
    kept: Sequence[tuple[Target, Sequence[int]]],
    example: Example,
    batches: Iterable[Example],
) -> nn.Module:
    """A new plain model to train on: like :func:`deployed`, but with every norm.

    A norm whose conv took in a compactor comes back with statistics measured on ``batches``.
    """
    plain = deep_copy(model)
    zero = _zero_channels(plain, kept)
    places = _places(kept)
    _fold_compactors(plain, places, removed_entries(kept))
    _cut(plain, kept, zero, example)
    handover.insert_norms(
        plain, [_norm_place(plain, each) for each in places if each.norm], batches
    )
    return plain


def _places(kept: Sequence[tuple[Target, Sequence[int]]]) -> list[Place]:
    """Every compactor once."""
    found = {place.host: place for target, _ in kept for place in target.places}
    return list(found.values())


def _zero_channels(
    model: nn.Module, kept: Sequence[tuple[Target, Sequence[int]]]
) -> dict[str, set[int]]:
    """Channels whose rows are zero in every compactor; of a dead group the first one stays."""
    removed = removed_entries(kept)
    zero: dict[str, set[int]] = {}
    for target, channels in kept:
        alive: set[int] = set()
        for place, rows in zip(target.places, target.rows, strict=True):
            weight = model.get_parameter(place.weight).detach()
            nonzero = weight.reshape(len(weight), -1).ne(0).any(1).tolist()
            live = {
                row
                for row, is_live in zip(present_rows(place, removed), nonzero, strict=True)
                if is_live
            }
            alive |= {channel for channel in channels if not live.isdisjoint(rows[channel])}
        zero[target.name] = set(channels) - (alive or set(channels[:1]))
    return zero


def _fold_compactors(model: nn.Module, places: Sequence[Place], removed: Removed) -> None:
    """Folds each compactor and its norm into the conv, in place."""
    narrowed = []
    for place in places:
        conv = model.get_submodule(place.conv)
        rows = present_rows(place, removed)
        weight, bias = _folded(model, place, conv, rows)
        detach(model.get_submodule(place.host))
        if place.norm is not None:
            fuse.fold_pairs(model, [(place.conv, place.norm)])
        with torch.no_grad():
            conv.weight.copy_(weight)  # type: ignore[operator]
            if isinstance(conv.bias, Tensor):
                conv.bias.copy_(bias)
        if not place.is_diagonal and len(rows) < place.size:
            narrowed.append(_narrowing(place, conv, rows))
    surgery.apply(model, narrowed)


def _folded(
    model: nn.Module, place: Place, conv: nn.Module, rows: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Float64 weight and bias with as many outputs as before; those that are gone are zero."""
    wide = deep_copy(conv).double()
    if place.norm is not None:
        weight, bias = fuse.fuse_conv_norm(wide, model.get_submodule(place.norm))
    else:
        weight = wide.weight.detach()  # type: ignore[operator]
        bias = wide.bias.detach() if isinstance(wide.bias, Tensor) else weight.new_zeros(place.size)
    values = model.get_parameter(place.weight).detach().double()
    if place.is_diagonal:
        matrix = torch.diag(values)
        bias = bias[: len(values)]
    else:
        matrix = values.new_zeros(place.size, place.size)
        matrix[list(rows)] = values
    return fuse.mix_outputs(
        weight,
        bias,
        matrix,
        groups=getattr(conv, "groups", 1),
        is_transposed=isinstance(conv, Transposed),
    )


def _narrowing(place: Place, conv: nn.Module, rows: Sequence[int]) -> Cut:
    """Takes the outputs away that the compactor had lost already in training."""
    left = tuple((row,) for row in rows)
    slots = [SlotCut(f"{place.conv}.weight", 1 if isinstance(conv, Transposed) else 0, left)]
    if isinstance(conv.bias, Tensor):
        slots.append(SlotCut(f"{place.conv}.bias", 0, left))
    return Cut(place.conv, place.size, len(rows), tuple(slots))


def _cut(
    model: nn.Module,
    kept: Sequence[tuple[Target, Sequence[int]]],
    zero: Mapping[str, set[int]],
    example: Example,
) -> None:
    """Removes zero channels from a model whose compactors are folded, in place."""
    removed = removed_entries(kept)
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    names |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    names |= set(attributes.counters(dict(model.named_modules())))
    cuts = [
        cut_when_folded(
            target,
            channels,
            [channel for channel in channels if channel not in zero[target.name]],
            removed,
            names.__contains__,
        )
        for target, channels in kept
        if zero[target.name]
    ]
    if cuts:
        surgery.apply(model, cuts, example=example)


def _norm_place(model: nn.Module, place: Place) -> tuple[str, str]:
    """Conv and the Identity where its norm was; an activation that stayed moves behind it."""
    path = str(place.norm)
    rest = model.get_submodule(path)
    if type(rest) is nn.Identity:
        return place.conv, path
    model.set_submodule(path, nn.Sequential(nn.Identity(), rest).train(rest.training))
    return place.conv, f"{path}.0"
