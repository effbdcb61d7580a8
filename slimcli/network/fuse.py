"""Linear layers in a row are one linear layer: norms, kernels and matrices folded into convs.

The arithmetic is float64 whatever the layers hold; results have the layer's dtype. What is not
exact is refused with a ``ValueError`` that says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from slimcli.errors import Problem, RunError
from slimcli.network.attributes import BatchNorm, Convolution, Transposed

CONVOLUTION_SUBCLASSES = frozenset({"Conv2dSame"})
"""Subclasses of convs with a forward of their own that only pads: the weight is used as it is."""

PLAIN_NORMS = frozenset({"FrozenBatchNorm2d"})
"""Batch norms by name that are not torch's: statistics, weight and bias as buffers, ``eps``."""


def _activation_of(norm: nn.Module) -> nn.Module:
    """What of timm's norms stays: they hold ``drop`` and ``act``, applied in this order."""
    parts: list[Any] = [getattr(norm, "drop", None), getattr(norm, "act", None)]
    rest = [part for part in parts if part is not None and not isinstance(part, nn.Identity)]
    if len(rest) == 1:
        kept: nn.Module = rest[0]
        return kept
    return nn.Sequential(*rest) if rest else nn.Identity()


ACTIVATED_NORMS: dict[str, Callable[[nn.Module], nn.Module]] = {"BatchNormAct2d": _activation_of}
"""Class name of a norm that does more than normalise -> what stays when the norm is folded."""


class Pair(Protocol):
    """Module paths of a conv and of the norm behind it."""

    @property
    def conv(self) -> str:
        """Path of the conv, transposed conv or Linear."""

    @property
    def norm(self) -> str:
        """Path of the norm."""


