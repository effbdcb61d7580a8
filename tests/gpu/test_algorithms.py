"""Every algorithm learns on a GPU what it learns on the CPU."""

from __future__ import annotations

import pytest
import torch

from slimcli.compressor import registry
from tests.contract.loop import begin, outputs, train
from tests.contract.networks import NETWORKS, SHAPE, build

EPOCHS = 4
# Float64 sums in another order, through 48 steps of training on small losses.
AGREEMENT = 1e-6

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; here: none"),
]


@pytest.mark.parametrize("network", sorted(NETWORKS))
@pytest.mark.parametrize("name", sorted(registry()))
def test_training_and_deploying_agree_with_the_cpu(name: str, network: str) -> None:
    info = registry()[name]
    found = []
    for device in ("cpu", "cuda"):
        run = begin(info, info.example, build(network), SHAPE, EPOCHS, device)
        train(run, EPOCHS)
        found.append((run.losses[0], outputs(run.compressor.deploy(run.model), run.batches).cpu()))
    (first_cpu, on_cpu), (first_gpu, on_gpu) = found
    assert first_gpu == pytest.approx(first_cpu, rel=1e-9)
    scale = on_cpu.abs().max()
    assert (on_gpu - on_cpu).abs().max() <= AGREEMENT * scale
