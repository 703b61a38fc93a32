"""Sentences of the core and its pages, picked by a seed, for somebody who has not seen the code.

    python -m tests.sentences [--seed 15] [--count 40] [--all FILE ...]

At most one of forty may need a second reading. A sentence comes with what its reader has before
their eyes: the file, the class or function with its docstring, the line of code beside a comment,
the section of a page with the paragraph or list. How each file begins, where its terms are
explained, is printed at the end. --all picks from these files alone, and all of them.
"""

from __future__ import annotations

import argparse
import ast
import io
import random
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from tests.size import ROOT, manifest

_ENDS = re.compile(r"(?<=[.!?])\s+(?=[A-Z`\[\"(])")
_HEADINGS = {"Args:", "Attributes:", "Raises:", "Returns:"}
# Comments that are for tools.
_ORDERS = ("# mypy", "# type", "# noqa", "# fmt")
# Fewer words are no sentence.
_LEAST_WORDS = 5


@dataclass(frozen=True, order=True)
class Sentence:
    """A sentence, where it stands, and the text around it."""

    place: str
    text: str
    around: str

    def __str__(self) -> str:
        alone = self.text == self.around
        return f"- {self.place}: {self.text}" + ("" if alone else f"\n    [{self.around}]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=15)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--all", nargs="+", metavar="FILE", help="every sentence of these files")
    arguments = parser.parse_args()
    found = sorted({s for name in arguments.all or _files() for s in _of_file(name)})
    picked = random.Random(arguments.seed).sample(
        found, len(found) if arguments.all else arguments.count
    )
    print(*picked, sep="\n")
    for name in sorted({"engine/types.py", *(s.place.split()[0] for s in picked)}):
        print(f"\n{name} begins:\n{_beginning(name)}")


def _files() -> Iterator[str]:
    """The core's files, README.md, CONTRIBUTING.md and docs."""
    yield from (file for files in manifest().values() for file in files)
    yield from ("README.md", "CONTRIBUTING.md")
    yield from sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md"))


def _beginning(name: str) -> str:
    """The docstring of a module, or what a page says before its first section."""
    text = (ROOT / name).read_text()
    if name.endswith(".py"):
        return ast.get_docstring(ast.parse(text)) or ""
    return text.partition("\n## ")[0]


def _of_file(name: str) -> Iterator[Sentence]:
    text = (ROOT / name).read_text()
    found = [*_docstrings(text), *_comments(text)] if name.endswith(".py") else _page(text)
    for owner, paragraph, around in found:
        for sentence in _ENDS.split(" ".join(paragraph.split())):
            if len(sentence.split()) >= _LEAST_WORDS:
                yield Sentence(f"{name} {owner}".strip(), sentence, " ".join(around.split()))


def _docstrings(source: str) -> Iterator[tuple[str, str, str]]:
    """Owner, paragraph and whole of docstrings; what is said of an argument is a paragraph."""
    for owner, node in _definitions(ast.parse(source), ""):
        text = ast.get_docstring(node) or ""
        for paragraph in re.split(r"\n\s*\n|\n(?= {4}\w[\w, ]*:)", text):
            lines = [line for line in paragraph.splitlines() if line.strip() not in _HEADINGS]
            yield owner, "\n".join(lines), text


_Definition = ast.Module | ast.ClassDef | ast.FunctionDef


def _definitions(node: _Definition, owner: str) -> Iterator[tuple[str, _Definition]]:
    yield owner, node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            yield from _definitions(child, f"{owner}.{child.name}".lstrip("."))


def _comments(source: str) -> Iterator[tuple[str, str, str]]:
    """Owner and text of comments, with the line of code that they are behind or above."""
    tokens, code = tokenize.generate_tokens(io.StringIO(source).readline), source.splitlines()
    found = [t for t in tokens if t.type == tokenize.COMMENT and not t.string.startswith(_ORDERS)]

    def together(item: tuple[int, tokenize.TokenInfo]) -> object:
        index, token = item
        alone = token.line.lstrip().startswith("#")
        return token.start[0] - index if alone else token.start

    for _, group in groupby(enumerate(found), key=together):
        comment = [token for _, token in group]
        text = "\n".join(token.string.lstrip("# ") for token in comment)
        line = comment[0].line.partition("#")[0].strip() or code[comment[-1].start[0]]
        yield _owner(source, comment[0].start[0]), text, f"{text} | {line}"


def _owner(source: str, line: int) -> str:
    """The innermost class or function around a line."""
    around = [
        owner
        for owner, node in _definitions(ast.parse(source), "")
        if not isinstance(node, ast.Module) and node.lineno <= line <= (node.end_lineno or 0)
    ]
    return around[-1] if around else ""


def _page(page: str) -> Iterator[tuple[str, str, str]]:
    """Heading, paragraph or list item, and all of the list; no code, tables and addresses."""
    text = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    heading = ""
    for block in re.split(r"\n\s*\n", text):
        if block.lstrip().startswith("#"):
            heading = f"({block.strip('# ')})"
        elif not block.lstrip().startswith("|"):
            for item in re.split(r"\n(?=\s*[-*] |\s*\d+\. )", block):
                yield heading, re.sub(r"^\s*[-*] ", "", item), block


if __name__ == "__main__":
    main()
