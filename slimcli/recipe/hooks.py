"""Imports the user's code, once and in one place, and binds the hooks a recipe names."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from slimcli.errors import HookError, Problem, SlimError
from slimcli.recipe.binding import RAISED, BoundHook, bind, location
from slimcli.recipe.find import find_file, shadowing, shown, split_target
from slimcli.recipe.frames import describe, frame_lines, is_users, place_of, user_frames
from slimcli.recipe.model import Recipe, is_file_target
from slimcli.recipe.validate import suggest

__all__ = ["Hooks", "bind", "check_model", "import_target", "resolve"]

_loaded_by_us: set[str] = set()
"""Names in sys.modules that stand for a user's file; a file elsewhere may take them over."""


@dataclass(frozen=True)
class Hooks:
    """The user's functions, each taking our order of arguments.

    Attributes:
        build_model: ``() -> nn.Module``.
        dataset_generator: ``() -> (train, validation[, test])``.
        predict_function: ``(model, data) -> prediction``.
        calculate_loss_function: ``(prediction, data) -> loss``.
        evaluate_function: ``(prediction, data) -> dict``, or an object with update and compute.
        optimizer_generator: ``(config, params) -> optimizer``, or None.
        scheduler_generator: ``(config, optimizer) -> scheduler``, or None.
        collate_fn: The user's own, or None.
        teacher: ``() -> nn.Module``, or None.
        locations: ``file:line`` of each hook.
        files: The user's source files that were imported.
        warnings: Sentences about the user's folders.
    """

    build_model: Callable[[], Any]
    dataset_generator: Callable[[], Any]
    predict_function: Callable[[Any, Any], Any]
    calculate_loss_function: Callable[[Any, Any], Any]
    evaluate_function: Any
    optimizer_generator: Callable[[Any, Any], Any] | None = None
    scheduler_generator: Callable[[Any, Any], Any] | None = None
    collate_fn: Callable[[Any], Any] | None = None
    teacher: Callable[[], Any] | None = None
    locations: Mapping[str, str] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    warnings: tuple[str, ...] = ()


def resolve(recipe: Recipe) -> Hooks:
    """Imports every hook of a recipe and checks its signature; calls none of them.

    Raises:
        HookError: With everything that is wrong.
    """
    specs = {"model": recipe.model, **recipe.hooks}
    specs |= {"teacher": recipe.teacher} if recipe.teacher else {}
    bound: dict[str, Any] = {}
    locations: dict[str, str] = {}
    problems: dict[tuple[str, str], Problem] = {}
    frames: tuple[str, ...] = ()
    before = set(sys.modules)
    targets: list[Path] = []
    for name, spec in specs.items():
        try:
            found, file = import_target(recipe, spec.target, spec.where)
            targets += [file] if file else []
            locations[name] = location(found)
            bound[name] = bind(name, found, spec.keywords)
        except SlimError as error:
            for each in error.problems:  # one file that fails is one problem
                problems.setdefault((each.code, each.what), each)
            frames = frames or error.user_frames
    if problems:
        raise HookError(*problems.values(), user_frames=frames)
    build_model = _model_builder("model", bound.pop("model"))
    if "teacher" in bound:
        bound["teacher"] = _model_builder("teacher", bound["teacher"])
    return Hooks(
        build_model=build_model,
        **bound,
        locations=locations,
        files=_files(recipe, before, targets),
        warnings=tuple(shadowing(dict.fromkeys((recipe.folder, *recipe.code)))),
    )


def import_target(recipe: Recipe, target: str, where: str = "") -> tuple[Any, Path | None]:
    """What a target of the recipe names, and the file it lies in.

    Raises:
        HookError: There is no such file, module or name, or importing it failed.
    """
    module_name, name = split_target(target)
    use_folders(recipe)
    if is_file_target(target):
        path = find_file(module_name, recipe.import_folders)
        if path is None:
            raise HookError(Problem("E-HOOK-FILE", f"no file {module_name}", where))
        module = _guarded(lambda: import_file(path), shown(path), where)
    else:
        module = _guarded(lambda: importlib.import_module(module_name), module_name, where)
    if not hasattr(module, name):
        names = [each for each in vars(module) if not each.startswith("_")]
        close = suggest(name, names)
        fix = f"did you mean {close}?" if close else f"it has {', '.join(names)}"
        raise HookError(Problem("E-HOOK-NAME", f"no {name} in {module_name}", where, fix=fix))
    file = getattr(module, "__file__", None)
    return getattr(module, name), Path(file) if file else None


