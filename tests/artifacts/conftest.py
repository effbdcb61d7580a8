"""One exported file for many tests: an export costs seconds."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from slimcli.artifacts import onnx
from slimcli.network.example import Example


class Rich(nn.Module):
    """Two inputs, one of them by keyword, a constant argument, nested outputs of three kinds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.fc = nn.Linear(8, 5)

    def forward(self, image, mask=None, scale=1.0):
        h = torch.relu(self.bn1(self.conv1(image)))
        h = self.block(h) + h
        h = (h * mask["pixels"][:, None]).mean((2, 3)) * scale
        logits = self.fc(h)
        return {"logits": logits, "pair": (h, mask["ids"] + 1), "same": h, "none": None}


def rich_predict(model, batch):
    return model(batch["image"], mask=batch["mask"], scale=2.0)


def rich_batch(samples: int, seed: int = 0):
    torch.manual_seed(seed)
    mask = {"pixels": torch.rand(samples, 6, 6), "ids": torch.arange(samples)}
    return {"image": torch.randn(samples, 3, 6, 6), "mask": mask}


@pytest.fixture(scope="session")
def rich(tmp_path_factory):
    model = Rich()
    model(rich_batch(8)["image"], rich_batch(8)["mask"])  # moves the statistics of the norm
    folder = tmp_path_factory.mktemp("rich")
    state = {name: each.clone() for name, each in model.state_dict().items()}
    example = Example(rich_batch(5), rich_predict)
    report = onnx.export(model, example, folder / "model.onnx", metadata={"recipe": "abc"})
    return SimpleNamespace(model=model, report=report, folder=folder, state=state)


@pytest.fixture(scope="session")
def quantized_file(tmp_path_factory):
    from .quantized import QuantizedNet

    path = tmp_path_factory.mktemp("quantized") / "model.onnx"
    torch.manual_seed(0)
    onnx.export(
        QuantizedNet(channels=True), Example(torch.randn(4, 3, 8, 8), lambda m, b: m(b)), path
    )
    return path
