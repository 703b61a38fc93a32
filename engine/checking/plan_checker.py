"""The rules that every plan and every result has to keep, as one state machine.

It sees plans when they are executed and results when they are taken, and knows nothing else of
scheduler, block manager or runner. So it serves the fake runner, the KV sanitizer (which adds what
the block manager tells, see `engine.checking.kv_sanitizer`) and the conformance kit alike.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.types import (
    BlockCopy,
    BlockUpdate,
    KVGeometry,
    NewRequest,
    PrefillChunk,
    StepHandle,
    StepPlan,
    StepResult,
)
from utils.errors import ContractError, KVSanitizerError


@dataclass(slots=True)
class SlotState:
    """A request in its slot, as far as plans and results tell.

    Attributes:
        num_known: tokens that its `NewRequest` brought.
        limit: most tokens, prompt and output together.
        scored: it asked for log-probabilities.
        tables: the block table of each cache group.
        fresh: of each group, indices of table entries added since the slot's last row.
        low, high: fewest and most positions that are computed once all steps in flight have ended;
            `low` is None before its first row. They differ while decode rows of several positions
            are in flight. `high` may exceed the length limit.
        decodes: its prefill has been planned to the end, and a token is sampled.
        ended: no plan may have a row of it any more.
    """

    request_id: int
    num_known: int
    limit: int
    scored: bool
    tables: list[list[int]]
    fresh: list[list[int]]
    low: int | None = None
    high: int = 0
    decodes: bool = False
    ended: bool = False


@dataclass(slots=True)
class Row:
    """A row of a step.

    Attributes:
        start, latest: earliest and latest position at which it starts; equal but for decode rows
            behind others of several positions.
        count: most positions that it computes.
        samples: it gives tokens.
        decodes: it is no prefill chunk.
        tables: the slot's block table of each cache group, which may become longer.
        fresh: of each group, indices of entries that came to the table since the slot's last row.
    """

    slot: int
    state: SlotState
    start: int
    latest: int
    count: int
    samples: bool
    decodes: bool
    tables: list[list[int]] = field(default_factory=list)
    fresh: list[list[int]] = field(default_factory=list)

    @property
    def end(self) -> int:
        """One behind the last position that it may compute."""
        end = self.latest + self.count
        return min(end, self.state.limit - 1) if self.decodes else end


class CheckedHandle(StepHandle):
    """A step whose result is checked when it is first taken.

    Args:
        take: checks a result.
        fail: told that the step has none.
    """

    def __init__(
        self, inner: StepHandle, take: Callable[[StepResult], None], fail: Callable[[], None]
    ) -> None:
        self._inner = inner
        self._take = take
        self._fail = fail
        self._taken = False

    def result(self) -> StepResult:
        try:
            result = self._inner.result()
        except BaseException:
            self._fail()
            raise
        if not self._taken:
            self._taken = True
            self._take(result)
        return result

    def done(self) -> bool:
        return self._inner.done()


class PlanChecker:
    """Checks plans and results in the order of their steps.

    Args:
        groups: the cache groups.
        max_num_seqs: slots.
        budget: most positions of a step.
    """

    def __init__(self, groups: tuple[KVGeometry, ...], max_num_seqs: int, budget: int) -> None:
        self._groups = groups
        self._size = groups[0].block_size
        self._max_num_seqs = max_num_seqs
        self._budget = budget
        self._next_step_id = 0
        self._in_flight: deque[tuple[StepPlan, list[Row]]] = deque()
        # Taken before those of earlier steps, by step.
        self._results: dict[int, StepResult] = {}
        self._running: dict[int, SlotState] = {}
        self._ended: set[int] = set()
        self.slots: dict[int, SlotState] = {}

    def check(self, plan: StepPlan) -> list[Row]:
        """Check a plan and take in what it changes; its rows.

        Raises:
            ContractError: the plan asks for what no plan may; the message says what.
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
        self._in_flight.append((plan, rows))
        return rows

    def take(self, result: StepResult) -> None:
        """Check the result of a step in flight, as soon as those before it have been taken.

        Raises:
            ContractError: a result breaks a rule.
        """
        waiting = {plan.step_id for plan, _ in self._in_flight}
        require(result.step_id in waiting, f"a result of step {result.step_id}, not in flight")
        self._results[result.step_id] = result
        while self._in_flight and self._in_flight[0][0].step_id in self._results:
            plan, rows = self._in_flight.popleft()
            self._check_result(plan, rows, self._results.pop(plan.step_id))

    def fail(self) -> None:
        """A step failed: nothing that is in flight matters any more."""
        self._in_flight.clear()
        self._results.clear()

    def _check_result(self, plan: StepPlan, rows: list[Row], result: StepResult) -> None:
        result.check(plan)
        if result.logprobs is not None or any(row.state.scored for row in rows):
            self._check_scores([row for row in rows if row.samples], result)
        require(set(result.reports) <= set(range(len(rows))), "a report of a row that is not there")
        for index, report in result.reports.items():
            if report.error is not None:
                self.end(rows[index].state.request_id)
        tokens = iter(result.tokens)
        for row in rows:
            num_kept = len(next(tokens)) if row.samples else 0
            if row.count > 1 and row.decodes and not row.state.ended:
                self._settle(row, num_kept)

    @staticmethod
    def _check_scores(sampling: list[Row], result: StepResult) -> None:
        """Who asked for log-probabilities has them, and nobody else."""
        scores = result.logprobs or [[]] * len(sampling)
        for row, tokens, scored in zip(sampling, result.tokens, scores, strict=True):
            wanted = len(tokens) if row.state.scored else 0
            require(
                len(scored) == wanted or row.state.ended,
                f"slot {row.slot}: {len(scored)} log-probabilities, and {wanted} were asked for",
            )

    def end(self, request_id: int) -> None:
        """The request has ended: no plan may have a row of it any more."""
        self._ended.add(request_id)
        state = self._running.pop(request_id, None)
        if state is not None:
            state.ended = True

    def users(self, group: int, block: int) -> list[int]:
        """Slots that may touch the block in a step in flight."""
        rows = [row for _, rows in self._in_flight for row in rows]
        return [row.slot for row in rows if block in self._touched(row, group)]

    def in_flight(self, request_id: int) -> int:
        """Rows in flight of a request."""
        rows = (row for _, rows in self._in_flight for row in rows)
        return sum(row.state.request_id == request_id for row in rows)

    def _touched(self, row: Row, group: int) -> list[int]:
        first = self._groups[group].kind.first_read(row.start) // self._size
        return row.tables[group][first : -(-row.end // self._size)]

    def _check_shape(self, plan: StepPlan) -> None:
        # An exception ends all requests and steps, and step ids start anew.
        if plan.step_id == 0:
            self.fail()
            self._next_step_id = 0
            self.slots.clear()
            self._running.clear()
            self._ended.clear()
        require(plan.step_id == self._next_step_id, f"step {plan.step_id} is out of order")
        self._next_step_id += 1
        rows, counts = plan.row_slots, plan.decode_tokens
        require(bool(rows), "the plan computes nothing")
        require(len(set(rows)) == len(rows), "a slot has two rows in one step")
        require(len(rows) <= self._max_num_seqs, f"{len(rows)} rows exceed max_num_seqs")
        require(
            len(counts) in (0, len(plan.decode)),
            f"decode_tokens has {len(counts)} entries for {len(plan.decode)} rows",
        )
        require(all(count > 0 for count in counts), f"decode rows of {counts} positions")
        require(
            plan.num_tokens <= self._budget, f"{plan.num_tokens} tokens exceed the token budget"
        )

    def _enter(self, new: NewRequest) -> None:
        slot = new.slot
        require(0 <= slot < self._max_num_seqs, f"there is no slot {slot}")
        busy = any(row.slot == slot for _, rows in self._in_flight for row in rows)
        require(not busy, f"slot {slot} changes hands while a step uses it")
        require(new.request_id not in self._ended, f"request {new.request_id} has ended")
        require(
            not self.in_flight(new.request_id),
            f"request {new.request_id} enters slot {slot} while it is in flight",
        )
        require(0 < len(new.token_ids) <= new.max_total_tokens, f"slot {slot}: its tokens")
        # Who held the slot, and the place that a preempted request held, are no more.
        old = self.slots.pop(slot, None)
        if old is not None and self._running.get(old.request_id) is old:
            del self._running[old.request_id]
        before = self._running.get(new.request_id)
        if before is not None:
            before.ended = True
        count = len(self._groups)
        state = SlotState(
            new.request_id,
            len(new.token_ids),
            new.max_total_tokens,
            new.sampling.logprobs is not None,
            [[] for _ in range(count)],
            [[] for _ in range(count)],
        )
        self.slots[slot] = self._running[new.request_id] = state

    def _update(self, update: BlockUpdate) -> None:
        require(update.group in range(len(self._groups)), f"there is no group {update.group}")
        state, valid = self._state(update.slot), range(self._groups[update.group].num_blocks)
        table, fresh = state.tables[update.group], state.fresh[update.group]
        first, end = update.first_index, update.first_index + len(update.block_ids)
        require(0 <= first <= len(table), f"slot {update.slot}: a gap in the block table")
        known = all(block in valid for block in update.block_ids)
        require(known, f"there are no such blocks as {update.block_ids}")
        table[first:end] = update.block_ids
        fresh.extend(range(first, end))

    def _check_copies(self, copies: tuple[BlockCopy, ...]) -> None:
        sources = {(copy.group, copy.source) for copy in copies}
        targets = [(copy.group, copy.target) for copy in copies]
        clear = sources.isdisjoint(targets) and len(set(targets)) == len(targets)
        require(clear, f"copies that overlap: {copies}")
        for copy in copies:
            require(copy.group in range(len(self._groups)), f"there is no group {copy.group}")
            source, target = copy.source, copy.target
            valid = range(self._groups[copy.group].num_blocks)
            require(source in valid and target in valid, f"no such blocks: {source}, {target}")
            if users := self.users(copy.group, target):
                problem = f"is overwritten while slots {users} use it"
                raise KVSanitizerError(self._next_step_id - 1, -1, target, problem)

    def _chunk(self, chunk: PrefillChunk) -> Row:
        state = self._state(chunk.slot)
        start, end = chunk.start, chunk.start + chunk.num_tokens
        where = f"slot {chunk.slot}, positions {start} to {end}"
        require(chunk.num_tokens > 0, f"{where}: an empty chunk")
        if state.low is None:
            require(start >= 0, f"{where}: a negative start")
        else:
            require(not state.decodes and start == state.low, f"{where}: {state.low} are computed")
        require(end <= state.num_known, f"{where}: {state.num_known} tokens are known")
        samples = end == state.num_known < state.limit
        require(chunk.samples == samples, f"{where}: samples={chunk.samples} is wrong")
        state.low = state.high = end
        state.decodes = samples
        return Row(chunk.slot, state, start, start, chunk.num_tokens, samples, False)

    def _decode(self, slot: int, count: int) -> Row:
        # Without `require`, whose message would be put together for every row.
        state = self._state(slot)
        if not state.decodes or state.low is None:
            raise ContractError(f"slot {slot} decodes in its prefill")
        if state.high + 1 >= state.limit:
            raise ContractError(f"slot {slot} may have reached its limit of {state.limit} tokens")
        row = Row(slot, state, state.low, state.high, count, True, True)
        state.low += 1
        state.high += count
        return row

    def _check_blocks(self, row: Row) -> None:
        """The row's blocks are there, and no step in flight uses those that came to its table."""
        state, size, row_end = row.state, self._size, row.end
        if state.ended:
            raise ContractError(f"slot {row.slot} is planned, and its request has ended")
        row.tables = state.tables
        for group, table in enumerate(state.tables):
            if row_end > (end := len(table) * size):
                raise self._misuse(row, -1, f"position {end} has no block in slot {row.slot}")
            for place in state.fresh[group]:
                # Blocks before the first row's start hold a prefix that was found in the cache.
                if place * size >= row.start and (users := self.users(group, table[place])):
                    raise self._misuse(
                        row, table[place], f"goes to slot {row.slot} while slots {users} use it"
                    )
        row.fresh = state.fresh
        if any(state.fresh):
            state.fresh = [[] for _ in state.tables]

    def _misuse(self, row: Row, block: int, problem: str) -> KVSanitizerError:
        return KVSanitizerError(self._next_step_id - 1, row.state.request_id, block, problem)

    def _settle(self, row: Row, num_kept: int) -> None:
        """A row of several positions has come back: later ones start where it left off."""
        state = row.state
        require(
            row.start + num_kept < state.limit,
            f"slot {row.slot} has more than its limit of {state.limit} tokens",
        )
        more, less = num_kept - 1, row.count - num_kept
        assert state.low is not None
        state.low += more
        state.high -= less
        for _, rows in self._in_flight:
            for later in rows:
                if later.state is state:
                    later.start += more
                    later.latest -= less

    def _state(self, slot: int) -> SlotState:
        state = self.slots.get(slot)
        if state is None:
            raise ContractError(f"no request ever entered slot {slot}")
        return state


def require(holds: bool, rule: str) -> None:
    """Raise ContractError with `rule` unless it holds."""
    if not holds:
        raise ContractError(rule)
