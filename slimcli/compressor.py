"""The contract between the training loop and an algorithm, and the registry of algorithms.

The loop owns *when*, an algorithm owns *what*. The order of calls::

    plan = compressor.plan(model, example, schedule)      # changes nothing; refuses what can't work
    model = compressor.prepare(model, example, plan)      # modules change, the function does not
    compressor.calibrate(model, batches)                  # fresh starts only, never on resume
    groups = compressor.param_groups(model, defaults)
    for epoch ...:
        cuts = compressor.before_epoch(model, progress)   # surgery applies them, then after_cut
        for batch ...:
            loss.backward()                               # unscaled, reduced, clipped
            compressor.after_backward(model, progress)
            optimizer.step()
            compressor.after_step(model, progress, skipped)
        (last epoch only) cuts = compressor.finish(model, progress)
        evaluate; compressor.may_save(model, progress) decides whether "best" may be this model
    model = compressor.handover(best_model, batches)      # what the next stage trains on
    plain = compressor.deploy(best_model)                 # what artifacts are made of

A compressor holds names, numbers and masks, never a parameter, and knows no file, flag, logger or
device list. This module imports no torch at run time.
"""

from __future__ import annotations

import fnmatch
import importlib
import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import nn

    from slimcli.network.cuts import Cut
    from slimcli.network.example import Example


