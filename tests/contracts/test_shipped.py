"""Every part that the engine has, under the contracts."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from engine.checking.fake_runner import FakeRunner
from engine.model_runner import LocalRunner
from engine.ranks.runner import TensorParallelRunner
from engine.simulated_runner import SimulatedRunner
from engine.types import WindowPages
from memory.cache_groups import WindowBlockManager
from tests.contracts.block_manager import BlockManagerContract
from tests.contracts.model_runner import ModelRunnerContract
from tests.contracts.scheduler import SchedulerContract
from tests.contracts.traces import shipped_managers, shipped_schedulers


class TestLocalRunner(ModelRunnerContract):
    make_runner = LocalRunner


@pytest.mark.slow
class TestTensorParallelRunner(ModelRunnerContract):
    make_runner = TensorParallelRunner
    options: ClassVar = {"tensor_parallel_size": 2}


class TestFakeRunner(ModelRunnerContract):
    make_runner = FakeRunner


class TestWindowBlockManager(BlockManagerContract):
    make_blocks = WindowBlockManager
    kind = WindowPages(5)


class TestSimulatedRunner(ModelRunnerContract):
    make_runner = SimulatedRunner


def _subclass(contract: type, field: str, part: Any) -> type:
    name = f"Test{part.__name__}"
    return type(name, (contract,), {field: part, "__module__": __name__})


for _part in shipped_schedulers():
    globals()[f"Test{_part.__name__}"] = _subclass(SchedulerContract, "make_scheduler", _part)
for _part in shipped_managers():
    globals()[f"Test{_part.__name__}"] = _subclass(BlockManagerContract, "make_blocks", _part)
