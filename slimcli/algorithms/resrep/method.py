"""ResRep: lossless pruning by remembering and forgetting in different parameters.

Xiaohan Ding et al., "ResRep: Lossless CNN Pruning via Decoupling Remembering and Forgetting",
arXiv:2007.03260 (ICCV 2021); the authors' code is DingXiaoH/ResRep at a3567a19. Behind each layer
sits a *compactor*, an identity matrix. Its rows are pulled to zero by a group lasso; the rows of
the channels chosen to go no longer see the gradient of the loss (it is reset to zero,
"forgetting"), so the pull wins without hurting the rest ("remembering"). In the end conv, norm and
compactor are one narrower conv with the same function.

What differs from the paper and from the authors' code:

* Coupled layers (residual sums) have one compactor a layer; the rows of one channel form a bundle
  with a joint norm, a joint lasso and one mask bit. The authors prune inner layers only.
* A masked channel moves straight to zero and stays there (:func:`forgetting.shrink_masked`). In the
  authors' code momentum still carries old gradients of the loss past zero; a row then rings, and
  they delete rows below 1e-5.
* A channel stays masked; theirs may come back while the target isn't reached.
* Selection never stalls (:mod:`selection`), and what cannot be reached inside the schedule is
  refused before training (:mod:`pacing`). ``lasso_decay: auto`` chooses the pull of each masked
  row from its norm and the learning rates that are left.
* Optimizers other than SGD scale the lasso away. For them unmasked rows shrink by a proximal
  step after the optimizer's; masked rows move as with SGD.
* Channels at zero are cut at epoch boundaries; the authors cut at the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from slimcli.algorithms.resrep import budget, folding
from slimcli.algorithms.resrep.bundles import Bundles
from slimcli.algorithms.resrep.compactor import Compactor, attach
from slimcli.algorithms.resrep.config import ALGORITHM, ResRepConfig
from slimcli.algorithms.resrep.cutting import (
    can_shrink_in_training,
    cut_in_training,
    present_rows,
    removed_entries,
)
from slimcli.algorithms.resrep.forgetting import (
    reset_gradients,
    shrink_masked,
    shrink_unmasked,
)
from slimcli.algorithms.resrep.pacing import base_strength
from slimcli.algorithms.resrep.planning import Analysis, make_plan, masked_strength
from slimcli.algorithms.resrep.projection import project
from slimcli.algorithms.resrep.selection import choose
from slimcli.compressor import (
    AlgorithmConfig,
    Compressor,
    GroupDefaults,
    Plan,
    Progress,
    Schedule,
    default_param_groups,
)
from slimcli.network.cuts import Cut
from slimcli.network.example import Example


class ResRepCompressor(Compressor):
    """Compactors, masks and their pace."""

    info = ALGORITHM

    def __init__(self, config: AlgorithmConfig) -> None:
        super().__init__(config)
        self.keys = cast(ResRepConfig, config)
        self.bundles: list[Bundles] = []
        self.updates_done = 0
        self.projected: dict[str, float] = {}
        self._before: dict[str, list[Tensor]] = {}
        self._macs_now = 0

    def plan(self, model: nn.Module, example: Example, schedule: Schedule) -> Plan:
        """Targets, reachable MACs, shrink budget; refusals with the value that works."""
        return make_plan(self.keys, model, example, schedule)

    def prepare(self, model: nn.Module, example: Example, plan: Plan) -> nn.Module:
        """Attaches identity compactors."""
        self.analysis = cast(Analysis, plan.private)
        self.example = example
        self.pace = self.analysis.pace
        self.bundles = [
            Bundles(target, base_strength(self.keys)) for target in self.analysis.targets
        ]
        places = {place.host: place for each in self.bundles for place in each.target.places}
        for place in places.values():
            like = model.get_submodule(place.conv).weight
            compactor = Compactor(
                place.size,
                cast(Tensor, like).detach(),
                is_diagonal=place.is_diagonal,
                spatial=place.spatial,
            )
            attach(model.get_submodule(place.host), compactor, is_before=place.is_before)
        self._weights = {place.weight for place in places.values()}
        self._shrinking = can_shrink_in_training(model, self.analysis.targets)
        self._macs_now = self.analysis.structure.macs
        return model

    def param_groups(self, model: nn.Module, defaults: GroupDefaults) -> list[dict[str, Any]]:
        """The default groups, and one of the compactors: own momentum, no decay, no Nesterov."""
        groups = default_param_groups(model, defaults)
        compactors: list[tuple[str, nn.Parameter]] = []
        for group in groups:
            named = list(zip(group["names"], group["params"], strict=True))
            compactors += [pair for pair in named if pair[0] in self._weights]
            rest = [pair for pair in named if pair[0] not in self._weights]
            group["names"] = [name for name, _ in rest]
            group["params"] = [parameter for _, parameter in rest]
        groups = [group for group in groups if group["params"]]
        if compactors:
            groups.append(
                {
                    "params": [parameter for _, parameter in compactors],
                    "names": [name for name, _ in compactors],
                    "lr": defaults.lr,
                    "weight_decay": 0.0,
                    "momentum": self.keys.compactor_momentum,
                    "nesterov": False,
                }
            )
        return groups

    def after_backward(self, model: nn.Module, progress: Progress) -> None:
        """Resets gradients of masked rows; with SGD adds the lasso's to all."""
        is_sgd = progress.schedule.is_sgd
        for each in self.bundles:
            rows = reset_gradients(each, model, has_lasso=is_sgd)
            self._before[each.target.name] = rows

    def after_step(self, model: nn.Module, progress: Progress, skipped: bool) -> None:
        """Masked rows go towards zero and stay there; if it is time, the next rows are masked."""
        before, self._before = self._before, {}
        if skipped:
            return
        lr, momentum = progress.learning_rate, self.keys.compactor_momentum
        for each in self.bundles:
            if not progress.schedule.is_sgd:
                shrink_unmasked(each, model, lr / (1 - momentum))
            shrink_masked(each, model, before[each.target.name], lr, momentum)
        self._mask(model, progress)

    def _mask(self, model: nn.Module, progress: Progress) -> None:
        """Masks the next blocks if the pace says so."""
        full, target = self.analysis.structure.macs, self.analysis.target_macs
        if self.pace is None or self._macs_now <= target:
            return
        gone = (full - self._macs_now) / (full - target)
        if not self.pace.is_due(progress.step, self.updates_done, gone):
            return
        standings = {each.target.name: each.standing(model) for each in self.bundles}
        macs, blocks = self.analysis.structure.macs_with, self.keys.prune_groups
        chosen = choose(standings, self.analysis.limits, blocks, target, macs)
        for each in self.bundles:
            channels = chosen.get(each.target.name, [])
            norms = standings[each.target.name].norms
            each.mask(channels, [self._strength(progress, norms[channel]) for channel in channels])
        self.updates_done += 1
        self._macs_now = self._predicted_macs()

    def _strength(self, progress: Progress, norm: float) -> float:
        """Lasso strength of a row masked now, at the learning rate that is really used."""
        assert self.pace is not None
        strength = masked_strength(self.keys, progress.schedule, self.pace, progress.step, norm)
        return strength * _lag(progress) if self.keys.lasso_decay == "auto" else strength

    def _predicted_macs(self) -> int:
        """MACs of the deployed model once the masked channels are gone."""
        return self.analysis.structure.macs_with(
            {each.target.name: each.unmasked for each in self.bundles}
        )

    def before_epoch(self, model: nn.Module, progress: Progress) -> list[Cut]:
        """Cuts channels that are zero for good; helps masked rows that lag behind."""
        self._hurry(model, progress)
        removed = removed_entries(self._kept())
        cuts = []
        for each in self.bundles:
            if each.target.name not in self._shrinking or not bool(each.locked.any()):
                continue
            keep = [
                channel
                for channel, locked in zip(each.kept, each.locked.tolist(), strict=True)
                if not locked
            ]
            cuts.append(cut_in_training(each.target, each.kept, keep, removed))
        return cuts

    def _hurry(self, model: nn.Module, progress: Progress) -> None:
        """With ``auto``, pulls harder where the learning rate fell more than was planned."""
        if self.keys.lasso_decay != "auto" or self.pace is None:
            return
        end = self.pace.zero if progress.step < self.pace.zero else progress.schedule.steps
        planned = progress.schedule.learning_rates[progress.step : end]
        distance = budget.reach(planned, self.keys.compactor_momentum)[0] / _lag(progress)
        coasting = budget.coast(planned, self.keys.compactor_momentum) / _lag(progress)
        if distance > 0:
            for each in self.bundles:
                each.catch_up(model, distance, coasting)

    def after_cut(self, model: nn.Module, cuts: list[Cut]) -> None:
        """Masks and row numbers follow the cuts."""
        groups = {cut.group for cut in cuts}
        for each in self.bundles:
            if each.target.name in groups:
                pairs = zip(each.kept, each.locked.tolist(), strict=True)
                each.remove([channel for channel, locked in pairs if not locked])
        self._renumber()

    def _renumber(self) -> None:
        removed = removed_entries(self._kept())
        for each in self.bundles:
            each.refresh([present_rows(place, removed) for place in each.target.places])

    def _kept(self) -> list[tuple[Any, list[int]]]:
        """The targets, each with the channels that are still in the model."""
        return [(each.target, each.kept) for each in self.bundles]

    def finish(self, model: nn.Module, progress: Progress) -> list[Cut]:
        """Sets masked rows that are left to zero; how far that moved the model is in the status."""
        self.projected = project(self.bundles, model, self.example)
        return []

    def may_save(self, model: nn.Module, progress: Progress) -> bool:
        """The masks reach the target, and every masked channel is exactly zero."""
        if self._macs_now > self.analysis.target_macs:
            return False
        return all(bool((each.zeros(model) | ~each.masked).all()) for each in self.bundles)

    def status(self, model: nn.Module) -> dict[str, float]:
        """MACs by masks (share of the original), channels, norms, largest norm left to shrink."""
        if not self.bundles:
            return {}
        masked, norms = [], []
        for each in self.bundles:
            norms.append(each.norms(model).value.cpu().double())
            masked.append(each.masked.cpu())
        all_norms, all_masked = torch.cat(norms), torch.cat(masked)
        cut = sum(each.target.group.size - len(each.kept) for each in self.bundles)
        shrinking = all_norms[all_masked]
        numbers = {
            "macs": self._macs_now / self.analysis.structure.macs,
            "masked": float(all_masked.sum()) + cut,
            "zero": float((all_norms == 0).sum()) + cut,
            "norm_smallest": float(all_norms.min()),
            "norm_largest": float(all_norms.max()),
            "shrink_left": float(shrinking.max()) if len(shrinking) else 0.0,
        }
        return {**numbers, **self.projected}

    def deploy(self, model: nn.Module) -> nn.Module:
        """A new plain model in eval mode without norms that can be folded."""
        pairs = [(pair.conv, pair.norm) for pair in self.analysis.structure.conv_batch_norms]
        return folding.deployed(model, self._kept(), pairs, self.example)

    def handover(self, model: nn.Module, batches: Iterable[Example]) -> nn.Module:
        """A new plain model with every norm, for the next stage."""
        return folding.handed_over(model, self._kept(), self.example, batches)

    def state_dict(self) -> dict[str, Any]:
        """Masks, locks, strengths and what is left of each group."""
        return {
            "groups": {each.target.name: each.state_dict() for each in self.bundles},
            "updates_done": self.updates_done,
            "projected": dict(self.projected),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what :meth:`state_dict` gave."""
        for each in self.bundles:
            each.load_state_dict(state["groups"][each.target.name])
        self.updates_done = int(state["updates_done"])
        self.projected = dict(state["projected"])
        self._renumber()
        self._macs_now = self._predicted_macs()


def _lag(progress: Progress) -> float:
    """How many times smaller than planned the learning rate is, at least 1.

    A plateau scheduler, whose steps nobody can plan, makes it so.
    """
    planned = progress.schedule.learning_rates[progress.step]
    return max(planned / progress.learning_rate, 1.0) if progress.learning_rate > 0 else 1.0