def fuse_conv_norm(conv: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one layer that equals ``norm(conv(x))`` in eval mode.

    With ``t = gamma / sqrt(running_var + eps)`` the weight is scaled by ``t`` along its outputs and
    the bias is ``beta + (bias - running_mean) * t``.

    Args:
        conv: Conv1d/2d/3d, ConvTranspose1d/2d/3d (any groups) or Linear; with or without bias.
        norm: A batch norm with running statistics; ``affine=False`` counts as gamma 1, beta 0.

    Returns:
        Weight of the conv's shape and bias (out_channels,), in the dtype of the conv's weight.

    Raises:
        ValueError: The norm has no running statistics, or the widths differ.

    >>> conv, norm = nn.Conv1d(1, 1, 1, bias=False), nn.BatchNorm1d(1, eps=0.0)
    >>> _ = conv.weight.data.fill_(3.0), norm.running_mean.fill_(1.0), norm.running_var.fill_(4.0)
    >>> [tensor.flatten().tolist() for tensor in fuse_conv_norm(conv, norm)]
    [[1.5], [-0.5]]
    """
    weight, bias = _weight_and_bias(conv)
    scale, shift = norm_as_scale(norm)
    scale, shift = scale.to(weight.device), shift.to(weight.device)
    outputs = bias.shape[0]
    if scale.shape[0] != outputs:
        raise ValueError(f"the conv has {outputs} outputs and the norm {scale.shape[0]} channels")
    fused = scale_outputs(weight, scale, _groups(conv), isinstance(conv, Transposed))
    dtype = conv.weight.dtype
    return fused.to(dtype), (bias * scale + shift).to(dtype)  # type: ignore[arg-type]


def norm_as_scale(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """A batch norm in eval mode as ``x * scale + shift``, two float64 tensors (channels,).

    Raises:
        ValueError: It has no running statistics, so that eval mode depends on the batch.

    >>> norm = nn.BatchNorm1d(1, eps=0.0, affine=False)
    >>> _ = norm.running_mean.fill_(2.0), norm.running_var.fill_(0.25)
    >>> norm_as_scale(norm)
    (tensor([2.], dtype=torch.float64), tensor([-4.], dtype=torch.float64))
    """
    mean = getattr(norm, "running_mean", None)
    variance = getattr(norm, "running_var", None)
    if mean is None or variance is None:
        raise ValueError(f"{type(norm).__name__} has no running statistics and can't be folded")
    scale = (variance.detach().double() + float(norm.eps)).rsqrt()  # type: ignore[arg-type]
    if isinstance(norm.weight, Tensor):
        scale = scale * norm.weight.detach().double()
    shift = -mean.detach().double() * scale
    if isinstance(norm.bias, Tensor):
        shift = shift + norm.bias.detach().double()
    return scale, shift


def scale_outputs(weight: Tensor, scale: Tensor, groups: int, is_transposed: bool) -> Tensor:
    """A conv weight with each output channel multiplied by its entry of ``scale``.

    Args:
        weight: (out, in / groups, ...); transposed: (in, out / groups, ...).
        scale: (out,).
        groups: Groups of the conv.
        is_transposed: Whether the weight is a transposed conv's.
    """
    kernel = (1,) * (weight.dim() - 2)
    if not is_transposed:
        return weight * scale.reshape(-1, 1, *kernel)
    grouped = _grouped(weight, groups)  # (groups, in / groups, out / groups, ...)
    return (grouped * scale.reshape(groups, 1, -1, *kernel)).flatten(0, 1)


def mix_outputs(
    weight: Tensor, bias: Tensor, matrix: Tensor, *, groups: int = 1, is_transposed: bool = False
) -> tuple[Tensor, Tensor]:
    """Weight and bias of ``matrix @ layer(x)``: ``K' = matrix . K`` and ``b' = matrix b``.

    Args:
        weight: (out, in / groups, ...); transposed: (in, out / groups, ...).
        bias: (out,).
        matrix: (new_out, out). With groups it must be block diagonal, blocks of equal height.
        groups: Groups of the layer; the result has as many.
        is_transposed: Whether the weight is a transposed conv's.

    Returns:
        float64 weight (new_out, in / groups, ...), transposed (in, new_out / groups, ...), and
        float64 bias (new_out,).

    Raises:
        ValueError: The matrix mixes groups.

    >>> mixed = mix_outputs(torch.eye(2), torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 1.0]]))
    >>> [tensor.tolist() for tensor in mixed]
    [[[1.0, 1.0]], [3.0]]
    """
    wide = matrix.detach().double()
    blocks = _diagonal_blocks(wide, groups)  # (groups, new_out / groups, out / groups)
    values = weight.detach().double()
    if is_transposed:
        grouped = _grouped(values, groups)  # (groups, in / groups, out / groups, ...)
        mixed = torch.einsum("gno,gio...->gin...", blocks, grouped).flatten(0, 1)
    else:
        grouped = _grouped(values, groups)  # (groups, out / groups, in / groups, ...)
        mixed = torch.einsum("gno,goi...->gni...", blocks, grouped).flatten(0, 1)
    return mixed, wide @ bias.detach().double()


def pad_kernel(weight: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """A kernel with zeros around it, its centre where the centre of the larger one is.

    Args:
        weight: (out, in / groups, *small).
        kernel_size: The larger size; each dimension must differ by an even number.

    Raises:
        ValueError: The centres can't meet, or the kernel is larger than asked for.

    >>> pad_kernel(torch.ones(1, 1, 1), [3])
    tensor([[[0., 1., 0.]]])
    """
    pads: list[int] = []
    for small, large in zip(reversed(weight.shape[2:]), reversed(list(kernel_size)), strict=True):
        if small > large or (large - small) % 2:
            raise ValueError(f"a kernel of {small} has no place in the centre of one of {large}")
        pads += [(large - small) // 2] * 2
    return nn.functional.pad(weight, pads)


def fold_pointwise(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], groups: int = 1
) -> tuple[Tensor, Tensor]:
    """One conv for a 1x1 conv followed by a k x k conv, both with the same groups.

    Exact if the k x k conv does not pad, or pads the output of the 1x1 conv with that conv's bias
    (arXiv 2103.13425, section 3.2, transform III).

    Args:
        first: Weight (middle, in / groups, 1, ...) and bias (middle,).
        second: Weight (out, middle / groups, ...) and bias (out,).
        groups: Groups of both.

    Returns:
        float64 weight (out, in / groups, ...) and bias (out,).

    >>> one = torch.full((1, 1, 1), 2.0), torch.tensor([1.0])
    >>> two = torch.ones(1, 1, 3), torch.tensor([0.0])
    >>> [tensor.flatten().tolist() for tensor in fold_pointwise(one, two)]
    [[2.0, 2.0, 2.0], [3.0]]
    """
    point = _grouped(first[0].detach().double().flatten(1), groups)  # (g, middle, in)
    kernel = _grouped(second[0].detach().double(), groups)  # (g, out, middle, ...)
    bias = _grouped(first[1].detach().double(), groups)  # (g, middle)
    weight = torch.einsum("gom...,gmi->goi...", kernel, point).flatten(0, 1)
    summed = kernel.flatten(3).sum(3) if kernel.dim() > 3 else kernel
    gained = torch.einsum("gom,gm->go", summed, bias)
    return weight, gained.flatten() + second[1].detach().double()


def fold_pairs(model: nn.Module, pairs: Iterable[Pair | tuple[str, str]]) -> None:
    """Folds norms into the convs before them, in place: the norm becomes ``nn.Identity``.

    The conv keeps its object and gets new parameters, with a bias. A norm that also activates
    keeps the activation. Whether the norm sees all of the conv's output, and nothing else, is for
    the caller to know.

    Args:
        model: Changed in place; its function in eval mode stays.
        pairs: (conv path, norm path) or objects with ``conv`` and ``norm``.

    Raises:
        RunError: A layer can't be folded; nothing is changed then.
    """
    paths = [pair if isinstance(pair, tuple) else (pair.conv, pair.norm) for pair in pairs]
    _check_unshared(model, paths)
    folded = []
    for conv_path, norm_path in paths:
        conv, norm = model.get_submodule(conv_path), model.get_submodule(norm_path)
        reason = why_not_foldable(conv, norm)
        try:
            if reason:
                raise ValueError(reason)
            folded.append((conv, norm, fuse_conv_norm(conv, norm), remainder(norm)))
        except ValueError as error:
            raise _refused(conv_path, norm_path, str(error)) from error
    for conv, norm, (weight, bias), rest in folded:
        needs_gradient = bool(conv.weight.requires_grad)
        conv.weight = nn.Parameter(weight, requires_grad=needs_gradient)
        conv.bias = nn.Parameter(bias, requires_grad=needs_gradient)
        _replace(model, norm, rest)


def why_not_foldable(conv: nn.Module, norm: nn.Module) -> str:
    """Why a norm can't be folded into a conv, or an empty string; looks at types only.

    >>> why_not_foldable(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    ''
    >>> why_not_foldable(nn.Conv2d(1, 1, 1), nn.GroupNorm(1, 1))
    'GroupNorm is no batch norm that can be folded'
    """
    exact = (*Convolution, *Transposed, nn.Linear)
    own = dict(conv.named_parameters(recurse=False))
    known = type(conv) in exact or (
        isinstance(conv, exact) and type(conv).__name__ in CONVOLUTION_SUBCLASSES
    )
    if not known or "weight" not in own:
        return f"{type(conv).__name__} is no plain conv or Linear"
    name = type(norm).__name__
    if type(norm) not in BatchNorm and name not in ACTIVATED_NORMS and name not in PLAIN_NORMS:
        return f"{name} is no batch norm that can be folded"
    if getattr(norm, "running_mean", None) is None:
        return f"{name} has no running statistics"
    return ""


def has_hooks(module: nn.Module) -> bool:
    """Does code of the user's read what comes in or out? torch has no public list of hooks."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def remainder(norm: nn.Module) -> nn.Module:
    """What takes the place of a folded norm: nothing, or the activation it contains."""
    rule = ACTIVATED_NORMS.get(type(norm).__name__)
    rest = rule(norm) if rule else nn.Identity()
    return rest.train(norm.training)


def _check_unshared(model: nn.Module, paths: Sequence[tuple[str, str]]) -> None:
    """Each weight must belong to one conv, each module to one pair.

    One module under several paths is one layer: how often it runs is for the caller to know.
    """
    holders: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            holders.setdefault(id(parameter), []).append(f"{path}.{name}")
    seen: dict[str, set[int]] = {"conv": set(), "norm": set()}
    for conv_path, norm_path in paths:
        conv, norm = model.get_submodule(conv_path), model.get_submodule(norm_path)
        for held in conv.parameters(recurse=False):
            if len(holders[id(held)]) > 1:
                reason = f"{' and '.join(holders[id(held)])} are one"
                raise _refused(conv_path, norm_path, reason)
        for which, module in (("conv", conv), ("norm", norm)):
            if id(module) in seen[which]:
                raise _refused(conv_path, norm_path, f"this {which} is in two pairs")
            seen[which].add(id(module))


def _replace(model: nn.Module, module: nn.Module, rest: nn.Module) -> None:
    """Puts ``rest`` in the place of a module, under every path that has it."""
    named = list(model.named_modules(remove_duplicate=False))
    for path in [path for path, each in named if each is module]:
        model.set_submodule(path, rest)


def _refused(conv: str, norm: str, reason: str) -> RunError:
    return RunError(Problem("E-FUSE", f"{norm} can't be folded into {conv}: {reason}"))


def _groups(conv: nn.Module) -> int:
    groups: int = getattr(conv, "groups", 1)
    return groups


def _weight_and_bias(conv: nn.Module) -> tuple[Tensor, Tensor]:
    """float64 weight and bias of a layer; a missing bias is zero."""
    weight: Tensor = conv.weight.detach().double()  # type: ignore[operator]
    if isinstance(conv.bias, Tensor):
        return weight, conv.bias.detach().double()
    outputs = weight.shape[1] * _groups(conv) if isinstance(conv, Transposed) else weight.shape[0]
    return weight, weight.new_zeros(outputs)


def _grouped(tensor: Tensor, groups: int) -> Tensor:
    """The leading dimension as (groups, size / groups)."""
    return tensor.reshape(groups, -1, *tensor.shape[1:])


def _diagonal_blocks(matrix: Tensor, groups: int) -> Tensor:
    """The diagonal blocks (groups, rows / groups, columns / groups) of a block diagonal matrix."""
    rows, columns = matrix.shape
    if rows % groups or columns % groups:
        raise ValueError(f"a {rows} x {columns} matrix has no {groups} equal diagonal blocks")
    grid = matrix.reshape(groups, rows // groups, groups, columns // groups)
    blocks = torch.stack([grid[group, :, group] for group in range(groups)])
    if torch.count_nonzero(matrix) != torch.count_nonzero(blocks):
        raise ValueError("the matrix mixes channels of different groups")
    return blocks
