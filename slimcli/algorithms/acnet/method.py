"""ACNet: train each k x k convolution as several branches, deploy one plain convolution.

Paper: arXiv:1908.03930 (ICCV 2019). Authors' code: DingXiaoH/ACNet at 748fb0c7.

A convolution and the batch norm behind it become one block: a square, a vertical and a horizontal
branch over the same input, each with a norm of its own, summed. Convolution is linear, so in eval
mode the sum is one convolution; its kernel is the square kernel with the vertical one added onto
the middle column and the horizontal one onto the middle row.

Differs from the paper: by default a trained network is strengthened instead of a fresh one. The old
conv and norm stay verbatim as the square branch and side branches start with scale 0, so that the
function is unchanged in eval and in train mode (``init: paper`` draws fresh weights). A conv
without a norm keeps a square branch without one under the warm start. Differs from the authors'
code: any odd kernel, padding, dilation and padding mode, not only square kernels without dilation;
kernels of 7 and more are replaced too.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import nn

from slimcli.algorithms.acnet.blocks import (
    BLOCKS,
    Block,
    BranchBlock,
    MergedBlock,
    NewLayers,
    plain_conv,
    why_plain,
)
from slimcli.algorithms.acnet.calls import input_dimensions
from slimcli.algorithms.acnet.config import ALGORITHM, ACNetConfig
from slimcli.compressor import Compressor, LayerPlan, Plan, Schedule
from slimcli.errors import Problem, RecipeError
from slimcli.network.copying import deep_copy
from slimcli.network.example import Example
from slimcli.network.fuse import fold_pairs, remainder
from slimcli.network.handover import insert_norms
from slimcli.network.structure import analyze


@dataclass(frozen=True)
class Target:
    """One convolution that becomes a block.

    Attributes:
        conv: Its module path.
        norm: Path of the batch norm that the block takes in; empty if there is none.
    """

    conv: str
    norm: str


@dataclass(frozen=True)
class Analysis:
    """What the plan hands to ``prepare``.

    Attributes:
        targets: The convs to replace, in network order.
        pairs: (conv, norm) paths that deploying folds because no block takes the norm in.
        seed: Seed of the fresh weights.
    """

    targets: tuple[Target, ...]
    pairs: tuple[tuple[str, str], ...]
    seed: int


class ACNetCompressor(Compressor):
    """Replaces convolutions by blocks before training and by plain ones after it."""

    info = ALGORITHM
    keeps_widths: ClassVar[bool] = True
    config: ACNetConfig

    def plan(self, model: nn.Module, example: Example, schedule: Schedule) -> Plan:
        """Which convs become blocks, and why the others stay; nothing is cut.

        Raises:
            RecipeError: A pattern of ``skip`` fits no module.
        """
        _check_patterns(model, self.config.skip)
        structure = analyze(model, example, trial=False)
        reasons = why_convs_stay(model, example, self.config)
        norm_of = {pair.conv: pair.norm for pair in structure.conv_batch_norms}
        targets = tuple(
            Target(path, _norm_to_take(model, norm_of.get(path, "")))
            for path, reason in reasons.items()
            if not reason
        )
        taken = {target.norm for target in targets} - {""}
        pairs = tuple(pair for pair in norm_of.items() if pair[1] not in taken)
        plan = Plan(
            targets=[target.conv for target in targets],
            layers=_layers(model, reasons),
            macs=structure.macs,
            params=sum(parameter.numel() for parameter in model.parameters()),
            warnings=list(schedule.warnings),
            private=Analysis(targets, pairs, schedule.seed),
        )
        if targets:
            plan.notes.append(
                f"{len(targets)} of {len(reasons)} convolutions train as {self.config.acnet_type} "
                f"blocks, {len(taken)} of them with the batch norm behind them; the deployed model "
                "has the MACs and channels of today"
            )
        else:
            plan.warnings.append("no convolution can become a block: this is plain training")
        return plan

    def prepare(self, model: nn.Module, example: Example, plan: Plan) -> nn.Module:
        """The model with blocks in place; its function is the same unless ``init: paper``."""
        self._analysis: Analysis = plan.private
        generator = torch.Generator().manual_seed(self._analysis.seed)
        for target in self._analysis.targets:
            conv = model.get_submodule(target.conv)
            norm = _take_norm(model, target.norm)
            block = self._block(cast(nn.Conv2d, conv), norm, generator)
            for path in paths_of(model, conv):
                model.set_submodule(path, block.train(conv.training))
        return model

    def _block(
        self, conv: nn.Conv2d, norm: nn.BatchNorm2d | None, generator: torch.Generator
    ) -> Block:
        """A block around a conv and its norm, started as the config says."""
        is_fresh = self.config.init == "paper"
        make = NewLayers(norm, self.config.gamma if is_fresh else 0.0, generator, conv.weight)
        square_norm: nn.Module = norm if norm is not None else nn.Identity()
        if is_fresh:
            make.draw(conv)
            conv.register_parameter("bias", None)  # the norm's shift plays its part
            square_norm = make.batch_norm(conv.out_channels)
        return BLOCKS[self.config.acnet_type](conv, square_norm, make)

    def status(self, model: nn.Module) -> dict[str, float]:
        """Mean absolute scale of the side branches: 0 at a warm start, grows as they take part."""
        scales = [
            scale.detach().abs().mean()
            for module in model.modules()
            if isinstance(module, BranchBlock | MergedBlock)
            for scale in _side_scales(module)
        ]
        return {"side_scale": torch.stack(scales).mean().item()} if scales else {}

    def handover(self, model: nn.Module, batches: Iterable[Example]) -> nn.Module:
        """A plain copy with every batch norm back behind its conv, for the next stage."""
        plain = self._without_blocks(model)
        pairs = [(each.conv, each.norm) for each in self._analysis.targets if each.norm]
        activations = {norm: plain.get_submodule(norm) for _, norm in pairs}
        for path in activations:
            plain.set_submodule(path, nn.Identity())
        insert_norms(plain, pairs, batches)
        for path, activation in activations.items():
            if type(activation) is not nn.Identity:
                norm = plain.get_submodule(path)
                plain.set_submodule(path, nn.Sequential(norm, activation))
        return plain

    def deploy(self, model: nn.Module) -> nn.Module:
        """A plain copy in eval mode: one conv a block, and every other batch norm folded."""
        plain = self._without_blocks(model).eval()
        fold_pairs(plain, self._analysis.pairs)
        return plain

    def _without_blocks(self, model: nn.Module) -> nn.Module:
        """A copy whose blocks are plain convolutions; a shared block becomes a shared conv."""
        plain = deep_copy(model)
        for target in self._analysis.targets:
            block = cast(Block, plain.get_submodule(target.conv))
            conv = plain_conv(block)
            for path in paths_of(plain, block):
                plain.set_submodule(path, conv)
        return plain


def paths_of(model: nn.Module, module: nn.Module) -> list[str]:
    """Every path under which a model holds a module."""
    named = model.named_modules(remove_duplicate=False)
    return [path for path, each in named if each is module]


def why_convs_stay(model: nn.Module, example: Example, config: ACNetConfig) -> dict[str, str]:
    """For each 2-d convolution in network order, why it stays plain; empty if it is replaced."""
    calls, uncalled = input_dimensions(model, example)
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    reasons: dict[str, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            if any(fnmatch.fnmatchcase(path, pattern) for pattern in config.skip):
                reasons[path] = "skipped by the recipe"
            elif type(module) is not nn.Conv2d or "weight" not in dict(
                module.named_parameters(recurse=False)
            ):
                reasons[path] = f"{type(module).__name__} is more than a plain Conv2d"
            elif path in uncalled:
                reasons[path] = uncalled[path]
            elif calls[path] != {4}:
                reasons[path] = "it is fed images without a batch dimension"
            elif holders[id(module.weight)] > 1:
                reasons[path] = "its weight belongs to another module too"
            else:
                reasons[path] = why_plain(module, config.acnet_type)
    return reasons


def _check_patterns(model: nn.Module, patterns: tuple[str, ...]) -> None:
    """Each pattern must fit something, or it is a typing error."""
    paths = [path for path, _ in model.named_modules()]
    for pattern in patterns:
        if pattern != "*" and not fnmatch.filter(paths, pattern):
            raise RecipeError(
                Problem(
                    "E-RECIPE-SKIP",
                    f"no module fits the pattern {pattern!r} of skip",
                    expected="a module path or pattern such as layer1.*",
                    received=pattern,
                    fix="compare with the layers that `slim plan` lists",
                )
            )


def _norm_to_take(model: nn.Module, path: str) -> str:
    """The norm's path if a block can take it in: a batch norm that trains, with statistics."""
    if not path:
        return ""
    norm = model.get_submodule(path)
    return path if isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm) else ""


