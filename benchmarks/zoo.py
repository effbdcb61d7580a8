"""Every network of torchvision and many of timm: is what the engine declares prunable exact?

    python benchmarks/zoo.py                 go on where the last run stopped
    python benchmarks/zoo.py --onnx          the same for ONNX: does the cut network export, equal?
    python benchmarks/zoo.py --only resnet18 only networks with this in their name
    python benchmarks/zoo.py --again         also what an older engine was measured on
    python benchmarks/zoo.py --share 0/2     every second network; another process takes 1/2
    python benchmarks/zoo.py --page          write benchmarks/zoo.md from the results

One process analyses and cuts a network, a second one loads the deploy files, a third one asks
torch-pruning (for ZOO_COMPARE_SECONDS of CPU at most, 60 unless set); 20 GiB of address space each.
Results are appended to benchmarks/zoo.jsonl and
zoo_onnx.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).parent
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
)
RESULTS = {"cut": HERE / "zoo.jsonl", "onnx": HERE / "zoo_onnx.jsonl"}
MEMORY_BYTES = 20 * 2**30
WALL_SECONDS = 1800
COMPARE_SECONDS = int(os.environ.get("ZOO_COMPARE_SECONDS", "60"))
Row = dict[str, Any]
Step = Callable[[str, Path], Iterator[Row]]


def measure(name: str, folder: Path) -> Iterator[Row]:
    """Our part of the table but for the deploy files, which go into the folder."""
    import zoo_build
    import zoo_measure

    case = zoo_build.build(name)
    yield {"params": zoo_measure.count(case.model)}
    zoo_measure.run(case, case.model)
    started = zoo_measure.cpu_seconds()
    zoo_measure.run(case, case.model)
    yield {"forward_seconds": round(zoo_measure.cpu_seconds() - started, 3)}
    ours, structure, cut = zoo_measure.measure_ours(case)
    yield {"ours": ours, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
    norms = [pair.norm for pair in structure.conv_batch_norms]
    (folder / "ours.json").write_text(json.dumps([zoo_measure.layers(structure), norms]))
    if cut is not None:
        zoo_measure.save(case, cut, folder)
        yield {"train_uncut": zoo_measure.train_step(case, copy.deepcopy(case.model))}
        yield {"train": zoo_measure.train_step(case, cut)}


def reload(name: str, folder: Path) -> Iterator[Row]:
    """What a new process gets from the deploy files."""
    import zoo_build
    import zoo_measure

    if (folder / "prediction.pt").exists():
        yield {"deploy_error": zoo_measure.reload_error(zoo_build.build(name, seed=1), folder)}


def compare(name: str, folder: Path) -> Iterator[Row]:
    """What torch-pruning does with the same network."""
    import zoo_build
    import zoo_peer

    layers, norms = json.loads((folder / "ours.json").read_text())
    yield {"compare_limit": COMPARE_SECONDS}
    for part in zoo_peer.measure_peer(zoo_build.build(name), layers, norms):
        yield {"peer": part}


def export(name: str, folder: Path) -> Iterator[Row]:
    """Does the cut network export where the uncut one does, and is the file equal to it?"""
    import zoo_onnx

    yield zoo_onnx.measure_onnx(name, folder)


STEPS: dict[str, tuple[tuple[Step, int], ...]] = {
    "cut": ((measure, 900), (reload, 300), (compare, COMPARE_SECONDS)),
    "onnx": ((export, 900),),
}
"""What is done to each network, each in a process of its own, with its limit in seconds of CPU."""


def child(step: Step, name: str, folder: str, seconds: int, sender: Connection) -> None:
    """What runs in such a process."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    try:
        for part in step(name, Path(folder)):
            sender.send(part)
    except Exception as error:
        sender.send({f"{step.__name__}_failed": f"{type(error).__name__}: {error}"[:400]})


def in_new_process(step: Step, name: str, folder: str, seconds: int) -> Row:
    """What it found out, all of it or until it failed."""
    context = multiprocessing.get_context("forkserver")  # libraries are imported once, not by each
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(step, name, folder, seconds, sender))
    process.start()
    sender.close()
    row: Row = {}
    try:
        while receiver.poll(WALL_SECONDS):
            row |= receiver.recv()
        row[f"{step.__name__}_failed"] = f"more than {WALL_SECONDS} s"
    except EOFError:
        process.join()
        if process.exitcode:
            ended = f"ended with {process.exitcode} ({seconds} s of CPU allowed)"
            row[f"{step.__name__}_failed"] = ended
    finally:
        process.kill()
        process.join()
    return row


def engine() -> str:
    """A short hash of the code that is measured."""
    files = sorted((HERE.parent / "slimcli" / "network").rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:8]


def sweep(chosen: list[str], kind: str, again: bool) -> None:
    """Measures what is not in the results yet, or not with this engine."""
    known = {row["name"]: row["engine"] for row in rows(kind)}
    version = engine()
    for name in chosen:
        if name in known and not (again and known[name] != version):
            continue
        started = time.monotonic()
        row: Row = {"name": name, "engine": version}
        with tempfile.TemporaryDirectory() as folder:
            for step, seconds in STEPS[kind]:
                if "measure_failed" not in row:
                    row |= in_new_process(step, name, folder, seconds)
        row["wall_seconds"] = round(time.monotonic() - started, 1)
        with RESULTS[kind].open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def rows(kind: str) -> list[Row]:
    """What was measured so far, the last row of each network."""
    path = RESULTS[kind]
    lines = path.read_text().splitlines() if path.exists() else []
    return list({row["name"]: row for row in map(json.loads, lines)}.values())


def main() -> None:
    """Read the command line."""
    import zoo_page

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="sweep only these names or parts of names")
    parser.add_argument(
        "--share", default="0/1", help="of how many networks this process takes one"
    )
    parser.add_argument("--onnx", action="store_true", help="sweep the ONNX exports")
    parser.add_argument("--again", action="store_true", help="measure anew with a changed engine")
    parser.add_argument("--page", action="store_true", help="write the page and stop")
    arguments = parser.parse_args()
    if not arguments.page:
        import zoo_build

        multiprocessing.get_context("forkserver").set_forkserver_preload(
            ["zoo_build", "zoo_measure", "zoo_peer", *(["zoo_onnx"] if arguments.onnx else [])]
        )
        chosen = zoo_build.names()
        if arguments.only:
            chosen = [name for name in chosen if any(part in name for part in arguments.only)]
        place, _, count = arguments.share.partition("/")
        chosen = chosen[int(place) :: int(count)]
        sweep(chosen, "onnx" if arguments.onnx else "cut", arguments.again)
    zoo_page.PAGE.write_text(zoo_page.page(rows("cut"), rows("onnx"), engine()))


if __name__ == "__main__":
    main()
