"""Hooks for scikit-learn's handwritten digits: 1,797 images of 8 x 8 pixels, part of the package.

Half of the images train, shifted by up to one pixel at random; the other half (899) validate.
Nothing is downloaded.
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import Dataset, TensorDataset


class Shifted(Dataset):
    """Training images, each time moved by at most one pixel up or down and left or right."""

    def __init__(self, images, labels):
        self.images = nn.functional.pad(images, (1, 1, 1, 1))
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        top, left = torch.randint(3, (2,)).tolist()
        return self.images[index, :, top : top + 8, left : left + 8], self.labels[index]


class Block(nn.Module):
    """The basic block of ResNet: two 3x3 convs and a shortcut."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitResNet(nn.Module):
    """A ResNet with three stages, for 8 x 8 images."""

    def __init__(self, widths=(16, 32, 64), blocks=1, classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(1, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        stages, inputs = [], widths[0]
        for index, outputs in enumerate(widths):
            for position in range(blocks):
                stride = 2 if index > 0 and position == 0 else 1
                stages.append(Block(inputs, outputs, stride))
                inputs = outputs
        self.blocks = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x):
        x = self.blocks(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.pool(x).flatten(1))


def build_model(widths=(16, 32, 64), blocks=1):
    return DigitResNet(widths, blocks)


def dataset_generator():
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train, validation = train_test_split(
        range(len(labels)), test_size=0.5, random_state=0, stratify=digits.target
    )
    return (
        Shifted(images[train], labels[train]),
        TensorDataset(images[validation], labels[validation]),
    )


def predict_function(model, data):
    images, _ = data
    return model(images)


def calculate_loss_function(prediction, data):
    _, labels = data
    return nn.functional.cross_entropy(prediction, labels)


def evaluate_function(prediction, data):
    _, labels = data
    return {"acc": (prediction.argmax(1) == labels).float().mean().item()}
