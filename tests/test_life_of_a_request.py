"""docs/life-of-a-request.md names files, classes and methods that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "life-of-a-request.md"
TEXT = PAGE.read_text()
# [engine/step.py](../engine/step.py)
LINKS = re.findall(r"\[([^\]]+)\]\(([^)]+)\)", TEXT)
# `Class.method` in [file](link): the file that has to define it.
DEFINED = set(re.findall(r"`([A-Z]\w*\.\w+)`\s+in\s+\[([\w/]+\.py)\]", TEXT))
# Class.method<br>file: a station of the figure.
DRAWN = set(re.findall(r'"([A-Z]\w*\.\w+)<br>([\w/]+\.py)"', TEXT))


def methods(path: Path) -> set[str]:
    """All "Class.name" of a module's classes: methods and annotated attributes."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ClassDef):
            continue
        for part in node.body:
            if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)):
                found.add(f"{node.name}.{part.name}")
            elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                found.add(f"{node.name}.{part.target.id}")
    return found


@pytest.mark.parametrize("name", sorted(set(re.findall(r"(?<![\w/.])[\w/]+\.py\b", TEXT))))
def test_every_file_exists(name: str) -> None:
    assert (ROOT / name).is_file()


def test_every_link_leads_to_what_it_says() -> None:
    assert len(LINKS) > 20
    for words, target in LINKS:
        assert (PAGE.parent / target).exists(), target
        assert target in (words, f"../{words.rstrip('/')}")


@pytest.mark.parametrize(("name", "file"), sorted(DEFINED | DRAWN))
def test_every_method_is_defined_in_its_file(name: str, file: str) -> None:
    assert name in methods(ROOT / file)


def test_every_method_is_named_with_its_file() -> None:
    """A name that the test above does not look at would not be noticed when it goes."""
    named = set(re.findall(r"\b([A-Z]\w*\.[a-z_]\w*)\b(?!\.)", TEXT))
    assert named == {name for name, _ in DEFINED}
    assert len(DRAWN) >= 6
    assert DRAWN <= DEFINED


def test_the_page_says_what_the_model_does(shipped: Path) -> None:
    """Its prompt, token ids and output, as far as rounding may not change them."""
    from llm import LLM, SamplingParams

    with LLM(shipped, device="cpu") as llm:
        (out,) = llm.generate(
            ["def add(a, b):"], SamplingParams(temperature=0, max_tokens=3), use_tqdm=False
        )
    assert str(out["prompt_token_ids"]) in TEXT
    assert f'"token_ids": {out["token_ids"]}, "finish_reason": "{out["finish_reason"]}"' in TEXT
    assert f'"text": "{out["text"]}"'.replace("\n", "\\n") in TEXT
