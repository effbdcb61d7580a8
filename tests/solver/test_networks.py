"""Models as users bring them: lazy, compiled, not copyable; and optimizers that need more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimcli
from slimcli.algorithms.qat.config import QATConfig
from slimcli.algorithms.qat.method import QATCompressor
from slimcli.artifacts import checkpoint
from slimcli.artifacts.event_lines import line_of
from slimcli.errors import HookError
from slimcli.solver.job import Export
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


def test_layers_registered_twice_are_folded_and_loaded_again(tmp_path: Path) -> None:
    class Twice(toys.Net):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(self.conv1, self.bn1)

    done = run(toys.with_hooks(toys.job(tmp_path, epoch=1), build_model=Twice))
    assert all(each["ok"] for each in done.summary["verification"])
    loaded = slimcli.load_deploy(done.folder, model=Twice())
    assert type(loaded.bn1) is type(loaded.stem[1]) is nn.Identity


def test_a_model_that_cannot_be_copied_is_told_before_anything_starts(tmp_path: Path) -> None:
    class Remembering(toys.Net):
        def __init__(self) -> None:
            super().__init__()
            self.scaled = self.fc.weight * 2  # a tensor with a history, as nn.utils.weight_norm's

    with pytest.raises(HookError, match="can't be copied") as caught:
        run(toys.with_hooks(toys.job(tmp_path), build_model=Remembering))
    assert "parametrizations.weight_norm" in str(caught.value)


def test_an_optimizer_that_needs_a_closure_is_refused(tmp_path: Path) -> None:
    def lbfgs(config: Any, params: Any) -> torch.optim.Optimizer:
        return torch.optim.LBFGS([each for group in params for each in group["params"]])

    with pytest.raises(HookError, match="needs no closure"):
        run(toys.with_hooks(toys.job(tmp_path), optimizer_generator=lbfgs))


def test_a_file_of_fixed_batch_size_is_made_for_batches_of_validation(tmp_path: Path) -> None:
    """As detectors: a list of images, whose length is part of the file."""

    class OfLists(toys.Net):
        def forward(self, x: list[Tensor], targets: Any = None) -> Tensor:
            return super().forward(torch.stack(x))

    def predict(model: nn.Module, data: Any) -> Tensor:
        # In train mode a detector is given the targets, too.
        images = list(data[0])
        return model(images, data[1]) if model.training else model(images)

    one = toys.job(tmp_path, epoch=1, test_batch_size=6)
    hooks = {"build_model": OfLists, "predict_function": predict}
    done = run(replace(toys.with_hooks(one, **hooks), export=Export(onnx=True)))
    seams = {(each["from"], each["to"]): each["ok"] for each in done.summary["verification"]}
    assert seams[("deploy", "onnx")]
    assert any("fixed batch size" in note for note in done.summary["notes"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_are_refused_before_training(tmp_path: Path, dtype: Any) -> None:
    with pytest.raises(HookError, match="half precision") as caught:
        run(toys.with_hooks(toys.job(tmp_path), build_model=lambda: toys.Net().to(dtype)))
    assert "bf16-mixed" in str(caught.value)


def test_float64_convolutions_are_refused_before_training_where_onnx_is_asked(
    tmp_path: Path,
) -> None:
    one = toys.with_hooks(toys.job(tmp_path), build_model=lambda: toys.Net().double())
    with pytest.raises(HookError, match="received float64 in conv1") as caught:
        run(replace(one, export=Export(onnx=True)))
    assert "onnx: false" in str(caught.value)


def test_float64_linear_layers_are_refused_only_where_the_algorithm_makes_its_own_onnx(
    tmp_path: Path,
) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).double()

    def predict(model: nn.Module, data: Any) -> Any:
        return model(data[0].double())

    one = toys.with_hooks(toys.job(tmp_path, epoch=1), build_model=build, predict_function=predict)
    stage = replace(one.stages[0], algorithm="qat", compressor=QATCompressor, config=QATConfig())
    quantized, asked = replace(one, stages=(stage,)), Export(onnx=True)
    with pytest.raises(HookError, match=r"operators that qat writes .* take float32") as caught:
        run(replace(quantized, export=asked))
    assert "received float64 in 1.weight" in str(caught.value)
    assert not list(tmp_path.rglob("*.pt"))
    assert run(quantized).summary["final"]["file_bytes"] == {}
    plain = run(replace(one, export=asked)).summary["final"]["file_bytes"]
    assert plain["model.onnx"] > 0


def test_norms_behind_convs_of_one_tied_weight_stay(tmp_path: Path) -> None:
    class Tied(toys.Net):
        def __init__(self) -> None:
            super().__init__()
            self.again, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
            self.third, self.last = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
            self.third.weight = self.again.weight

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
            x = self.last(self.third(torch.relu(self.norm(self.again(x)))))
            return self.fc(x.mean((2, 3)))

    done = run(toys.with_hooks(toys.job(tmp_path, epoch=1), build_model=Tied))
    assert all(each["ok"] for each in done.summary["verification"])
    loaded = slimcli.load_deploy(done.folder, model=Tied())
    assert loaded.third.weight is loaded.again.weight
    kinds = [type(each).__name__ for each in (loaded.bn2, loaded.norm, loaded.last)]
    assert kinds == ["Identity", "BatchNorm2d", "BatchNorm2d"]


def test_a_seam_without_a_number_is_told_in_words() -> None:
    """Detections that can't be compared have no difference; printing them ended in a traceback."""
    event = {"event": "verified", "from": "trained", "to": "deploy", "max_abs": None}
    line = line_of({**event, "max_rel": None, "limit": 1e-4, "ok": False})
    assert line == "trained and deploy DIFFER: max difference not a number (limit 1.0e-04)"
