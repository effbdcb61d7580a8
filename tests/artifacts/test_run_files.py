"""Checkpoints, events and run folders as files: what can be stored, what a crash leaves."""

from __future__ import annotations

import csv
import errno
import gc
import json
import zipfile
from collections import Counter, OrderedDict, namedtuple
from enum import Enum
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from tensorboardX.record_writer import RecordWriter

from slimcli.artifacts import checkpoint, events, run_folder, summary
from slimcli.artifacts.events import EVENTS, EventLog
from slimcli.errors import RecipeError, RunError


class Colour(Enum):
    RED = "red"


def test_what_users_keep_in_a_state_comes_back_as_tensors_and_plain_values(tmp_path: Path) -> None:
    content = {
        "tensor": torch.nn.Parameter(torch.ones(2)),
        "array": numpy.arange(3),
        "number": numpy.float32(0.5),
        "enum": Colour.RED,
        "path": Path("a/b"),
        "ordered": OrderedDict(a=1),
        "milestones": Counter([3, 6]),
        "named": namedtuple("Pair", "x y")(1, 2),
        "nothing": None,
        3: {"deep": [True, {1, 2}]},
    }
    checkpoint.save(tmp_path / "a.pt", content, read_back=True)
    found = checkpoint.load(tmp_path / "a.pt")
    assert torch.equal(found["tensor"], torch.ones(2))
    assert not found["tensor"].requires_grad
    assert found["array"].tolist() == [0, 1, 2]
    plain = ("number", "enum", "path", "ordered", "milestones", "named", "nothing", 3)
    expected = (
        0.5,
        "red",
        "a/b",
        {"a": 1},
        Counter([3, 6]),
        (1, 2),
        None,
        {"deep": [True, {1, 2}]},
    )
    assert tuple(found[name] for name in plain) == expected


def test_a_stored_tensor_is_a_copy() -> None:
    live = torch.zeros(2)
    stored = checkpoint.normalise({"a": live})
    live += 1
    assert stored["a"].tolist() == [0, 0]


@pytest.mark.parametrize("value", [lambda: 0, torch.nn.Linear(1, 1), object()])
def test_what_would_need_pickled_code_is_refused_with_its_place(value: Any) -> None:
    with pytest.raises(RunError, match=r"checkpoint\.optimizer\[1\]\.hook can't be stored"):
        checkpoint.normalise({"optimizer": [0, {"hook": value}]})


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 torn"])
def test_a_damaged_checkpoint_is_a_message_and_no_traceback(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "last.pt").write_bytes(content)
    with pytest.raises(RunError, match="can't be read"):
        checkpoint.load(tmp_path / "last.pt")


def test_a_pickle_with_code_in_it_is_not_run(tmp_path: Path) -> None:
    torch.save({"model": torch.nn.Linear(1, 1)}, tmp_path / "last.pt")
    with pytest.raises(RunError, match="can't be read"):
        checkpoint.load(tmp_path / "last.pt")


@pytest.mark.parametrize("content", [[1], {"model": torch.nn.Linear(1, 1)}, b"torn", b""])
def test_an_unreadable_checkpoint_is_told_in_our_words_with_a_fix(
    tmp_path: Path, content: Any
) -> None:
    path = tmp_path / "last.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(RunError) as caught:
        checkpoint.load(path)
    text = str(caught.value)
    assert caught.value.problems[0].fix
    assert "weights_only" not in text  # torch's advice to run the code in the file
    assert "\x1b" not in text


def flip(path: Path, name: str) -> None:
    """Changes one byte of the numbers in a checkpoint, and nothing else."""
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(name)
        numbers = archive.read(entry)
    content = bytearray(path.read_bytes())
    content[content.index(numbers)] ^= 2
    path.write_bytes(content)


@pytest.mark.parametrize("read", [checkpoint.load, checkpoint.stored_weights])
def test_weights_with_a_flipped_bit_are_refused(tmp_path: Path, read: Any) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"model": {"weight": torch.arange(1.0, 9.0)}})
    assert "model" in checkpoint.load(path)
    flip(path, "archive/data/0")
    with pytest.raises(
        RunError, match=r"last\.pt.*archive/data/0 is not what was written"
    ) as caught:
        read(path)
    assert caught.value.problems[0].code == "E-CHECKPOINT-DAMAGED"


