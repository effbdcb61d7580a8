"""Networks whose own hooks read what a norm or a conv gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slimcli.algorithms.resrep.compactor import Compactor, attach
from slimcli.algorithms.resrep.targets import why_not
from slimcli.network.example import Example
from slimcli.network.structure import analyze


class Tapped(nn.Module):
    """Its heads read what hooks wrote down behind two norms."""

    def __init__(self, is_tapped: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 8), (8, 6), (6, 4)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.body, self.head = nn.Sequential(*layers), nn.Conv2d(6, 5, 1)
        self.is_tapped = is_tapped
        self.seen: list[Tensor] = []
        if is_tapped:
            self.body[4].register_forward_hook(self.tap())

    def tap(self) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.seen[:] = [output]

        return hook

    def forward(self, x: Tensor) -> Tensor:
        last = self.body(x).mean((2, 3))
        features = self.seen[0] if self.is_tapped else self.body[:5](x)
        return torch.cat([self.head(features).mean((2, 3)), last], 1)


def test_a_norm_that_a_hook_reads_is_not_folded_and_its_channels_stay() -> None:
    torch.manual_seed(0)
    for is_tapped in (False, True):
        model = Tapped(is_tapped).double().eval()
        batch = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        structure = analyze(model, Example(batch, lambda net, data: net(data)))
        folded = {pair.norm for pair in structure.conv_batch_norms}
        assert ("body.4" in folded) == (not is_tapped)
        assert {"body.1", "body.7"} <= folded
        reason = why_not(model, structure, structure.group("body.4"))
        told = "body.4 can't be folded into body.3: forward hooks read one of them"
        assert reason == (told if is_tapped else "")
        assert why_not(model, structure, structure.group("body.1")) == ""


def test_a_hook_of_the_users_reads_what_the_compactor_gives() -> None:
    seen: list[Tensor] = []
    layer = nn.BatchNorm2d(4).double().eval()
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    compactor = Compactor(4, layer.weight)
    with torch.no_grad():
        compactor.weight[2] = 0
    attach(layer, compactor)
    output = layer(torch.randn(2, 4, 3, 3, dtype=torch.float64))
    assert not output[:, 2].any()
    assert torch.equal(seen[0], output)