class AlgorithmConfig(BaseModel):
    """The keys of one algorithm; keys of the training loop are not among them."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


@dataclass(frozen=True)
class AlgorithmInfo:
    """What the registry knows of an algorithm without importing torch.

    Attributes:
        name: The value of ``algorithm:`` in a recipe.
        summary: One line for ``slim list``.
        paper: Title and arXiv id, for ``slim explain``.
        config: The pydantic schema of its own keys.
        compressor: ``package.module:Class`` of its Compressor.
        training_defaults: Training keys whose default differs from the loop's (``{"lr": 0.001}``).
        aliases: Other accepted values of ``algorithm:``, the class paths of the original library.
        key_aliases: Other accepted spellings of its keys, alias -> name.
        solver: Name of its class in the Python API (``ResRepSolver``).
        example: Its own keys for a run of a few epochs on a small network; shown by
            ``slim explain``, and what the contract tests of the whole registry use.
    """

    name: str
    summary: str
    paper: str
    config: type[AlgorithmConfig]
    compressor: str
    solver: str
    training_defaults: dict[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    key_aliases: dict[str, str] = field(default_factory=dict)
    example: dict[str, Any] = field(default_factory=dict)

    def load(self) -> type[Compressor]:
        """The Compressor class; imports torch."""
        module, _, name = self.compressor.partition(":")
        loaded: type[Compressor] = getattr(importlib.import_module(module), name)
        return loaded


def registry() -> dict[str, AlgorithmInfo]:
    """All algorithms, name -> info, in alphabetical order.

    A folder of ``slimcli.algorithms`` is an algorithm: its ``config.py`` has an ``ALGORITHM``.

    Raises:
        ValueError: Two folders claim one name or alias.
    """
    import slimcli.algorithms as package

    found: dict[str, AlgorithmInfo] = {}
    taken: dict[str, str] = {}
    for entry in sorted(pkgutil.iter_modules(package.__path__), key=lambda each: each.name):
        if not entry.ispkg:
            continue
        info: AlgorithmInfo = importlib.import_module(
            f"slimcli.algorithms.{entry.name}.config"
        ).ALGORITHM
        for name in (info.name, *info.aliases):
            if name in taken:
                raise ValueError(f"algorithm {name!r} is claimed by {taken[name]} and {entry.name}")
            taken[name] = entry.name
        found[info.name] = info
    return found


@dataclass(frozen=True)
class Schedule:
    """What training will do, known before it starts.

    Attributes:
        epochs: Number of epochs.
        steps_per_epoch: Optimizer steps in one epoch.
        learning_rates: The learning rate of each optimizer step of the whole run, for a parameter
            with multiplier 1; found by stepping the user's optimizer and scheduler on a dummy.
        is_sgd: True for ``torch.optim.SGD``: the papers' gradient forms apply. False: the pull is
            decoupled, in ``after_step``, because adaptive steps cancel it.
        momentum: Momentum of the ordinary parameters.
        nesterov: Whether momentum is Nesterov's.
        weight_decay: Decay of the ordinary parameters.
        seed: Seed for anything random the algorithm draws.
        warnings: What the reader of the plan should know (a plateau scheduler counted as constant).
        state_misfit: Why the optimizer's state can't follow a cut; empty if it can.
    """

    epochs: int
    steps_per_epoch: int
    learning_rates: tuple[float, ...]
    is_sgd: bool = True
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    seed: int = 0
    warnings: tuple[str, ...] = ()
    state_misfit: str = ""

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.epochs * self.steps_per_epoch


@dataclass(frozen=True)
class Progress:
    """Where training is.

    Attributes:
        epoch: Number of the epoch in progress, from 0.
        step: Number of the optimizer step in progress, over the whole run, from 0.
        learning_rate: Learning rate of this step for a parameter with multiplier 1.
        schedule: The schedule the run was planned with.
    """

    epoch: int
    step: int
    learning_rate: float
    schedule: Schedule


@dataclass(frozen=True)
class Goal:
    """What a compressed model must reach.

    Attributes:
        name: The quantity, e.g. ``macs``.
        target: The largest value that is allowed, in the quantity's unit.
    """

    name: str
    target: float


@dataclass(frozen=True)
class LayerPlan:
    """One row of the plan's table.

    Attributes:
        name: Module path of the layer.
        type: Class name of the module.
        channels: Output channels today.
        channels_minimum: The fewest the plan can reach; equal to ``channels`` where frozen.
        group: Name of the coupled group it belongs to; empty if none.
        frozen_reason: Why nothing is cut here, with the user's source line; empty if prunable.
    """

    name: str
    type: str
    channels: int
    channels_minimum: int
    group: str = ""
    frozen_reason: str = ""


@dataclass(frozen=True)
class Refusal:
    """Why this recipe cannot work, with the value that would.

    Attributes:
        what: One sentence with the numbers.
        key: The config key to change (``lasso_decay``), without ``config.``.
        fix: The value that works, or what to do.
        is_for_any_model: The schedule alone forbids it, so that no stage before it needs to train.
    """

    what: str
    key: str = ""
    fix: str = ""
    is_for_any_model: bool = False


@dataclass
class Plan:
    """What an algorithm will do to this model under this schedule.

    Attributes:
        targets: Names of what is compressed (modules or groups), in network order.
        layers: One row a conv or linear layer.
        macs: Multiply-accumulates of the model today, for one sample of the example.
        params: Parameters today.
        reachable_macs: The fewest MACs that can be reached; None where it does not apply.
        goal: The goal, or None.
        budget: Named numbers of the budget (``shrink_needed``, ``shrink_available`` ...).
        settings: What ``auto`` came out as.
        notes, warnings: Sentences a reader of the plan should see, and must see.
        refusals: If any, training does not start (exit 4).
        private: The algorithm's own analysis, handed back to it by ``prepare``.
    """

    targets: list[str] = field(default_factory=list)
    layers: list[LayerPlan] = field(default_factory=list)
    macs: int = 0
    params: int = 0
    reachable_macs: int | None = None
    goal: Goal | None = None
    budget: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    private: Any = None


@dataclass(frozen=True)
class GroupDefaults:
    """The one rule table of optimizer groups.

    Attributes:
        lr: Learning rate.
        momentum: Momentum, for optimizers that have one.
        weight_decay: Weight decay.
        nesterov: Nesterov momentum.
        bias_lr_multiplier: Factor on the learning rate of parameters called ``bias``.
        no_decay: Glob patterns of parameter names without weight decay; ``norm`` and ``bias`` stand
            for all parameters of normalisation modules and all parameters called ``bias``.
    """

    lr: float
    momentum: float = 0.9
    weight_decay: float = 1e-4
    nesterov: bool = False
    bias_lr_multiplier: float = 1.0
    no_decay: tuple[str, ...] = ()


def parameter_settings(name: str, is_norm: bool, defaults: GroupDefaults) -> tuple[float, float]:
    """Learning rate and weight decay of one parameter.

    >>> parameter_settings("fc.bias", False, GroupDefaults(lr=0.1, no_decay=("bias",)))
    (0.1, 0.0)
    """
    is_bias = name.rsplit(".", 1)[-1] == "bias"
    lr = defaults.lr * (defaults.bias_lr_multiplier if is_bias else 1.0)
    for pattern in defaults.no_decay:
        hit = is_bias if pattern == "bias" else is_norm if pattern == "norm" else False
        if hit or fnmatch.fnmatchcase(name, pattern):
            return lr, 0.0
    return lr, defaults.weight_decay


def default_param_groups(model: nn.Module, defaults: GroupDefaults) -> list[dict[str, Any]]:
    """Every trainable parameter once, in as few groups as the rule table allows.

    Each group has ``params``, ``names``, ``lr``, ``weight_decay``, ``momentum`` and ``nesterov``;
    ``names`` runs parallel to ``params``. The order is that of ``named_parameters``.
    """
    import torch

    norm = torch.nn.modules.batchnorm._NormBase
    norms = (norm, torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.RMSNorm)
    norm_parameters = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, norms)
        for parameter in module.parameters(recurse=False)
    }
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        lr, decay = parameter_settings(name, id(parameter) in norm_parameters, defaults)
        group = groups.setdefault(
            (lr, decay),
            {
                "params": [],
                "names": [],
                "lr": lr,
                "weight_decay": decay,
                "momentum": defaults.momentum,
                "nesterov": defaults.nesterov,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


class Compressor:
    """Base of all algorithms: the plain loop, which compresses nothing.

    Subclasses override what they need; see the module docstring for the order of calls.

    Args:
        config: The algorithm's own validated keys.
    """

    info: ClassVar[AlgorithmInfo]
    compresses: ClassVar[bool] = True
    """False for an algorithm that only trains: what it yields is the baseline to compare with."""
    keeps_widths: ClassVar[bool] = False
    """True if what it compresses stays as wide as it was: later stages can be sure of that."""
    deploys_to: ClassVar[str] = "module"
    """``module``: deploy() returns a plain model. ``onnx``: one made for the exporter."""

    def __init__(self, config: AlgorithmConfig) -> None:
        self.config = config

    def plan(self, model: nn.Module, example: Example, schedule: Schedule) -> Plan:
        """What will be done, whether it can work, and what it costs; changes nothing."""
        raise NotImplementedError

    def prepare(self, model: nn.Module, example: Example, plan: Plan) -> nn.Module:
        """The model to train on; modules may change in place, the eval function may not."""
        return model

    def calibrate(self, model: nn.Module, batches: Iterable[Example]) -> None:
        """Takes ranges or statistics from training batches, once, when training starts fresh."""

    def param_groups(self, model: nn.Module, defaults: GroupDefaults) -> list[dict[str, Any]]:
        """Groups for the optimizer: every trainable parameter in exactly one.

        :func:`default_param_groups` says which keys a group has.
        """
        return default_param_groups(model, defaults)

    def before_epoch(self, model: nn.Module, progress: Progress) -> list[Cut]:
        """Cuts to apply before this epoch starts."""
        return []

    def after_backward(self, model: nn.Module, progress: Progress) -> None:
        """Changes gradients, which are unscaled, reduced over processes and clipped."""

    def after_step(self, model: nn.Module, progress: Progress, skipped: bool) -> None:
        """Changes parameters the algorithm owns; ``skipped``: the scaler skipped the step."""

    def after_cut(self, model: nn.Module, cuts: list[Cut]) -> None:
        """Follows the cuts in the algorithm's own names and masks."""

    def finish(self, model: nn.Module, progress: Progress) -> list[Cut]:
        """After the last step of the run: the measured projection that makes deploying exact."""
        return []

    def may_save(self, model: nn.Module, progress: Progress) -> bool:
        """Whether the model as it is meets the goal, so that it may become the best checkpoint."""
        return True

    def status(self, model: nn.Module) -> dict[str, float]:
        """Numbers for log, progress line and report; the first one moves towards the goal."""
        return {}

    def handover(self, model: nn.Module, batches: Iterable[Example]) -> nn.Module:
        """A new plain model for the next stage: our modules folded, cuts applied, every BN kept."""
        raise NotImplementedError

    def deploy(self, model: nn.Module) -> nn.Module:
        """A new plain model in eval mode, with the same function; ``model`` stays as it is."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Names, numbers, masks as plain values and tensors (``weights_only`` loadable)."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what :meth:`state_dict` gave; called after ``prepare`` on a fresh model."""
