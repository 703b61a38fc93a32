"""How much there is to read: `python -m tests.size` counts the files that core.txt lists.

Lines of code are those that are neither blank nor part of a comment or a docstring.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
MANIFEST = Path(__file__).with_name("core.txt")
READING_PATH = "reading path"
_NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


@dataclass(frozen=True)
class Size:
    """Lines of a file, and those of them that are code."""

    lines: int
    code: int

    def __add__(self, other: Size) -> Size:
        return Size(self.lines + other.lines, self.code + other.code)


def manifest() -> dict[str, list[str]]:
    """The files of each section, by its name in brackets."""
    sections: dict[str, list[str]] = {}
    for line in MANIFEST.read_text().splitlines():
        if line.startswith("["):
            files = sections.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            files.append(line)
    return sections


def size_of(path: Path) -> Size:
    """The lines of one file."""
    source = path.read_text()
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            code.difference_update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return Size(len(source.splitlines()), len(code))


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Name and length of every function of a file, its decorators not counted."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            yield node.name, (node.end_lineno or 0) - node.lineno + 1


def total(files: list[str]) -> Size:
    """The lines of several files."""
    return sum((size_of(ROOT / file) for file in files), Size(0, 0))


def main() -> None:
    sections = manifest()
    for name, files in sections.items():
        size = total(files)
        print(f"{name}: {len(files)} files, {size.lines} lines, {size.code} of code")
    size = total([file for files in sections.values() for file in files])
    print(f"core: {size.lines} lines, {size.code} of code")


if __name__ == "__main__":
    main()
