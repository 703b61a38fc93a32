"""Parts by name, import path, class or factory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.scheduler import ContinuousScheduler
from engine.types import Scheduler
from layers.attention.torch_sdpa import TorchAttention
from memory.block_manager import PagedBlockManager
from tests.custom_parts import OneAtATime, make_one_at_a_time
from utils.errors import ConfigError
from utils.registry import PartKind

SCHEDULERS = PartKind("scheduler", "engine.types:Scheduler", ("engine",))
BACKENDS = PartKind(
    "attention_backend", "layers.attention.base:AttentionBackend", ("layers.attention",)
)
MADE_UP = replace(SCHEDULERS, packages=("made_up",))
ANYTHING = PartKind("scheduler", "builtins:object", ())


def _find(spec: Any) -> Any:
    return SCHEDULERS.find(spec)


def test_by_name() -> None:
    assert _find("continuous") is ContinuousScheduler
    blocks = PartKind("block_manager", "engine.types:BlockManager", ("memory",))
    assert blocks.find("paged") is PagedBlockManager


def test_by_path() -> None:
    assert _find("tests.custom_parts:OneAtATime") is OneAtATime
    assert _find("tests.custom_parts:make_one_at_a_time") is make_one_at_a_time


def test_by_class_and_factory() -> None:
    assert _find(OneAtATime) is OneAtATime
    assert _find(make_one_at_a_time) is make_one_at_a_time


def test_parts_are_found_without_a_table() -> None:
    assert SCHEDULERS.known()["continuous"] is ContinuousScheduler
    assert BACKENDS.known()["torch"] is TorchAttention
    assert "one-at-a-time" not in SCHEDULERS.known()


def test_a_name_may_be_in_any_of_several_packages() -> None:
    for packages in (("memory", "engine"), ("engine", "memory")):
        kind = replace(SCHEDULERS, packages=packages)
        assert kind.find("continuous") is ContinuousScheduler
        with pytest.raises(ConfigError, match=" or ".join(packages)) as caught:
            kind.find("continuos")
        assert "Did you mean 'continuous'?" in str(caught.value)


class Unfinished(Scheduler):
    """Lacks what a scheduler must have."""

    name = "unfinished"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("continuos", "Did you mean 'continuous'?"),
        ("zzz", "Known: continuous"),
        ("zzz", '"package.module:Class"'),
        ("nowhere.at.all:Scheduler", "cannot be imported"),
        ("tests.custom_parts:Missing", "cannot be imported"),
        (":Scheduler", "cannot be imported"),
        ("..engine.scheduler:Scheduler", "cannot be imported"),
        (".:Scheduler", "cannot be imported"),
        ("tests.custom_parts:", "cannot be imported"),
        ("tests.custom_parts:NOT_A_PART", "cannot be constructed"),
        (PagedBlockManager, "is no Scheduler"),
        ("memory.block_manager:PagedBlockManager", "is no Scheduler"),
        (dict, "is no Scheduler"),
        (Unfinished, "does not implement abort, add, commit, has_unfinished, schedule"),
        (Scheduler, "does not implement"),
    ],
)
def test_what_is_no_part_is_refused(spec: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _find(spec)
    assert caught.value.field == "scheduler"
    assert message in str(caught.value)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package `made_up` to put modules into."""
    folder = tmp_path / "made_up"
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "made_up"]:
        del sys.modules[name]


def test_a_module_whose_dependency_is_missing_is_passed_over_and_named(package: Path) -> None:
    (package / "mine.py").write_text("import not_installed_anywhere\n")
    assert MADE_UP.known() == {}
    with pytest.raises(ConfigError, match=r"not counting made_up\.mine .*not_installed_anywhere"):
        MADE_UP.find("mine")


@pytest.mark.parametrize(
    "mistake", ["from engine.types import Schedular", "import engine.typos", "import made_up.other"]
)
def test_a_mistake_in_a_module_is_not_hidden(package: Path, mistake: str) -> None:
    (package / "mine.py").write_text(mistake + "\n")
    with pytest.raises(ImportError):
        MADE_UP.known()


def test_a_part_that_takes_other_arguments() -> None:
    def two(config: object, blocks: object) -> None: ...

    with pytest.raises(
        ConfigError, match=r"(?s)scheduler=.*cannot be called with \(int, str, int\)"
    ):
        ANYTHING.make(two, 1, "a", 2)


def test_a_type_error_inside_a_constructor_is_its_own() -> None:
    def fails(one: int) -> None:
        raise TypeError("inside")

    with pytest.raises(TypeError, match="inside"):
        ANYTHING.make(fails, 1)


def test_a_callable_without_a_signature() -> None:
    assert ANYTHING.make(dict, [(1, 2)]) == {1: 2}
