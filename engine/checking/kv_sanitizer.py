"""Finds the wrong use of a KV block in the step that makes it: `Config(kv_sanitizer=True)`.

The block manager and the runner are wrapped, and share an account of who holds each block and
how far it is written. Every plan is checked against it before it runs, and by the rules for all
plans (`engine.checking.plan_checker`). Dead blocks are filled with NaN on the device
(`StepPlan.poisoned_blocks`), and what a step writes must not be NaN
(`engine.checking.kv_poison`), so that what no plan shows is found as well: a kernel that reads
past a request's end, or in another one's blocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import replace

from engine.checking.plan_checker import CheckedHandle, PlanChecker, Row
from engine.types import (
    NO_BLOCK,
    BlockCopy,
    BlockManager,
    CacheStats,
    KVGeometry,
    ModelRunner,
    PendingPrefix,
    StepHandle,
    StepPlan,
    StepResult,
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

    def __init__(self, inner: BlockManager) -> None:
        self._inner = inner
        self._published: set[int] = set()
        # All blocks: what the device holds before anything was written is dead as well.
        self._dead = set(range(inner.num_blocks))
        self.holders: list[set[int]] = [set() for _ in range(inner.num_blocks)]
        self.filled = [0] * inner.num_blocks
        self.step_id = 0

    @property
    def caches_prefixes(self) -> bool:  # type: ignore[override]
        return self._inner.caches_prefixes

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
        before = list(self._inner.table(request_id))
        self._published.update(before[:full])
        self._inner.commit(request_id, token_ids, num_computed)
        # A window gives blocks back.
        kept = self._inner.table(request_id)
        self._drop(request_id, [b for b, k in zip(before, kept, strict=True) if k != b])

    def release(self, request_id: int) -> None:
        self._drop(request_id, self._inner.table(request_id))
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

    def _drop(self, request_id: int, blocks: list[int]) -> None:
        """The request holds these blocks no longer."""
        for block in blocks:
            if block == NO_BLOCK:
                continue
            self.holders[block].discard(request_id)
            may_be_found = self._inner.caches_prefixes and block in self._published
            if not self.holders[block] and not may_be_found:
                self._kill(block)

    def _kill(self, block: int) -> None:
        self._dead.add(block)
        self._published.discard(block)
        self.filled[block] = 0


class SanitizedRunner(ModelRunner):
    """Checks every plan, then has the runner execute it.

    Args:
        inner: the runner to watch.
        max_num_seqs, budget: the engine's limits of a step.
    """

    def __init__(self, inner: ModelRunner, max_num_seqs: int, budget: int) -> None:
        self._inner = inner
        self.drafts = inner.drafts  # type: ignore[misc]
        self._limits = max_num_seqs, budget
        self._kinds = [geometry.kind for geometry in inner.kv_groups]
        self._size = inner.kv_groups[0].block_size
        self.watch(())

    def watch(self, managers: Iterable[BlockManager]) -> tuple[BlockManager, ...]:
        """The block managers of the next plans, one for each cache group, in their wrappers."""
        self._checker = PlanChecker(self.kv_groups, *self._limits)
        self._groups = tuple(SanitizedBlocks(blocks) for blocks in managers)
        self._in_flight: deque[list[Row]] = deque()
        return self._groups

    @property
    def kv_groups(self) -> tuple[KVGeometry, ...]:
        return self._inner.kv_groups

    def now(self) -> float:
        return self._inner.now()

    def wait_until(self, moment: float) -> None:
        self._inner.wait_until(moment)

    def execute(self, plan: StepPlan) -> StepHandle:
        """As the contract says.

        Raises:
            KVSanitizerError: the plan reads what is not written, or writes what is not its own.
            ContractError: it breaks another rule of plans.
        """
        for blocks in self._groups:
            blocks.step_id = plan.step_id
        rows = self._checker.check(plan)
        for copy in plan.block_copies:
            self._copy(copy)
        for row in rows:
            for group in range(len(self._groups)):
                self._check(row, group)
        for blocks in self._groups:
            blocks.step_id += 1
        dead = tuple(blocks.take_dead() for blocks in self._groups)
        handle = self._inner.execute(replace(plan, poisoned_blocks=dead))
        self._in_flight.append(rows)
        return CheckedHandle(handle, self._take, self._fail)

    def close(self) -> None:
        self._inner.close()

    def _fail(self) -> None:
        self._in_flight.clear()
        self._checker.fail()

    def _take(self, result: StepResult) -> None:
        if not self._in_flight:
            # An earlier step failed.
            return
        rows = self._in_flight.popleft()
        self._checker.take(result)
        kept = iter(result.tokens)
        for row in rows:
            num_tokens = len(next(kept)) if row.samples else 0
            if row.decodes and row.count > 1:
                self._forget_drafts(row, num_tokens)

    def _forget_drafts(self, row: Row, num_kept: int) -> None:
        """What was drafted and not kept is not written, unless a later row computes it."""
        later = [r.end for rows in self._in_flight for r in rows if r.state is row.state]
        end = max([row.start + num_kept, *later])
        for group, blocks in enumerate(self._groups):
            size = blocks.block_size
            for place in range(end // size, len(row.tables[group])):
                block = row.tables[group][place]
                # Given up since, it may be another one's already.
                if row.state.request_id in blocks.holders[block]:
                    blocks.filled[block] = min(blocks.filled[block], max(0, end - place * size))

    def _copy(self, copy: BlockCopy) -> None:
        """Check a copy, and count its target as written as far as its source is."""
        blocks, target = self._groups[copy.group], copy.target
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

    def _check(self, row: Row, group: int) -> None:
        """Check one row of the plan, and count its positions as written."""
        blocks, table = self._groups[group], row.tables[group]
        size, request_id, end = self._size, row.state.request_id, row.end
        # Wherever the row starts, it reads no earlier position than this.
        earliest = self._kinds[group].first_read(row.start)
        for place in range(earliest // size, -(-end // size)):
            block, first = table[place], place * size
            if block == NO_BLOCK:
                raise blocks.error(request_id, block, f"position {first} has left the window")
            holders, filled = blocks.holders[block], blocks.filled[block]
            if request_id not in holders:
                raise blocks.error(
                    request_id, block, f"used after it was given up; holders {sorted(holders)}"
                )
            if filled < min(size, row.start - first):
                raise blocks.error(
                    request_id, block, f"position {first + filled} is read and was never written"
                )
            if end > first and row.start < first + size:
                if len(holders) > 1:
                    others = sorted(holders - {request_id})
                    raise blocks.error(
                        request_id, block, f"written while requests {others} share it"
                    )
                blocks.filled[block] = max(filled, min(size, end - first))
