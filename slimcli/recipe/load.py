"""A recipe file and the command line's overrides to a checked recipe, or all that is wrong."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from slimcli.compressor import AlgorithmConfig, AlgorithmInfo
from slimcli.errors import Problem, RecipeError
from slimcli.recipe import find, keys
from slimcli.recipe.apply import apply
from slimcli.recipe.draft import Draft, StageDraft
from slimcli.recipe.model import Change, ExportConfig, HookSpec, Recipe, Stage
from slimcli.recipe.nodes import Entry, Node, Place, Source, parse, plain, problem
from slimcli.recipe.overrides import parse_overrides
from slimcli.recipe.validate import Section, received, validate
from slimcli.solver.config import TrainingConfig

NAME_BYTES = 255
"""The longest name of a folder, on all file systems in use."""


FROM_PYTHON = "from Python; model and hooks were objects."
"""How the first line of the recipe ends that a run of a Solver leaves in its folder."""


class Heading(BaseModel):
    """The simple keys of the top level."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task_name: str | None = None
    code: str | tuple[str, ...] | None = None
    init_from: str | None = None


def load(path: Path, overrides: Sequence[str] = (), *, find_hooks: bool = True) -> Recipe:
    """The recipe a file and ``key=value`` words describe; imports neither torch nor user code.

    Args:
        path: The recipe file.
        overrides: Words of the command line.
        find_hooks: Also check that the files and functions it names exist.

    Raises:
        RecipeError: With everything that is wrong, in the order of the file.
    """
    problems: list[Problem] = []
    source = read(Path(path))
    root = parse(source, problems)
    words = parse_overrides(overrides, problems)
    if root is None or not isinstance(root.value, dict):
        problems += [] if root is None and problems else [_not_a_mapping(root, source)]
        raise RecipeError(*problems)
    draft = Draft(root, problems)
    draft.identify(words)
    apply(draft, words)
    _refuse_run_from_python(draft, Path(path), source)
    assembly = _Assembly(draft, Path(path), source)
    recipe = assembly.recipe()
    if find_hooks:
        problems += assembly.missing_files()
    if problems or recipe is None:
        raise RecipeError(*_in_order(problems))
    return recipe


