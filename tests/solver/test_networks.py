"""Models as users bring them: lazy, compiled, not copyable; and optimizers that need more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import slimcli
from slimcli.artifacts import checkpoint
from slimcli.errors import HookError
from slimcli.solver.stages import run
from tests.solver import toys


def test_a_lazy_model_that_was_never_called_is_told_before_anything_starts(tmp_path: Path) -> None:
    def lazy() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.LazyLinear(3))

    with pytest.raises(HookError, match="lazy modules") as caught:
        run(toys.with_hooks(toys.job(tmp_path), build_model=lazy))
    assert "1.weight, 1.bias" in str(caught.value)

    def called() -> nn.Module:
        model = lazy()
        model(torch.zeros(2, 1, 6, 6))
        return model

    assert run(toys.with_hooks(toys.job(tmp_path), build_model=called)).folder.exists()


def resrep_weights(folder: Path, build: Any) -> dict[str, torch.Tensor]:
    """What ResRep trains from ``build``'s model, by names without wrappers."""
    config = {
        "epoch": 6,
        "lr": 0.05,
        "batch_size": 8,
        "devices": "cpu",
        "warmup_epoch": 1,
        "lasso_decay": "auto",
        "prune_rate": 0.2,
        "prune_groups": 2,
        "groups_size": 1,
        "min_channels": 2,
        "auto_find_module_strategy": "all_bn",
        "save_dir": str(folder),
        "export": {"onnx": False},
        "dataset_generator": toys.datasets,
        "predict_function": toys.predict,
        "calculate_loss_function": toys.loss,
        "evaluate_function": toys.accuracy,
    }
    done = slimcli.ResRepSolver(build, config).run()
    state = checkpoint.load(done.folder / "checkpoints" / "last.pt")["model"]
    return {name.removeprefix("_orig_mod."): value for name, value in state.items()}


def test_a_compiled_model_trains_with_its_compactors_as_the_plain_one_does(tmp_path: Path) -> None:
    """Without dropout, whose random numbers a compiled model draws in another order."""

    def plain() -> nn.Module:
        model = toys.Net()
        model.drop = nn.Identity()
        return model

    def compiled() -> Any:
        return torch.compile(plain(), backend="eager")

    expected = resrep_weights(tmp_path / "plain", plain)
    found = resrep_weights(tmp_path / "compiled", compiled)
    assert found.keys() == expected.keys()
    # The same operators run, so that not even rounding may differ.
    for name, value in expected.items():
        assert torch.allclose(found[name].float(), value.float(), atol=1e-6), name