def test_a_file_that_torch_wrote_without_checksums_is_read(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"weight": torch.ones(2)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(checkpoint.stored_weights(path)["weight"], torch.ones(2))


@pytest.mark.parametrize("content", [None, b"", b"not safetensors"])
def test_weights_that_are_no_safetensors_are_told(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "weights.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunError, match=r"there is no checkpoint|no safetensors file"):
        checkpoint.stored_weights(path)


def test_a_folder_nothing_was_done_in_goes_with_its_link(tmp_path: Path) -> None:
    first, second = (run_folder.create(tmp_path, "task", name) for name in "ab")
    run_folder.discard(first)
    assert (tmp_path / "task" / "latest").resolve() == second.path.resolve()
    run_folder.discard(second)
    assert list((tmp_path / "task").iterdir()) == []


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    torch.save({"version": 99}, tmp_path / "last.pt")
    with pytest.raises(RunError, match="another format"):
        checkpoint.load(tmp_path / "last.pt")


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": s}])
def test_weights_are_found_in_the_usual_files(tmp_path: Path, wrap: Any) -> None:
    state = torch.nn.Linear(2, 1).state_dict()
    torch.save(wrap(state), tmp_path / "weights.pt")
    assert set(checkpoint.stored_weights(tmp_path / "weights.pt")) == {"weight", "bias"}


def epoch_end(log: EventLog, epoch: int, **val: float) -> None:
    log.emit(
        "epoch_end",
        stage="1-toy",
        epoch=epoch,
        epochs=3,
        train={"loss": 0.5},
        val=val,
        status={},
        lr=0.1,
        seconds=1.0,
        may_save=True,
    )


def test_events_are_cut_back_to_the_checkpoint_and_the_table_with_them(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    epoch_end(log, 1, acc=0.5)
    length = log.length
    epoch_end(log, 2, acc=0.6)
    log.close()
    with (tmp_path / "events.jsonl").open("a") as stream:
        stream.write('{"torn')
    again = EventLog(tmp_path, length=length)
    epoch_end(again, 2, acc=0.7, iou=0.1)
    again.close()
    assert [each["val"]["acc"] for each in events.read(tmp_path / "events.jsonl")] == [0.5, 0.7]
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert [(row["epoch"], row["val.acc"], row["val.iou"]) for row in rows] == [
        ("1", "0.5", ""),
        ("2", "0.7", "0.1"),
    ]


def test_what_json_does_not_know_becomes_null(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    epoch_end(log, 1, acc=float("nan"))
    log.close()
    (line,) = (tmp_path / "events.jsonl").read_text().splitlines()
    assert json.loads(line)["val"] == {"acc": None}
    summary.write(tmp_path / "summary.json", {"a": [float("inf")]})
    assert summary.read(tmp_path / "summary.json") == {"a": [None]}


def test_an_event_nobody_documented_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        EventLog(tmp_path).emit("surprise")
    assert "surprise" not in EVENTS


def test_warnings_of_other_packages_go_to_the_log(tmp_path: Path) -> None:
    import warnings

    log = EventLog(tmp_path)
    with log.hearing_warnings():
        warnings.simplefilter("always")
        warnings.warn("old api", DeprecationWarning, stacklevel=1)
    assert "DeprecationWarning" in (tmp_path / "log.txt").read_text()


def test_latest_points_at_the_newest_run(tmp_path: Path) -> None:
    first = run_folder.create(tmp_path, "task", "a")
    second = run_folder.create(tmp_path, "task", "a")
    assert (first.path.name, second.path.name) == ("a", "a-2")
    assert (tmp_path / "task" / "latest").resolve() == second.path
    assert not list((tmp_path / "task").glob(".latest*"))


def test_a_folder_that_cannot_be_made_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "task").write_text("a file")
    with pytest.raises(RunError, match="can't make the run folder") as caught:
        run_folder.create(tmp_path, "task")
    assert "config.save_dir=FOLDER" in caught.value.problems[0].fix
    with pytest.raises(RunError, match="can't make the run folder") as caught:
        run_folder.create(tmp_path, "other", "n" * 300)
    assert "a shorter task_name, --name" in caught.value.problems[0].fix


def test_a_changed_a_new_and_a_missing_hook_file_are_named(tmp_path: Path) -> None:
    kept, changed, gone, new = (tmp_path / f"{name}.py" for name in ("k", "c", "g", "n"))
    for file in (kept, changed, gone):
        file.write_text("x = 1\n")
    folder = run_folder.create(tmp_path / "runs", "task")
    run_folder.write_origin(folder, "recipe", "source", [kept, changed, gone])
    changed.write_text("x = 2\n")
    new.write_text("")
    found = run_folder.changed_code(folder, [kept, changed, new])
    assert [each.split("/")[-1] for each in found] == [
        "c.py (changed)",
        "n.py (new)",
        "g.py (gone)",
    ]
    assert (folder.path / "code" / "c.py").read_text() == "x = 1\n"


def test_the_newest_recipe_is_in_force(tmp_path: Path) -> None:
    folder = run_folder.create(tmp_path, "task")
    run_folder.write_origin(folder, "one", "", [])
    assert folder.recipe.name == "recipe.yaml"
    run_folder.write_changed_recipe(folder, "two")
    run_folder.write_changed_recipe(folder, "three")
    assert folder.recipe.name == "recipe.3.yaml"


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="not a run folder"):
        run_folder.open_run(tmp_path)


def scalars_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What a TensorBoard would read, parsed from the file's records."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list[tuple[int, float]]] = {}
    (path,) = (folder / "tensorboard").iterdir()
    data = path.read_bytes()
    while data:
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
        data = data[16 + length :]
    return found


def test_tensorboard_gets_the_numbers_under_the_names_of_the_events(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    epoch_end(log, 1, acc=0.5)
    epoch_end(log, 2, acc=0.75)
    log.close()
    (found,) = (v for tag, v in scalars_of(tmp_path).items() if tag.endswith("acc"))
    assert found == [(1, 0.5), (2, 0.75)]


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("error::ResourceWarning")
def test_a_disk_that_fills_up_under_tensorboard_is_told_in_our_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RecordWriter, "flush", full)
    log = EventLog(tmp_path)
    with pytest.raises(RunError, match="No space left on device"):
        epoch_end(log, 1, acc=0.5)
    with pytest.raises(RunError, match="slim resume"):
        log.close()
    log.close()
    gc.collect()  # a file that was left open would be told of here