def read(path: Path) -> Source:
    """The text of a recipe file.

    Raises:
        RecipeError: It is missing, a folder, unreadable or not UTF-8.
    """
    name = str(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        beside = path.parent if path.parent.is_dir() else Path()
        near = sorted(str(each) for each in beside.glob("*.y*ml"))[:5]
        fix = f"recipes here: {', '.join(near)}" if near else "make one: slim init"
        raise RecipeError(Problem("E-RECIPE-FILE", f"no file {name}", fix=fix)) from None
    except IsADirectoryError:
        inside = [each for each in (path / "recipe.yaml",) if each.is_file()]
        fix = f"write {inside[0]}" if inside else "name the YAML file"
        raise RecipeError(Problem("E-RECIPE-FILE", f"{name} is a folder", fix=fix)) from None
    except UnicodeDecodeError as error:
        what = f"{name} is not UTF-8 text (byte {error.start})"
        fix = "save it as UTF-8; a recipe is a text file"
        raise RecipeError(Problem("E-RECIPE-ENCODING", what, fix=fix)) from None
    except OSError as error:
        what = f"{name} cannot be read: {error.strerror}"
        raise RecipeError(Problem("E-RECIPE-FILE", what)) from None
    return Source(name, text)


def _not_a_mapping(root: Node | None, source: Source) -> Problem:
    if root is None or root.value is None:
        fix = "start from a template: slim init"
        return Problem("E-RECIPE-EMPTY", "the recipe is empty", where=source.name, fix=fix)
    return problem(
        "E-RECIPE-SYNTAX",
        "the recipe",
        root.place,
        expected="a mapping: lines of `key: value`",
        received=received(root.value),
    )


def _refuse_run_from_python(draft: Draft, path: Path, source: Source) -> None:
    """A run of a Solver names no model and no hooks, which is nobody's mistake in a recipe.

    Raises:
        RecipeError: Says what opens the run instead.
    """
    head = source.text.partition("\n")[0]
    if not head.endswith(FROM_PYTHON) or "model" in draft.top or "hooks" in draft.top:
        return
    run = find.shown(path.resolve().parent)
    solver = head.removeprefix("# Run by slimcli.").partition(" ")[0]
    raise RecipeError(
        Problem(
            "E-RUN-PYTHON",
            "the run was started from Python: its model and hooks were objects in no file",
            source.name,
            fix=f"slimcli.load_deploy({run!r}, model=...) loads its result; "
            f"slimcli.{solver}(model, config).run(resume={run!r}) goes on with it",
        )
    )


def _in_order(problems: list[Problem]) -> list[Problem]:
    """Without repetitions, in the order of the file; what has no line comes last."""

    def line(each: Problem) -> tuple[int, int]:
        parts = each.where.rsplit(":", 2)
        is_place = len(parts) == 3 and parts[1].isdigit() and parts[2].isdigit()
        return (int(parts[1]), int(parts[2])) if is_place else (1 << 30, 0)

    return sorted(dict.fromkeys(problems), key=line)


class _Assembly:
    """Checks the values of a draft and builds the recipe from them."""

    def __init__(self, draft: Draft, path: Path, source: Source) -> None:
        self.draft = draft
        self.path = path
        self.source = source
        self.problems = draft.problems
        self.folder = path.resolve().parent
        self.code: tuple[Path, ...] = ()
        self.targets: list[tuple[str, str, Place]] = []

    def missing_files(self) -> list[Problem]:
        """A problem for each file or function that the recipe names and that is not there."""
        folders = tuple(dict.fromkeys((self.folder, *self.code, Path.cwd())))
        found: dict[find.NotFound, list[tuple[str, Place]]] = {}
        for key, target, place in self.targets:
            wrong = find.check_target(target, folders)
            if wrong:  # a file that is gone is one problem, however many hooks lie in it
                found.setdefault(wrong, []).append((key, place))
        return [
            problem(
                wrong.code,
                f"{', '.join(key for key, _ in wanted)}: {wrong.what}",
                wanted[0][1],
                fix=wrong.fix,
            )
            for wrong, wanted in found.items()
        ]

    def recipe(self) -> Recipe | None:
        """The recipe; None if it cannot be built, then the problems say why."""
        heading = self._heading()
        self.code = self._code(heading.code if heading else None)
        model = self._hook("model", self.draft.top.get("model"))
        hooks = self._hooks()
        teacher = self._hook("teacher", self.draft.top.get("teacher"), is_required=False)
        export = self._section(ExportConfig, "export", self.draft.export, {})
        stages = [self._stage(each) for each in self.draft.stages]
        if not (heading and model and export and stages and all(stages)):
            return None
        return Recipe(
            path=self.path,
            folder=self.folder,
            source_text=self.source.text,
            task_name=heading.task_name or self.path.stem,
            stages=tuple(stage for stage in stages if stage),
            model=model,
            hooks=hooks,
            export=export,
            code=self.code,
            init_from=self._init_from(heading.init_from),
            teacher=teacher,
            is_staged=self.draft.is_staged,
            changes=tuple(self._changes()),
        )

    def _section(
        self,
        schema: type[Any],
        name: str,
        entries: dict[str, Entry],
        defaults: dict[str, Any],
        place: Place | None = None,
    ) -> Any:
        where = self.draft.top[name].place if name in self.draft.top else self.draft.root.place
        return validate(schema, Section(name, entries, place or where, defaults), self.problems)

    def _heading(self) -> Heading | None:
        names = tuple(Heading.model_fields)
        given = {key: entry for key, entry in self.draft.top.items() if key in names}
        for key, entry in given.items():
            entry.spelled = key
        heading: Heading | None = self._section(Heading, "", given, {})
        if heading and heading.task_name is not None:
            self._check_task_name(heading.task_name)
        return heading

    def _check_task_name(self, name: str) -> None:
        size = len(os.fsencode(name))
        if size > NAME_BYTES:
            self.draft.complain(
                "E-RECIPE-VALUE",
                "task_name",
                self.draft.top["task_name"].node.place,
                expected=f"the name of a folder: at most {NAME_BYTES} bytes",
                received=f"{size} bytes",
            )
        if not name.strip() or "/" in name or "\\" in name or name.startswith("."):
            self.draft.complain(
                "E-RECIPE-VALUE",
                "task_name",
                self.draft.top["task_name"].node.place,
                expected="the name of a folder: no / or \\, no dot at the beginning",
                received=received(name),
            )

    def _hooks(self) -> dict[str, HookSpec]:
        given = self.draft.hooks
        place = self.draft.top["hooks"].place if "hooks" in self.draft.top else self._start
        missing = [name for name in keys.REQUIRED_HOOKS if name not in given]
        is_mapping = "hooks" not in self.draft.top or isinstance(
            self.draft.top["hooks"].node.value, dict | type(None)
        )
        if missing and is_mapping:
            what = f"hooks: missing {', '.join(missing)}"
            fix = f"add {missing[0]}: file.py:function; what each one does: slim explain hooks"
            self.draft.complain("E-RECIPE-MISSING-HOOK", what, place, fix=fix)
        found = {name: self._hook(name, given[name]) for name in keys.HOOKS if name in given}
        return {name: spec for name, spec in found.items() if spec}

    @property
    def _start(self) -> Place:
        return self.draft.root.place

    def _hook(self, name: str, entry: Entry | None, is_required: bool = True) -> HookSpec | None:
        key = name if name in keys.TOP_KEYS else f"hooks.{name}"
        if entry is None:
            if is_required:
                fix = f"add {name}: file.py:function"
                what = f"{key} is required"
                self.draft.complain("E-RECIPE-MISSING-KEY", what, self._start, fix=fix)
            return None
        node, keywords = entry.node, {}
        if isinstance(node.value, dict):
            keywords = {each: plain(inner.node) for each, inner in node.value.items()}
            keywords.pop("target", None)
            if "target" in node.value:
                node = node.value["target"].node
        if node.broken:
            return None
        if isinstance(node.value, str) and node.value:
            self.targets.append((key, node.value, node.place))
            return HookSpec(name, node.value, keywords, str(node.place), node.place)
        self.draft.complain(
            "E-RECIPE-TYPE",
            key,
            node.place,
            expected="file.py:function, package.module.function, or {target: one of these, "
            "any: keyword}",
            received=received(plain(node)),
        )
        return None

    def _stage(self, stage: StageDraft) -> Stage | None:
        info = stage.algorithm if isinstance(stage.algorithm, AlgorithmInfo) else None
        entries = {**self.draft.shared, **stage.config}
        training = {key: entry for key, entry in entries.items() if key in keys.TRAINING_KEYS}
        own = {key: entry for key, entry in entries.items() if key not in keys.TRAINING_KEYS}
        defaults = info.training_defaults if info else {}
        name = stage.prefix[:-1]
        if isinstance(stage.algorithm, str):
            place = stage.given["algorithm"].node.place
            self.targets.append(("algorithm", stage.algorithm, place))
        loop = self._section(TrainingConfig, name, training, defaults, stage.place)
        config: AlgorithmConfig | dict[str, Any] | None
        if info:
            config = self._section(info.config, name, own, {}, stage.place)
        else:
            config = {key: plain(entry.node) for key, entry in own.items()}
        if loop is None or config is None or stage.algorithm is None:
            return None
        return Stage(stage.name, stage.algorithm, loop, config, entries, stage.place)

    def _code(self, written: str | tuple[str, ...] | None) -> tuple[Path, ...]:
        listed = (written,) if isinstance(written, str) else written or ()
        folders = [(self.folder / each).resolve() for each in listed]
        for text, folder in zip(listed, folders, strict=True):
            if not folder.is_dir():
                place = self.draft.top["code"].node.place
                fix = f"looked for {os.path.relpath(folder)}"
                self.draft.complain("E-RECIPE-CODE", f"code: no folder {text}", place, fix=fix)
        return tuple(folders)

    def _init_from(self, written: str | None) -> Path | None:
        if written is None:
            return None
        for folder in (self.folder, Path.cwd()):
            if (folder / written).exists():
                return (folder / written).resolve()
        place = self.draft.top["init_from"].node.place
        fix = f"looked in {find.shown(self.folder)} and the current folder"
        what = f"init_from: no file or run folder {written}"
        self.draft.complain("E-RECIPE-INIT-FROM", what, place, fix=fix)
        return None

    def _changes(self) -> list[Change]:
        found: dict[str, Change] = {}
        for stage in self.draft.stages:
            info = stage.algorithm if isinstance(stage.algorithm, AlgorithmInfo) else None
            fields = {**TrainingConfig.model_fields, **(info.config.model_fields if info else {})}
            special = info.training_defaults if info else {}
            for key, entry in {**self.draft.shared, **stage.config}.items():
                field = fields.get(key)
                default = special.get(key, field.get_default() if field else None)
                prefix = stage.prefix if key in stage.config else "config."
                self._note(found, prefix + key, default, entry)
        for key, entry in self.draft.export.items():
            self._note(found, f"export.{key}", ExportConfig.model_fields[key].default, entry)
        return list(found.values())

    @staticmethod
    def _note(found: dict[str, Change], key: str, default: Any, entry: Entry) -> None:
        value = plain(entry.node)
        comparable = list(default) if isinstance(default, tuple) else default
        is_its_text = isinstance(default, str) and str(value) == default  # precision: 32
        if value != comparable and not is_its_text:
            found[key] = Change(key, comparable, value, entry.node.place.origin)
