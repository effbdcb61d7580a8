"""The quickstart recipe over several seeds: errors before and after, MACs, seams, CPU time.

    python benchmarks/quickstart.py               # seeds 0 to 4, about three minutes on one core
    python benchmarks/quickstart.py --seeds 0 1

Each seed is one `slim run recipes/quickstart.yaml seed=N` in a process of its own. Wanted: at most
half of the MACs, at most 9 more errors on the 899 validation images than the base model and at most
0.5 points less accuracy in the mean, every form of the network equally accurate, at most 180 s of
user and system CPU time a run. Writes quickstart.json and quickstart.md beside itself.

The best epoch of both stages is chosen on the images that are counted here; the base model chooses
among more epochs, which favours it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RECIPE = HERE.parent / "recipes" / "quickstart.yaml"
IMAGES = 899
MOST_ERRORS_MORE = 9
MOST_POINTS_LESS = 0.5
MOST_MACS = 0.5
MOST_CPU_SECONDS = 180


def run(seed: int, overrides: list[str]) -> dict[str, Any]:
    """One run; what its summary says, and the CPU time it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        keys = [f"config.seed={seed}", f"config.save_dir={folder}", *overrides]
        command = [sys.executable, "-c", "from slimcli.cli import main; main()", "run", str(RECIPE)]
        subprocess.run([*command, *keys], check=True, stdout=subprocess.DEVNULL)
        (path,) = Path(folder).glob("quickstart/2*/summary.json")
        summary = json.loads(path.read_text())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    forms = {name: each["acc"] for name, each in summary["final"]["metrics_by_form"].items()}
    widest = max(summary["verification"], key=lambda seam: seam["max_abs"] / seam["limit"])
    return {
        "seed": seed,
        "errors_before": errors(summary["baseline"]["metrics"]["acc"]),
        "errors_after": errors(summary["final"]["metrics"]["acc"]),
        "errors_by_form": {name: errors(accuracy) for name, accuracy in forms.items()},
        "macs": summary["final"]["macs"] / summary["baseline"]["macs"],
        "params": summary["final"]["params"] / summary["baseline"]["params"],
        "widest_seam": {key: widest[key] for key in ("from", "to", "max_abs", "limit", "ok")},
        "cpu_seconds": after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime,
        "summary": {name: summary[name] for name in ("baseline", "final", "verification")},
    }


def errors(accuracy: float) -> int:
    return round((1 - accuracy) * IMAGES)


def failures(runs: list[dict[str, Any]]) -> list[str]:
    """What is not as wanted, in words."""
    found = []
    for each in runs:
        more = each["errors_after"] - each["errors_before"]
        checks = {
            f"{more} more errors": more > MOST_ERRORS_MORE,
            f"{each['macs']:.1%} of the MACs": each["macs"] > MOST_MACS,
            "forms of different accuracy": len(set(each["errors_by_form"].values())) > 1,
            "a seam above its limit": not each["widest_seam"]["ok"],
            f"{each['cpu_seconds']:.0f} s of CPU time": each["cpu_seconds"] > MOST_CPU_SECONDS,
        }
        found += [f"seed {each['seed']}: {what}" for what, is_wrong in checks.items() if is_wrong]
    if points_lost(runs) > MOST_POINTS_LESS:
        found.append(f"{points_lost(runs):.2f} points less in the mean")
    return found


def points_lost(runs: list[dict[str, Any]]) -> float:
    more = statistics.mean(each["errors_after"] - each["errors_before"] for each in runs)
    return 100 * more / IMAGES


def page(runs: list[dict[str, Any]], wrong: list[str]) -> str:
    lines = [
        "# Quickstart: ResRep at half of the MACs, handwritten digits",
        "",
        f"`python benchmarks/quickstart.py` · {IMAGES} validation images · "
        f"{platform.machine()}, {os.cpu_count()} cores",
        "",
        "| seed | errors before | after | MACs left | parameters left | widest seam | CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in runs:
        seam = each["widest_seam"]
        lines.append(
            f"| {each['seed']} | {each['errors_before']} | {each['errors_after']} | "
            f"{each['macs']:.1%} | {each['params']:.1%} | {seam['max_abs']:.1e} of "
            f"{seam['limit']:.1e} | {each['cpu_seconds']:.0f} |"
        )
    lines += [
        "",
        f"Mean accuracy lost: {points_lost(runs):.2f} points (wanted: at most {MOST_POINTS_LESS}).",
        "As wanted in every respect." if not wrong else f"Not as wanted: {'; '.join(wrong)}.",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("overrides", nargs="*", help="more key=value for the recipe")
    options = parser.parse_args()
    runs = []
    for seed in options.seeds:
        runs.append(run(seed, options.overrides))
        print(json.dumps(runs[-1]), flush=True)
    wrong = failures(runs)
    if not options.overrides:
        result = {
            "images": IMAGES,
            "runs": runs,
            "points_lost": points_lost(runs),
            "failures": wrong,
        }
        (HERE / "quickstart.json").write_text(json.dumps(result, indent=2) + "\n")
        (HERE / "quickstart.md").write_text(page(runs, wrong))
    print(page(runs, wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
