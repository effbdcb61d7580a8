"""Atomic writes: all or nothing, also on a full disk."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from slimcli.artifacts import atomic
from slimcli.errors import RunError


def test_text_is_written_as_utf8_with_plain_line_ends(tmp_path: Path):
    atomic.write_text(tmp_path / "a.txt", "grüße\nzwei\n")
    assert (tmp_path / "a.txt").read_bytes() == "grüße\nzwei\n".encode()


def test_a_file_has_the_permissions_any_new_file_has(tmp_path: Path):
    (tmp_path / "plain").write_text("x")
    atomic.write_bytes(tmp_path / "atomic", b"x")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "atomic")]
    assert modes[0] == modes[1]


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_no_stray_one(tmp_path: Path, monkeypatch, call):
    place = tmp_path / "last.pt"
    place.write_bytes(b"old")
    monkeypatch.setattr(os, call, full_disk)
    with pytest.raises(RunError, match="no space left on the disk") as caught:
        atomic.write_bytes(place, b"new")
    assert caught.value.problems[0].code == "E-DISK-FULL"
    assert [each.name for each in tmp_path.iterdir()] == ["last.pt"]
    assert place.read_bytes() == b"old"


def write_half_and_raise(place: Path, error: Exception) -> None:
    with atomic.replacing(place) as temporary:
        temporary.write_bytes(b"half of it")
        raise error


@pytest.mark.parametrize(
    ("error", "seen"), [(KeyError("x"), KeyError), (OSError(errno.ENOSPC, "full"), RunError)]
)
def test_a_write_that_breaks_off_leaves_nothing(tmp_path: Path, error, seen):
    with pytest.raises(seen):
        write_half_and_raise(tmp_path / "a", error)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_grows_too_large_is_told_the_limit(tmp_path: Path):
    error = OSError(errno.EFBIG, "File too large")
    with pytest.raises(RunError, match="File too large") as caught:
        write_half_and_raise(tmp_path / "a", error)
    assert caught.value.problems[0].fix == "allow larger files (ulimit -f)"


def test_a_folder_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(RunError, match="gone"):
        atomic.write_bytes(tmp_path / "gone" / "a", b"x")