def _take_norm(model: nn.Module, path: str) -> nn.BatchNorm2d | None:
    """Takes the norm out of the model and leaves what it did besides normalising."""
    if not path:
        return None
    norm = cast(nn.BatchNorm2d, model.get_submodule(path))
    for each in paths_of(model, norm):
        model.set_submodule(each, remainder(norm))
    if type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return norm
    plain = nn.BatchNorm2d(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
    )
    plain.weight, plain.bias = norm.weight, norm.bias
    plain.running_mean, plain.running_var = norm.running_mean, norm.running_var
    plain.num_batches_tracked = norm.num_batches_tracked
    return plain.train(norm.training)


def _layers(model: nn.Module, reasons: dict[str, str]) -> list[LayerPlan]:
    """One row a convolution; widths do not change."""
    rows = []
    for path, reason in reasons.items():
        conv = cast(nn.Conv2d, model.get_submodule(path))
        width = conv.out_channels
        kind = type(conv).__name__
        rows.append(LayerPlan(path, kind, width, width, frozen_reason=reason))
    return rows


def _side_scales(block: Block) -> list[torch.Tensor]:
    """The factors on the side branches."""
    if isinstance(block, MergedBlock):
        return list(block.scales)
    return [cast(torch.Tensor, cast(nn.BatchNorm2d, side.norm).weight) for side in block.sides]
