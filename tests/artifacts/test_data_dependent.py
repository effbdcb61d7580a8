"""Outputs whose shape depends on data are compared where their shape was last known."""

import copy

import pytest
import torch
from torch import nn

from slimcli.artifacts import verify
from slimcli.artifacts.data_dependent import Watch


class Detector(nn.Module):
    """Scores above a threshold, and a dense map beside them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.head = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x):
        h = torch.relu(self.backbone(x))
        scores = self.head(h)[:, 0]
        return {"dense": h, "boxes": h[scores > 0.0] * 2, "picked": h[torch.tensor([0, 1])]}


def call(model, batch):
    return model(batch)


def seam(left, right, batch):
    return verify.compare(verify.runner(left, call), verify.runner(right, call), [batch])


def moved(model, amount):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.head.bias += amount
    return other


def batch_at_the_threshold(model):
    """A batch in which the score of one sample is 1e-6 above the threshold."""
    batch = torch.randn(8, 4)
    with torch.no_grad():
        scores = model.head(torch.relu(model.backbone(batch)))[:, 0]
        model.head.bias -= scores.max() - 1e-6
    return batch


def test_a_flip_at_the_threshold_is_no_difference():
    model = Detector()
    batch = batch_at_the_threshold(model)
    other = moved(model, -1e-5)
    assert model(batch)["boxes"].shape != other(batch)["boxes"].shape
    found = seam(model, other, batch)
    assert found.ok, str(found)
    assert found.max_abs < 1e-4
    assert "not compared, their shape depends on data: boxes (after aten::" in str(found)


def test_a_real_difference_in_front_of_the_mask_is_found():
    model = Detector()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.backbone.bias += 0.1
    found = seam(model, other, torch.randn(8, 4))
    assert not found.ok


def test_a_file_without_an_inside_is_compared_by_what_has_one_shape():
    model = Detector()
    batch = batch_at_the_threshold(model)
    fewer = {k: v.detach() for k, v in moved(model, -1e-5)(batch).items()}
    found = verify.compare(verify.runner(model, call), lambda b: fewer, [batch])
    assert found.ok
    assert "boxes" in found.notes[0]
    fewer["dense"] = fewer["dense"] + 1
    assert not verify.compare(verify.runner(model, call), lambda b: fewer, [batch]).ok


def test_picking_by_number_keeps_the_shape():
    with Watch() as seen, torch.no_grad():
        picked = torch.arange(4.0)[torch.tensor([0, 2])]
    assert (seen.operators, seen.is_behind([picked])) == ([], False)


def test_nms_is_known():
    torchvision = pytest.importorskip("torchvision")
    boxes = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1.01], [5, 5, 6, 6]])
    with Watch() as seen:
        kept = torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5)
        result = boxes[kept]
    assert seen.operators == ["torchvision::nms"]
    assert seen.is_behind([result])
    assert len(seen.inputs) == 3  # boxes, scores, and the boxes again where some are picked


def test_ops_that_torch_tags_are_known():
    with Watch() as seen:
        where = torch.nonzero(torch.tensor([0.0, 1.0]))
    assert seen.operators == ["aten::nonzero"]
    assert seen.is_behind([where])


class Proposals(nn.Module):
    """As a region proposal network: the best by score, then those that are large enough."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.sizes, self.score = nn.Linear(4, 2), nn.Linear(4, 1)

    def forward(self, x):
        best = self.score(x)[:, 0].topk(6).indices
        sizes = self.sizes(x)[best]
        return sizes[((sizes[:, 0] > 0) & (sizes[:, 1] > -9)).nonzero()[:, 0]]


def tied_batch():
    """Two samples with nearly one score and quite different sizes."""
    model, batch = Proposals(), torch.randn(8, 4)
    with torch.no_grad():
        model.score.weight.copy_(torch.tensor([[1.0, 0, 0, 0]]))
        model.sizes.bias += 3
    batch[:2, 0] = torch.tensor([2.0, 2.0 + 1e-6])
    return model, batch


def test_a_model_that_gives_the_same_boxes_is_compared_by_its_boxes():
    model, batch = tied_batch()
    found = seam(model, copy.deepcopy(model), batch)
    assert (found.ok, found.max_abs, found.notes) == (True, 0.0, ())


def test_two_nearly_equal_scores_that_change_places_are_no_difference():
    model, batch = tied_batch()
    other = copy.deepcopy(model)
    swapped = batch.clone()
    swapped[:2, 0] = torch.tensor([2.0 + 1e-6, 2.0])
    with torch.no_grad():
        assert not torch.allclose(model(batch), other(swapped), atol=0.1)
    found = verify.compare(lambda b: call(model, b), lambda b: call(other, swapped), [batch])
    assert found.ok, str(found)
    assert found.max_abs < 1e-5
    assert "not compared" in str(found)


def test_a_difference_in_what_is_ordered_or_masked_is_found():
    model, batch = tied_batch()
    for name in ("score", "sizes"):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.get_submodule(name).weight[0] *= -1.5
        assert not seam(model, other, batch).ok, name
