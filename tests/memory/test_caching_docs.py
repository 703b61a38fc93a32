"""docs/caching.md: the parts on it pass the suites."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from memory.block_manager import PrefixCacheManager
from tests.contracts.block_manager import BlockManagerContract

PAGE = (Path(__file__).parents[2] / "docs" / "caching.md").read_text()


def _defined(name: str) -> Any:
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", PAGE, re.S) if f"class {name}(" in c)
    namespace: dict[str, Any] = {"__name__": "docs"}
    exec(code, namespace)
    return namespace[name]


class TestTheManagerOfOnesOwn(BlockManagerContract):
    make_blocks = _defined("OneTable")
    num_traces = 100
    num_examples = 10


class TestThePolicyOfOnesOwn(BlockManagerContract):
    make_blocks = PrefixCacheManager
    options = {"eviction_policy": _defined("ShallowStays")}  # noqa: RUF012
    num_traces = 100
    num_examples = 10
