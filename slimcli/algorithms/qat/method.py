"""Quantization-aware training: train while weights and activations are rounded to int8.

Ranges come from a calibration pass before training. Then the network trains through its fake
quantizers (straight-through gradient inside the range, none outside), with scales frozen, following
the data, or learned. What deploys is a copy whose quantizers show an exporter ONNX QuantizeLinear
and DequantizeLinear. Its batch norms stay, because TensorRT folds them; on request they are folded
in what the exporter sees, where that leaves the codes of the weights what they are.

Learned scales: "Learned Step Size Quantization", arXiv 1902.08153. Differs from the paper: a scale
starts from calibration, not from the mean magnitude; the gradient mask is that of the rounded code;
a scale stays between a quarter and twice of where it started; what is fed into the network keeps
its calibrated scale, because only learning it needs a gradient of the input (a tenth of a step).

Differs from torchslim: scale is ``amax / 127``, weights use [-127, 127], linear and transposed
layers are quantized too, a residual sum gets its skip quantized and not its convolution, and ranges
are calibrated before training instead of starting with the first batch of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from slimcli.algorithms.qat.config import ALGORITHM, QATConfig
from slimcli.compressor import (
    Compressor,
    GroupDefaults,
    LayerPlan,
    Plan,
    Progress,
    Refusal,
    Schedule,
    default_param_groups,
)
from slimcli.errors import Problem, RunError
from slimcli.network.copying import deep_copy
from slimcli.network.count import count_macs, count_params
from slimcli.network.cuts import Cut
from slimcli.network.evaluating import evaluating
from slimcli.network.example import Example
from slimcli.network.quantize.audit import float_readers
from slimcli.network.quantize.calibrate import collector, finite_magnitude, not_finite
from slimcli.network.quantize.fake_quant import FakeQuant, Phase, quantizers, scale_of, set_phase
from slimcli.network.quantize.fold import fold
from slimcli.network.quantize.freeze import (
    batch_statistics,
    freeze_statistics,
    make_freezable,
    remove_switches,
)
from slimcli.network.quantize.insert import insert, remove
from slimcli.network.quantize.layers import TRANSPOSED, first_in_float64, other_weights
from slimcli.network.quantize.norms import NormBehind
from slimcli.network.quantize.place import Activation, Placement, place

SCALE_SHARES = (0.25, 2.0)
"""Bounds of a learned scale, in calibrated scales: positive, and not so wide that codes vanish."""


class QATCompressor(Compressor):
    """The four moments of QAT: place and insert, calibrate, freeze on schedule, export."""

    info = ALGORITHM
    keeps_widths: ClassVar[bool] = True
    deploys_to: ClassVar[str] = "onnx"
    config: QATConfig
    norms: tuple[NormBehind, ...] = ()
    """Batch norms that are folded in a file; known from ``prepare`` on."""

    def plan(self, model: nn.Module, example: Example, schedule: Schedule) -> Plan:
        """Which layers become int8, and why the others stay float."""
        clone = deep_copy(model)
        placement = place(clone, example, self.config.skip)
        plan = Plan(targets=list(placement.quantized), private=placement)
        read = {name: each for each in placement.activations for name in each.readers}
        plan.layers = [
            LayerPlan(
                each.name, each.type, each.channels, each.channels,
                _shared(read.get(each.name)), each.reason,
            )
            for each in placement.layers
        ]  # fmt: skip
        plan.macs, plan.params = count_macs(clone, example).total, count_params(model)
        plan.budget = {
            "quantized_layers": float(len(placement.quantized)),
            "float_layers": float(len(placement.layers) - len(placement.quantized)),
            "activation_quantizers": float(len(placement.activations)),
        }
        plan.notes = [*placement.notes, *self._notes(model, placement)]
        plan.refusals = self._late(schedule)
        if self.config.bn_export == "fold":
            plan.notes += _norm_notes(placement.norms)
        double = first_in_float64(model, placement.layers)
        if double:
            plan.warnings.append(
                f"{double} is float64, which ONNX cannot quantize: no model.onnx can be written; "
                "return model.float() in the hook `model`"
            )
        if not placement.quantized and not self.config.skip:
            plan.refusals.append(
                Refusal("the model calls no convolution or linear layer that can be quantized")
            )
        return plan

    def _notes(self, model: nn.Module, placement: Placement) -> list[str]:
        notes = []
        modules = [model.get_submodule(name) for name in placement.quantized]
        if self.config.weight_granularity == "channel" and any(
            isinstance(each, TRANSPOSED) for each in modules
        ):
            notes.append("transposed convolutions have one weight scale: TensorRT takes no other")
        narrow = sum(
            getattr(each, "groups", 1) > 1 and getattr(each, "out_channels", 8) % 8 != 0
            for each in modules
        )
        if narrow:
            notes.append(
                f"{narrow} grouped convolutions have a channel count that is no multiple of 8: "
                "int8 may not be faster there"
            )
        others = other_weights(model, placement.layers)
        if others:
            listed = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if others[5:] else "")
            notes.append(f"stay float, only convolution and linear layers are quantized: {listed}")
        return notes

    def _late(self, schedule: Schedule) -> list[Refusal]:
        """Epochs to freeze at that the training never comes to; without training none does."""
        last = schedule.epochs - 1
        return [
            Refusal(
                f"{key} {value} is never reached: the last of {schedule.epochs} epochs is {last}",
                key,
                f"{key}: {last} or less, or leave it out",
                is_for_any_model=True,
            )
            for key in ("freeze_scale_epoch", "freeze_bn_epoch")
            if (value := getattr(self.config, key)) is not None and value > last >= 0
        ]

    def prepare(self, model: nn.Module, example: Example, plan: Plan) -> nn.Module:
        """Adds quantizers, switched off: the function does not change until calibration."""
        insert(model, plan.private, self.config.weight_granularity, self.config.scale)
        if self.config.freeze_bn_epoch is not None:
            make_freezable(model)
        if self.config.bn_export == "fold":
            self.norms = tuple(each for each in plan.private.norms if not each.reason)
        return model

    def calibrate(self, model: nn.Module, batches: Iterable[Example]) -> None:
        """Finds all ranges on float activations, then switches the quantizers on.

        Each batch is seen twice, with the stored statistics of batch norms, as when deployed, and
        with its own, as in training: on a network that is hardly trained they differ so much that
        ranges of the one clip all of the other and nothing is learnt.

        Raises:
            RunError: A tensor holds NaN or inf, or no batch reached it.
        """
        found = quantizers(model)
        for each in found.values():
            if not each.is_weight:
                each.collector = collector(
                    self.config.calibration, each.label, self.config.percentile
                )
                each.phase = Phase.CALIBRATE
        example = None
        with evaluating(model), torch.no_grad():
            for example in itertools.islice(batches, self.config.calibration_batches):
                example.run(model)
                if self.config.freeze_bn_epoch != 0:
                    with batch_statistics(model):
                        example.run(model)
            self._take_ranges(model)
        set_phase(model, Phase.FROZEN if self.config.scale == "frozen" else Phase.TRAIN)
        if example is not None:
            _audit(model, example)

    def _take_ranges(self, model: nn.Module) -> None:
        for path, each in quantizers(model).items():
            if each.is_weight:
                weight = dict(model.named_parameters())[path.replace("weight_quantizer", "weight")]
                finite_magnitude(weight, each.label)
                amax = each.magnitude(weight)
            else:
                amax = each.collector.amax().to(each.amax)
                each.collector = None
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX)
            each.set_amax(amax)

    def param_groups(self, model: nn.Module, defaults: GroupDefaults) -> list[dict[str, Any]]:
        """The loop's groups; learned scales never decay."""
        no_decay = (*defaults.no_decay, "*_quantizer.scale", "*_quantizer_*.scale")
        return default_param_groups(model, replace(defaults, no_decay=no_decay))

    def before_epoch(self, model: nn.Module, progress: Progress) -> list[Cut]:
        """Freezes scales and batch statistics when their epoch has come."""
        self._require_calibrated(model)
        scale_epoch, norm_epoch = self.config.freeze_scale_epoch, self.config.freeze_bn_epoch
        if scale_epoch is not None and progress.epoch >= scale_epoch:
            set_phase(model, Phase.FROZEN)
        if norm_epoch is not None and progress.epoch >= norm_epoch:
            freeze_statistics(model)
        return []

    def after_backward(self, model: nn.Module, progress: Progress) -> None:
        """Stops before the step if a range that follows the data met NaN or inf."""
        moving = [
            each
            for each in quantizers(model).values()
            if each.phase is Phase.TRAIN and each.policy == "ema"
        ]
        if not moving:
            return
        largest = torch.stack([each.amax.max() for each in moving])
        if not bool(torch.isfinite(largest).all()):
            raise RunError(*_all_not_finite(moving))

    def after_step(self, model: nn.Module, progress: Progress, skipped: bool) -> None:
        """Keeps learned scales near what calibration found, hence positive.

        Without bounds a large gradient early in training was seen to widen a range 4,000 times:
        all codes are zero then, and so is the gradient that could undo it.
        """
        if self.config.scale != "lsq":
            return
        with torch.no_grad():
            for each in quantizers(model).values():
                calibrated, (low, high) = scale_of(each.amax), SCALE_SHARES
                each.scale.clamp_(calibrated * low, calibrated * high)

    def status(self, model: nn.Module) -> dict[str, float]:
        """How many quantizers there are, and how many of them no longer move."""
        found = list(quantizers(model).values())
        frozen = sum(each.phase in (Phase.FROZEN, Phase.EXPORT) for each in found)
        return {"quantizers": float(len(found)), "frozen_scales": float(frozen)}

    def handover(self, model: nn.Module, batches: Iterable[Example]) -> nn.Module:
        """The float network with the trained weights, every batch norm kept."""
        plain = deep_copy(model)
        remove_switches(plain)
        remove(plain)
        return plain

    def deploy(self, model: nn.Module) -> nn.Module:
        """A copy in eval mode that computes the fake-quantized function and exports with Q/DQ.

        With ``bn_export: fold`` an exporter sees the folded network; the copy itself computes what
        was trained, bit for bit.
        """
        self._require_calibrated(model)
        exportable = deep_copy(model).eval()
        set_phase(exportable, Phase.EXPORT)
        fold(exportable, self.norms)
        return exportable

    def _require_calibrated(self, model: nn.Module) -> None:
        waiting = [each for each in quantizers(model).values() if each.phase <= Phase.CALIBRATE]
        if waiting:
            raise RunError(
                Problem(
                    "E-QUANTIZE-NOT-CALIBRATED",
                    f"{len(waiting)} quantizers have no range yet",
                    waiting[0].label,
                    fix="call calibrate(model, batches) after prepare",
                )
            )


