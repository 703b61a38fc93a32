"""The core stays small enough to read in a day; `python -m tests.size` prints the figures."""

from __future__ import annotations

import subprocess

import pytest

from tests.path import first_token
from tests.size import READING_PATH, ROOT, functions, manifest, size_of, total

ALL = [file for files in manifest().values() for file in files]
# Folders and files of the repository that are no part of the core.
OTHERS = ("tests", "benchmarks", "assets", "bench.py", "example.py")


def test_the_manifest_has_every_file_of_the_core_once() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    if not listed:
        pytest.skip("this is no git checkout")
    core = [name for name in listed if not name.startswith(OTHERS) and size_of(ROOT / name).lines]
    assert sorted(ALL) == sorted(core)


@pytest.mark.parametrize("name", ALL)
def test_no_file_and_no_function_is_long(name: str) -> None:
    assert size_of(ROOT / name).lines <= 400
    if not name.startswith("layers/kernels/"):
        assert {f: lines for f, lines in functions(ROOT / name) if lines > 60} == {}


def test_the_core_and_its_reading_path_are_short() -> None:
    """The redesign ended at 11,500 and 7,700 lines; docs/LOG.md says what each feature added."""
    core = total(ALL)
    assert core.lines <= 19_390
    assert core.code <= 12_970
    assert total(manifest()[READING_PATH]).lines <= 5_000


def test_a_plan_comes_back_to_no_file_more_than_twice() -> None:
    calls = first_token(ROOT / "assets" / "qwen3-tiny-python")
    assert "engine/model_runner.py" in calls.plan_files
    assert max(calls.returns.values(), default=0) <= 2
