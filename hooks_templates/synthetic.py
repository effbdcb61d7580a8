"""The smallest set of hooks: generated images, a plain network, no download.

Change the lines marked # EDIT, then: slim check recipe.yaml --hooks
"""

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset


def build_model():
    """() -> nn.Module. A fresh model, with trained weights if you have some."""
    return nn.Sequential(  # EDIT: your model
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 4),
    )


def bright_quadrants(count, seed):
    """Noise images, (count, 1, 16, 16), with one brighter quadrant; the label says which."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, 16, 16, generator=generator)
    labels = torch.randint(4, (count,), generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = divmod(label, 2)
        image[:, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] += 0.7
    return TensorDataset(images, labels)


def dataset_generator():
    """() -> train_set, validation_set. Datasets or DataLoaders; a third one is the test set."""
    return bright_quadrants(768, seed=1), bright_quadrants(256, seed=2)  # EDIT: your data


def predict_function(model, data):
    """(model, one batch on the device) -> prediction, here (N, 4) logits."""
    images, _ = data  # EDIT: what your batches hold
    return model(images)


def calculate_loss_function(prediction, data):
    """(prediction, batch) -> a tensor with one number."""
    _, labels = data
    return functional.cross_entropy(prediction, labels)


def evaluate_function(prediction, data):
    """(prediction, batch) -> {name: number}, averaged over the validation set by slim."""
    _, labels = data
    return {"acc": (prediction.argmax(1) == labels).float().mean().item()}
