"""Hooks of a detection task: one object an image, batches that are dictionaries.

Change the lines marked # EDIT, then: slim check recipe.yaml --hooks
"""

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset

CLASSES = 2
SIZE = 32


class SmallDetector(nn.Module):
    """A backbone and two heads: where the object is, and what it is."""

    def __init__(self, width=16):
        super().__init__()
        layers = []
        for inputs, outputs in ((1, width), (width, 2 * width), (2 * width, 2 * width)):
            layers += [
                nn.Conv2d(inputs, outputs, 3, padding=1, stride=2, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            ]
        self.backbone = nn.Sequential(*layers, nn.Flatten())
        self.box = nn.Linear(2 * width * 16, 4)
        self.label = nn.Linear(2 * width * 16, CLASSES)

    def forward(self, x):  # (N, 1, 32, 32)
        features = self.backbone(x)
        return self.box(features).sigmoid(), self.label(features)  # (N, 4), (N, CLASSES)


class Shapes(Dataset):
    """Noisy images with a full (0) or a hollow (1) rectangle."""

    def __init__(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        self.images = 0.3 * torch.randn(count, 1, SIZE, SIZE, generator=generator)
        corners = torch.randint(0, SIZE // 2, (count, 2), generator=generator)
        sizes = torch.randint(8, SIZE // 2, (count, 2), generator=generator)
        self.labels = torch.randint(CLASSES, (count,), generator=generator)
        self.boxes = torch.cat([corners, corners + sizes], 1)
        for image, box, label in zip(
            self.images[:, 0], self.boxes.tolist(), self.labels.tolist(), strict=True
        ):
            top, left, bottom, right = box
            image[top:bottom, left:right] += 1.5
            if label:
                image[top + 2 : bottom - 2, left + 2 : right - 2] -= 1.5

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        box = self.boxes[index] / SIZE
        return {"image": self.images[index], "box": box, "label": self.labels[index]}


def build_model():
    """() -> nn.Module. A fresh model, with trained weights if you have some."""
    return SmallDetector()  # EDIT: your model


def dataset_generator():
    """() -> train_set, validation_set. Datasets or DataLoaders; a third one is the test set."""
    return Shapes(512, seed=1), Shapes(128, seed=2)  # EDIT: your data


def predict_function(model, data):
    """(model, one batch on the device) -> prediction, here (N, 4) boxes and (N, CLASSES) logits."""
    return model(data["image"])  # EDIT: what your batches hold


def calculate_loss_function(prediction, data):
    """(prediction, batch) -> a tensor with one number."""
    boxes, logits = prediction
    return 5 * functional.l1_loss(boxes, data["box"]) + functional.cross_entropy(
        logits, data["label"]
    )


def evaluate_function(prediction, data):
    """(prediction, batch) -> {name: number}, averaged over the validation set by slim."""
    boxes, logits = prediction
    start = torch.maximum(boxes[:, :2], data["box"][:, :2])
    end = torch.minimum(boxes[:, 2:], data["box"][:, 2:])
    common = (end - start).clamp(min=0).prod(1)
    area = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)
    truth = (data["box"][:, 2:] - data["box"][:, :2]).prod(1)
    return {
        "iou": (common / (area + truth - common)).mean().item(),
        "acc": (logits.argmax(1) == data["label"]).float().mean().item(),
    }
