"""Where the user's code lies: files are found and read, never imported. No torch here."""

from __future__ import annotations

import ast
import importlib.machinery
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from slimcli.recipe.model import is_file_target
from slimcli.recipe.validate import suggest


@dataclass(frozen=True)
class NotFound:
    """Why a target leads nowhere.

    Attributes:
        code: Error code.
        what: One sentence.
        fix: What to do about it.
    """

    code: str
    what: str
    fix: str = ""


def shown(path: Path) -> str:
    """A path as the user would type it: relative inside the current folder."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def split_target(target: str) -> tuple[str, str]:
    """Module part and name part of a target.

    >>> split_target("digits.py:build_model"), split_target("pkg.mod.build")
    (('digits.py', 'build_model'), ('pkg.mod', 'build'))
    """
    if is_file_target(target):
        file, _, name = target.rpartition(":")
        return file, name
    module, _, name = target.rpartition(".")
    return module, name


def find_file(file: str, folders: Iterable[Path]) -> Path | None:
    """The file of a ``file.py:function`` target: beside the recipe first."""
    for folder in folders:
        path = folder / file
        if path.is_file():
            return path.resolve()
    return None


def find_module(module: str, folders: Iterable[Path]) -> Path | None:
    """The source file of a dotted module, or None where it has none we can read."""
    search: Sequence[str] = [*(str(folder) for folder in folders), *sys.path]
    spec = None
    for part in module.split("."):
        spec = importlib.machinery.PathFinder.find_spec(part, search)
        if spec is None:
            return None
        search = list(spec.submodule_search_locations or [])
    origin = spec.origin if spec else None
    return Path(origin) if origin and origin.endswith(".py") else None


def has_module(module: str, folders: Iterable[Path]) -> bool:
    """Whether the first part of a dotted module can be found at all."""
    first = module.split(".")[0]
    search = [*(str(folder) for folder in folders), *sys.path]
    builtin = first in sys.builtin_module_names
    return builtin or importlib.machinery.PathFinder.find_spec(first, search) is not None


def check_target(target: str, folders: Sequence[Path]) -> NotFound | None:
    """What is wrong with a target, as far as reading its file can tell."""
    module, name = split_target(target)
    if is_file_target(target):
        path = find_file(module, folders)
        if path is None:
            return _no_file(module, folders)
        return check_name(path, name)
    if not module:
        fix = "write file.py:function or package.module.function"
        return NotFound("E-HOOK-TARGET", f"{target} names no file or module", fix)
    path = find_module(module, folders)
    if path is not None:
        missing = check_name(path, name)
        if name == "py" and missing is not None and missing.code == "E-HOOK-NAME":
            fix = f"write {target}:NAME; {missing.fix}"
            return NotFound("E-HOOK-TARGET", f"{target} names a file alone", fix)
        return missing
    if has_module(module, folders):
        return None  # A compiled module, or an attribute of a class: only importing can tell.
    looked = ", ".join(shown(folder) for folder in folders)
    first = module.split(".")[0]
    what = f"no module {first} in {looked}, nor among the installed packages"
    fix = f"install {first}, or put the folder it lies in into code:"
    if find_file(f"{module.replace('.', '/')}.py", folders):
        fix = f"write {module.replace('.', '/')}.py:{name}"
    return NotFound("E-HOOK-FILE", what, fix)


def _no_file(file: str, folders: Sequence[Path]) -> NotFound:
    """The files that are there instead; a run folder keeps a copy of each."""
    copies = [folder / "code" / Path(file).name for folder in folders]
    kept = next((each for each in copies if each.is_file()), None)
    if kept is not None:
        return NotFound("E-HOOK-FILE", f"no file {file}", f"put it back; a copy is {shown(kept)}")
    there = {path.name for folder in folders for path in folder.glob("*.py")}
    close = suggest(file, there)
    looked = ", ".join(shown(folder) for folder in folders)
    fix = f"did you mean {close}?" if close else f"looked in {looked}"
    return NotFound("E-HOOK-FILE", f"no file {file}", fix)


def check_name(path: Path, name: str) -> NotFound | None:
    """Whether a file defines a name, from its syntax tree."""
    try:
        tree = ast.parse(path.read_bytes(), filename=str(path))
    except SyntaxError as error:
        what = f"{shown(path)}:{error.lineno}: {error.msg}: {(error.text or '').strip()}"
        return NotFound("E-HOOK-SYNTAX", what, "the file is not valid Python")
    except (OSError, ValueError) as error:
        return NotFound("E-HOOK-FILE", f"{shown(path)} cannot be read: {error}")
    names, is_open = _names(tree.body)
    if is_open or name in names:
        return None
    close = suggest(name, names)
    listed = ", ".join(sorted(each for each in names if not each.startswith("_"))) or "nothing"
    fix = f"did you mean {close}?" if close else f"it has {listed}"
    return NotFound("E-HOOK-NAME", f"no {name} in {shown(path)} (read, not imported)", fix)


def _names(body: Sequence[ast.stmt]) -> tuple[set[str], bool]:
    """Names a module defines, and whether it may define more than can be read."""
    names: set[str] = set()
    is_open = False
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(statement.name)
            is_open |= statement.name == "__getattr__"
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            for alias in statement.names:
                is_open |= alias.name == "*"
                names.add(alias.asname or alias.name.split(".")[0])
        else:
            inner, inner_open = _names(
                [each for each in ast.iter_child_nodes(statement) if isinstance(each, ast.stmt)]
            )
            names |= inner | _assigned(statement)
            is_open |= inner_open
    return names, is_open


def _assigned(statement: ast.stmt) -> set[str]:
    """Names a statement other than a definition binds."""
    return {
        each.id
        for each in ast.walk(statement)
        if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)
    }


def shadowing(folders: Iterable[Path]) -> list[str]:
    """A warning for each file of the user that hides a module of the standard library."""
    found = []
    for folder in folders:
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            is_module = path.suffix == ".py" or (path / "__init__.py").is_file()
            if is_module and path.stem in sys.stdlib_module_names:
                found.append(
                    f"{shown(path)} hides the standard library's module {path.stem}: rename it"
                )
    return found
