"""The bookkeeping every scheduler needs: slots, blocks, and what is in flight.

A scheduler decides; the ledger keeps the decisions consistent with the step contract. It turns
`admit`, `prefill`, `decode` and `preempt` calls into one `StepPlan` of deltas, and a
`StepResult` back into request state, whatever the pipeline depth.
"""

from __future__ import annotations

from engine.sequence import Sequence
from engine.types import BlockManager, BlockUpdate, NewRequest, PrefillChunk, StepPlan, StepResult


class Ledger:
    """Slots and blocks of the running requests, and the plan under construction.

    Args:
        block_manager: where KV blocks come from.
        max_num_seqs: slots in all.
    """

    def __init__(self, block_manager: BlockManager, max_num_seqs: int) -> None:
        self._blocks = block_manager
        self._holder: list[Sequence | None] = [None] * max_num_seqs
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._new: dict[int, NewRequest] = {}
        self._grown: dict[int, int] = {}
        self._chunks: list[PrefillChunk] = []
        self._decode: list[int] = []
        self._next_step_id = 0
        self.num_in_flight = 0

    @property
    def num_running(self) -> int:
        """Requests that hold a slot, finished ones with a step in flight included."""
        return len(self._holder) - len(self._free_slots)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self._blocks.block_size)

    def admit(self, seq: Sequence) -> bool:
        """Give a request a slot and blocks for all its tokens; False, unchanged, if none are free.

        Leading tokens found in the cache count as scheduled.
        """
        if not self._free_slots:
            return False
        cached = self._blocks.begin(seq.request_id, seq.token_ids)
        if not self._blocks.grow(seq.request_id, len(seq.token_ids)):
            self._blocks.release(seq.request_id)
            return False
        slot = self._free_slots.pop()
        self._holder[slot] = seq
        seq.slot = slot
        seq.num_scheduled = seq.num_committed = cached
        seq.num_prefill = len(seq.token_ids)
        seq.capacity = len(self._blocks.table(seq.request_id)) * self._blocks.block_size
        self._new[slot] = NewRequest(
            slot, seq.request_id, tuple(seq.token_ids), seq.sampling, seq.seed
        )
        self._grown[slot] = 0
        return True

    def reserve(self, seq: Sequence) -> bool:
        """Make sure that the next position has a block; False, unchanged, if none is free."""
        if seq.num_scheduled < seq.capacity:
            return True
        if not self._blocks.grow(seq.request_id, seq.num_scheduled + 1):
            return False
        assert seq.slot is not None
        block_size = self._blocks.block_size
        self._grown.setdefault(seq.slot, seq.capacity // block_size)
        seq.capacity = len(self._blocks.table(seq.request_id)) * block_size
        return True

    def prefill(self, seq: Sequence, num_tokens: int) -> None:
        """Plan the next `num_tokens` of a request's known tokens."""
        assert seq.slot is not None
        start = seq.num_scheduled
        seq.num_scheduled = start + num_tokens
        samples = seq.num_scheduled == seq.num_prefill
        self._chunks.append(PrefillChunk(seq.slot, start, num_tokens, samples))
        seq.num_in_flight += 1
        if samples:
            seq.num_pending += 1

    def decode(self, seqs: list[Sequence]) -> None:
        """Plan one more token for each of `seqs`, which all have a reserved position."""
        for seq in seqs:
            assert seq.slot is not None
            seq.num_scheduled += 1
            seq.num_pending += 1
            seq.num_in_flight += 1
            self._decode.append(seq.slot)

    def preempt(self, seq: Sequence) -> None:
        """Take slot and blocks away; the request starts over from all its tokens, later."""
        assert seq.num_in_flight == 0, "a request in flight cannot be preempted"
        self._release(seq)
        seq.reset()
        seq.num_preemptions += 1

    def build(self) -> StepPlan | None:
        """The plan made of the calls since the last one; None if it computes nothing."""
        if not self._chunks and not self._decode:
            return None
        updates = []
        for slot, first in self._grown.items():
            seq = self._holder[slot]
            assert seq is not None
            table = self._blocks.table(seq.request_id)
            updates.append(BlockUpdate(slot, first, tuple(table[first:])))
        plan = StepPlan(
            self._next_step_id,
            tuple(self._new.values()),
            tuple(updates),
            tuple(self._chunks),
            tuple(self._decode),
        )
        self._new, self._grown, self._chunks, self._decode = {}, {}, [], []
        self._next_step_id += 1
        self.num_in_flight += 1
        return plan

    def commit(self, plan: StepPlan, result: StepResult) -> list[Sequence]:
        """Append the step's tokens, find stops, publish blocks; returns the finished requests."""
        self.num_in_flight -= 1
        finished: list[Sequence] = []
        tokens = iter(result.tokens)
        for chunk in plan.prefill:
            new = next(tokens) if chunk.samples else []
            self._commit_row(chunk.slot, chunk.num_tokens, new, finished)
        for slot in plan.decode:
            self._commit_row(slot, 1, next(tokens), finished)
        return finished

    def finish(self, seq: Sequence, reason: str) -> None:
        """End a request; slot and blocks are kept until nothing in flight uses them."""
        seq.finish_reason = reason
        if seq.num_in_flight == 0 and seq.slot is not None:
            self._release(seq)

    def _commit_row(
        self, slot: int, num_computed: int, new: list[int], finished: list[Sequence]
    ) -> None:
        seq = self._holder[slot]
        assert seq is not None
        seq.num_in_flight -= 1
        if seq.finish_reason is not None:
            # A row planned before its request's end was seen: what it produced is dropped.
            if seq.num_in_flight == 0:
                self._release(seq)
            return
        before = seq.num_committed
        seq.num_committed = before + num_computed
        seq.num_pending -= len(new)
        reason = None
        for token in new:
            seq.token_ids.append(token)
            if token in seq.stop_token_ids:
                reason = "stop"
                break
            if len(seq.token_ids) >= seq.max_total_tokens:
                reason = "length"
                break
        block_size = self._blocks.block_size
        if seq.num_committed // block_size != before // block_size:
            self._blocks.commit(seq.request_id, seq.token_ids, seq.num_committed)
        if reason is not None:
            finished.append(seq)
            self.finish(seq, reason)

    def _release(self, seq: Sequence) -> None:
        assert seq.slot is not None
        self._blocks.release(seq.request_id)
        self._new.pop(seq.slot, None)
        self._grown.pop(seq.slot, None)
        self._holder[seq.slot] = None
        self._free_slots.append(seq.slot)
        seq.slot = None
