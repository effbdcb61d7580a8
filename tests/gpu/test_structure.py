"""What a network's structure is does not depend on where it runs."""

from __future__ import annotations

import pytest
import torch

from slimcli.network.copying import deep_copy
from slimcli.network.example import Example
from slimcli.network.structure import analyze
from tests.network import structures
from tests.network.proving import network

DEVICE = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; here: none"),
]


@pytest.mark.parametrize("name", sorted(structures.NETWORKS))
def test_a_network_on_a_gpu_has_the_groups_it_has_on_the_cpu(name: str) -> None:
    model, example, structure = network(name)
    batch = example.batch
    is_dict = isinstance(batch, dict)
    moved = {k: v.to(DEVICE) for k, v in batch.items()} if is_dict else batch.to(DEVICE)
    found = analyze(deep_copy(model).to(DEVICE), Example(moved, example.predict))
    assert found.groups == structure.groups
    assert found.macs == structure.macs
