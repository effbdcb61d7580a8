"""Rules of the house that a machine can check: who may import whom, and how big things may get."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "slimcli"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Who may not import whom: the arrows point cli -> solver -> compressor <- algorithms -> network.
FORBIDDEN = {
    "network": ("cli", "console", "recipe", "solver", "artifacts", "algorithms", "report"),
    "algorithms": ("cli", "console", "recipe", "solver", "artifacts", "report"),
    "compressor": ("cli", "console", "recipe", "solver", "artifacts", "report"),
    "artifacts": ("cli", "console", "recipe", "solver", "algorithms"),
    "report": ("cli", "console", "recipe", "solver", "algorithms"),
    "recipe": ("cli", "console", "artifacts", "report"),
    "solver": ("cli", "console"),
    "api": ("cli", "console"),
    "attachment": ("cli", "console", "recipe"),
    "errors": ("cli", "console", "recipe", "solver", "artifacts", "report", "network"),
}
ALGORITHM_NAMES = ("resrep", "acnet", "csgd", "c-sgd", "qat")
NAMELESS = ("solver", "network", "cli")


def part_of(path: Path) -> str:
    """``network`` for slimcli/network/cuts.py, ``errors`` for slimcli/errors.py."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imported_names(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name for every import in a file, lazy ones and those for types included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def imported_parts(path: Path) -> Iterator[tuple[int, str]]:
    """Line and part of the package for every import in a file."""
    for line, name in imported_names(path):
        pieces = name.split(".")
        if pieces[0] == "slimcli" and len(pieces) > 1:
            yield line, pieces[1]


@pytest.mark.parametrize("part", sorted(FORBIDDEN))
def test_imports_point_one_way(part: str) -> None:
    wrong = [
        f"{path.relative_to(PACKAGE.parent)}:{line} imports {other}"
        for path in SOURCES
        if part_of(path) == part
        for line, other in imported_parts(path)
        if other in FORBIDDEN[part]
    ]
    assert wrong == []


def test_no_files_import_each_other_in_a_circle() -> None:
    files = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path
        for path in SOURCES
        if path.name != "__init__.py"
    }
    arrows = {
        name: {other for _, other in imported_names(path) if other in files}
        for name, path in files.items()
    }
    assert sum(map(len, arrows.values())) > 500
    list(TopologicalSorter(arrows).static_order())  # raises CycleError, which names the circle


@pytest.mark.parametrize("part", NAMELESS)
def test_no_algorithm_is_named_outside_its_folder(part: str) -> None:
    wrong = [
        f"{path.relative_to(PACKAGE.parent)}:{number} {line.strip()}"
        for path in SOURCES
        if part_of(path) == part
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if any(name in line.lower() for name in ALGORITHM_NAMES)
    ]
    assert wrong == []


def test_every_config_imports_without_torch() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'sklearn', 'torchvision'): sys.modules[name] = None\n"
        "from slimcli.compressor import registry\n"
        "print(','.join(registry()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().split(",") == ["acnet", "csgd", "finetune", "qat", "resrep"]


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import slimcli; print(slimcli.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All functions of a file, nested ones included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    docstring = ast.get_docstring(node, clean=False)
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    return lines - (docstring.count("\n") + 1 if docstring else 0)


def test_files_and_functions_stay_small() -> None:
    long_files = [
        f"{path.relative_to(PACKAGE.parent)}: {count} lines"
        for path in SOURCES
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > 400
    ]
    long_functions = [
        f"{path.relative_to(PACKAGE.parent)}:{node.lineno} {node.name}: {body_lines(node)} lines"
        for path in SOURCES
        for node in functions(path)
        if body_lines(node) > 60
    ]
    assert long_files + long_functions == []


def test_every_algorithm_says_where_it_comes_from_and_what_differs() -> None:
    for path in sorted((PACKAGE / "algorithms").glob("*/method.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        if path.parent.name in ("finetune", "qat"):
            continue
        assert "arXiv" in text, path
        assert "differs from the paper" in text.lower(), path


def test_every_test_asserts_something() -> None:
    silent = []
    for path in sorted(Path(__file__).parent.rglob("test_*.py")):
        for node in functions(path):
            if not node.name.startswith("test_"):
                continue
            source = ast.dump(node)
            marks = ("Assert(", "'raises'", "assert_", "'warns'", "check_")
            if not any(mark in source for mark in marks):
                silent.append(f"{path.name}:{node.lineno} {node.name}")
    assert silent == []


def test_only_the_console_writes_results() -> None:
    """Commands run while ``sys.stdout`` is stderr, so that a hook's print is no result."""
    wrong = [
        f"{path.name}:{node.lineno}"
        for path in sorted((PACKAGE / "cli").glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("click.echo", "print")
        and not any(word.arg in ("err", "file") for word in node.keywords)
    ]
    assert wrong == []
