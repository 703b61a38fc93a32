"""Sentences of the core and its pages, picked by a seed, for somebody who has not seen the code.

    python -m tests.sentences [--seed 15] [--count 40] [--all FILE ...]

At most one of forty may need a second reading. Each sentence comes with its place: the file, and
the class or function that it stands in. A sentence of a longer paragraph comes with the paragraph.
--all prints every sentence of the files, in order, instead.
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

_ENDS = re.compile(r"(?<=[.!?:])\s+(?=[A-Z`\[\"(])")
_HEADINGS = {"Args:", "Attributes:", "Raises:", "Returns:"}
# Comments that are for tools.
_ORDERS = ("# mypy", "# type", "# noqa", "# fmt")
# Fewer words are no sentence.
_LEAST_WORDS = 5


@dataclass(frozen=True, order=True)
class Sentence:
    """A sentence, and the paragraph of a docstring, comment or page that it stands in."""

    place: str
    text: str
    paragraph: str

    def __str__(self) -> str:
        alone = self.text == self.paragraph
        return f"- {self.place}: {self.text}" + ("" if alone else f"\n    [{self.paragraph}]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=15)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--all", nargs="+", metavar="FILE", help="every sentence of these files")
    arguments = parser.parse_args()
    if arguments.all:
        for name in arguments.all:
            print(*(f"- {s.place}: {s.text}" for s in _of_file(name)), sep="\n")
        return
    found = sorted(set(sentences()))
    for sentence in random.Random(arguments.seed).sample(found, arguments.count):
        print(sentence)


def sentences() -> Iterator[Sentence]:
    """Every sentence of the core's files, of README.md, CONTRIBUTING.md and docs."""
    pages = sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md"))
    core = [file for files in manifest().values() for file in files]
    for name in (*core, "README.md", "CONTRIBUTING.md", *pages):
        yield from _of_file(name)


def _of_file(name: str) -> Iterator[Sentence]:
    text = (ROOT / name).read_text()
    if name.endswith(".py"):
        found = [*_docstrings(text), *_comments(text)]
    else:
        found = [("", paragraph) for paragraph in _paragraphs(text)]
    for owner, paragraph in found:
        whole = " ".join(paragraph.split())
        for sentence in _ENDS.split(whole):
            if len(sentence.split()) >= _LEAST_WORDS:
                yield Sentence(f"{name} {owner}".strip(), sentence, whole)


def _docstrings(source: str) -> Iterator[tuple[str, str]]:
    """Owner and text of docstrings' paragraphs; what is said of an argument is a paragraph."""
    for owner, node in _definitions(ast.parse(source), ""):
        text = ast.get_docstring(node) or ""
        for paragraph in re.split(r"\n\s*\n|\n(?= {4}\w[\w, ]*:)", text):
            lines = [line for line in paragraph.splitlines() if line.strip() not in _HEADINGS]
            yield owner, "\n".join(lines)


_Definition = ast.Module | ast.ClassDef | ast.FunctionDef


def _definitions(node: _Definition, owner: str) -> Iterator[tuple[str, _Definition]]:
    yield owner, node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            yield from _definitions(child, f"{owner}.{child.name}".lstrip("."))


def _comments(source: str) -> Iterator[tuple[str, str]]:
    """Owner and text of comments: of one behind code, of several lines of their own together."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found = [t for t in tokens if t.type == tokenize.COMMENT and not t.string.startswith(_ORDERS)]

    def together(item: tuple[int, tokenize.TokenInfo]) -> object:
        index, token = item
        alone = token.line.lstrip().startswith("#")
        return token.start[0] - index if alone else token.start

    for _, group in groupby(enumerate(found), key=together):
        lines = [token for _, token in group]
        yield _owner(source, lines[0].start[0]), "\n".join(t.string.lstrip("# ") for t in lines)


def _owner(source: str, line: int) -> str:
    """The innermost class or function around a line."""
    around = [
        owner
        for owner, node in _definitions(ast.parse(source), "")
        if not isinstance(node, ast.Module) and node.lineno <= line <= (node.end_lineno or 0)
    ]
    return around[-1] if around else ""


def _paragraphs(page: str) -> Iterator[str]:
    """The paragraphs and list items of a page, without code, tables, headings and addresses."""
    text = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*[-*|] |\s*\d+\. )", text):
        if not paragraph.lstrip().startswith(("#", "|")):
            yield re.sub(r"^\s*[-*] ", "", paragraph)


if __name__ == "__main__":
    main()
