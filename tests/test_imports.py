"""Which part of the core may import which, so that a part can be read and replaced by itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_packaging import NOT_INSTALLED, ROOT

# Modules and packages of the core, and what they may import of this project, with all below it.
# Of two rows for a module the longer name counts. engine.types has the contracts.
ALLOWED = {
    "config": "utils",
    "sampling_params": "utils",
    "utils": "utils config sampling_params engine.types",
    "memory": "memory utils config sampling_params engine.types",
    "layers": "layers utils engine.types memory.kv_cache",
    "models": "models layers utils engine.types memory.kv_cache",
    "engine": "engine models layers memory utils config sampling_params",
    "engine.types": "engine.cache_kinds engine.requests engine.step utils config sampling_params",
    "engine.cache_kinds": "utils",
    "engine.step": "utils config sampling_params",
    "engine.processors": "utils config sampling_params",
    "engine.ranks": "engine.ranks engine.types engine.model_runner layers models utils config",
    # What every rank imports before its runner does: nothing that needs torch.
    "engine.ranks.worker": "engine.ranks.channel engine.types utils config",
    "engine.ranks.channel": "engine.processors engine.step",
    "llm": "engine utils config sampling_params",
}
CORE = {name for name in ALLOWED if "." not in name}


def violations(root: Path) -> list[str]:
    """Imports of the core that the table does not allow, as "file:line imports name"."""
    found = []
    for path in sorted(path for name in CORE for path in _files(root, name)):
        file = path.relative_to(root)
        parts = file.with_suffix("").parts
        row = max((name for name in ALLOWED if _within(".".join(parts), name)), key=len)
        for line, name in _imports(ast.parse(path.read_text()), parts[:-1]):
            ours = any(_within(name, top) for top in CORE | NOT_INSTALLED)
            if ours and not any(_within(name, one) for one in ALLOWED[row].split()):
                found.append(f"{file.as_posix()}:{line} imports {name}")
    return found


def _files(root: Path, name: str) -> list[Path]:
    return [*root.glob(f"{name}.py"), *root.glob(f"{name}/**/*.py")]


def _within(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


def _imports(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Line and full name of whatever is imported anywhere in a module of `package`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            origin = [*above, *([node.module] if node.module else [])]
            yield from ((node.lineno, ".".join([*origin, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node.func) in {"import_module", "__import__"}:
            literals = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
            yield from ((node.lineno, str(name)) for name in literals)


def _called(function: ast.expr) -> str | None:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else None


def test_imports_keep_their_direction() -> None:
    assert violations(ROOT) == []


def test_every_part_of_the_core_has_a_row() -> None:
    files = [*ROOT.glob("*.py"), *ROOT.glob("[!.]*/*.py")]
    names = {file.relative_to(ROOT).parts[0].removesuffix(".py") for file in files}
    assert names - NOT_INSTALLED == CORE


@pytest.mark.parametrize(
    ("file", "source", "name"),
    [
        ("utils/a.py", "import layers.linear", "layers.linear"),
        ("utils/a.py", "import torch, engine", "engine"),
        ("memory/a.py", "from engine.graphs import Rows", "engine.graphs.Rows"),
        ("memory/a.py", "from engine import graphs, types", "engine.graphs"),
        ("memory/a.py", "from ..engine import graphs", "engine.graphs"),
        ("layers/kernels/a.py", "from ...models.base import Model", "models.base.Model"),
        ("layers/__init__.py", "def f():\n    from memory import sizing", "memory.sizing"),
        ("models/a.py", "if TYPE_CHECKING:\n    import engine.graphs", "engine.graphs"),
        ("models/a.py", 'x = importlib.import_module("engine.x")', "engine.x"),
        ("engine/types.py", "class A:\n    import layers", "layers"),
        ("engine/a/b.py", "import llm", "llm"),
        ("engine/ranks/a.py", "from engine.scheduler import Queue", "engine.scheduler.Queue"),
        ("engine/ranks/channel.py", "from engine.ranks import runner", "engine.ranks.runner"),
        ("engine/ranks/worker.py", "from .collectives import a", "engine.ranks.collectives.a"),
        ("llm.py", "from benchmarks import run", "benchmarks.run"),
        ("config.py", "import tests", "tests"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, file: str, source: str, name: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(f"{source}\n")
    assert violations(tmp_path) == [f"{file}:{source.count(chr(10)) + 1} imports {name}"]


def test_an_allowed_import_is_not(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    lines = ["import engines, types", "from engine import types", "from .sizing import release"]
    (tmp_path / "memory" / "a.py").write_text("\n".join(lines))
    assert violations(tmp_path) == []
