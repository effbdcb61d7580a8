"""C-SGD: filters of a cluster are pulled together until they are identical, then merged.

Paper: Centripetal SGD, arXiv:1904.03837 (CVPR 2019). Authors' code: DingXiaoH/Centripetal-SGD at
c5611530.

Every layer's filters are clustered once. With ``M`` the mean over each cluster, ``G`` the gradient
and ``W`` the filters, SGD steps along ``M G + eta W + eps (W - M W)``: the mean of a cluster trains
as ever, differences inside it fade. When they have gone, one filter of each cluster stays and the
next layer sums the inputs it read from the others, which changes nothing.

Differs from the paper: clusters are found on all kernels of a coupled group, scaled by the norm
behind each (paper: the leader's raw kernels); vectors get the full pull (paper: a tenth, after
which they stay measurably apart); whether filters meet is computed before training; at the merge
their distance is measured, refused above a limit, and set to zero by a projection that takes the
running statistics along; with other optimizers than SGD, whose adaptive steps cancel a pull in the
gradient, the step is taken from the means of the clusters, and distances are put back, contracted,
after it: so they shrink as planned whatever the optimizer does with gradients and weight decay.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from slimcli.algorithms.csgd.budget import LIMIT, STATISTICS_LIMIT
from slimcli.algorithms.csgd.clustering import Clusters
from slimcli.algorithms.csgd.collapse import what_misses
from slimcli.algorithms.csgd.config import ALGORITHM, CSGDConfig
from slimcli.algorithms.csgd.planning import (
    Analysis,
    make_plan,
    statistics_distance,
    tied_slots,
)
from slimcli.algorithms.csgd.ties import (
    Tie,
    centripetal_gradient,
    distance,
    gather_at_means,
    project,
    size_of,
    spread_again,
)
from slimcli.compressor import (
    Compressor,
    GroupDefaults,
    Plan,
    Progress,
    Schedule,
    default_param_groups,
)
from slimcli.errors import GoalError, Problem
from slimcli.network.copying import deep_copy
from slimcli.network.cuts import Cut
from slimcli.network.example import Example
from slimcli.network.fuse import fold_pairs


class CSGDCompressor(Compressor):
    """Ties clusters of channels during training and merges them at the planned epoch."""

    info = ALGORITHM
    config: CSGDConfig

    def plan(self, model: nn.Module, example: Example, schedule: Schedule) -> Plan:
        """Clusters, widths, and whether the filters meet in time.

        Raises:
            RecipeError: ``prune_module_names`` has a name that can't be cut.
        """
        return make_plan(self.config, model, example, schedule)

    def prepare(self, model: nn.Module, example: Example, plan: Plan) -> nn.Module:
        """The model as it is; only names and clusters are taken down."""
        self._analysis: Analysis = plan.private
        self._decay: dict[str, float] = {}
        self._own: list[Tensor] = []
        self._merge_epoch = self._analysis.collapse.epoch
        self._strength = self._analysis.collapse.strength
        self._form = self._analysis.collapse.form
        self._spread = 0.0
        self._slots = {group.name: tied_slots(model, group) for group in self._analysis.groups}
        self._tie(self._analysis.clusters)
        # The spread is relative to the size of a tensor at the start: a cluster whose mean happens
        # to be near zero would otherwise never be close enough.
        self._sizes = [size_of(tie, model.get_parameter(tie.tensor)) for tie in self._ties]
        self._merged = not self._ties
        return model

    def _tie(self, clusters: dict[str, Clusters]) -> None:
        """Makes the ties of all tensors; a group that keeps all its channels needs none."""
        self._clusters = clusters
        self._ties: list[Tie] = []
        self._statistics: list[Tie] = []
        for group in self._analysis.groups:
            own = clusters[group.name]
            if len(own) < group.size:
                for slot, kind in self._slots[group.name]:
                    tie = Tie(slot, own, kind == "vector")
                    (self._statistics if kind == "statistics" else self._ties).append(tie)

    def param_groups(self, model: nn.Module, defaults: GroupDefaults) -> list[dict[str, Any]]:
        """The rule table, but tied tensors get their weight decay from the update rule, once."""
        groups = default_param_groups(model, defaults)
        if self._form != "gradient" or not self._ties:
            return groups
        tied = {tie.tensor for tie in self._ties}
        self._decay = {
            name: group["weight_decay"]
            for group in groups
            for name in group["names"]
            if name in tied and group["weight_decay"]
        }
        return _without_decay(groups, set(self._decay))

    def before_epoch(self, model: nn.Module, progress: Progress) -> list[Cut]:
        """The merge, when its epoch has come."""
        is_time = progress.epoch >= self._merge_epoch
        return self._merge(model) if is_time and not self._merged else []

    def after_backward(self, model: nn.Module, progress: Progress) -> None:
        """Gradients: the mean over each cluster, pull (SGD), weight decay of tied tensors.

        Without the pull in the gradient, tied channels wait at their mean for the step.
        """
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            if not self._merged:
                for tie in self._ties:
                    values = parameters[tie.tensor]
                    if values.grad is not None:
                        pull = self._pull(tie) if self._form == "gradient" else 0.0
                        centripetal_gradient(tie, values.grad, values, pull)
                if self._form != "gradient":
                    self._own = [gather_at_means(tie, parameters[tie.tensor]) for tie in self._ties]
            for name, decay in self._decay.items():
                values = parameters[name]
                if values.grad is not None:
                    values.grad.add_(values, alpha=decay)

    def after_step(self, model: nn.Module, progress: Progress, skipped: bool) -> None:
        """Where the pull is not in the gradient: distances come back, contracted."""
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            # Last in, first out: two ties may hold entries of the same tensor.
            for tie, own in reversed(list(zip(self._ties, self._own, strict=False))):
                values = parameters[tie.tensor]
                if skipped:
                    tie.scatter(values, own)
                else:
                    fraction = min(1.0, progress.learning_rate * self._pull(tie))
                    spread_again(tie, values, own, fraction)
        self._own = []

    def _pull(self, tie: Tie) -> float:
        """Strength of the pull on one tensor."""
        return float(self._strength * (self.config.vector_factor if tie.is_vector else 1.0))

    def finish(self, model: nn.Module, progress: Progress) -> list[Cut]:
        """The merge, if its epoch is the end of the run; a run cut short merges nothing."""
        is_time = progress.epoch + 1 >= self._merge_epoch
        return self._merge(model) if is_time and not self._merged else []

    def _merge(self, model: nn.Module) -> list[Cut]:
        """Measures, projects and cuts.

        Raises:
            GoalError: The filters are too far apart for a merge.
        """
        spread, statistics = self.spreads(model)
        if spread > LIMIT or statistics > STATISTICS_LIMIT:
            raise GoalError(
                Problem(
                    "E-CSGD-SPREAD",
                    "the filters have not met, so merging them would change the model",
                    expected=f"at most {LIMIT:g} of their size apart, their running statistics "
                    f"at most {STATISTICS_LIMIT:g} standard deviations",
                    received=what_misses(spread, statistics, (LIMIT, STATISTICS_LIMIT)),
                    fix="centri_strength: auto, a later prune_epoch, or more epochs",
                )
            )
        self._spread = spread
        with torch.no_grad():
            for tie in self._ties:
                project(tie, model.get_parameter(tie.tensor))
            for tie in self._statistics:
                project(tie, model.get_buffer(tie.tensor))
        self._merged = True
        return [
            group.merge(self._clusters[group.name])
            for group in self._analysis.groups
            if len(self._clusters[group.name]) < group.size
        ]

    def spreads(self, model: nn.Module) -> tuple[float, float]:
        """Largest spread of the parameters, and of the running statistics, over all tensors."""
        parameters = [
            distance(tie, model.get_parameter(tie.tensor), size)
            for tie, size in zip(self._ties, self._sizes, strict=True)
        ]
        statistics = [statistics_distance(model, tie) for tie in self._statistics]
        return max(parameters, default=0.0), max(statistics, default=0.0)

    def may_save(self, model: nn.Module, progress: Progress) -> bool:
        """Only a merged model is as small as the goal says."""
        return self._merged

    def status(self, model: nn.Module) -> dict[str, float]:
        """The spread, which goes to 0; after the merge, what it was when the filters merged."""
        if not self._ties:
            return {}
        if self._merged:
            return {"spread": 0.0, "spread_at_merge": self._spread}
        spread, statistics = self.spreads(model)
        return {"spread": spread, "statistics_spread": statistics}

    def handover(self, model: nn.Module, batches: Iterable[Example]) -> nn.Module:
        """A copy: the model has no module of ours, and every norm is in place."""
        return deep_copy(model)

    def deploy(self, model: nn.Module) -> nn.Module:
        """A copy in eval mode with every norm folded that can be."""
        plain = deep_copy(model).eval()
        pairs = self._analysis.structure.conv_batch_norms
        fold_pairs(plain, [(pair.conv, pair.norm) for pair in pairs])
        return plain

    def state_dict(self) -> dict[str, Any]:
        """Clusters, how they are pulled, and whether they are merged."""
        return {
            "clusters": {
                name: [list(members) for members in clusters]
                for name, clusters in self._clusters.items()
            },
            "merge_epoch": self._merge_epoch,
            "strength": self._strength,
            "form": self._form,
            "sizes": list(self._sizes),
            "merged": self._merged,
            "spread": self._spread,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what :meth:`state_dict` gave."""
        self._tie(
            {
                name: tuple(tuple(members) for members in clusters)
                for name, clusters in state["clusters"].items()
            }
        )
        self._merge_epoch = int(state["merge_epoch"])
        self._strength = float(state["strength"])
        self._sizes = [float(size) for size in state["sizes"]]
        self._form = str(state["form"])
        self._merged = bool(state["merged"])
        self._spread = float(state["spread"])


def _without_decay(groups: list[dict[str, Any]], names: set[str]) -> list[dict[str, Any]]:
    """The same groups, those parameters in groups of their own with weight decay 0."""
    split: list[dict[str, Any]] = []
    for group in groups:
        pairs = list(zip(group["names"], group["params"], strict=True))
        for is_tied in (False, True):
            part = [pair for pair in pairs if (pair[0] in names) is is_tied]
            if part:
                own = {
                    **group,
                    "names": [name for name, _ in part],
                    "params": [parameter for _, parameter in part],
                }
                split.append({**own, "weight_decay": 0.0} if is_tied else own)
    return split
