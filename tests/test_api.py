"""docs/api.md has every public class, method and field, each with a meaning."""

from __future__ import annotations

import re

from tests.api import PAGE, classes, page


def test_the_page_is_what_the_docstrings_say() -> None:
    assert PAGE.read_text() == page(), "run python -m tests.api"


def test_everything_has_a_meaning() -> None:
    lines = page().splitlines()
    empty = [line for line in lines if re.search(r"\|\s*\|$", line)]
    assert empty == []
    for i, line in enumerate(lines):
        if line.startswith("**`"):
            assert lines[i + 2].strip(), line
            assert not lines[i + 2].startswith(("**", "#")), line


def test_every_class_is_there_once() -> None:
    names = [(module, cls.__name__) for _, module, cls in classes()]
    assert len(names) == len(set(names)) > 50
