"""Parts that a user might bring along."""

from __future__ import annotations

from config import Config
from engine.requests import Sequence
from engine.scheduler import ContinuousScheduler
from engine.types import BlockManager, Clock, KVGeometry, StepPlan
from memory.block_manager import PagedBlockManager


class OneAtATime(ContinuousScheduler):
    """Admits a request only when nothing else runs."""

    name = "one-at-a-time"

    def __init__(self, config: Config, block_manager: BlockManager, clock: Clock) -> None:
        super().__init__(config, block_manager, clock)
        self._queue: list[Sequence] = []
        self.num_plans = 0

    @property
    def has_unfinished(self) -> bool:
        return bool(self._queue) or super().has_unfinished

    def add(self, seq: Sequence) -> None:
        self._queue.append(seq)

    def schedule(self) -> StepPlan | None:
        if self._queue and not super().has_unfinished:
            super().add(self._queue.pop(0))
        plan = super().schedule()
        self.num_plans += plan is not None
        return plan


class ShuffledBlocks(PagedBlockManager):
    """Hands blocks out in an order without pattern."""

    name = "shuffled"

    def __init__(self, config: Config, geometry: KVGeometry) -> None:
        super().__init__(config, geometry)
        self._free.sort(key=lambda block: hash((block, 17)))


def make_one_at_a_time(config: Config, block_manager: BlockManager, clock: Clock) -> OneAtATime:
    """A factory instead of a class."""
    return OneAtATime(config, block_manager, clock)


NOT_A_PART = 3
