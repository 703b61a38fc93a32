"""The page of all public classes: `python -m tests.api` writes docs/api.md from the docstrings.

What is public: what a user imports, and what a part of one's own implements. A name with a leading
underscore is private.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

from tests.size import ROOT

PAGE = ROOT / "docs" / "api.md"
_SECTIONS: tuple[tuple[str, str, dict[str, tuple[str, ...]]], ...] = (
    (
        "Generating text",
        "What a script imports.",
        {
            "llm": ("LLM",),
            "sampling_params": ("SamplingParams",),
            "utils.output_types": ("Output", "Logprob"),
            "config": ("Config",),
            "engine.types": ("EngineStats", "CacheStats"),
        },
    ),
    (
        "Errors",
        "Every error of the engine is one of these.",
        {"utils.errors": ()},
    ),
    (
        "The engine below LLM",
        "For those who run requests of token ids themselves.",
        {"engine.llm_engine": ("LLMEngine",), "engine.requests": ("Sequence",)},
    ),
    (
        "Contracts",
        "What a scheduler, a block manager and a model runner of your own implement.",
        {"engine.types": ("Scheduler", "BlockManager", "ModelRunner", "StepHandle")},
    ),
    (
        "Values of the contracts",
        "What schedulers, block managers and runners exchange.",
        {
            "engine.step": (),
            "engine.types": ("KVGeometry", "PendingPrefix"),
            "engine.cache_kinds": (),
        },
    ),
    (
        "Policies",
        "Short classes that decide one thing.",
        {
            "engine.policies": (
                *("QueuePolicy", "KeyedQueue", "AdmissionPolicy", "PreemptionPolicy"),
                "StepPolicy",
            ),
            "memory.eviction": ("EvictionPolicy", "CachedBlock"),
        },
    ),
    (
        "Models and attention",
        "What a model file and an attention backend of your own implement.",
        {
            "models.base": ("ModelShape", "ForwardBatch", "CausalLM"),
            "layers.attention.base": (),
        },
    ),
)


def classes() -> Iterator[tuple[str, str, type]]:
    """Title of the section, module and class, in the order of the page."""
    for title, _, modules in _SECTIONS:
        for name, chosen in modules.items():
            module = importlib.import_module(name)
            found = [
                value
                for key, value in vars(module).items()
                if inspect.isclass(value) and value.__module__ == name and key[0] != "_"
            ]
            for value in found if not chosen else [getattr(module, one) for one in chosen]:
                yield title, name, value


def page() -> str:
    """The whole page, as Markdown."""
    lines = [
        "# Classes, methods and fields",
        "",
        "Made by `python -m tests.api` from the docstrings. [options.md](options.md) explains",
        "options and outputs with examples. [testing-your-part.md](testing-your-part.md) explains",
        "how to replace a part.",
    ]
    told = ""
    about = {title: text for title, text, _ in _SECTIONS}
    for title, module, cls in classes():
        if title != told:
            lines += ["", f"## {title}", "", about[title]]
            told = title
        lines += ["", *_of_class(module, cls)]
    return "\n".join(lines) + "\n"


def _of_class(module: str, cls: type) -> Iterator[str]:
    file = f"{module.replace('.', '/')}.py"
    bases = [base.__name__ for base in cls.__bases__ if base not in (object, Exception)]
    yield f"### {cls.__name__}{f' ({bases[0]})' if bases else ''}"
    yield ""
    yield f"[{file}](../{file})"
    yield ""
    text, told = _split(inspect.getdoc(cls) or "")
    yield from text
    fields = {name: (kind, told.pop(name, "") or text) for name, kind, text in _fields(cls)}
    if fields or told:
        yield ""
        yield "| field | type | meaning |"
        yield "|---|---|---|"
        for name, (kind, meaning) in fields.items():
            yield f"| `{name}` | {_cell(kind)} | {_escaped(meaning)} |"
        for name, meaning in told.items():
            yield f"| `{name}` | | {_escaped(meaning)} |"
    for name, method in vars(cls).items():
        if not (name[0] == "_" and name != "__call__") and not isinstance(method, type):
            yield from _of_method(cls, name, method)


def _of_method(cls: type, name: str, method: Any) -> Iterator[str]:
    function = getattr(method, "__func__", method)
    if isinstance(method, property):
        assert method.fget is not None
        kind = inspect.signature(method.fget).return_annotation
        yield from ("", f"**`{name}`** → `{kind}`", "")
    elif inspect.isfunction(function):
        # Annotations are strings here.
        signature = re.sub(r"'([^']*)'", r"\1", str(inspect.signature(function)))
        signature = signature.replace("(self, ", "(").replace("(self)", "()")
        yield from ("", f"**`{name}{signature}`**", "")
    else:
        return
    yield from _split(_doc_of(cls, name))[0]


def _doc_of(cls: type, name: str) -> str:
    """The docstring of a method, or that of the method it overrides."""
    for base in cls.__mro__:
        if text := inspect.getdoc(base.__dict__.get(name)):
            return text
    return ""


def _split(doc: str) -> tuple[list[str], dict[str, str]]:
    """The lines of a docstring, and what it says of fields under "Attributes:"."""
    lines: list[str] = []
    told: dict[str, str] = {}
    kind, name = "", ""
    for line in doc.splitlines():
        if re.fullmatch(r"(Attributes|Args|Raises|Returns):", line):
            kind, name = line[:-1], ""
            if kind != "Attributes":
                lines += [f"{kind}:", ""]
        elif kind and line and not line.startswith("    "):
            kind = ""
            lines.append(line)
        elif kind == "Attributes":
            if match := re.match(r"    (\w[\w, ]*): (.*)", line):
                name = match[1]
                told |= dict.fromkeys(name.split(", "), match[2])
            elif line.strip():
                for one in name.split(", "):
                    told[one] += " " + line.strip()
        elif kind and (match := re.match(r"    (\w[\w, ]*): (.*)", line)):
            lines.append(f"- `{match[1]}`: {match[2]}")
        elif kind and line.startswith("     "):
            lines.append("  " + line.strip())
        elif line.startswith("    ") and not kind:
            lines.append(line)
        else:
            lines.append(line.strip() if kind else line)
    return _trimmed(lines), told


def _trimmed(lines: list[str]) -> list[str]:
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _fields(cls: type) -> Iterator[tuple[str, str, str]]:
    """Name, type and comment of each public field that the class itself declares."""
    source = textwrap.dedent(inspect.getsource(cls))
    lines = source.splitlines()
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    defaults = {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    for node in body.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        name = node.target.id
        if name[0] == "_" or (dataclasses.is_dataclass(cls) and name not in defaults):
            continue
        yield name, ast.unparse(node.annotation), _comment(lines, node)


def _comment(lines: list[str], node: ast.AnnAssign) -> str:
    """The comment behind a field, or the lines of comments before it."""
    end = (node.end_lineno or node.lineno) - 1
    behind = re.search(r"  # (.*)", lines[end])
    if behind and not behind[1].startswith(("noqa", "type")):
        return behind[1]
    before = node.lineno - 2
    found: list[str] = []
    while before >= 0 and (match := re.fullmatch(r"\s*# (.*)", lines[before])):
        found.insert(0, match[1])
        before -= 1
    return " ".join(found)


def _cell(kind: str) -> str:
    return f"`{_escaped(kind)}`"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    PAGE.write_text(page())
    sys.stdout.write(f"{PAGE.relative_to(ROOT)}: {len(list(classes()))} classes\n")


if __name__ == "__main__":
    main()
