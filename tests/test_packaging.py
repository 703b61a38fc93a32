"""What `pip install` takes along."""

from __future__ import annotations

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
