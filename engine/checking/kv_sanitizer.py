"""The KV sanitizer finds misuse of KV blocks. `Config(kv_sanitizer=True)` turns the sanitizer on.

The sanitizer records for each block which requests *hold* the block, i.e. have it in their block
tables, and how many positions of the block are written. Before a step runs, the sanitizer checks
the step's plan against these records and against the rules of `PlanChecker`. A block is *dead* if
no request may read its old KV any more. Dead blocks are filled with NaN before the next step. If a
kernel reads a dead block, the step writes NaN as KV, and the sanitizer raises a KVSanitizerError.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import torch

from config import Config
from engine.checking.plan_checker import CheckedHandle, PlanChecker, Row
from engine.types import NO_BLOCK, BlockManager, KVGeometry, ModelRunner, StepHandle, StepPlan
from layers.step_rows import SlotTables
from memory.kv_cache import KVLayer
from utils.errors import KVSanitizerError


class SanitizedBlocks:
    """Wraps a block manager, and keeps the sanitizer's records of the manager's blocks."""

    def __init__(self, inner: BlockManager) -> None:
        self._inner = inner
        # Dead blocks not yet filled with NaN. Initially all blocks are dead.
        self._dead = set(range(inner.num_blocks))
        self._published: set[int] = set()
        self._unshared: set[int] = set()  # requests whose blocks must not enter the prefix cache
        # Block -> ids of the requests that hold the block.
        self.holders: list[set[int]] = [set() for _ in range(inner.num_blocks)]
        # Block -> how many of its first positions are written, once the steps in flight have run.
        self.filled = [0] * inner.num_blocks
        self.step_id = 0  # id of the step that the scheduler plans next

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    @property
    def groups(self) -> tuple[SanitizedBlocks, ...]:
        return (self,)

    def begin(self, request_id: int, token_ids: list[int], *about: Any) -> int:
        cached = self._inner.begin(request_id, token_ids, *about)
        table, size = self._inner.table(request_id), self._inner.block_size
        num_shared = len(table) - (cached % size > 0)
        for block in filter(lambda block: block != NO_BLOCK, table[:num_shared]):
            if (filled := self.filled[block]) < size:
                problem = f"found in the cache, and {filled} of its {size} positions are written"
                raise KVSanitizerError(self.step_id, request_id, block, problem)
            self.holders[block].add(request_id)
        self._hand_out(request_id, table[num_shared:])
        return cached

    def grow(self, request_id: int, num_tokens: int) -> bool:
        before = len(self._inner.table(request_id))
        grown = self._inner.grow(request_id, num_tokens)
        self._hand_out(request_id, self._inner.table(request_id)[before:])
        return grown

    def commit(self, request_id: int, token_ids: list[int], num_computed: int) -> None:
        before = list(self._inner.table(request_id))
        if request_id not in self._unshared:
            self._published.update(before[: num_computed // self._inner.block_size])
        self._inner.commit(request_id, token_ids, num_computed)
        # For blocks outside the sliding window the wrapped `commit` puts NO_BLOCK into the table,
        # and it may put the same blocks at the end of the table, for later positions.
        after = self._inner.table(request_id)
        self._drop(request_id, [b for b, a in zip(before, after, strict=False) if a != b])
        self._hand_out(request_id, after[len(before) :])

    def release(self, request_id: int) -> None:
        self._drop(request_id, [b for b in self._inner.table(request_id) if b != NO_BLOCK])
        self._inner.release(request_id)
        self._unshared.discard(request_id)

    def reset_prefix_cache(self) -> None:
        self._inner.reset_prefix_cache()
        self._published.clear()
        self._unshared.update(*self.holders)
        for block, holders in enumerate(self.holders):
            if not holders:
                self._kill(block)

    def take_dead(self) -> tuple[int, ...]:
        """Return the blocks that have become dead since the last call of `take_dead`."""
        dead, self._dead = self._dead, set()
        return tuple(sorted(dead))

    def _hand_out(self, request_id: int, blocks: list[int]) -> None:
        """Record a request's new `blocks`. Raises KVSanitizerError if another request holds one."""
        for block in blocks:
            if others := sorted(self.holders[block]):
                problem = f"handed out while requests {others} hold it"
                raise KVSanitizerError(self.step_id, request_id, block, problem)
            self.holders[block].add(request_id)
            self._kill(block)

    def _drop(self, request_id: int, blocks: list[int]) -> None:
        for block in blocks:
            self.holders[block].discard(request_id)
            may_be_found = self._inner.caches_prefixes and block in self._published
            if not self.holders[block] and not may_be_found:
                self._kill(block)

    def _kill(self, block: int) -> None:
        self._dead.add(block)
        self._published.discard(block)
        self.filled[block] = 0


