"""Checks that step plans and their results keep the rules of `engine.types` and `engine.step`.

A *slot* is the index of a running request in the runner's tables. A *place* is an index in a block
table. A *row* is what a step computes for one request. A step and its rows are *in flight* from the
check of the plan to the check of the result. A decode row may have *drafts*, guessed tokens that
the runner accepts or rejects. The request's next row starts after the accepted drafts. So while
drafts are in flight, the checker knows only bounds of the next row's first position.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from config import Config
from engine.step import BlockCopy, BlockUpdate, NewRequest, PrefillChunk, StepPlan, StepResult
from engine.types import NO_BLOCK, KVGeometry, StepHandle
from utils.errors import ContractError, PlanError


@dataclass(slots=True)
class SlotState:
    """What the checker knows about the request in a slot."""

    new: NewRequest
    tables: list[list[int]]  # the request's block table in each cache group
    # Number of positions that steps may compute for the request. The request ends when a step
    # samples the last token that the length limit allows; no step computes this token's KV.
    num_positions: int
    # Bounds of the number of computed positions once the steps in flight have run: `low` if all
    # drafts are rejected, `high` if all are accepted.
    low: int = -1  # -1 before the request's first row, which may start at any position
    high: int = 0  # may exceed `num_positions`, but `Row.end` may not
    # (cache group, place) of each block table entry set since the previous row was planned.
    fresh: list[tuple[int, int]] = field(default_factory=list)
    rows: deque[Row] = field(default_factory=deque)  # the request's rows in flight, oldest first
    ended: bool = False  # whether the request has ended, or lost the slot by preemption


@dataclass(slots=True)
class Row:
    """What a step computes for one request: a prefill chunk or a decode."""

    state: SlotState
    start: int  # lower bound of the row's first position
    latest: int  # upper bound of the row's first position
    count: int  # number of positions of the row, also of those beyond the request's length limit
    samples: bool = True
    fresh: Sequence[tuple[int, int]] = ()  # block table entries set since the previous row

    @property
    def end(self) -> int:
        """The highest position that the row may compute, plus 1."""
        return min(self.latest + self.count, self.state.num_positions)


@dataclass(slots=True, eq=False)
class CheckedHandle(StepHandle):
    """Wraps a step's `StepHandle`. The first call of `result` also checks the step's result."""

    inner: StepHandle
    checker: PlanChecker
    taken: bool = False

    def result(self) -> StepResult:
        try:
            result = self.inner.result()
        except BaseException:
            self.checker.reset()
            raise
        if not self.taken:
            self.taken = True
            self.checker.take(result)
        return result

    def done(self) -> bool:
        return self.inner.done()


class PlanChecker:
    """Checks the plan and the result of every step, in the order of the steps."""

    error: type[PlanError] = PlanError

    def __init__(self, groups: tuple[KVGeometry, ...], config: Config) -> None:
        self.groups = groups
        self.block_size = groups[0].block_size
        self._config = config
        self.reset()

    def reset(self) -> None:
        """Forget all requests and steps. After an exception the engine starts again at step 0."""
        self._next_step_id = 0
        self._in_flight: dict[int, tuple[StepPlan, list[Row]]] = {}
        self._results: dict[int, StepResult] = {}  # step id -> unchecked result
        self._slots: dict[int, SlotState] = {}
        self._running: dict[int, SlotState] = {}  # by request id
        self._ended: set[int] = set()

    def check(self, plan: StepPlan) -> list[Row]:
        """Check a plan and return the plan's rows.

        Raises a PlanError if the plan misuses a block. Raises a ContractError for other faults.
        """
        self._check_shape(plan)
        for new in plan.new_requests:
            self._enter(new)
        for update in plan.block_updates:
            self._update(update)
        self._check_copies(plan.block_copies)
        rows = [self._chunk(chunk) for chunk in plan.prefill]
        rows += map(self._decode, plan.decode, plan.decode_counts)
        for row in rows:
            self._check_blocks(row)
            row.state.rows.append(row)
        self._in_flight[plan.step_id] = plan, rows
        return rows

    def take(self, result: StepResult) -> None:
        """Check a result, or keep it until the results of all earlier steps have come.

        Raises a ContractError if a result is wrong.
        """
        if self._next_step_id == 0:
            return  # a step failed, and `reset` deleted the records that the check needs
        step_id = result.step_id
        require(step_id in self._in_flight, f"a result of step {step_id}, not in flight")
        self._results[step_id] = result
        while self._in_flight and (oldest := next(iter(self._in_flight))) in self._results:
            self._check_result(*self._in_flight.pop(oldest), self._results.pop(oldest))

    def end(self, request_id: int) -> None:
        """Record that a request has ended. Later plans must have no row for this request."""
        self._ended.add(request_id)
        self._leave(request_id)

    def misuse(self, request_id: int, block: int, problem: str) -> PlanError:
        """Return an error about a misused block, for the step whose plan was checked last."""
        return self.error(self._next_step_id - 1, request_id, block, problem)

    def settle(self, row: Row, num_kept: int) -> None:
        """Record that `num_kept` positions of `row` were accepted; adjust bounds of later rows."""
        state = row.state
        limit = state.new.max_total_tokens
        if row.start + num_kept >= limit:
            raise ContractError(f"slot {state.new.slot} has more than its limit of {limit} tokens")
        state.low += num_kept - 1
        state.high -= row.count - num_kept
        for later in state.rows:
            later.start += num_kept - 1
            later.latest -= row.count - num_kept

    def _check_result(self, plan: StepPlan, rows: list[Row], result: StepResult) -> None:
        for row in rows:
            row.state.rows.popleft()
        result.check(plan)
        for index, report in result.reports.items():
            require(index in range(len(rows)), "a report of a row that is not there")
            if report.error is not None:
                self.end(rows[index].state.new.request_id)
        sampling = [row for row in rows if row.samples]
        scores = result.logprobs or [[]] * len(sampling)
        for row, tokens, scored in zip(sampling, result.tokens, scores, strict=True):
            new = row.state.new
            if row.state.ended:
                continue
            wanted = 0 if new.sampling.logprobs is None else len(tokens)
            if len(scored) != wanted:
                problem = f"{len(scored)} log-probabilities, and {wanted} were asked for"
                raise ContractError(f"slot {new.slot}: {problem}")
            if row.count > 1 and row.start >= len(new.token_ids):  # a decode with drafts
                self.settle(row, len(tokens))

    def _users(self, group: int, block: int) -> list[int]:
        """Return the slots that have a row in flight which may read or write the block."""
        users, kind, size = set(), self.groups[group].kind, self.block_size
        for _, rows in self._in_flight.values():
            for row in rows:
                places = slice(kind.first_read(row.start) // size, -(-row.end // size))
                if block in row.state.tables[group][places]:
                    users.add(row.state.new.slot)
        return sorted(users)

    def _check_shape(self, plan: StepPlan) -> None:
        if plan.step_id == 0:
            self.reset()
        require(plan.step_id == self._next_step_id, f"step {plan.step_id} is out of order")
        self._next_step_id += 1
        rows, counts = plan.row_slots, plan.decode_tokens
        require(bool(rows), "the plan computes nothing")
        require(len(set(rows)) == len(rows), "a slot has two rows in one step")
        most = self._config.max_num_seqs
        require(len(rows) <= most, f"{len(rows)} rows exceed max_num_seqs={most}")
        entries = f"decode_tokens has {len(counts)} entries for {len(plan.decode)} rows"
        require(len(counts) in (0, len(plan.decode)), entries)
        require(min(counts, default=1) > 0, f"decode rows of {counts} positions")
        num_tokens, most = plan.num_tokens, self._config.max_num_batched_tokens
        require(num_tokens <= most, f"{num_tokens} tokens exceed the token budget of {most}")

    def _enter(self, new: NewRequest) -> None:
        slot, request_id = new.slot, new.request_id
        # `old`: state of the slot's last request. `before`: earlier state of this request, or None.
        old, before = self._slots.get(slot), self._running.get(request_id)
        known, limit = len(new.token_ids), new.max_total_tokens
        require(0 <= slot < self._config.max_num_seqs, f"there is no slot {slot}")
        require(not (old and old.rows), f"slot {slot} changes hands while a step uses it")
        require(request_id not in self._ended, f"request {request_id} has ended")
        early = f"request {request_id} enters slot {slot} while it is in flight"
        require(not (before and before.rows), early)
        require(0 < known <= limit, f"slot {slot}: {known} tokens of at least 1, at most {limit}")
        if old is not None and not old.ended:
            self._leave(old.new.request_id)
        self._leave(request_id)
        state = SlotState(new, [[] for _ in self.groups], max(known, limit - 1))
        self._slots[slot] = self._running[request_id] = state

    def _leave(self, request_id: int) -> None:
        if state := self._running.pop(request_id, None):
            state.ended = True

    def _update(self, update: BlockUpdate) -> None:
        group = update.group
        # `_check_blocks` makes sure that no row reads the places without a block.
        self._check_ids(group, tuple(b for b in update.block_ids if b != NO_BLOCK))
        state = self._state(update.slot)
        table = state.tables[group]
        first, end = update.first_index, update.first_index + len(update.block_ids)
        require(0 <= first <= len(table), f"slot {update.slot}: a gap in the block table")
        table[first:end] = update.block_ids
        state.fresh.extend((group, place) for place in range(first, end))

    def _check_copies(self, copies: tuple[BlockCopy, ...]) -> None:
        sources = {(copy.group, copy.source) for copy in copies}
        targets = [(copy.group, copy.target) for copy in copies]
        clear = sources.isdisjoint(targets) and len(set(targets)) == len(targets)
        require(clear, f"copies that overlap: {copies}")
        for copy in copies:
            self._check_ids(copy.group, (copy.source, copy.target))
            if users := self._users(copy.group, copy.target):
                raise self.misuse(-1, copy.target, f"is overwritten while slots {users} use it")

    def _check_ids(self, group: int, blocks: tuple[int, ...]) -> None:
        require(group in range(len(self.groups)), f"there is no group {group}")
        valid = range(self.groups[group].num_blocks)
        if not all(map(valid.__contains__, blocks)):
            raise ContractError(f"there are no such blocks as {blocks}")

    def _chunk(self, chunk: PrefillChunk) -> Row:
        state = self._state(chunk.slot)
        start, end, known = chunk.start, chunk.start + chunk.num_tokens, len(state.new.token_ids)
        where = f"slot {chunk.slot}, positions {start} to {end}"
        require(chunk.num_tokens > 0, f"{where}: an empty chunk")
        require(start >= 0, f"{where}: a negative start")
        require(state.low in (-1, start), f"{where}: {state.low} are computed")
        require(end <= known, f"{where}: {known} tokens are known")
        samples = end == known < state.new.max_total_tokens
        require(chunk.samples == samples, f"{where}: samples={chunk.samples} is wrong")
        state.low = state.high = end
        return Row(state, start, start, chunk.num_tokens, samples)

    def _decode(self, slot: int, count: int) -> Row:
        # `require` is not used here, since messages would be formatted for faultless rows too.
        state = self._state(slot)
        limit = state.new.max_total_tokens
        if state.low < len(state.new.token_ids):
            raise ContractError(f"slot {slot} decodes in its prefill")
        if state.high + 1 >= limit:
            raise ContractError(f"slot {slot} may have reached its limit of {limit} tokens")
        if state.rows and state.new.sampling.logits_processors:
            raise ContractError(f"slot {slot} has logits processors and a row in flight")
        row = Row(state, state.low, state.high, count)
        state.low += 1
        state.high += count
        return row

    def _check_blocks(self, row: Row) -> None:
        """Check that a row has all its blocks, and that no row in flight uses its new blocks."""
        state, new, size, row_end = row.state, row.state.new, self.block_size, row.end
        if state.ended:
            raise ContractError(f"slot {new.slot} is planned, and its request has ended")
        for table, geometry in zip(state.tables, self.groups, strict=True):
            end, first = len(table) * size, geometry.kind.first_read(row.start)
            if NO_BLOCK in table and NO_BLOCK in table[first // size : -(-row_end // size)]:
                end = table.index(NO_BLOCK, first // size) * size
            if row_end > end:
                problem = f"position {end} has no block in slot {new.slot}"
                raise self.misuse(new.request_id, -1, problem)
        if state.fresh:
            row.fresh, state.fresh = state.fresh, []
        for group, place in row.fresh:
            block = state.tables[group][place]
            # Skip a block that begins before the row's start: its cached tokens may be shared.
            if place * size >= row.start and (users := self._users(group, block)):
                problem = f"goes to slot {new.slot} while slots {users} use it"
                raise self.misuse(new.request_id, block, problem)

    def _state(self, slot: int) -> SlotState:
        if slot not in self._slots:
            raise ContractError(f"no request ever entered slot {slot}")
        return self._slots[slot]


def require(holds: bool, rule: str) -> None:
    """Raise a ContractError with the message `rule` if `holds` is false."""
    if not holds:
        raise ContractError(rule)
