"""Parts by name, import path, class or factory."""

from __future__ import annotations

from typing import Any

import pytest

from engine.scheduler import ContinuousScheduler
from engine.types import BlockManager, Scheduler
from layers.attention.base import AttentionBackend
from layers.attention.torch_sdpa import TorchAttention
from memory.block_manager import PagedBlockManager
from tests.custom_parts import OneAtATime, make_one_at_a_time
from utils.errors import ConfigError
from utils.registry import find_part, parts_in


def _find(spec: Any) -> Any:
    return find_part("scheduler", spec, Scheduler, "engine")


def test_by_name() -> None:
    assert _find("continuous") is ContinuousScheduler
    assert find_part("block_manager", "paged", BlockManager, "memory") is PagedBlockManager


def test_by_path() -> None:
    assert _find("tests.custom_parts:OneAtATime") is OneAtATime
    assert _find("tests.custom_parts:make_one_at_a_time") is make_one_at_a_time


def test_by_class_and_factory() -> None:
    assert _find(OneAtATime) is OneAtATime
    assert _find(make_one_at_a_time) is make_one_at_a_time


def test_parts_are_found_without_a_table() -> None:
    assert parts_in("engine", Scheduler)["continuous"] is ContinuousScheduler
    assert parts_in("layers.attention", AttentionBackend)["torch"] is TorchAttention
    assert "one-at-a-time" not in parts_in("engine", Scheduler)


def test_every_part_has_a_name_of_its_own() -> None:
    for package, base in (
        ("engine", Scheduler),
        ("memory", BlockManager),
        ("layers.attention", AttentionBackend),
    ):
        for name, part in parts_in(package, base).items():
            assert vars(part)["name"] == name


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
