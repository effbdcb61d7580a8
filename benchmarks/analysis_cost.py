"""What finding a network's structure costs at 224 x 224: CPU time, and memory beside a forward.

    python benchmarks/analysis_cost.py          # about two minutes on one core, Linux only

Every figure is taken in a process of its own, one image, one thread, random float32 weights, after
the same has been done once to a small network. Wanted: analysis of ResNet-50 in at most 1 s of CPU
and twice the memory growth of one forward, DenseNet-201 in 5 s, Swin-T and MaxViT-T in 10 s. Writes
analysis_cost.json and analysis_cost.md beside itself.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MOST_SECONDS = {"resnet50": 1.0, "densenet201": 5.0, "swin_t": 10.0, "maxvit_t": 10.0}
WAYS = {"forward": "one forward", "traced": "without trial cut", "tried": "with trial cut"}
MOST_GROWTH = 2.0
ROUNDS = 3


def cpu_seconds() -> float:
    """User and system time of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def memory_mib(name: str) -> float:
    """A figure of /proc/self/status: ``VmRSS`` (now) or ``VmHWM`` (the most since a reset)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"this system has no {name} in /proc/self/status")


def measure(network: str, way: str) -> dict[str, float]:
    """One way on one network, in this process."""
    import torch
    import torchvision

    from slimcli.network.example import Example
    from slimcli.network.structure import analyze

    torch.set_num_threads(1)

    def once(model: torch.nn.Module, images: torch.Tensor) -> None:
        if way == "forward":
            with torch.no_grad():
                model(images)
            return
        example = Example(images, lambda model, batch: model(batch))
        analyze(model, example, trial=way == "tried")

    once(torchvision.models.resnet18(weights=None).eval(), torch.rand(1, 3, 64, 64))
    model = torchvision.models.get_model(network, weights=None).eval()
    images = torch.rand(1, 3, 224, 224)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, started = memory_mib("VmRSS"), cpu_seconds()
    once(model, images)
    return {
        "cpu_seconds": round(cpu_seconds() - started, 3),
        "growth_mib": round(memory_mib("VmHWM") - before, 1),
    }


def in_own_process(network: str, way: str) -> dict[str, float]:
    """The same, measured by another process."""
    command = [sys.executable, __file__, "--one", network, way]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def page(found: dict[str, Any]) -> str:
    """The table."""
    lines = [
        "# What finding a network's structure costs",
        "",
        "Made by `python benchmarks/analysis_cost.py`: one image of 224 x 224, one thread, float32,"
        f" a process each, medians of {ROUNDS}. {found['machine']}.",
        "",
        "| network | wanted CPU s | " + " | ".join(f"{each}: CPU s, MiB" for each in WAYS.values()),
        "|---|---|" + "---|" * len(WAYS),
    ]
    lines[4] += " |"
    for network, most in MOST_SECONDS.items():
        row = found["networks"][network]
        cells = [f"{row[way]['cpu_seconds']:.2f}, {row[way]['growth_mib']:.0f}" for way in WAYS]
        lines.append(f"| {network} | {most:g} | " + " | ".join(cells) + " |")
    rows = found["networks"]["resnet50"]
    ratios = {w: rows[w]["growth_mib"] / rows["forward"]["growth_mib"] for w in ("traced", "tried")}
    lines += [
        "",
        f"Memory on ResNet-50, {MOST_GROWTH:g} times the growth of a forward wanted: "
        f"{ratios['traced']:.1f} times without the trial cut, {ratios['tried']:.1f} times with it. "
        "The trial runs in float64, because in float32 rounding would hide small errors: its "
        "activations take twice the memory of a forward, beside the largest weight, and float64 "
        "convolutions unfold their input.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measures and writes, or measures one thing and prints it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", nargs=2, metavar=("NETWORK", "WAY"))
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one)))
        return
    networks: dict[str, dict[str, dict[str, float]]] = {name: {} for name in MOST_SECONDS}
    for network, ways in networks.items():
        for way in WAYS:
            runs = [in_own_process(network, way) for _ in range(ROUNDS)]
            ways[way] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            print(network, way, ways[way], flush=True)
    import torch

    machine = f"torch {torch.__version__}, Python {platform.python_version()}"
    found = {"machine": machine, "networks": networks}
    (HERE / "analysis_cost.json").write_text(json.dumps(found, indent=1) + "\n")
    (HERE / "analysis_cost.md").write_text(page(found))


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    main()