def _shared(activation: Activation | None) -> str:
    """The quantizer a layer reads, and who reads it too: ``conv2.input: conv2, + conv3``."""
    if activation is None:
        return ""
    name = f"{activation.layer}.{activation.role}"
    return name if len(activation.readers) == 1 else f"{name}: {', '.join(activation.readers)}"


def _norm_notes(norms: tuple[NormBehind, ...]) -> list[str]:
    """How many batch norms ``bn_export: fold`` folds, and why the others stay."""
    kept: dict[str, list[str]] = {}
    for each in norms:
        if each.reason:
            kept.setdefault(each.reason, []).append(each.layer)
    count = sum(not each.reason for each in norms)
    if not norms:
        return ["bn_export: fold changes nothing: no batch norm reads a quantized layer's output"]
    return [
        f"bn_export: fold: {count} of {len(norms)} batch norms behind quantized layers are folded "
        "in model.onnx",
        *(f"keeps its batch norm in model.onnx: {', '.join(names)}: {reason}"
          for reason, names in kept.items()),
    ]  # fmt: skip


def _audit(model: nn.Module, example: Example) -> None:
    """Refuses a network in which a quantized layer reads float values after all."""
    missed = float_readers(model, example)
    if missed:
        raise RunError(
            Problem(
                "E-QUANTIZE-PLACEMENT",
                f"{missed[0]} reads a tensor that no quantizer reached",
                missed[0],
                fix=f"config.skip: [{', '.join(dict.fromkeys(missed))}], and report this network",
            )
        )


def _all_not_finite(moving: list[FakeQuant]) -> list[Problem]:
    """One problem for each quantizer whose range is NaN or inf."""
    return [
        not_finite(each.label, float(each.amax.max()))
        for each in moving
        if not bool(torch.isfinite(each.amax).all())
    ]
