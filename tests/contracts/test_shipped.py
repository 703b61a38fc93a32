"""Every part that the engine has, under the contracts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest

from config import Config
from engine.checking.fake_runner import FakeRunner
from engine.model_runner import LocalRunner
from engine.ranks.runner import TensorParallelRunner
from engine.simulated_runner import SimulatedRunner
from engine.types import NO_BLOCK, KVGeometry, WindowPages
from memory.cache_groups import CachingWindowManager, WindowBlockManager
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


def _of_small_steps(config: Config, geometry: KVGeometry) -> CachingWindowManager:
    """With the default budget, a request may hold more blocks than there are: none are shared."""
    return CachingWindowManager(replace(config, max_num_batched_tokens=8, max_num_seqs=8), geometry)


class TestCachingWindowManager(BlockManagerContract):
    make_blocks = staticmethod(_of_small_steps)
    kind = WindowPages(5)
    most_uncommitted = 8

    def test_a_prefix_is_found_again_but_not_its_last_token(self) -> None:
        """Whole blocks only, and no blocks before the window."""
        blocks = self._caching()
        tokens = [*range(22)]
        blocks.begin(0, tokens)
        for end in (8, 16, 22):
            assert blocks.grow(0, end)
            blocks.written[0] = end
            blocks.commit(0, tokens, end)
        blocks.release(0)
        for length, found in [(22, 20), (21, 20), (20, 16), (5, 4), (4, 0)]:
            assert blocks.begin(1, tokens[:length]) == found
            table = blocks.table(1)
            assert table.count(NO_BLOCK) == max(0, found - 4) // 4
            blocks.release(1)
        blocks.check_idle()

    def test_nothing_is_copied_for_a_request_that_was_released(self) -> None:
        pytest.skip("it copies no blocks")


class TestSimulatedRunner(ModelRunnerContract):
    make_runner = SimulatedRunner


def _subclass(contract: type, field: str, part: Any) -> type:
    name = f"Test{part.__name__}"
    return type(name, (contract,), {field: part, "__module__": __name__})


for _part in shipped_schedulers():
    globals()[f"Test{_part.__name__}"] = _subclass(SchedulerContract, "make_scheduler", _part)
for _part in shipped_managers():
    globals()[f"Test{_part.__name__}"] = _subclass(BlockManagerContract, "make_blocks", _part)
