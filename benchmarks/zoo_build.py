"""The networks of the zoo: their names, and each with random weights and a small input."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
import zoo_measure

TIMM_LIST = Path(__file__).parent / "zoo_timm.txt"
# Measured last: each takes minutes.
LARGE = (
    "_base",
    "_large",
    "_b",
    "_l_",
    "_h_",
    "_v2_l",
    "_v2_m",
    "152",
    "101",
    "gf",
    "vgg",
    "3d",
    "rcnn",
    "mvit",
    "r2plus1d",
    "mc3",
)

ROI_KINDS = ("box", "mask", "keypoint")


def names() -> list[str]:
    """``torchvision/NAME`` and ``timm/NAME``; the large ones last."""
    unwanted = ("quantized_", "raft_")
    vision = [n for n in torchvision.models.list_models() if not n.startswith(unwanted)]
    chosen = [line.split()[0] for line in TIMM_LIST.read_text().splitlines() if line.strip()]
    small = [n for n in vision if not any(word in n for word in LARGE)]
    large = [n for n in vision if n not in small]
    vision = [f"torchvision/{n}" for n in small]
    return [*vision, *(f"timm/{n}" for n in chosen), *(f"torchvision/{n}" for n in large)]


def build(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> zoo_measure.Case:
    """A randomly initialised network with a small input; the largest in float32."""
    warnings.filterwarnings("ignore")
    torch.manual_seed(seed)
    source, short = name.split("/", 1)
    model, batch = (build_torchvision if source == "torchvision" else build_timm)(short)
    if zoo_measure.count(model) > zoo_measure.LARGE:
        dtype = torch.float32
    model = model.to(dtype)
    batch = [each.to(dtype) for each in batch] if isinstance(batch, list) else batch.to(dtype)
    zoo_measure.jitter(model, seed)
    is_detector = hasattr(model, "anchor_generator") or hasattr(model, "rpn")
    predict = dense_predictions if is_detector else predictions
    return zoo_measure.Case(model.eval(), batch, predict, zoo_measure.TOLERANCES[dtype])


def predictions(net: torch.nn.Module, data: Any) -> Any:
    """What the network returns."""
    return net(data)


def dense_predictions(net: torch.nn.Module, data: Any) -> Any:
    """What a detector's heads say of all their boxes.

    Which of them survive jumps, or none does: random weights give hundreds of boxes equal scores
    and overlaps, and rounding alone decides their order.
    """
    seen: list[Any] = []
    paths = ("head", "rpn.head", *(f"roi_heads.{kind}_predictor" for kind in ROI_KINDS))
    heads = [module for path, module in net.named_modules() if path in paths]
    handles = [
        head.register_forward_hook(lambda module, inputs, output: seen.append(output))
        for head in heads
    ]
    try:
        net(data)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def build_torchvision(name: str) -> tuple[Any, Any]:
    """Model and batch, by the task that the name's builder belongs to."""
    builder = torchvision.models.get_model_builder(name)
    task = builder.__module__
    keywords: dict[str, Any] = {"weights": None}
    if "detection" in task or "segmentation" in task:
        keywords["weights_backbone"] = None
    if "detection" in task and not name.startswith("ssd"):
        keywords |= {"min_size": 160, "max_size": 256}  # they enlarge their images to 800 otherwise
    if name in ("googlenet", "inception_v3"):
        keywords["init_weights"] = False
    model = builder(**keywords)
    if "detection" in task:
        return model, [torch.rand(3, 96, 96), torch.rand(3, 96, 96)]
    if ".video" in task:
        frames = 16 if "mvit" in name or "s3d" in name else 4
        side = 224 if "mvit" in name or name == "s3d" else 64
        return model, torch.rand(2, 3, frames, side, side)
    sides = {"inception_v3": 299, "maxvit_t": 224, "alexnet": 96, "vit_h_14": 224}
    # inception_v3: its auxiliary head, which runs in training only, needs an image of full size
    side = sides.get(name, 224 if name.startswith("vit_") else 64)
    return model, torch.rand(2, 3, side, side)


def build_timm(name: str) -> tuple[Any, Any]:
    """Model and batch; the network's own input size where smaller ones are refused."""
    channels, *sides = timm.create_model(name).pretrained_cfg["input_size"]
    for side in (64, 128, *sides):
        model = timm.create_model(name)
        batch = torch.rand(2, channels, side, side)
        try:
            with torch.no_grad():
                model.eval()(batch)
        except Exception:
            continue
        return model, batch
    return model, batch