def use_folders(recipe: Recipe) -> None:
    """Puts the user's folders first on the import path, the recipe's before all others.

    Worker processes that are spawned inherit the path.
    """
    folders = [str(folder) for folder in recipe.import_folders]
    sys.path[:] = folders + [each for each in sys.path if each not in folders]


def import_file(path: Path) -> ModuleType:
    """A file as a real module, so that siblings and pickles can import it by name."""
    root, parts = path.parent, [path.stem]
    while (root / "__init__.py").is_file():
        parts.insert(0, root.name)
        root = root.parent
    name = ".".join(parts)
    known = sys.modules.get(name)
    if known is not None and _is_at(known, path):
        return known
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    if known is None and len(parts) > 1 and parts[0] not in sys.modules:
        _loaded_by_us.add(name)
        return importlib.import_module(name)
    if known is not None and name not in _loaded_by_us:
        name = f"slim_user_{abs(hash(str(path)))}_{path.stem}"
        if name in sys.modules:
            return sys.modules[name]
    return _execute(name, path)


def _is_at(module: ModuleType, path: Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve() == path


def _execute(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    old = sys.modules.get(name)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        if old is not None:
            sys.modules[name] = old
        raise
    _loaded_by_us.add(name)
    return module


def _guarded(load: Callable[[], ModuleType], name: str, where: str) -> ModuleType:
    """Imports; whatever the user's module raises is told as such, with the user's frames."""
    try:
        return load()
    except RAISED as error:
        frames = user_frames(error)
        what = f"{name} cannot be imported: {describe(error)}"
        fix = "full trace: --traceback"
        if isinstance(error, ModuleNotFoundError) and error.name:
            fix = f"install {error.name}, or put its folder into code:"
        elif isinstance(error, ImportError) and "relative import" in str(error):
            fix = "beside the recipe write `from other import x`; `from .other` needs a package, a "
            fix += "folder with __init__.py"
        problem = Problem("E-HOOK-IMPORT", what, place_of(frames) or where, fix=fix)
        raise HookError(problem, user_frames=frame_lines(frames)) from error


def _files(recipe: Recipe, before: set[str], targets: list[Path]) -> tuple[Path, ...]:
    """The user's files among the modules that were imported, and the hooks' own."""
    found = dict.fromkeys(path.resolve() for path in targets if is_users(str(path)))
    for name in sorted(set(sys.modules) - before - {"__mp_main__"}):  # joblib's name for __main__
        file = getattr(sys.modules[name], "__file__", None)
        if not file or not is_users(file):
            continue
        path = Path(file).resolve()
        if any(folder in path.parents for folder in recipe.import_folders):
            found[path] = None
    return tuple(found)


def _model_builder(name: str, build: BoundHook) -> Callable[[], Any]:
    """The user's builder, which returns a module or fails with the reason."""

    @functools.wraps(build.__wrapped__, updated=())
    def checked() -> Any:
        return check_model(build(), name, build.where)

    return checked


def check_model(model: Any, name: str = "model", where: str = "") -> Any:
    """The model, if it is one.

    Raises:
        HookError: It is a class, or no ``torch.nn.Module``.
    """
    from torch import nn

    if isinstance(model, nn.Module):
        return model
    received, fix = f"a {type(model).__name__}", "return the model itself"
    if model is None:
        received, fix = "None", "return the model"
    elif isinstance(model, type):
        received, fix = f"the class {model.__name__}", f"return {model.__name__}(...)"
    what = f"hook `{name}` returned the wrong thing"
    raise HookError(Problem("E-HOOK-MODEL", what, where, "a torch.nn.Module", received, fix=fix))
