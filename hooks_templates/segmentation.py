"""Hooks of a segmentation task: a small U-shaped network on generated images.

Change the lines marked # EDIT, then: slim check recipe.yaml --hooks
"""

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

CLASSES = 3


def convolution(inputs, outputs):
    """Convolution, normalisation, activation."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class SmallUNet(nn.Module):
    """One step down, one step up, one bridge."""

    def __init__(self, width=16):
        super().__init__()
        self.enter = convolution(1, width)
        self.down = convolution(width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.merge = convolution(2 * width, width)
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, x):  # (N, 1, 32, 32)
        high = self.enter(x)
        low = self.down(functional.max_pool2d(high, 2))
        return self.head(self.merge(torch.cat([high, self.up(low)], 1)))  # (N, CLASSES, 32, 32)


def squares_and_bars(count, seed):
    """Noisy images, (count, 1, 32, 32), and masks: 0 background, 1 a square, 2 a bar."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.5 * torch.randn(count, 1, 32, 32, generator=generator)
    masks = torch.zeros(count, 32, 32, dtype=torch.long)
    places = torch.randint(0, 16, (count, 4), generator=generator).tolist()
    for image, mask, (top, left, row, column) in zip(images, masks, places, strict=True):
        mask[top : top + 12, left : left + 12] = 1
        mask[row : row + 16, column : column + 3] = 2
        image[0] += mask
    return TensorDataset(images, masks)


def build_model():
    """() -> nn.Module. A fresh model, with trained weights if you have some."""
    return SmallUNet()  # EDIT: your model


def dataset_generator():
    """() -> train_set, validation_set. Datasets or DataLoaders; a third one is the test set."""
    return squares_and_bars(384, seed=1), squares_and_bars(128, seed=2)  # EDIT: your data


def predict_function(model, data):
    """(model, one batch on the device) -> prediction, here (N, CLASSES, H, W) logits."""
    images, _ = data  # EDIT: what your batches hold
    return model(images)


def calculate_loss_function(prediction, data):
    """(prediction, batch) -> a tensor with one number."""
    _, masks = data
    return functional.cross_entropy(prediction, masks)


class MeanIoU:
    """Intersection over union, averaged over classes: no average over batches, so it counts."""

    def __init__(self):
        self.counts = torch.zeros(CLASSES, CLASSES, dtype=torch.long)

    def update(self, prediction, data):
        """Called for every validation batch."""
        _, masks = data
        pairs = (masks * CLASSES + prediction.argmax(1)).flatten().cpu()
        self.counts += torch.bincount(pairs, minlength=CLASSES**2).view(CLASSES, CLASSES)

    def compute(self):
        """Called once behind the last batch."""
        hits = self.counts.diag().double()
        union = (self.counts.sum(0) + self.counts.sum(1)).double() - hits
        return {"miou": (hits / union.clamp(min=1)).mean().item()}

    def reset(self):
        """Called before the first batch."""
        self.counts.zero_()


evaluate_function = MeanIoU()