class KVSanitizer(PlanChecker):
    """A plan checker that also checks plans against the records of `SanitizedBlocks`."""

    error = KVSanitizerError
    managers: tuple[SanitizedBlocks, ...] = ()  # one per cache group, set by `SanitizedRunner`

    def check(self, plan: StepPlan) -> list[Row]:
        rows = super().check(plan)
        for copy in plan.block_copies:
            self._check_copy(copy.source, copy.target, self.managers[copy.group])
        for group, blocks in enumerate(self.managers):
            for row in rows:
                self._check_row(row, group, blocks)
            blocks.step_id = plan.step_id + 1
        return rows

    def settle(self, row: Row, num_kept: int) -> None:
        super().settle(row, num_kept)
        # Record positions from `end` on as unwritten: they have rejected drafts or no tokens.
        end = max([row.start + num_kept, *(later.end for later in row.state.rows)])
        for table, blocks in zip(row.state.tables, self.managers, strict=False):
            for place in range(end // self.block_size, len(table)):
                block, most = table[place], max(0, end - place * self.block_size)
                # Skip a block that the request has released: another request may use it already.
                if row.state.new.request_id in blocks.holders[block]:
                    blocks.filled[block] = min(blocks.filled[block], most)

    def _check_copy(self, source: int, target: int, blocks: SanitizedBlocks) -> None:
        holders, filled = sorted(blocks.holders[target]), blocks.filled[source]
        if len(holders) != 1:
            problem = f"copied to; holders {holders}"
            raise self.misuse(min(holders, default=-1), target, problem)
        if filled < self.block_size:
            problem = f"copied, and {filled} of its {self.block_size} positions are written"
            raise self.misuse(holders[0], source, problem)
        blocks.filled[target] = filled

    def _check_row(self, row: Row, group: int, blocks: SanitizedBlocks) -> None:
        """Check a row's blocks in one cache group, and record the row's positions as written."""
        size, request_id, end = self.block_size, row.state.new.request_id, row.end
        # The row does not read the blocks before index `first_place` of the block table.
        first_place = self.groups[group].kind.first_read(row.start) // size
        table = row.state.tables[group][: -(-end // size)]
        for place in range(first_place, len(table)):
            block, first = table[place], place * size
            holders, filled = blocks.holders[block], blocks.filled[block]
            if request_id not in holders:
                problem = f"used after it was given up; holders {sorted(holders)}"
            elif filled < size and first + filled < row.start:
                problem = f"position {first + filled} is read and was never written"
            elif row.start >= first + size:
                continue
            elif len(holders) > 1:
                problem = f"written while requests {sorted(holders - {request_id})} share it"
            else:
                blocks.filled[block] = max(filled, min(size, end - first))
                continue
            raise self.misuse(request_id, block, problem)


class SanitizedRunner(ModelRunner):
    """Wraps a model runner, and checks every plan before the runner executes the plan."""

    def __init__(self, inner: ModelRunner, config: Config) -> None:
        self._inner = inner
        self.drafts = inner.drafts  # type: ignore[misc]
        self.exact, self.hidden_layers = inner.exact, inner.hidden_layers
        self._checker = KVSanitizer(inner.kv_groups, config)

    def watch(self, managers: Iterable[BlockManager]) -> tuple[BlockManager, ...]:
        """Wrap the block managers, one for each cache group, and return the wrappers."""
        self._checker.reset()
        self._checker.managers = tuple(map(SanitizedBlocks, managers))
        return cast(tuple[BlockManager, ...], self._checker.managers)

    @property
    def kv_groups(self) -> tuple[KVGeometry, ...]:
        return self._inner.kv_groups

    def now(self) -> float:
        return self._inner.now()

    def wait_until(self, moment: float) -> None:
        self._inner.wait_until(moment)

    def execute(self, plan: StepPlan) -> StepHandle:
        """Check a plan, then execute it. Raises a KVSanitizerError if the plan misuses a block."""
        self._checker.check(plan)
        dead = tuple(blocks.take_dead() for blocks in self._checker.managers)
        handle = self._inner.execute(replace(plan, poisoned_blocks=dead))
        return CheckedHandle(handle, self._checker)

    def close(self) -> None:
        self._inner.close()


class KVPoison:
    """Fills dead blocks with NaN before a step, and looks for NaN in the KV that the step wrote.

    If a row reads NaN in one layer, the keys and values that the row writes in all later layers are
    NaN. So only the keys and values of the last layer are checked.
    """

    def __init__(self, kv: list[list[KVLayer]], last: int, tables: SlotTables) -> None:
        """`kv` has the layers of each cache group; `last` is the group of the last layer."""
        self._kv, self._last = kv, last
        self._tables = tables
        self._requests: dict[int, int] = {}  # slot -> id of the slot's request

    def fill(self, plan: StepPlan) -> None:
        """Fill the plan's `poisoned_blocks` with NaN."""
        device = self._tables.num_computed.device
        for layers, dead in zip(self._kv, plan.poisoned_blocks, strict=False):
            blocks = torch.tensor(dead, dtype=torch.int64, device=device)
            for layer in layers:
                layer.k[blocks] = layer.v[blocks] = float("nan")

    def check(self, plan: StepPlan) -> None:
        """Wait until a step ends. Raises a KVSanitizerError if the step wrote NaN to the cache."""
        self._requests |= {new.slot: new.request_id for new in plan.new_requests}
        tables, size = self._tables, self._tables.block_size
        per_row = [chunk.num_tokens for chunk in plan.prefill] + [1] * len(plan.decode)
        slots, counts = torch.tensor([plan.row_slots, per_row], device=tables.num_computed.device)
        # The step wrote the positions `num_computed - behind`. For a row that computes three
        # positions, `behind` is 3, 2, 1, because `num_computed` already includes the step.
        behind = counts.cumsum(0).repeat_interleave(counts)
        behind -= torch.arange(len(behind), device=behind.device)
        slots = slots.repeat_interleave(counts)
        positions = tables.num_computed[slots] - behind
        blocks = tables.block_tables[self._last][slots, positions // size].long()
        written = self._kv[self._last][-1].flat[blocks * size + positions % size]
        if len(bad := written.isnan().flatten(1).any(1).nonzero()):
            slot, position, block = (int(x[bad[0]]) for x in (slots, positions, blocks))
            problem = f"position {position} is NaN: the model, or a read of a dead block"
            raise KVSanitizerError(plan.step_id, self._requests[slot], block, problem)
