"""The results of the zoo as a page: what was measured, what fell short, every network."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from statistics import median, quantiles
from typing import Any

PAGE = Path(__file__).parent / "zoo.md"
Row = dict[str, Any]


def page(rows: list[Row], exports: list[Row], engine: str) -> str:
    """All of it."""
    files = {row["name"]: row for row in exports}
    good = [row for row in rows if "ours" in row]
    parts = [
        "# The zoo",
        "",
        "Made by `python benchmarks/zoo.py`; every figure is in `zoo.jsonl` or `zoo_onnx.jsonl`. "
        "Random weights, statistics and constants made unequal, float64 (float32 over 300 M "
        "parameters), one thread, one process a network.",
        "",
        engines(rows, engine),
        *exactness(rows, good, files),
        *speed(good),
        *shortfalls(rows, good, files),
        "## Every network",
        "",
        "Channels: outputs of all layers that can be cut; in brackets what torch-pruning offers to "
        "cut, right or wrong. Seconds are of CPU.",
        "",
        "| network | parameters | groups cut / all | channels (torch-pruning's offer) | error of "
        "the cut | deploy files | training step | ONNX | forward s | trace s | with trial s | "
        "torch-pruning s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        *(line(row, files.get(row["name"])) for row in rows),
    ]
    return "\n".join(parts) + "\n"


def engines(rows: list[Row], engine: str) -> str:
    """Which code the rows were measured with: a long sweep outlives some of its commits."""
    counts = Counter(row["engine"] for row in rows).most_common()
    versions = ", ".join(f"{count} with {version}" for version, count in counts)
    return f"- Measured with these versions of `slimcli/network` (now {engine}): {versions}."


def exactness(rows: list[Row], good: list[Row], files: dict[str, Row]) -> list[str]:
    """The counts that matter."""
    cut = [row for row in good if row["ours"]["groups_prunable"]]
    exact = [row for row in cut if row["ours"]["exact"]]
    loaded = [row for row in cut if row.get("deploy_error") == 0.0]
    can_train = [row for row in cut if row["train_uncut"] == "ok"]
    trained = [row for row in can_train if row["train"] == "ok"]
    compared = [row for row in good if "missed" in row.get("peer", {})]
    nothing_missed = [row for row in compared if not row["peer"]["missed"]]
    untried = sum(row["peer"]["untried"] for row in compared)
    exported = [row for row in files.values() if "cut" in row]
    equal = [row for row in exported if row["cut"] == "equal"]
    cannot = [row for row in exported if row["cut"] != "equal" and row["uncut"] != "equal"]
    return [
        f"- {len(rows)} networks; {len(good)} analysed without an error.",
        f"- {len(cut)} have something to cut. Half of every group, chosen at random, was cut: "
        f"{len(exact)} equal the network whose producers were zeroed.",
        f"- Deploy files loaded into a fresh network in a new process predict the same, bit for "
        f"bit: {len(loaded)} of {len(cut)}.",
        f"- A training step works after the cut: {len(trained)} of the {len(can_train)} where it "
        "works before.",
        f"- ONNX of the cut network, run by onnxruntime, equals it: {len(equal)} of "
        f"{len(exported)} tried; of the others {len(cannot)} do not export uncut either.",
        f"- Beside torch-pruning on {len(compared)}: {len(nothing_missed)} have no group that its "
        f"own cut gets right and we leave whole (tried alone; {untried} of its groups were left "
        "untried for time).",
        "",
    ]


def speed(good: list[Row]) -> list[str]:
    """Analysis and cut against the peer's, on the same machine one after the other."""
    timed = [row for row in good if "cut_seconds" in row["ours"]]
    ways = {
        "its pruner (built, one step, the smaller half of every group)": (
            pruner_seconds,
            "pruner_seconds",
        ),
        "its graph and the cut of every group alone, nothing ranked": (
            graph_seconds,
            "cut_seconds",
        ),
    }
    lines = []
    for label, (seconds, ended) in ways.items():
        theirs = {row["name"]: seconds(row) for row in timed}
        theirs = {name: each for name, each in theirs.items() if each}
        if len(theirs) < 10:
            continue
        stopped = sum(ended not in row.get("peer", {}) for row in timed if row["name"] in theirs)
        slowest = sorted(theirs, key=lambda name: -theirs[name])[: len(theirs) // 10]
        for ours, key in (("with its trial cut", "analyze_seconds"), ("without", "trace_seconds")):
            ratios = {
                row["name"]: theirs[row["name"]] / (row["ours"][key] + row["ours"]["cut_seconds"])
                for row in timed
                if row["name"] in theirs
            }
            low, middle, high = quantiles(ratios.values(), n=4)
            lines.append(
                f"- Time of torch-pruning's analysis and cut, {label}, over the time of ours "
                f"{ours}: {middle:.2f} in the median (quartiles {low:.2f} and {high:.2f}), "
                f"{median(ratios[name] for name in slowest):.2f} on its slowest tenth; "
                f"{len(ratios)} networks; on {stopped} of them it was stopped, and what it had "
                "used by then counts."
            )
    return [*lines, ""]


def pruner_seconds(row: Row) -> float:
    """0 where it failed; where it was stopped, what it had used up by then."""
    peer = row.get("peer", {})
    if "pruner_seconds" in peer or "pruner_started_seconds" in peer:
        seconds = peer.get("pruner_seconds", used(row, "pruner_started_seconds"))
    else:
        seconds = used(row, "graph_started_seconds")
    return 0.0 if isinstance(seconds, str) else float(seconds)


def graph_seconds(row: Row) -> float:
    """The same for its graph and bare cuts."""
    peer = row.get("peer", {})
    if isinstance(peer.get("cut_seconds"), str):
        return 0.0
    if "cut_seconds" in peer:
        return float(peer["graph_seconds"] + peer["cut_seconds"])
    return used(row, "graph_started_seconds")


def used(row: Row, started: str) -> float:
    """Seconds from the start of a step to the limit, if the limit is why it has no end."""
    is_stopped = "s of CPU allowed" in row.get("compare_failed", "")
    begin = row.get("peer", {}).get(started)
    return row["compare_limit"] - begin if is_stopped and begin is not None else 0.0


def shortfalls(rows: list[Row], good: list[Row], files: dict[str, Row]) -> list[str]:
    """Whatever is not as it should be, one line each."""
    found = [
        f"- {row['name']}: {row['measure_failed'].splitlines()[-1]}"
        for row in rows
        if "measure_failed" in row
    ]
    for row in good:
        ours, name = row["ours"], row["name"]
        if not ours.get("exact", True):
            found.append(f"- {name}: zeroed and cut differ by {ours['error']:.1e}")
        if row.get("deploy_error", 0.0) != 0.0:
            found.append(f"- {name}: the deploy files differ by {row['deploy_error']:.1e}")
        if row.get("train_uncut") == "ok" and row["train"] != "ok":
            found.append(f"- {name}: training step after the cut: {row['train']}")
        for each in row.get("peer", {}).get("missed", []):
            layers = ", ".join(f"`{layer}`" for layer in each["layers"][:2])
            more = f" and {len(each['layers']) - 2} more" if len(each["layers"]) > 2 else ""
            found.append(
                f"- {name}: torch-pruning cuts {each['channels']} channels of {layers}{more}; "
                f"ours are frozen: {each['reason'] or 'no reason'}"
            )
        file = files.get(name, {})
        if file.get("cut", "equal") != "equal" and file.get("uncut") == "equal":
            found.append(f"- {name}: ONNX of the cut network: {file['cut']}")
    return ["## What falls short", "", *(found or ["Nothing."]), ""]


def line(row: Row, file: Row | None) -> str:
    """One network as a row of the table."""
    if "ours" not in row:
        return f"| {row['name']} | {row['measure_failed'].splitlines()[-1][:90]} |" + " |" * 10
    ours, peer = row["ours"], row.get("peer", {})
    theirs = peer.get("channels_claimed", "fails")
    seconds = f"{pruner_seconds(row):.2f}" if pruner_seconds(row) else "fails"
    seconds = seconds if "pruner_seconds" in peer or seconds == "fails" else f"> {seconds}"
    error = f"{ours['error']:.0e}" if "error" in ours else "-"
    loaded = {None: "-", 0.0: "equal"}.get(row.get("deploy_error"), f"{row.get('deploy_error')}")
    step = row.get("train", "-") if row.get("train_uncut", "ok") == "ok" else "needs targets"
    exported = "-" if not file or "cut" not in file else file["cut"].partition(":")[0]
    return (
        f"| {row['name']} | {row['params'] / 1e6:.1f} M | "
        f"{ours['groups_prunable']} / {ours['groups']} | {ours['channels_prunable']} ({theirs}) | "
        f"{error} | {loaded} | {step} | {exported} | {row['forward_seconds']:.2f} | "
        f"{ours['trace_seconds']:.2f} | {ours['analyze_seconds']:.2f} | {seconds} |"
    )
