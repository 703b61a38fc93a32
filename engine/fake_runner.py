"""A runner without model, torch or device, on which every mistake in a plan changes tokens.

Its KV cache is a real array of pages. A position's entry is a hash of its token and of all that
the block table shows of the positions before it, and the next token is a hash of all that the
table shows up to there. A wrong block, one that was freed early, a stale prefix, a lost write: each
gives tokens other than `FakeModel.alone`, and what a plan may never ask for is a ContractError.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from config import Config
from engine.types import (
    BlockCopy,
    KVGeometry,
    ModelRunner,
    PrefillChunk,
    StepHandle,
    StepPlan,
    StepResult,
)
from utils.errors import ConfigError, ContractError, EngineClosedError

if TYPE_CHECKING:
    from utils.checkpoint import Checkpoint

# What a page holds before anything of its request was written.
_POISON = 0x7EADBEEF


@dataclass(frozen=True, slots=True)
class FakeModel:
    """The arithmetic that stands for a model, the same in every process.

    The entries of a context add up to what is *read* from it: like attention, which knows order
    from the entries alone, so the sum is the same whatever the page size.

    Attributes:
        eos_chance: probability that a token is `eos_token_id`, beside its share of the others.
        seed: another seed, another model.
    """

    vocab_size: int = 50
    eos_token_id: int = 0
    eos_chance: float = 0.0
    seed: int = 0

    def entry(self, read: int, token: int) -> int:
        """What the cache holds for `token` behind a context of which `read` was read."""
        # Python hashes tuples of integers alike everywhere; only str and bytes are salted.
        return hash((read, token))

    def sample(self, read: int, seed: int) -> int:
        """The token after a context, for a request with this seed."""
        draw = hash((read, seed, self.seed))
        if (draw >> 8) % 2**20 < self.eos_chance * 2**20:
            return self.eos_token_id
        return draw % self.vocab_size

    def alone(
        self,
        prompt: list[int],
        max_tokens: int,
        *,
        stop_token_ids: Container[int] = frozenset(),
        seed: int = 0,
    ) -> list[int]:
        """The right output of a request, whatever it is batched with."""
        read = 0
        for token in prompt:
            read += self.entry(read, token)
        output: list[int] = []
        while len(output) < max_tokens:
            token = self.sample(read, seed)
            output.append(token)
            if token in stop_token_ids:
                break
            read += self.entry(read, token)
        return output


@dataclass(slots=True)
class _Slot:
    """A request in its slot.

    Attributes:
        fresh: indices of table entries whose block has not been used in this place.
    """

    tokens: list[int]
    seed: int
    table: list[int] = field(default_factory=list)
    fresh: list[int] = field(default_factory=list)
    num_computed: int | None = None


class _Handle(StepHandle):
    """A step whose result can be had from a time on.

    Attributes:
        tables: the blocks that each slot in the step may touch.
    """

    def __init__(self, result: StepResult, tables: dict[int, tuple[int, ...]], at: float) -> None:
        self._result = result
        self.tables = tables
        self.at = at
        self.taken = False

    def result(self) -> StepResult:
        if self.at:
            time.sleep(max(0.0, self.at - time.monotonic()))
        self.taken = True
        return self._result


class FakeRunner(ModelRunner):
    """Executes plans on pages of numbers; `LLM(path, model_runner="fake")`, or without a path.

    Args:
        config: for the number of slots, the token budget and, with a checkpoint, the cache size.
        checkpoint: for vocabulary and end-of-sequence token; only its config is read.
        geometry: the cache; derived from the config if None, which needs a max_model_len.
        model: another FakeModel than the checkpoint's vocabulary suggests.
        seconds: how long a step takes, from its plan; a result is not to be had before.

    Raises:
        ConfigError: tensor_parallel_size is above 1.
    """

    name = "fake"

    def __init__(
        self,
        config: Config,
        checkpoint: Checkpoint | None = None,
        *,
        geometry: KVGeometry | None = None,
        model: FakeModel | None = None,
        seconds: Callable[[StepPlan], float] | None = None,
    ) -> None:
        if config.tensor_parallel_size != 1:
            raise ConfigError(
                "tensor_parallel_size", config.tensor_parallel_size, "there is no device", "Use 1."
            )
        self._max_num_seqs = config.max_num_seqs
        self._budget = config.max_num_batched_tokens
        self.model = model or _model_of(checkpoint)
        self._geometry = g = geometry or _geometry_of(config)
        self._seconds = seconds
        self._entries = [_POISON] * (g.num_blocks * g.block_size)
        self._page_sums = [_POISON * g.block_size] * g.num_blocks
        self._slots: dict[int, _Slot] = {}
        self._in_flight: deque[_Handle] = deque()
        self._next_step_id = 0
        self._closed = False

    @property
    def kv_geometry(self) -> KVGeometry:
        return self._geometry

    def execute(self, plan: StepPlan) -> StepHandle:
        """As the contract says.

        Raises:
            ContractError: the plan asks for what no plan may; the message says what.
        """
        if self._closed:
            raise EngineClosedError("execute() after close()")
        while self._in_flight and self._in_flight[0].taken:
            self._in_flight.popleft()
        self._check(plan)
        self._apply(plan)
        tokens = []
        for chunk in plan.prefill:
            token = self._prefill(chunk)
            if chunk.samples:
                tokens.append([token])
        for index in plan.decode:
            slot = self._running(index)
            _require(
                slot.num_computed == len(slot.tokens) - 1, f"slot {index} decodes in its prefill"
            )
            tokens.append([self._compute(index, slot, 1)])
        tables = {index: tuple(self._slots[index].table) for index in _rows(plan)}
        handle = _Handle(StepResult(plan.step_id, tokens), tables, self._ready_at(plan))
        self._in_flight.append(handle)
        return handle

    def close(self) -> None:
        self._closed = True

    def _check(self, plan: StepPlan) -> None:
        rows = _rows(plan)
        # An exception ends all requests, and step ids start anew.
        anew = plan.step_id == 0 and not self._in_flight
        _require(plan.step_id == self._next_step_id or anew, f"step {plan.step_id} is out of order")
        self._next_step_id = plan.step_id + 1
        _require(bool(rows), "the plan computes nothing")
        _require(len(set(rows)) == len(rows), "a slot has two rows in one step")
        _require(len(rows) <= self._max_num_seqs, f"{len(rows)} rows exceed max_num_seqs")
        _require(
            plan.num_tokens <= self._budget, f"{plan.num_tokens} tokens exceed the token budget"
        )

    def _apply(self, plan: StepPlan) -> None:
        for block in plan.poisoned_blocks:
            self._poison(block)
        for new in plan.new_requests:
            _require(0 <= new.slot < self._max_num_seqs, f"there is no slot {new.slot}")
            busy = any(new.slot in handle.tables for handle in self._in_flight)
            _require(not busy, f"slot {new.slot} changes hands while a step uses it")
            self._slots[new.slot] = _Slot(list(new.token_ids), new.seed)
        for update in plan.block_updates:
            slot = self._running(update.slot)
            first, end = update.first_index, update.first_index + len(update.block_ids)
            _require(0 <= first <= len(slot.table), f"slot {update.slot}: a gap in the block table")
            valid = all(0 <= block < self._geometry.num_blocks for block in update.block_ids)
            _require(valid, f"there are no such blocks as {update.block_ids}")
            slot.table[first:end] = update.block_ids
            slot.fresh.extend(range(first, end))
        self._copy(plan.block_copies)

    def _copy(self, copies: tuple[BlockCopy, ...]) -> None:
        targets = [copy.target for copy in copies]
        clear = set(targets).isdisjoint(copy.source for copy in copies)
        _require(clear and len(set(targets)) == len(targets), f"copies that overlap: {copies}")
        size = self._geometry.block_size
        for source, target in ((copy.source, copy.target) for copy in copies):
            blocks = range(self._geometry.num_blocks)
            _require(source in blocks and target in blocks, f"no such blocks: {source}, {target}")
            users = self._users(target)
            _require(not users, f"block {target} is overwritten while slots {users} use it")
            to, start = target * size, source * size
            self._entries[to : to + size] = self._entries[start : start + size]
            self._page_sums[target] = self._page_sums[source]

    def _prefill(self, chunk: PrefillChunk) -> int:
        slot = self._running(chunk.slot)
        if slot.num_computed is None:
            slot.num_computed = chunk.start
        end = chunk.start + chunk.num_tokens
        where = f"slot {chunk.slot}, positions {chunk.start} to {end}"
        _require(chunk.num_tokens > 0, f"{where}: an empty chunk")
        _require(chunk.start == slot.num_computed, f"{where}: {slot.num_computed} are computed")
        _require(end <= len(slot.tokens), f"{where}: {len(slot.tokens)} tokens are known")
        _require(
            chunk.samples == (end == len(slot.tokens)), f"{where}: samples={chunk.samples} is wrong"
        )
        return self._compute(chunk.slot, slot, chunk.num_tokens, samples=chunk.samples)

    def _compute(self, index: int, slot: _Slot, count: int, *, samples: bool = True) -> int:
        """Write the next `count` positions; the token sampled behind them."""
        if slot.fresh:
            self._clear_fresh(index, slot)
        start = slot.num_computed
        assert start is not None
        size = self._geometry.block_size
        _require(
            start + count <= len(slot.table) * size,
            f"slot {index}: no block for position {len(slot.table) * size}",
        )
        entries, sums, table, entry = self._entries, self._page_sums, slot.table, self.model.entry
        read = self._read(slot, start)
        for position in range(start, start + count):
            block = table[position // size]
            place = block * size + position % size
            value = entry(read, slot.tokens[position])
            sums[block] += value - entries[place]
            entries[place] = value
            read += value
        slot.num_computed = start + count
        if not samples:
            return 0
        token = self.model.sample(self._read(slot, slot.num_computed), slot.seed)
        slot.tokens.append(token)
        return token

    def _read(self, slot: _Slot, length: int) -> int:
        """All that the pages hold for the first `length` positions."""
        size = self._geometry.block_size
        full, rest = divmod(length, size)
        read = sum(map(self._page_sums.__getitem__, slot.table[:full]))
        if rest:
            start = slot.table[full] * size
            read += sum(self._entries[start : start + rest])
        return read

    def _clear_fresh(self, index: int, slot: _Slot) -> None:
        """Poison blocks that came to the table for positions not computed yet."""
        size = self._geometry.block_size
        assert slot.num_computed is not None
        for place in slot.fresh:
            if place * size < slot.num_computed:
                continue
            block = slot.table[place]
            users = self._users(block)
            _require(not users, f"block {block} goes to slot {index} while slots {users} use it")
            self._poison(block)
        slot.fresh.clear()

    def _users(self, block: int) -> list[int]:
        """Slots that may touch the block in a step in flight."""
        tables = [item for handle in self._in_flight for item in handle.tables.items()]
        return [slot for slot, table in tables if block in table]

    def _poison(self, block: int) -> None:
        size = self._geometry.block_size
        self._entries[block * size : (block + 1) * size] = [_POISON] * size
        self._page_sums[block] = _POISON * size

    def _running(self, index: int) -> _Slot:
        slot = self._slots.get(index)
        if slot is None:
            raise ContractError(f"no request ever entered slot {index}")
        return slot

    def _ready_at(self, plan: StepPlan) -> float:
        if self._seconds is None:
            return 0.0
        before = self._in_flight[-1].at if self._in_flight else 0.0
        return max(before, time.monotonic()) + self._seconds(plan)


def _rows(plan: StepPlan) -> list[int]:
    return [chunk.slot for chunk in plan.prefill] + list(plan.decode)


def _require(holds: bool, rule: str) -> None:
    if not holds:
        raise ContractError(rule)


def _model_of(checkpoint: Checkpoint | None) -> FakeModel:
    if checkpoint is None:
        return FakeModel()
    eos = min(checkpoint.eos_token_ids, default=0)
    return FakeModel(int(checkpoint.hf_config.vocab_size), eos)


def _geometry_of(config: Config) -> KVGeometry:
    """A cache of entries of 8 bytes, sized as a real one."""
    # Here, because it brings torch along.
    from memory.kv_cache import kv_blocks

    return kv_blocks(config, KVGeometry(1, 1, 1, config.kvcache_block_size, 1, dtype_bytes=4))
