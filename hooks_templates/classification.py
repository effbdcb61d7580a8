"""Hooks of a classification task: a small residual network on generated images.

Change the lines marked # EDIT, then: slim check recipe.yaml --hooks
"""

import math

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset

CLASSES = 4


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        inner = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(x + self.bn2(self.conv2(inner)))


class SmallResNet(nn.Module):
    """A stem, two blocks, one linear layer."""

    def __init__(self, width=16):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(Block(width), nn.MaxPool2d(2), Block(width))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):  # (N, 3, 32, 32)
        x = functional.relu(self.bn(self.stem(x)))
        return self.head(self.blocks(x).mean((2, 3)))  # (N, CLASSES)


class Stripes(Dataset):
    """Noisy images, (3, 32, 32), with stripes in one of four directions; the label is which."""

    def __init__(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(CLASSES, (count,), generator=generator)
        angle = (self.labels * math.pi / CLASSES).view(-1, 1, 1)
        rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
        phase = 2 * math.pi * torch.rand(count, 1, 1, generator=generator)
        waves = torch.sin(0.8 * (rows * angle.cos() + columns * angle.sin()) + phase)
        noise = torch.randn(count, 3, 32, 32, generator=generator)
        self.images = waves.unsqueeze(1) + noise

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.images[index], self.labels[index]


def build_model():
    """() -> nn.Module. A fresh model, with trained weights if you have some."""
    return SmallResNet()  # EDIT: torchvision.models.resnet18(weights="DEFAULT"), say


def dataset_generator():
    """() -> train_set, validation_set. Datasets or DataLoaders; a third one is the test set."""
    return Stripes(768, seed=1), Stripes(256, seed=2)  # EDIT: torchvision.datasets.ImageFolder(...)


def predict_function(model, data):
    """(model, one batch on the device) -> prediction, here (N, CLASSES) logits."""
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
