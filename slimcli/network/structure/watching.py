"""What hooks note while a trial runs a model."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from slimcli.network.structure.producing import MIXING
from slimcli.network.structure.structure import Group


@dataclass
class Log:
    """What hooks note during a run.

    Attributes:
        entered: Path of the module entered last.
        calls: Mixing modules that have run.
        limit: Outputs are kept of this many of them at most.
        whole: Paths of layers that aren't cut: their outputs are kept.
        drew: Random numbers were drawn.
    """

    entered: str = ""
    calls: int = 0
    limit: int = 0
    whole: frozenset[str] = frozenset()
    outputs: list[Tensor] = field(default_factory=list)
    drew: bool = False


def uncut_layers(groups: Iterable[Group], layers: Iterable[str]) -> frozenset[str]:
    """Paths of those layers of which a cut of these groups takes nothing."""
    cut = {slot.tensor for group in groups for slot in group.producers + group.followers}
    touched = {name.rpartition(".")[0] for name in cut}
    return frozenset(
        path
        for path in (name.removeprefix("tensor:") for name in layers)
        if path not in touched and not any(each.startswith(f"{path}.") for each in touched)
    )


@contextlib.contextmanager
def watched(model: nn.Module, log: Log) -> Iterator[None]:
    """Notes which module was entered last, and keeps the outputs of layers that are not cut.

    Two hooks for all modules of the process: a hook on each would be copied with each module.
    """
    paths = {id(module): path for path, module in model.named_modules()}

    def enter(module: nn.Module, inputs: Any) -> None:
        log.entered = paths.get(id(module), log.entered)

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(module, MIXING) and id(module) in paths:
            log.calls += 1
            if log.calls <= log.limit and paths[id(module)] in log.whole:
                log.outputs.append(output)

    handles = register_module_forward_pre_hook(enter), register_module_forward_hook(leave)
    try:
        with warnings.catch_warnings():  # what torch says of hooks like these on compiled models
            warnings.filterwarnings("ignore", message="Using `torch.compile")
            yield
    finally:
        for handle in handles:
            handle.remove()
