"""What a training step costs with each block of `acnet` and with `csgd`, against the plain step.

    python benchmarks/step_cost.py            # about ten minutes on one core

Steps of the plain and of the compressed model alternate; each pair gives one ratio of CPU time.
Writes step_cost.json and step_cost.md beside itself.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torchvision
from torch import Tensor, nn

from slimcli.compressor import Compressor, GroupDefaults, Progress, Schedule, registry
from slimcli.network.example import Example

CASES: dict[str, tuple[str, dict[str, object], float | None]] = {
    "acnet_cr": ("acnet", {"acnet_type": "acnet_cr"}, 1.8),
    "merged": ("acnet", {"acnet_type": "merged"}, 1.25),
    "acb_corner": ("acnet", {"acnet_type": "acb_corner"}, None),
    "cnc": ("acnet", {"acnet_type": "cnc"}, None),
    "dbb": ("acnet", {"acnet_type": "dbb"}, None),
    "csgd": ("csgd", {"cluster_percent": 0.5, "centri_strength": "auto"}, 1.05),
}
"""Name -> algorithm, its keys, and the largest ratio that is wanted."""
BATCH = 64


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet20(nn.Module):
    """The CIFAR network: three stages of three basic blocks, 16, 32 and 64 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16))
        blocks, inputs = [], 16
        for outputs in (16, 32, 64):
            for position in range(3):
                stride = 2 if outputs != 16 and position == 0 else 1
                blocks.append(BasicBlock(inputs, outputs, stride))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet20 32x32": (ResNet20, 32),
    "resnet18 64x64": (lambda: torchvision.models.resnet18(num_classes=10), 64),
}


class Trainer:
    """One model with its optimizer; a call is one step."""

    def __init__(self, model: nn.Module, compressor: Compressor, batch: tuple[Tensor, Tensor]):
        self.schedule = Schedule(100, 1000, (0.05,) * 100_000)
        example = Example(batch, lambda net, data: net(data[0]))
        plan = compressor.plan(model, example, self.schedule)
        assert not plan.refusals, plan.refusals
        self.model = compressor.prepare(model, example, plan).train()
        self.compressor, self.batch = compressor, batch
        groups = compressor.param_groups(self.model, GroupDefaults(lr=0.05))
        self.optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)

    def __call__(self) -> float:
        """CPU seconds of one step, all threads."""
        progress = Progress(0, 0, 0.05, self.schedule)
        begin = time.process_time()
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(self.batch[0]), self.batch[1]).backward()
        self.compressor.after_backward(self.model, progress)
        self.optimizer.step()
        self.compressor.after_step(self.model, progress, False)
        return time.process_time() - begin

    def activation_bytes(self) -> int:
        """Bytes that a step keeps for its backward pass, parameters not counted."""
        own = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = nn.functional.cross_entropy(self.model(self.batch[0]), self.batch[1])
            total = sum(kept.values())
            loss.backward()
        return total


def interval(ratios: list[float]) -> tuple[float, float]:
    """A 95 % bootstrap interval of the median."""
    source = random.Random(0)
    medians = sorted(statistics.median(source.choices(ratios, k=len(ratios))) for _ in range(2000))
    return medians[49], medians[1949]


def measure(network: str, case: str, pairs: int) -> dict[str, object]:
    """Pairs of steps, alternating."""
    build, size = NETWORKS[network]
    torch.manual_seed(0)
    base = build()
    batch = (torch.randn(BATCH, 3, size, size), torch.randint(10, (BATCH,)))
    algorithms = registry()
    algorithm, keys, target = CASES[case]
    info = algorithms[algorithm]
    plain_info = algorithms["finetune"]
    plain = Trainer(copy.deepcopy(base), plain_info.load()(plain_info.config()), batch)
    other = Trainer(copy.deepcopy(base), info.load()(info.config(**keys)), batch)
    memory = other.activation_bytes() / plain.activation_bytes()
    for _ in range(2):
        plain(), other()
    times = [(plain(), other()) for _ in range(pairs)]
    ratios = [second / first for first, second in times]
    low, high = interval(ratios)
    return {
        "network": network,
        "case": case,
        "pairs": pairs,
        "plain_seconds": round(statistics.median(first for first, _ in times), 4),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_low": round(low, 3),
        "ratio_high": round(high, 3),
        "target": target,
        "activation_memory_ratio": round(memory, 3),
    }


def page(results: list[dict[str, object]], environment: dict[str, object]) -> str:
    """The results as a table to read."""
    lines = [
        "# What a training step costs",
        "",
        "CPU time of one training step over that of the plain network: the median of paired, "
        "alternating steps with its 95 % interval. Memory: bytes kept for the backward pass, over "
        "those of the plain network. Made by `python benchmarks/step_cost.py`.",
        "",
        f"Batch {BATCH}, float32, {environment['threads']} thread(s), torch "
        f"{environment['torch']}, {environment['machine']}.",
        "",
        "| network | what | cost | 95 % | wanted | memory |",
        "|---|---|---|---|---|---|",
    ]
    for each in results:
        wanted = f"<= {each['target']}" if each["target"] else ""
        lines.append(
            f"| {each['network']} | {each['case']} | {each['ratio']}x | {each['ratio_low']} to "
            f"{each['ratio_high']} | {wanted} | {each['activation_memory_ratio']}x |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cases", nargs="*", default=sorted(CASES), choices=sorted(CASES))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = []
    for network in NETWORKS:
        for case in arguments.cases:
            results.append(measure(network, case, arguments.pairs))
            print(json.dumps(results[-1]), flush=True)
    environment: dict[str, object] = {
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "threads": arguments.threads,
    }
    folder = Path(__file__).parent
    data = {"environment": environment, "results": results}
    (folder / "step_cost.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    (folder / "step_cost.md").write_text(page(results, environment), encoding="utf-8")


if __name__ == "__main__":
    main()
