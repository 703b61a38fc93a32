"""Finds the wrong use of a KV block in the step that makes it: `Config(kv_sanitizer=True)`.

The block manager and the runner are wrapped, and share an account of who holds each block and
how far it is written. Every plan is checked against it before it runs. Dead blocks are filled
with NaN on the device (`StepPlan.poisoned_blocks`), and what a step writes must not be NaN
(`memory.kv_poison`), so that what no plan shows is found as well: a kernel that reads past a
request's end, or in another one's blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from engine.types import (
    BlockCopy,
    BlockManager,
    CacheStats,
    KVGeometry,
    ModelRunner,
    NewRequest,
    PendingPrefix,
    StepHandle,
    StepPlan,
)
from utils.errors import KVSanitizerError


class SanitizedBlocks(BlockManager):
    """Passes every call on, and keeps the account.

    Args:
        inner: the block manager to watch; a new one.

    Attributes:
        holders: requests that hold each block, by block.
        filled: leading positions of each block that are written, or will be by planned steps.
        step_id: the step that is planned next.
    """

    name = "sanitized"

    def __init__(self, inner: BlockManager) -> None:
        self._inner = inner
        self._published: set[int] = set()
        # All blocks: what the device holds before anything was written is dead as well.
        self._dead = set(range(inner.num_blocks))
        self.holders: list[set[int]] = [set() for _ in range(inner.num_blocks)]
        self.filled = [0] * inner.num_blocks
        self.step_id = 0

    @property
    def block_size(self) -> int:
        return self._inner.block_size

    @property
    def num_blocks(self) -> int:
        return self._inner.num_blocks

    @property
    def num_free_blocks(self) -> int:
        return self._inner.num_free_blocks

    @property
    def stats(self) -> CacheStats:
        return self._inner.stats

    def begin(self, request_id: int, token_ids: list[int], cache_salt: str = "") -> int:
        cached = self._inner.begin(request_id, token_ids, cache_salt)
        table = self._inner.table(request_id)
        num_shared = len(table) - (cached % self.block_size > 0)
        for block in table[:num_shared]:
            if self.filled[block] < self.block_size:
                raise self.error(
                    request_id,
                    block,
                    f"found in the cache, and {self.filled[block]} of its {self.block_size} "
                    "positions are written",
                )
            self.holders[block].add(request_id)
        self._hand_out(request_id, num_shared)
        return cached

    def grow(self, request_id: int, num_tokens: int) -> bool:
        before = len(self._inner.table(request_id))
        if not self._inner.grow(request_id, num_tokens):
            return False
        self._hand_out(request_id, before)
        return True

    def table(self, request_id: int) -> list[int]:
        return self._inner.table(request_id)

    def commit(self, request_id: int, token_ids: list[int], num_computed: int) -> None:
        full = num_computed // self.block_size
        self._published.update(self._inner.table(request_id)[:full])
        self._inner.commit(request_id, token_ids, num_computed)

    def release(self, request_id: int) -> None:
        for block in self._inner.table(request_id):
            self.holders[block].discard(request_id)
            may_be_found = self._inner.caches_prefixes and block in self._published
            if not self.holders[block] and not may_be_found:
                self._kill(block)
        self._inner.release(request_id)

    def take_copies(self) -> tuple[BlockCopy, ...]:
        return self._inner.take_copies()

    def pending(self, token_ids: list[int], cache_salt: str = "") -> PendingPrefix | None:
        return self._inner.pending(token_ids, cache_salt)

    def reset_prefix_cache(self) -> None:
        self._inner.reset_prefix_cache()
        for block, holders in enumerate(self.holders):
            if not holders:
                self._kill(block)

    def take_dead(self) -> tuple[int, ...]:
        """Blocks whose content died since the last call."""
        dead, self._dead = self._dead, set()
        return tuple(sorted(dead))

    def error(self, request_id: int, block: int, problem: str) -> KVSanitizerError:
        """An error that names them and the step."""
        return KVSanitizerError(self.step_id, request_id, block, problem)

    def _hand_out(self, request_id: int, first: int) -> None:
        """The table's blocks from `first` on are new."""
        for block in self._inner.table(request_id)[first:]:
            if self.holders[block]:
                others = sorted(self.holders[block])
                raise self.error(request_id, block, f"handed out while requests {others} hold it")
            self.holders[block].add(request_id)
            self._kill(block)

    def _kill(self, block: int) -> None:
        self._dead.add(block)
        self._published.discard(block)
        self.filled[block] = 0


