"""The running requests, and the plan that the scheduler is building.

A decode row computes the KV of a request's last token and of its *drafts*, tokens that speculative
decoding proposes. The step's result tells how many drafts are accepted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, count, repeat
from typing import Any

from engine.requests import Sequence
from engine.step import BlockUpdate, NewRequest, PrefillChunk, StepPlan, StepResult
from engine.types import BlockManager, Clock, RowReport, TokenLogprobs
from utils.errors import RequestTooLongError

# A row of a step: its slot, number of planned positions, new tokens, their log-probabilities, and
# the error or other values that the runner returned for the row.
_Row = tuple[int, int, list[int], list[TokenLogprobs] | None, RowReport | None]


class RunningBatch:
    """Turns a scheduler's decisions into step plans, and applies step results to the requests."""

    def __init__(self, blocks: BlockManager, max_num_seqs: int, clock: Clock) -> None:
        self.blocks = blocks  # schedulers and policies must not change the block manager
        self.running: dict[int, Sequence] = {}  # running requests by id, in order of admission
        self.prefilling: dict[int, Sequence] = {}  # running requests with prefill left to plan
        # Running requests that may get a decode row: prefill is planned and `_goes_on` is True.
        self.decoding: dict[int, Sequence] = {}
        self.num_in_flight = 0  # number of steps in flight
        self._groups, self._clock = blocks.groups, clock
        self._holder: list[Sequence | None] = [None] * max_num_seqs  # request in each slot
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._next_step_id = 0
        # Contents of the next plan. The keys of `_new`, `_grown` and `_decode_counts` are slots.
        self._new: dict[int, NewRequest] = {}
        self._grown: dict[int, int] = {}  # index of the first new entry in the slot's block tables
        self._chunks: list[PrefillChunk] = []
        self._decode: list[int] = []
        self._decode_counts: dict[int, int] = {}  # number of positions in the slot's decode row

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    @property
    def num_running(self) -> int:
        """Number of slots used by running requests, and by ended requests with steps in flight."""
        return len(self._holder) - len(self._free_slots)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.blocks.block_size)

    def most_blocks(self, seq: Sequence) -> list[int]:
        """Number of blocks that the request needs in each cache group up to its length limit."""
        # The KV of the last output token is never written, so the token needs no block. With
        # `max_tokens=0` there is no output token, and the KV of the whole prompt is written.
        num_tokens = max(seq.max_total_tokens - 1, seq.num_prompt_tokens)
        return [blocks.most_blocks(num_tokens) for blocks in self._groups]

    def check_fits(self, seq: Sequence) -> None:
        """Raise RequestTooLongError if the request may need more blocks than a cache group has."""
        for needed, blocks in zip(self.most_blocks(seq), self._groups, strict=True):
            if needed > (there := blocks.num_blocks):
                problem = f"with its output it needs {needed} KV blocks and the cache has {there}"
                more = "num_kvcache_blocks, kvcache_memory_bytes or gpu_memory_utilization"
                fix = f"Lower max_tokens, or give the engine more {more}."
                raise RequestTooLongError("prompt", f"{seq.num_prompt_tokens} tokens", problem, fix)

    def prefix_of(self, seq: Sequence) -> tuple[Any, ...]:
        """The last arguments of the block manager's methods `begin`, `fits` and `pending`."""
        most = seq.most_cached if self.blocks.caches_prefixes else None
        return seq.token_ids, seq.cache_salt, *(() if most is None else (most,))

    def admit(self, seq: Sequence) -> bool:
        """Give a request a slot and blocks. Return False if no slot or too few blocks are free."""
        where = self.prefix_of(seq)
        if not self._free_slots or not self.blocks.fits(*where):
            return False
        cached = self.blocks.begin(seq.request_id, *where)
        if not self.blocks.grow(seq.request_id, len(seq.token_ids)):
            self.blocks.release(seq.request_id)
            return False
        seq.slot = slot = self._free_slots.pop()
        self._holder[slot] = seq
        seq.num_scheduled = seq.num_committed = cached
        seq.num_prefill = len(seq.token_ids)
        seq.capacity = self._room(seq)
        if seq.admitted_at is None:
            seq.admitted_at, seq.num_cached = self._clock(), cached
        self._new[slot] = NewRequest(
            slot,
            seq.request_id,
            tuple(seq.token_ids),
            seq.sampling,
            seq.seed,
            len(seq.token_ids) - seq.num_prompt_tokens,
            tuple(seq.stop_token_ids) if seq.sampling.min_tokens else (),
            seq.max_total_tokens,
            seq.sample,
            seq.seed_kind,
        )
        self._grown[slot] = 0
        self.running[seq.request_id] = self.prefilling[seq.request_id] = seq
        return True

    def reserve(self, seq: Sequence, num_positions: int = 1) -> bool:
        """Reserve blocks for a request's next positions. Return False if too few are free."""
        end = min(seq.num_scheduled + num_positions, seq.max_total_tokens - 1)
        if end <= seq.capacity:
            return True
        if not self.blocks.grow(seq.request_id, end):
            return False
        self._take_growth(seq)
        return end <= seq.capacity

    def _take_growth(self, seq: Sequence) -> None:
        """Have the next plan list the entries that a request's block tables have got."""
        assert seq.slot is not None
        self._grown.setdefault(seq.slot, seq.capacity // self.blocks.block_size)
        seq.capacity = self._room(seq)

    def _room(self, seq: Sequence) -> int:
        """Number of positions for which the request has an entry in each of its block tables."""
        tables = [len(blocks.table(seq.request_id)) for blocks in self._groups]
        return min(tables) * self.blocks.block_size

    def prefill(self, seq: Sequence, max_tokens: int) -> int:
        """Plan up to `max_tokens` prefill tokens. Returns how many; 0 if a window must slide."""
        assert seq.slot is not None
        start = seq.num_scheduled
        num_tokens = min(max_tokens, seq.num_prefill - start, seq.capacity - start)
        if not num_tokens:
            return 0
        seq.num_scheduled = start + num_tokens
        reaches_end = seq.num_scheduled == seq.num_prefill
        samples = reaches_end and seq.num_prefill < seq.max_total_tokens
        self._chunks.append(PrefillChunk(seq.slot, start, num_tokens, samples))
        seq.num_in_flight += 1
        if reaches_end:
            del self.prefilling[seq.request_id]
            if _goes_on(seq):
                self.decoding[seq.request_id] = seq
        return num_tokens

    def decode(self, seqs: Iterable[Sequence], num_positions: int = 1) -> int:
        """Plan a decode row for each of `seqs`. Returns the number of planned positions.

        All `seqs` must be in `decoding`, and `reserve` must have returned True for each of them. A
        row has `num_positions` positions, or fewer if blocks run out or the length limit is near.
        """
        num_row, total = 1, 0
        for seq in list(seqs):
            assert seq.slot is not None
            if num_positions > 1:
                num_row = self._most_positions(seq, num_positions)
                seq.num_drafted += num_row - 1
                self._decode_counts[seq.slot] = num_row
            total += num_row
            seq.num_scheduled += num_row
            seq.num_in_flight += 1
            self._decode.append(seq.slot)
            if not _goes_on(seq):
                del self.decoding[seq.request_id]
        return total

    def _most_positions(self, seq: Sequence, wanted: int) -> int:
        """Number of positions in the next decode row: 1 plus at most `wanted` - 1 drafts."""
        # The row starts at position `earliest` if all drafts in flight are rejected. If some drafts
        # are accepted, the row starts later, and the runner shortens it at the length limit.
        earliest = seq.num_scheduled - seq.num_drafted
        wanted = min(wanted, seq.max_total_tokens - 1 - earliest)
        if self.reserve(seq, wanted):
            return wanted
        # Too few blocks are free. No request is preempted for drafts, so the row gets fewer drafts.
        return min(wanted, seq.capacity - seq.num_scheduled)

    def preempt(self, seq: Sequence) -> None:
        """Take away a request's slot and blocks. The scheduler must queue the request again."""
        assert seq.num_in_flight == 0, "a request in flight cannot be preempted"
        self._stop(seq)
        seq.reset()
        seq.num_preemptions += 1

    def build(self) -> StepPlan | None:
        """Return a plan of all rows added since the last call, or None if no row was added."""
        if not self._chunks and not self._decode:
            return None
        updates = []
        for slot, first in self._grown.items():
            seq = self._holder[slot]
            assert seq is not None
            for group, blocks in enumerate(self._groups):
                table = blocks.table(seq.request_id)
                updates.append(BlockUpdate(slot, first, tuple(table[first:]), group))
        counts = self._decode_counts
        drafts = tuple(counts.get(slot, 1) for slot in self._decode) if counts else ()
        plan = StepPlan(
            self._next_step_id,
            tuple(self._new.values()),
            tuple(updates),
            tuple(self._chunks),
            tuple(self._decode),
            self.blocks.take_copies(),
            drafts if sum(drafts) > len(drafts) else (),
        )
        self._new, self._grown, self._chunks = {}, {}, []
        self._decode, self._decode_counts = [], {}
        self._next_step_id += 1
        self.num_in_flight += 1
        return plan

    def commit(self, plan: StepPlan, result: StepResult) -> list[Sequence]:
        """Apply a step's result to the requests. Returns the requests that the result has ended."""
        result.check(plan)
        self.num_in_flight -= 1
        holder, block_size, now = self._holder, self.blocks.block_size, result.ended_at
        if result.prompt_logprobs:
            self._take_prompt_logprobs(plan, result.prompt_logprobs)
        finished: list[Sequence] = []
        for row, (slot, num_planned, new, scores, report) in enumerate(_rows(plan, result)):
            seq = holder[slot]
            assert seq is not None
            seq.num_in_flight -= 1
            if seq.finish_reason is not None:
                # The request ended after the row was planned, so the row's tokens are dropped.
                if seq.num_in_flight == 0:
                    self._release(seq)
                continue
            if report is not None and report.hidden_states is not None:
                seq.add_hidden_states(seq.num_committed + num_planned, report.hidden_states)
            if report is not None and report.error is not None:
                # The row's KV may be wrong. Without `blocks.commit` no other request will use it.
                seq.error = report.error
                finished.append(seq)
                self.finish(seq, "error")
                continue
            before, token_ids, num_known = seq.num_committed, seq.token_ids, len(seq.token_ids)
            reason = _append(seq, new, now)
            if scores:
                seq.logprobs += scores[: len(token_ids) - num_known]
            if report is not None:
                seq.values += report.values[: max(len(token_ids) - num_known, 1)]
            if num_planned > 1 and row >= len(plan.prefill):
                # A decode row with drafts commits as many positions as it has appended tokens.
                seq.num_committed = committed = before + len(token_ids) - num_known
                seq.num_scheduled -= before + num_planned - committed
                seq.num_drafted -= num_planned - 1
                if _goes_on(seq):
                    self.decoding[seq.request_id] = seq
            else:
                seq.num_committed = committed = before + num_planned
                if not new and committed >= seq.max_total_tokens:
                    # With `max_tokens=0` the request ends after its last prefill chunk.
                    reason = "length"
            if seq.sampling.logits_processors and reason is None:
                self._rejoin(seq)
            if committed // block_size != before // block_size:
                self.blocks.commit(seq.request_id, token_ids, committed)
                if seq.capacity < seq.num_prefill:
                    self._take_growth(seq)  # blocks behind a window have moved to the end
            if reason is not None:
                finished.append(seq)
                self.finish(seq, reason)
        return finished

    def _rejoin(self, seq: Sequence) -> None:
        if seq.request_id not in self.prefilling and _goes_on(seq):
            self.decoding[seq.request_id] = seq

    def _take_prompt_logprobs(
        self, plan: StepPlan, prompt_logprobs: list[list[TokenLogprobs]]
    ) -> None:
        for chunk, found in zip(plan.prefill, prompt_logprobs, strict=True):
            seq = self._holder[chunk.slot]
            assert seq is not None
            if seq.finish_reason is not None:
                continue  # the request has been aborted
            # After a preemption the prompt is computed again: add only values that `seq` lacks.
            first = max(chunk.start + 1, seq.sampling.prompt_logprobs_start)
            seq.prompt_logprobs += found[max(0, len(seq.prompt_logprobs) - first) :]

    def finish(self, seq: Sequence, reason: str) -> None:
        """End a request. Its slot and blocks become free when no step in flight uses them."""
        seq.finish_reason = reason
        self.blocks.abandon(seq.token_ids)
        self._stop(seq)

    def _stop(self, seq: Sequence) -> None:
        for group in (self.running, self.prefilling, self.decoding):
            group.pop(seq.request_id, None)
        if seq.num_in_flight == 0 and seq.slot is not None:
            self._release(seq)

    def _release(self, seq: Sequence) -> None:
        assert seq.slot is not None
        self.blocks.release(seq.request_id)
        self._new.pop(seq.slot, None)
        self._grown.pop(seq.slot, None)
        self._holder[seq.slot] = None
        self._free_slots.append(seq.slot)
        seq.slot = None


def _append(seq: Sequence, tokens: list[int], now: float) -> str | None:
    """Append tokens, up to the one that ends the request. Return the finish reason, if any."""
    for token in tokens:
        seq.token_ids.append(token)
        seq.token_times.append(now)
        if token in seq.stop_token_ids:
            return "stop"
        if len(seq.token_ids) >= seq.max_total_tokens:
            return "length"
    return None


def _goes_on(seq: Sequence) -> bool:
    """Whether a further row may be planned: not if the rows in flight may reach the length limit.

    A request with logits processors waits for its row in flight: the host calls the processors with
    all tokens so far, and must not call them after the last token.
    """
    if seq.num_in_flight and seq.sampling.logits_processors:
        return False
    return seq.num_scheduled + 1 < seq.max_total_tokens


def _rows(plan: StepPlan, result: StepResult) -> Iterator[_Row]:
    """Return all rows of a step with their results: first prefill chunks, then decode rows."""
    tokens = iter(result.tokens)
    scores: Iterator[list[TokenLogprobs] | None] = iter(result.logprobs or repeat(None))
    reports = map(result.reports.get, count()) if result.reports else repeat(None)
    chunks: list[_Row] = []
    for chunk in plan.prefill:
        drawn = (next(tokens), next(scores)) if chunk.samples else ([], None)
        chunks.append((chunk.slot, chunk.num_tokens, *drawn, next(reports)))
    decodes = zip(plan.decode, plan.decode_counts, tokens, scores, reports, strict=False)
    return chain(chunks, decodes)
