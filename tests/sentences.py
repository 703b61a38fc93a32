"""Sentences of the core and its pages, picked by a seed, for somebody who has not seen the code.

    python -m tests.sentences [--seed 15] [--count 40]

At most one of forty may need a second reading.
"""

from __future__ import annotations

import argparse
import ast
import io
import random
import re
import tokenize
from collections.abc import Iterator
from itertools import groupby

from tests.size import ROOT, manifest

_ENDS = re.compile(r"(?<=[.!?])\s+(?=[A-Z`\[\"(])")
_HEADINGS = {"Args:", "Attributes:", "Raises:", "Returns:"}
# Fewer words are no sentence.
_LEAST_WORDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=15)
    parser.add_argument("--count", type=int, default=40)
    arguments = parser.parse_args()
    found = sorted(set(sentences()))
    for place, text in random.Random(arguments.seed).sample(found, arguments.count):
        print(f"- {place}: {text}")


def sentences() -> Iterator[tuple[str, str]]:
    """Place and text of every sentence."""
    for name in [file for files in manifest().values() for file in files]:
        source = (ROOT / name).read_text()
        for text in (*_docstrings(source), *_comments(source)):
            yield from ((name, sentence) for sentence in _split(text))
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for text in _paragraphs(page.read_text()):
            yield from ((str(page.relative_to(ROOT)), sentence) for sentence in _split(text))


def _split(text: str) -> Iterator[str]:
    for sentence in _ENDS.split(" ".join(text.split())):
        if len(sentence.split()) >= _LEAST_WORDS:
            yield sentence


def _docstrings(source: str) -> Iterator[str]:
    """The paragraphs of docstrings; what is said of each argument is a paragraph."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node) or ""
            for paragraph in re.split(r"\n\s*\n|\n(?= {4}\w[\w, ]*:)", text):
                lines = [line for line in paragraph.splitlines() if line.strip() not in _HEADINGS]
                yield "\n".join(lines)


def _comments(source: str) -> Iterator[str]:
    """Comments, those on lines that follow each other as one."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found = [(t.start[0], t.string.lstrip("# ")) for t in tokens if t.type == tokenize.COMMENT]
    for _, group in groupby(enumerate(found), key=lambda item: item[1][0] - item[0]):
        yield "\n".join(text for _, (_, text) in group if not text.startswith(("type:", "noqa")))


def _paragraphs(page: str) -> Iterator[str]:
    """The paragraphs and list items of a page, without code, tables, headings and addresses."""
    text = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*[-*|] |\s*\d+\. )", text):
        if not paragraph.lstrip().startswith(("#", "|")):
            yield re.sub(r"^\s*[-*] ", "", paragraph)


if __name__ == "__main__":
    main()