@dataclass(slots=True)
class _Slot:
    """A request as the plans describe it."""

    request_id: int
    table: list[int] = field(default_factory=list)
    num_computed: int = 0


class SanitizedRunner(ModelRunner):
    """Checks every plan, then has the runner execute it.

    Args:
        inner: the runner to watch.
    """

    name = "sanitized"

    def __init__(self, inner: ModelRunner) -> None:
        self._inner = inner

    def watch(self, blocks: BlockManager) -> BlockManager:
        """The block manager whose blocks the next plans use, in its wrapper."""
        self._blocks = SanitizedBlocks(blocks)
        self._slots: dict[int, _Slot] = {}
        return self._blocks

    @property
    def kv_geometry(self) -> KVGeometry:
        return self._inner.kv_geometry

    def execute(self, plan: StepPlan) -> StepHandle:
        """As the contract says.

        Raises:
            KVSanitizerError: the plan reads what is not written, or writes what is not its own.
        """
        self._blocks.step_id = plan.step_id
        for new in plan.new_requests:
            self._enter(new)
        for update in plan.block_updates:
            table, first = self._slots[update.slot].table, update.first_index
            table[first : first + len(update.block_ids)] = update.block_ids
        for copy in plan.block_copies:
            self._copy(copy)
        for chunk in plan.prefill:
            self._compute(chunk.slot, chunk.start, chunk.num_tokens)
        for slot in plan.decode:
            self._compute(slot, self._slots[slot].num_computed, 1)
        self._blocks.step_id += 1
        return self._inner.execute(replace(plan, poisoned_blocks=self._blocks.take_dead()))

    def close(self) -> None:
        self._inner.close()

    def _enter(self, new: NewRequest) -> None:
        self._slots[new.slot] = _Slot(new.request_id)

    def _copy(self, copy: BlockCopy) -> None:
        """Check a copy, and count its target as written as far as its source is."""
        blocks, target = self._blocks, copy.target
        holders, filled = sorted(blocks.holders[target]), blocks.filled[copy.source]
        if len(holders) != 1:
            raise blocks.error(min(holders, default=-1), target, f"copied to; holders {holders}")
        if filled < blocks.block_size:
            raise blocks.error(
                holders[0],
                copy.source,
                f"copied, and {filled} of its {blocks.block_size} positions are written",
            )
        blocks.filled[target] = filled

    def _compute(self, index: int, start: int, num_tokens: int) -> None:
        """Check one row of the plan, and count its positions as written."""
        slot, blocks = self._slots[index], self._blocks
        size, end = blocks.block_size, start + num_tokens
        needed = -(-end // size)
        for place in range(needed):
            block = slot.table[place] if place < len(slot.table) else -1
            if block < 0:
                raise blocks.error(
                    slot.request_id, block, f"position {place * size} has no block in slot {index}"
                )
            first = place * size
            holders, filled = blocks.holders[block], blocks.filled[block]
            if slot.request_id not in holders:
                raise blocks.error(
                    slot.request_id, block, f"used after it was given up; holders {sorted(holders)}"
                )
            if filled < min(size, start - first):
                raise blocks.error(
                    slot.request_id,
                    block,
                    f"position {first + filled} is read and was never written",
                )
            if end > first and start < first + size:
                if len(holders) > 1:
                    others = sorted(holders - {slot.request_id})
                    raise blocks.error(
                        slot.request_id, block, f"written while requests {others} share it"
                    )
                blocks.filled[block] = max(filled, min(size, end - first))
        slot.num_computed = end
