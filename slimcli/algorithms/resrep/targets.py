"""Where compactors sit: coupled groups of channels and the layers that produce them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from slimcli.algorithms.resrep.compactor import NAME
from slimcli.network.fuse import has_hooks
from slimcli.network.structure import Group, Structure, select_groups
from slimcli.network.widths import LEFT_ALONE, skipped
from slimcli.pruning_plans import refuse_patterns

Convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PlainNorm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Place:
    """One compactor.

    Attributes:
        host: Path of the module it is a child of: the norm, the conv, or what a norm with an
            activation inside runs between the two.
        conv: Path of the Conv, ConvTranspose or Linear whose output it multiplies.
        norm: Path of the norm in between, or None.
        is_before: It multiplies the input of its host instead of the output.
        is_diagonal: One factor a channel: the conv has groups.
        spatial: Dimensions behind the channels; None: all but the first two.
        size: Channels of the conv before anything is cut.
    """

    host: str
    conv: str
    norm: str | None
    is_before: bool
    is_diagonal: bool
    spatial: int | None
    size: int

    @property
    def weight(self) -> str:
        """Name of the compactor's parameter."""
        return f"{self.host}.{NAME}.weight"


@dataclass(frozen=True)
class Target:
    """One coupled group and its compactors.

    Attributes:
        group: The group as the structure analysis found it.
        places: The compactors, one behind each producer.
        rows: For each place and each channel of the group, the rows that belong to it.
    """

    group: Group
    places: tuple[Place, ...]
    rows: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def name(self) -> str:
        """Name of the group."""
        return self.group.name


def find_targets(
    model: nn.Module,
    structure: Structure,
    strategy: str,
    names: Sequence[str] | None,
    skip: Sequence[str],
) -> tuple[list[Target], dict[str, str]]:
    """The groups that get compactors, and why other selected groups get none (group -> reason).

    Raises:
        RecipeError: A name cannot be pruned, or a skip pattern fits nothing.
    """
    refuse_patterns(structure, names)
    selected = select_groups(structure, strategy, names)
    alone = skipped(skip, selected)
    targets, reasons = [], {}
    for group in selected:
        reason = LEFT_ALONE if group.name in alone else why_not(model, structure, group)
        if reason:
            reasons[group.name] = reason
        else:
            targets.append(_target(model, group))
    return targets, reasons


def why_not(model: nn.Module, structure: Structure, group: Group) -> str:
    """Why the channels of a group can't be removed by compactors, or an empty string."""
    if group.frozen_reason:
        return group.frozen_reason
    if not group.exact_zero:
        return group.zero_reason
    pairs = {(pair.conv, pair.norm) for pair in structure.conv_batch_norms}
    convs = [site.conv for site in group.sites]
    sharing = _sharing(model, convs)
    if sharing:
        return f"{sharing} share one weight: folded compactors would give each its own"
    produced = {slot.tensor for slot in group.producers if slot.tensor.endswith("weight")}
    if not group.is_placeable or produced != {f"{conv}.weight" for conv in convs}:
        return "its channels are made outside a conv or Linear module"
    if len(set(convs)) != len(convs):
        return "one of its convs feeds several norms"
    for site in group.sites:
        conv = model.get_submodule(site.conv)
        if not isinstance(conv, (*Convolution, *Transposed, nn.Linear)):
            return f"{site.conv} is a {type(conv).__name__}, no conv or Linear"
        if "weight" not in dict(conv.named_parameters(recurse=False)):
            return f"the weight of {site.conv} is computed from other parameters"
        if site.norm is not None and (site.conv, site.norm) not in pairs:
            layers = map(model.get_submodule, (site.conv, site.norm))
            why = ": forward hooks read one of them" if any(map(has_hooks, layers)) else ""
            return f"{site.norm} can't be folded into {site.conv}{why}"
    return ""


def _sharing(model: nn.Module, convs: Sequence[str]) -> str:
    """Different modules that hold the same weight, in words; empty if none do."""
    by_weight: dict[int, dict[nn.Module, str]] = {}
    for path in filter(None, convs):
        module = model.get_submodule(path)
        by_weight.setdefault(id(module.weight), {}).setdefault(module, path)
    return next((" and ".join(each.values()) for each in by_weight.values() if len(each) > 1), "")


def _target(model: nn.Module, group: Group) -> Target:
    places, rows = [], []
    slots = {slot.tensor: slot for slot in group.producers}
    for site in group.sites:
        places.append(_place(model, site.conv, site.norm))
        rows.append(slots[f"{site.conv}.weight"].indices)
    return Target(group, tuple(places), tuple(rows))


def _place(model: nn.Module, conv_path: str, norm_path: str | None) -> Place:
    conv = model.get_submodule(conv_path)
    host, is_before = conv_path, False
    spatial: int | None = 0 if isinstance(conv, nn.Linear) else len(conv.kernel_size)  # type: ignore[arg-type]
    if norm_path is not None:
        norm = model.get_submodule(norm_path)
        spatial = None
        has_activation = type(norm) not in PlainNorm and hasattr(norm, "act")
        host, is_before = (f"{norm_path}.drop", True) if has_activation else (norm_path, False)
    size = conv.out_features if isinstance(conv, nn.Linear) else conv.out_channels
    is_diagonal = getattr(conv, "groups", 1) != 1
    return Place(host, conv_path, norm_path, is_before, is_diagonal, spatial, int(size))  # type: ignore[arg-type]
