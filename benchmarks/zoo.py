"""Every network of torchvision and many of timm: is what the engine declares prunable exact?

    python benchmarks/zoo.py                 go on where the last run stopped
    python benchmarks/zoo.py --only resnet18 one network, printed
    python benchmarks/zoo.py --page          write benchmarks/zoo.md from the results

One process a network, 20 GiB of address space at most, results appended to benchmarks/zoo.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
HERE = Path(__file__).parent
RESULTS = HERE / "zoo.jsonl"
PAGE = HERE / "zoo.md"
TIMM_LIST = HERE / "zoo_timm.txt"
MEMORY_BYTES = 20 * 2**30
SECONDS = 300
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
)


def names() -> list[str]:
    """``torchvision/NAME`` and ``timm/NAME``; the large ones last."""
    import torchvision

    unwanted = ("quantized_", "raft_")
    vision = [n for n in torchvision.models.list_models() if not n.startswith(unwanted)]
    timm = [line.split()[0] for line in TIMM_LIST.read_text().splitlines() if line.strip()]
    small = [n for n in vision if not any(word in n for word in LARGE)]
    large = [n for n in vision if n not in small]
    vision = [f"torchvision/{n}" for n in small]
    return [*vision, *(f"timm/{n}" for n in timm), *(f"torchvision/{n}" for n in large)]


def build(name: str) -> Any:
    """A randomly initialised network with a small input, as a Case."""
    import torch
    import zoo_measure

    torch.manual_seed(0)
    source, short = name.split("/", 1)
    model, batch = (build_torchvision if source == "torchvision" else build_timm)(short)
    large = zoo_measure.count(model) > zoo_measure.LARGE
    model = model if large else model.double()
    batch = batch if large else _double(batch)
    zoo_measure.jitter(model)
    tolerance = zoo_measure.EXACT_FLOAT32 if large else zoo_measure.EXACT_FLOAT64
    return zoo_measure.Case(model.eval(), batch, lambda net, data: net(data), tolerance)


def _double(batch: Any) -> Any:
    return [each.double() for each in batch] if isinstance(batch, list) else batch.double()


def build_torchvision(name: str) -> tuple[Any, Any]:
    """Model and batch, by the task that the name's builder belongs to."""
    import torch
    import torchvision

    builder = torchvision.models.get_model_builder(name)
    task = builder.__module__
    keywords: dict[str, Any] = {"weights": None}
    if "detection" in task or "segmentation" in task:
        keywords["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        keywords["init_weights"] = False
    model = builder(**keywords)
    if "detection" in task:
        return model, [torch.rand(3, 96, 96), torch.rand(3, 96, 96)]
    if ".video" in task:
        frames = 16 if "mvit" in name or "s3d" in name else 4
        side = 224 if "mvit" in name else 64
        return model, torch.rand(2, 3, frames, side, side)
    sides = {"inception_v3": 128, "maxvit_t": 224, "alexnet": 96, "vit_h_14": 224}
    side = sides.get(name, 224 if name.startswith("vit_") else 64)
    return model, torch.rand(2, 3, side, side)


def build_timm(name: str) -> tuple[Any, Any]:
    """Model and batch; the network's own input size where smaller ones are refused."""
    import timm
    import torch

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


def measure(name: str, peer: bool) -> dict[str, Any]:
    """One row of the table."""
    import zoo_measure

    zoo_measure.quiet()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    case = build(name)
    row: dict[str, Any] = {"name": name, "params": zoo_measure.count(case.model)}
    started = zoo_measure.cpu_seconds()
    zoo_measure.run(case, case.model)
    row["forward_seconds"] = round(zoo_measure.cpu_seconds() - started, 3)
    ours, cut = zoo_measure.measure_ours(case)
    row["ours"] = ours
    if cut is not None and row["params"] < 60_000_000:
        row["train_uncut"] = zoo_measure.train_step(case, __import__("copy").deepcopy(case.model))
        row["train"] = zoo_measure.train_step(case, cut)
    if peer:
        try:
            row["peer"] = zoo_measure.measure_peer(case)
        except Exception as error:
            row["peer"] = {"failed": f"{type(error).__name__}: {str(error)[:80]}"}
    row["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return row


def sweep(chosen: list[str], peer: bool) -> None:
    """Measure what is not in the results yet, one process each."""
    done = {json.loads(line)["name"] for line in read_lines()}
    for name in chosen:
        if name in done:
            continue
        command = [sys.executable, __file__, "--one", name, *(["--peer"] if peer else [])]
        started = time.monotonic()
        try:
            ended = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
            lines = ended.stdout.strip().splitlines()
            row = json.loads(lines[-1]) if ended.returncode == 0 and lines else None
            row = row or {"name": name, "failed": (ended.stderr.strip() or "killed")[-300:]}
        except subprocess.TimeoutExpired:
            row = {"name": name, "failed": f"more than {SECONDS} s"}
        row["wall_seconds"] = round(time.monotonic() - started, 1)
        with RESULTS.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        print(summary(row), flush=True)


def read_lines() -> list[str]:
    """Rows measured so far."""
    return RESULTS.read_text().splitlines() if RESULTS.exists() else []


def summary(row: dict[str, Any]) -> str:
    """One line for the terminal."""
    if "failed" in row:
        return f"FAILED {row['name']}: {row['failed'].splitlines()[-1]}"
    ours, peer = row["ours"], row.get("peer", {})
    return (
        f"{row['name']}: {ours['groups_prunable']}/{ours['groups']} groups, "
        f"{ours['channels_prunable']} channels, error {ours.get('error', 0):.1e}, "
        f"train {row.get('train', '-')}, {ours['analyze_seconds']} s; "
        f"peer {peer.get('channels_exact', peer.get('failed', '-'))}"
    )


def page() -> str:
    """The results as a table, with what fell short first."""
    rows = [json.loads(line) for line in read_lines()]
    good = [row for row in rows if "failed" not in row]
    cut = [row for row in good if row["ours"]["groups_prunable"]]
    exact = [row for row in cut if row["ours"]["exact"]]
    compared = [row for row in good if "channels_exact" in row.get("peer", {})]
    behind = [
        row for row in compared if row["ours"]["channels_prunable"] < row["peer"]["channels_exact"]
    ]
    lines = [
        "# The zoo",
        "",
        "Made by `python benchmarks/zoo.py`; every figure below is in `zoo.jsonl`.",
        "",
        f"- {len(rows)} of the {len(names())} networks in the list measured so far, with random "
        f"weights; {len(good)} analysed without an error.",
        f"- {len(cut)} have something to cut; half of every group, chosen at random, was cut: "
        f"{len(exact)} equal the zeroed network.",
        f"- {len(compared)} compared with torch-pruning, counting the groups where its own cut "
        f"equals its masked model: fewer channels than it in {len(behind)}.",
        "",
        "| network | parameters | groups cut / all | channels | torch-pruning | error | train step "
        "| analysis s | cut s | forward s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + [table_row(row) for row in rows]) + "\n"


def table_row(row: dict[str, Any]) -> str:
    """One network as a Markdown row."""
    if "failed" in row:
        return f"| {row['name']} | failed: {row['failed'].splitlines()[-1][:90]} |||||||||"
    ours, peer = row["ours"], row.get("peer", {})
    theirs = peer.get("channels_exact", "fails" if "failed" in peer else "-")
    error = f"{ours['error']:.1e}" if "error" in ours else "-"
    return (
        f"| {row['name']} | {row['params'] / 1e6:.1f} M | {ours['groups_prunable']} / "
        f"{ours['groups']} | {ours['channels_prunable']} | {theirs} | {error} | "
        f"{row.get('train', '-')} | {ours['analyze_seconds']} | {ours.get('cut_seconds', '-')} | "
        f"{row['forward_seconds']} |"
    )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", help="measure one network in this process and print JSON")
    parser.add_argument("--only", nargs="*", help="sweep only these names or parts of names")
    parser.add_argument("--peer", action="store_true", help="measure torch-pruning side by side")
    parser.add_argument("--page", action="store_true", help="write the page and stop")
    arguments = parser.parse_args()
    sys.path.insert(0, str(HERE))
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.peer)))
    elif arguments.page:
        PAGE.write_text(page())
    else:
        chosen = [n for n in names() if not arguments.only or any(o in n for o in arguments.only)]
        sweep(chosen, arguments.peer)
        PAGE.write_text(page())


if __name__ == "__main__":
    main()
