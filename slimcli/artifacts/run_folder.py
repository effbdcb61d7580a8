"""The run folder: what lies where in it, and what it says about where the run came from."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from slimcli.artifacts import atomic
from slimcli.errors import Problem, RecipeError, RunError

TIMESTAMP = "%Y%m%d-%H%M%S"


@dataclass(frozen=True)
class RunFolder:
    """Paths in a run folder, ``<save_dir>/<task_name>/<timestamp>``."""

    path: Path

    @property
    def last(self) -> Path:
        """The checkpoint to go on from."""
        return self.path / "checkpoints" / "last.pt"

    def best(self, stage: str, is_last_stage: bool) -> Path:
        """The best checkpoint of a stage; that of the last one is ``best.pt``."""
        name = "best.pt" if is_last_stage else f"best-{stage}.pt"
        return self.path / "checkpoints" / name

    def handover(self, stage: str) -> Path:
        """The plain model one stage left for the next."""
        return self.path / "handover" / stage

    @property
    def artifacts(self) -> Path:
        """Deploy format, ONNX, engine."""
        return self.path / "artifacts"

    @property
    def recipe(self) -> Path:
        """The complete recipe in force, runnable again: ``recipe.yaml``, or the newest change."""
        changed = [each for each in self.path.glob("recipe.*.yaml") if each.stem[7:].isdigit()]
        return max(changed, key=lambda each: int(each.stem[7:]), default=self.path / "recipe.yaml")

    @property
    def summary(self) -> Path:
        """What came out, for machines."""
        return self.path / "summary.json"

    @property
    def manifest(self) -> Path:
        """Which hook files there were, with their hashes."""
        return self.path / "code" / "files.json"


def shown(path: Path, started_in: Path) -> str:
    """A path as it is called from a folder: relative if it lies below, else as it is.

    >>> shown(Path("/home/me/runs/a"), Path("/home/me")), shown(Path("/runs/a"), Path("/home/me"))
    ('runs/a', '/runs/a')
    """
    return str(path.relative_to(started_in) if path.is_relative_to(started_in) else path)


def create(save_dir: Path, task_name: str, name: str = "") -> RunFolder:
    """Make a new folder and point ``latest`` at it; a clash appends ``-2``.

    Args:
        save_dir: Holds the task folders.
        task_name: Name of the task's folder.
        name: Name of the run's folder; empty: the time.

    Raises:
        RunError: It can't be made.
    """
    parent = save_dir / task_name
    wanted = name or datetime.now().strftime(TIMESTAMP)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        path = _first_free(parent, wanted)
        (path / "checkpoints").mkdir()
        point_latest(path)
    except OSError as error:
        is_long = error.errno == errno.ENAMETOOLONG
        writable = "name a folder that can be written: config.save_dir=FOLDER"
        problem = Problem(
            "E-RUN-FOLDER",
            f"can't make the run folder: {error.strerror}",
            str(parent),
            fix="a shorter task_name, --name or config.save_dir" if is_long else writable,
        )
        raise RunError(problem) from error
    return RunFolder(path)


def _first_free(parent: Path, wanted: str) -> Path:
    number = 1
    while True:
        path = parent / (wanted if number == 1 else f"{wanted}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path


def point_latest(path: Path) -> None:
    """Make ``latest`` beside ``path`` a link to it; where links are not allowed, leave it."""
    temporary = path.parent / f".latest-{os.getpid()}"
    try:
        temporary.symlink_to(path.name, target_is_directory=True)
        temporary.replace(path.parent / "latest")
    except OSError:
        temporary.unlink(missing_ok=True)


def open_run(path: Path) -> RunFolder:
    """An existing run folder; ``latest`` is followed.

    Raises:
        RecipeError: ``path`` is no run folder.
    """
    resolved = path.resolve()
    if not (resolved / "recipe.yaml").is_file() or not (resolved / "checkpoints").is_dir():
        raise RecipeError(
            Problem(
                "E-RUN-UNKNOWN",
                "not a run folder",
                str(path),
                expected="a folder with recipe.yaml and checkpoints/",
                fix="slim list runs",
            )
        )
    return RunFolder(resolved)


def discard(folder: RunFolder) -> None:
    """Take away a run folder that nothing was done in, and the link to it."""
    latest = folder.path.parent / "latest"
    if latest.is_symlink() and latest.resolve() == folder.path.resolve():
        latest.unlink()
    shutil.rmtree(folder.path, ignore_errors=True)


def write_origin(
    folder: RunFolder,
    recipe: str,
    source: str,
    code: Sequence[Path],
    started_in: Path | None = None,
) -> None:
    """Recipe, command line and code, so that the folder explains itself.

    Args:
        folder: The run folder.
        recipe: The complete recipe.
        source: The recipe as the user wrote it; empty for the Python API.
        code: Files of the hooks.
        started_in: Where the command was given; None: in the current folder.
    """
    atomic.write_text(folder.path / "recipe.yaml", recipe)
    if source:
        atomic.write_text(folder.path / "recipe.source.yaml", source)
    command = f"{shlex.join(sys.argv)}\n# in {started_in or Path.cwd()}\n"
    atomic.write_text(folder.path / "command.txt", command)
    (folder.path / "code").mkdir(exist_ok=True)
    entries = []
    for file in filter(Path.is_file, code):
        copied = _first_free_file(folder.path / "code", file.name)
        atomic.write_bytes(copied, file.read_bytes())
        entries.append({"path": str(file.resolve()), "copy": copied.name, "sha256": digest(file)})
    atomic.write_text(folder.manifest, json.dumps(entries, indent=2) + "\n")
    _write_git(folder, code)


def write_changed_recipe(folder: RunFolder, recipe: str) -> Path:
    """Store a recipe that was changed for a resume beside the ones before it; its path."""
    number = 2
    while (folder.path / f"recipe.{number}.yaml").exists():
        number += 1
    path = folder.path / f"recipe.{number}.yaml"
    atomic.write_text(path, recipe)
    return path


def _first_free_file(parent: Path, name: str) -> Path:
    path, number = parent / name, 1
    while path.exists():
        number += 1
        path = parent / f"{Path(name).stem}-{number}{Path(name).suffix}"
    return path


def digest(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def changed_code(folder: RunFolder, code: Sequence[Path]) -> list[str]:
    """Hook files that are not what they were when the run started, as ``path (what)``."""
    stored = _stored_code(folder)
    current = {str(file.resolve()): digest(file) for file in filter(Path.is_file, code)}
    changed = [
        f"{path} (changed)" for path, value in current.items() if stored.get(path, value) != value
    ]
    changed += [f"{path} (new)" for path in current if path not in stored]
    changed += [f"{path} (gone)" for path in stored if path not in current]
    return changed


def _stored_code(folder: RunFolder) -> dict[str, str]:
    """Path and hash of every hook file the run started with; nothing where that is not known."""
    try:
        return {each["path"]: each["sha256"] for each in json.loads(folder.manifest.read_text())}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _write_git(folder: RunFolder, code: Sequence[Path]) -> None:
    """Commit and uncommitted changes around the hooks, where they lie in a git checkout."""
    if not code or not code[0].is_file():
        return
    commit = _git(code[0].resolve().parent, "rev-parse", "HEAD")
    if commit:
        atomic.write_text(folder.path / "code" / "git-commit.txt", commit)
        diff = _git(code[0].resolve().parent, "diff", "HEAD")
        if diff:
            atomic.write_text(folder.path / "code" / "uncommitted.diff", diff)


def _git(where: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(where), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""
    return done.stdout if done.returncode == 0 else ""
