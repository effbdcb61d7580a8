"""The numbers torch's layers keep about their own shapes, worked out from the shapes.

Works by ``isinstance``, so subclasses of torch's layers are served too. A module that isn't listed
keeps its attributes: what a user's own class remembers about sizes is found by a trial cut.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from slimcli.network.selection import Sources, groups_after, shape_after

Convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BatchNorm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
InstanceNorm = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
PerChannelNorm = (*BatchNorm, *InstanceNorm)

COUNTED: tuple[tuple[Any, str], ...] = (
    (InstanceNorm, "num_features"),
    (nn.GroupNorm, "num_channels"),
)
"""Layers that may have no tensor of their own, and where they keep how many channels they get."""

Attributes = dict[str, Any]
Selections = Mapping[str, Mapping[int, Sources]]
"""Local tensor name -> dimension -> what stays."""


def planned(module: nn.Module, selections: Selections) -> Attributes:
    """The attributes ``module`` must have after its tensors are cut; the module is not changed.

    Args:
        module: Any module.
        selections: What will be done to its own tensors (``weight``, ``running_mean`` ...).

    Raises:
        ValueError: A module of this type can't be cut like that.
    """
    for types, rule in _RULES:
        if isinstance(module, types):
            return rule(module, selections)
    vision = sys.modules.get("torchvision.ops")  # a model that has one of its layers imported it
    if vision is not None and isinstance(module, vision.DeformConv2d):
        return _conv(module, selections)
    return {}


def known(module: nn.Module) -> Attributes:
    """The attributes :func:`planned` would set, as they are today."""
    names = planned(module, {})
    return {name: getattr(module, name) for name in names}


def counters(modules: Mapping[str, nn.Module]) -> dict[str, tuple[nn.Module, str]]:
    """Attributes that count channels where no tensor of the layer does: (layer, attribute) by name.

    Args:
        modules: By their paths.

    >>> list(counters({"a": nn.InstanceNorm1d(3), "b": nn.InstanceNorm1d(3, affine=True)}))
    ['a.num_features']
    """
    found = {}
    for path, module in modules.items():
        for kind, name in COUNTED:
            if isinstance(module, kind) and not _has_tensors(module):
                found[f"{path}.{name}" if path else name] = (module, name)
    return found


def _has_tensors(module: nn.Module) -> bool:
    return any(True for _ in (*module.parameters(), *module.buffers()))


def output_sources(module: nn.Module, sources: Mapping[int, Sources]) -> Sources | None:
    """What stays of a conv's or Linear's output channels when its weight is cut, None for all.

    Args:
        module: Any module; None for one that is neither.
        sources: Dimension of the weight -> what stays of it.

    >>> output_sources(nn.Conv2d(3, 2, 1), {0: ((1,),)})
    ((1,),)
    """
    if isinstance(module, (*Convolution, nn.Linear)):
        return sources.get(0)
    if not isinstance(module, Transposed) or not sources:
        return None
    inputs, per_group = module.weight.shape[:2]
    group_size = inputs // module.groups
    kept_groups = range(module.groups)
    if module.groups > 1 and 0 in sources:
        kept_groups = sorted({entry[0] // group_size for entry in sources[0]})  # type: ignore[assignment]
    inner = sources.get(1, tuple((index,) for index in range(per_group)))
    return tuple(
        tuple(group * per_group + index for index in entry)
        for group in kept_groups
        for entry in inner
    )


def groups_from_shape(module: nn.Module, size: int) -> int:
    """Groups of a grouped layer when its divided dimension gets this size, if only one number fits.

    Args:
        module: A conv, transposed conv or group norm with its old size and groups.
        size: The new size of dimension 0 of its weight.

    Raises:
        ValueError: No number of groups fits, or several do.

    >>> groups_from_shape(nn.Conv2d(8, 8, 3, groups=8), 5)
    5
    """
    is_norm = isinstance(module, nn.GroupNorm)
    groups = int(module.num_groups if is_norm else module.groups)  # type: ignore[arg-type]
    group_size = int(effective_shape(module)[0]) // groups
    candidates = {size // group_size} if size % group_size == 0 else set()
    if group_size > 1 and size % groups == 0:
        candidates.add(groups)
    if len(candidates) != 1:
        choice = " or ".join(map(str, sorted(candidates))) or "no number of"
        raise ValueError(f"{size} channels can be in {choice} groups")
    return candidates.pop()


def effective_shape(module: nn.Module) -> tuple[int, ...]:
    """Shape of the weight the layer computes with, also where it is parametrized."""
    weight = module.weight
    return tuple(weight.shape) if isinstance(weight, Tensor) else ()


def _weight_selection(selections: Selections) -> Mapping[int, Sources]:
    """What happens to the computed weight: the selection of the tensor that has its shape."""
    for name in _WEIGHT_NAMES:
        if name in selections:
            return selections[name]
    return {}


_WEIGHT_NAMES = (
    "weight",
    "parametrizations.weight.original",
    "parametrizations.weight.original1",
    "weight_v",  # torch.nn.utils.weight_norm
    "weight_orig",  # torch.nn.utils.spectral_norm and prune
)


def _conv(module: nn.Module, selections: Selections) -> Attributes:
    chosen = _weight_selection(selections)
    shape = effective_shape(module)
    after = shape_after(shape, chosen)
    groups: int = module.groups  # type: ignore[assignment]
    if groups > 1 and 0 in chosen:
        groups = groups_after(chosen[0], shape[0], groups)
    return {"in_channels": after[1] * groups, "out_channels": after[0], "groups": groups}


def _transposed(module: nn.Module, selections: Selections) -> Attributes:
    chosen = _weight_selection(selections)
    shape = effective_shape(module)
    after = shape_after(shape, chosen)
    groups: int = module.groups  # type: ignore[assignment]
    if groups > 1 and 0 in chosen:
        groups = groups_after(chosen[0], shape[0], groups)
    return {"in_channels": after[0], "out_channels": after[1] * groups, "groups": groups}


def _linear(module: nn.Module, selections: Selections) -> Attributes:
    after = shape_after(effective_shape(module), _weight_selection(selections))
    return {"out_features": after[0], "in_features": after[1]}


def _bilinear(module: nn.Module, selections: Selections) -> Attributes:
    after = shape_after(effective_shape(module), _weight_selection(selections))
    return {"out_features": after[0], "in1_features": after[1], "in2_features": after[2]}


def _check_alike(module: nn.Module, selections: Selections) -> None:
    """A norm has one entry a channel in all its vectors: all must be cut alike."""
    vectors = dict(module.named_parameters(recurse=False)) | dict(
        module.named_buffers(recurse=False)
    )
    chosen = {name: selections.get(name, {}).get(0) for name, each in vectors.items() if each.dim()}
    for name, sources in chosen.items():
        if sources != next(iter(chosen.values())):
            raise ValueError(f"{name} and {next(iter(chosen))} would not keep the same channels")


def _per_channel_norm(module: nn.Module, selections: Selections) -> Attributes:
    _check_alike(module, selections)
    for name in ("weight", "parametrizations.weight.original", "running_mean", "bias"):
        if name in selections and 0 in selections[name]:
            return {"num_features": len(selections[name][0])}
    return {"num_features": module.num_features}


def _group_norm(module: nn.Module, selections: Selections) -> Attributes:
    channels: int = module.num_channels  # type: ignore[assignment]
    groups: int = module.num_groups  # type: ignore[assignment]
    _check_alike(module, selections)
    chosen = _weight_selection(selections)
    if 0 in chosen:
        groups = groups_after(chosen[0], channels, groups)
        channels = len(chosen[0])
    return {"num_channels": channels, "num_groups": groups}


def _shape_norm(module: nn.Module, selections: Selections) -> Attributes:
    shape: tuple[int, ...] = module.normalized_shape  # type: ignore[assignment]
    return {"normalized_shape": shape_after(shape, _weight_selection(selections))}


def _prelu(module: nn.Module, selections: Selections) -> Attributes:
    after = shape_after(effective_shape(module), _weight_selection(selections))
    return {"num_parameters": after[0]}


def _embedding(module: nn.Module, selections: Selections) -> Attributes:
    chosen = _weight_selection(selections)
    if 0 in chosen:
        raise ValueError("rows of an embedding are words, not channels, and can't be cut")
    after = shape_after(effective_shape(module), chosen)
    return {"num_embeddings": after[0], "embedding_dim": after[1]}


def _attention(module: nn.Module, selections: Selections) -> Attributes:
    """``nn.MultiheadAttention`` has one width for inputs, heads and outputs."""
    width: int = module.embed_dim  # type: ignore[assignment]
    heads: int = module.num_heads  # type: ignore[assignment]
    chosen = selections.get("in_proj_weight", {})
    if not isinstance(module.in_proj_weight, Tensor):
        if selections:
            raise ValueError("attention with separate key and value widths can't be cut")
        return {}
    after = shape_after((3 * width, width), chosen)
    if after[0] != 3 * after[1] or after[1] % heads:
        raise ValueError(
            f"attention of {heads} heads can't have projections of shape {after}; "
            "its three projections and its inputs share one width, a multiple of the heads"
        )
    widths = dict.fromkeys(("embed_dim", "kdim", "vdim"), after[1])
    return widths | {"head_dim": after[1] // heads}


def _recurrent(module: nn.Module, selections: Selections) -> Attributes:
    if selections:
        raise ValueError("recurrent layers can't be cut")
    return {}


_RULES: tuple[tuple[Any, Callable[[nn.Module, Selections], Attributes]], ...] = (
    (Convolution, _conv),
    (Transposed, _transposed),
    (nn.Linear, _linear),
    (nn.Bilinear, _bilinear),
    (PerChannelNorm, _per_channel_norm),
    (nn.GroupNorm, _group_norm),
    ((nn.LayerNorm, nn.RMSNorm), _shape_norm),
    (nn.PReLU, _prelu),
    ((nn.Embedding, nn.EmbeddingBag), _embedding),
    (nn.MultiheadAttention, _attention),
    ((nn.RNNBase, nn.RNNCellBase), _recurrent),
)
