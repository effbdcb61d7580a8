"""QAT on real data: handwritten digits, float against int8 in torch and in onnxruntime."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch

from slimcli.algorithms.qat.config import QATConfig
from slimcli.algorithms.qat.method import QATCompressor
from slimcli.artifacts.onnx import OnnxModel, compare, export
from slimcli.compressor import GroupDefaults, Progress, Schedule
from slimcli.network.example import Example

RECIPES = Path(__file__).parents[2] / "recipes"
# One digit more or less is 0.11 % of 899 test images; five of them is what QAT may cost.
MORE_ERRORS = 5
BATCH = 32


def hooks():
    spec = importlib.util.spec_from_file_location("digits", RECIPES / "digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(model, compressor, digits, data, epochs, lr):
    images, labels = data
    steps = len(images) // BATCH
    schedule = Schedule(epochs, steps, (lr,) * (epochs * steps))
    groups = compressor.param_groups(model, GroupDefaults(lr=lr))
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=1e-4)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        progress = Progress(epoch, epoch * steps, lr, schedule)
        compressor.before_epoch(model, progress)
        model.train()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        for chosen in order[: steps * BATCH].split(BATCH):
            batch = (images[chosen], labels[chosen])
            optimizer.zero_grad()
            loss = digits.calculate_loss_function(digits.predict_function(model, batch), batch)
            loss.backward()
            compressor.after_backward(model, progress)
            optimizer.step()
            compressor.after_step(model, progress, False)
        falling.step()
    return model.eval()


def errors(model, digits, data):
    with torch.no_grad():
        predicted = digits.predict_function(model, data).argmax(1)
    return int((predicted != data[1]).sum())


@pytest.fixture(scope="module")
def trained():
    """A float network, its hooks, the training and the validation data."""
    digits = hooks()
    torch.manual_seed(0)
    train_set, validation = (
        tuple(torch.stack(column) for column in zip(*each, strict=True))
        for each in digits.dataset_generator()
    )
    skipped = QATCompressor(QATConfig(skip=("*",)))
    model = train(digits.build_model(), skipped, digits, train_set, 10, 0.05)
    return digits, model, train_set, validation


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        {"weight_granularity": "tensor"},
        {"weight_granularity": "channel"},
        {"weight_granularity": "channel", "scale": "lsq", "calibration": "mse"},
        {"scale": "ema", "calibration": "percentile", "freeze_scale_epoch": 1},
    ],
    ids=lambda keys: "-".join(str(value) for value in keys.values()),
)
def test_int8_costs_at_most_five_digits_of_899(trained, keys, tmp_path):
    digits, float_model, train_set, validation = trained
    assert len(validation[1]) == 899
    before = errors(float_model, digits, validation)
    assert before <= 30
    compressor = QATCompressor(QATConfig(freeze_bn_epoch=1, **keys))
    batches = [
        Example((images, labels), digits.predict_function)
        for images, labels in zip(*(each.split(BATCH) for each in train_set), strict=True)
    ]
    model = copy.deepcopy(float_model)
    plan = compressor.plan(model, batches[0], Schedule(2, 28, (0.005,) * 56))
    model = compressor.prepare(model, batches[0], plan)
    compressor.calibrate(model, batches)
    train(model, compressor, digits, train_set, 2, 0.005)
    assert errors(model, digits, validation) <= before + MORE_ERRORS
    deployed = compressor.deploy(model)
    report = export(deployed, batches[0], tmp_path / "model.onnx")
    assert report.codes.agreement >= 0.999
    assert report.codes.distance <= 1
    assert errors(OnnxModel(report.path), digits, validation) <= before + MORE_ERRORS
    parts = zip(*(each.split(100) for each in validation), strict=True)
    assert compare(deployed, report.path, digits.predict_function, parts).ok
