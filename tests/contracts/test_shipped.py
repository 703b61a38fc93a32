"""Every part that the engine has, under the contracts."""

from __future__ import annotations

from typing import Any

from engine.types import BlockManager, Scheduler
from tests.contracts.block_manager import BlockManagerContract
from tests.contracts.scheduler import SchedulerContract
from utils.registry import parts_in


def _subclass(contract: type, field: str, part: Any) -> type:
    name = f"Test{part.__name__}"
    return type(name, (contract,), {field: part, "__module__": __name__})


# Found, not listed: a new part in these packages is tested from its first day on.
for _part in parts_in("engine", Scheduler).values():
    globals()[f"Test{_part.__name__}"] = _subclass(SchedulerContract, "make_scheduler", _part)
for _part in parts_in("memory", BlockManager).values():
    globals()[f"Test{_part.__name__}"] = _subclass(BlockManagerContract, "make_blocks", _part)
