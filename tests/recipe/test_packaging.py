"""After an install from a wheel everything is there that a checkout has."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

setuptools = pytest.importorskip("setuptools", minversion="70.1")

ROOT = Path(__file__).parents[2]


def settings() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def test_setup_cfg_lists_every_package():
    listed = settings()["options"]["packages"].split()
    found = setuptools.find_packages(str(ROOT), include=["slimcli", "slimcli.*"])
    assert sorted(listed) == sorted([*found, "slimcli.recipes", "slimcli.hooks_templates"])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the files that belong to the package."""
    copy = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("slimcli", "recipes", "hooks_templates"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    build = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q", "."]
    done = subprocess.run([*build, "-w", "out"], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next((copy / "out").glob("*.whl"))


@pytest.mark.slow
def test_a_wheel_has_recipes_and_templates_inside_the_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {each for each in tops if not each.endswith(".dist-info")} == {"slimcli"}
    for folder in ("recipes", "hooks_templates"):
        for path in (ROOT / folder).iterdir():
            if path.suffix in (".py", ".yaml"):
                assert f"slimcli/{folder}/{path.name}" in names
    assert "slimcli/cli/pages/errors.yaml" in names
    assert "slimcli/py.typed" in names


@pytest.mark.slow
def test_init_list_and_explain_work_from_a_wheel(wheel, tmp_path):
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    work = tmp_path / "work"
    work.mkdir()

    def slim(*words):
        command = [sys.executable, "-m", "slimcli", *words]
        environment = {**os.environ, "PYTHONPATH": str(target)}
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert str(target) in slim("list", "recipes", "--json")
    slim("init", "demo")
    assert (work / "demo" / "hooks.py").is_file()
    slim("check", "demo/recipe.yaml")
    assert "E-RECIPE-TYPE" in slim("explain", "E-RECIPE-TYPE")
