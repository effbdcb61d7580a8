"""What a recipe says once it is checked: plain frozen data, no torch, nothing imported."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from slimcli.compressor import AlgorithmConfig, AlgorithmInfo
from slimcli.recipe.nodes import Entry, Place
from slimcli.solver.config import TrainingConfig


class ExportConfig(BaseModel):
    """Which artifacts a run makes beside the deploy format."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    onnx: bool = Field(True, description="write model.onnx and verify it with onnxruntime")
    trt: bool = Field(False, description="build a TensorRT engine and verify it; needs a GPU")


@dataclass(frozen=True)
class HookSpec:
    """Where one of the user's functions is to be found.

    Attributes:
        name: ``model``, ``teacher`` or the name of the hook.
        target: ``file.py:function`` or ``package.module.function``.
        keywords: Arguments of the function besides those slim passes.
        where: Place of the target in the recipe, for messages.
        place: The same with its text; None for hooks of the Python API.
    """

    name: str
    target: str
    keywords: dict[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)
    place: Place | None = field(default=None, compare=False, repr=False)

    def written(self, prefix: str = "") -> Any:
        """As it stands in a recipe; ``prefix`` leads to the folder of a relative file."""
        target = self.target
        if prefix and is_file_target(target) and not os.path.isabs(target):
            target = os.path.join(prefix, target)
        return {"target": target, **self.keywords} if self.keywords else target


@dataclass(frozen=True)
class Stage:
    """One algorithm with its keys.

    Attributes:
        name: Unique in the recipe.
        algorithm: What the registry knows of it, or the path of the user's own class.
        training: Keys of the loop.
        config: The algorithm's own keys; a dictionary, unchecked, for a user's class.
        entries: Everything written for it, with its places, for checks made later.
        place: Where it begins.
    """

    name: str
    algorithm: AlgorithmInfo | str
    training: TrainingConfig
    config: AlgorithmConfig | dict[str, Any]
    entries: Mapping[str, Entry] = field(default_factory=dict, repr=False, compare=False)
    place: Place | None = field(default=None, repr=False, compare=False)

    @property
    def algorithm_name(self) -> str:
        """The value of ``algorithm:``."""
        return self.algorithm if isinstance(self.algorithm, str) else self.algorithm.name

    def keys(self) -> dict[str, Any]:
        """All keys of ``config:``, as plain values."""
        own = self.config if isinstance(self.config, dict) else self.config.model_dump(mode="json")
        return {**self.training.model_dump(mode="json"), **own}


class Change(NamedTuple):
    """A key that differs from its default."""

    key: str
    default: Any
    value: Any
    origin: str


@dataclass(frozen=True)
class Recipe:
    """A checked recipe.

    Attributes:
        path: The file, as the user named it.
        folder: The folder of the recipe, absolute: relative paths start here.
        started_in: The current folder when the recipe was read. Code of the user's may change to
            another one, and what the command line means must not change with it.
        source_text: Its text, untouched.
        task_name: Name of the task.
        stages: At least one.
        model: Where the model comes from.
        hooks: Hook name -> where it comes from; only those given.
        export: Artifacts to make.
        code: Extra folders to import from, absolute.
        init_from: Run folder or file whose weights the first stage starts from, absolute.
        teacher: Where a teacher model comes from, or None.
        is_staged: Written with ``stages:``.
        changes: What differs from the defaults, in the order of the schema.
    """

    path: Path
    folder: Path
    source_text: str = field(repr=False, compare=False)
    task_name: str
    stages: tuple[Stage, ...]
    model: HookSpec
    hooks: dict[str, HookSpec]
    export: ExportConfig
    code: tuple[Path, ...] = ()
    init_from: Path | None = None
    teacher: HookSpec | None = None
    is_staged: bool = False
    changes: tuple[Change, ...] = field(default=(), compare=False)
    started_in: Path = field(default_factory=Path.cwd, compare=False)

    @property
    def import_folders(self) -> tuple[Path, ...]:
        """Folders the user's code is looked for in, first wins: recipe, ``code:``, current."""
        return tuple(dict.fromkeys((self.folder, *self.code, self.started_in)))

    def resolved(self, folder: Path | None = None) -> dict[str, Any]:
        """Every key with its value; dumped to YAML it loads again.

        Args:
            folder: Where the YAML will lie, if not beside the recipe: paths are written so that
                they lead to the same files from there.
        """
        elsewhere = folder is not None and folder.resolve() != self.folder
        start = folder.resolve() if folder else self.folder
        prefix = str(self.folder) if elsewhere else ""
        found: dict[str, Any] = {"task_name": self.task_name}
        if not self.is_staged:
            found["algorithm"] = self.stages[0].algorithm_name
        found["model"] = self.model.written(prefix)
        found["hooks"] = {name: hook.written(prefix) for name, hook in self.hooks.items()}
        if self.is_staged:
            found["stages"] = [
                {"name": each.name, "algorithm": each.algorithm_name, "config": each.keys()}
                for each in self.stages
            ]
        else:
            found["config"] = self.stages[0].keys()
        found["export"] = self.export.model_dump(mode="json")
        code = [self.folder, *self.code] if elsewhere else list(self.code)
        if code:
            found["code"] = [
                str(each) if elsewhere else os.path.relpath(each, start) for each in code
            ]
        if self.init_from:
            found["init_from"] = str(self.init_from)
        if self.teacher:
            found["teacher"] = self.teacher.written(prefix)
        return found

    def to_yaml(self, folder: Path | None = None) -> str:
        """The complete recipe as text, runnable again; see :meth:`resolved` for ``folder``."""
        from slimcli.recipe.dump import dump

        return dump(self.resolved(folder))


def is_file_target(target: str) -> bool:
    """True for ``file.py:function``.

    >>> is_file_target("digits.py:build_model"), is_file_target("package.module.build_model")
    (True, False)
    """
    return ".py:" in target
