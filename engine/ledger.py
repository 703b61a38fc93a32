"""The bookkeeping every scheduler needs: slots, blocks, and what is in flight.

A scheduler decides; the ledger keeps the decisions consistent with the step contract. It turns
`admit`, `prefill`, `decode` and `preempt` calls into one `StepPlan` of deltas, and a
`StepResult` back into request state, whatever the pipeline depth.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from engine.sequence import Sequence
from engine.types import (
    BlockManager,
    BlockUpdate,
    NewRequest,
    PendingPrefix,
    PrefillChunk,
    StepPlan,
    StepResult,
)
from utils.errors import RequestTooLongError


class Ledger:
    """Slots and blocks of the running requests, and the plan under construction.

    Args:
        block_manager: where KV blocks come from.
        max_num_seqs: slots in all.
        clock: seconds, for the requests' times.

    Attributes:
        running: the requests that hold a slot and have not finished, by id, in order of
            admission.
        prefilling: those of them with known tokens left to plan.
        decoding: those past that and short of their length limit.
        num_in_flight: plans that have not been committed.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        max_num_seqs: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._blocks = block_manager
        self._clock = clock
        self._holder: list[Sequence | None] = [None] * max_num_seqs
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._new: dict[int, NewRequest] = {}
        self._grown: dict[int, int] = {}
        self._chunks: list[PrefillChunk] = []
        self._decode: list[int] = []
        self._next_step_id = 0
        self.running: dict[int, Sequence] = {}
        self.prefilling: dict[int, Sequence] = {}
        self.decoding: dict[int, Sequence] = {}
        self.num_in_flight = 0
        # By the running request whose prefix they wait for: (tokens it has to commit, request).
        self._followers: dict[int, list[tuple[int, Sequence]]] = {}
        self._woken: list[Sequence] = []

    @property
    def num_free_slots(self) -> int:
        """Slots that no request holds."""
        return len(self._free_slots)

    @property
    def num_running(self) -> int:
        """Requests that hold a slot, finished ones with a step in flight included."""
        return len(self._holder) - len(self._free_slots)

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self._blocks.block_size

    @property
    def num_blocks(self) -> int:
        """Blocks in all."""
        return self._blocks.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks that could be handed out now."""
        return self._blocks.num_free_blocks

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self._blocks.block_size)

    def most_blocks(self, seq: Sequence) -> int:
        """Blocks that the request holds at its length limit."""
        # The last token is only sampled, never computed, so it needs no place in the cache.
        return self.blocks_for(seq.max_total_tokens - 1)

    def check_fits(self, seq: Sequence) -> None:
        """Refuse a request that could never run.

        Raises:
            RequestTooLongError: at its length limit it exceeds the whole cache.
        """
        needed, there = self.most_blocks(seq), self._blocks.num_blocks
        if needed > there:
            raise RequestTooLongError(
                "prompt",
                f"{seq.num_prompt_tokens} tokens",
                f"with its output it needs {needed} KV blocks and the whole cache has {there}",
                "Lower max_tokens, or give the engine more num_kvcache_blocks, "
                "kvcache_memory_bytes or gpu_memory_utilization.",
            )

    def admit(self, seq: Sequence) -> bool:
        """Give a request a slot and blocks for all its tokens; False, unchanged, if none are free.

        Leading tokens found in the cache count as scheduled.
        """
        if not self._free_slots:
            return False
        cached = self._blocks.begin(seq.request_id, seq.token_ids, seq.cache_salt)
        if not self._blocks.grow(seq.request_id, len(seq.token_ids)):
            self._blocks.release(seq.request_id)
            return False
        slot = self._free_slots.pop()
        self._holder[slot] = seq
        seq.slot = slot
        seq.num_scheduled = seq.num_committed = cached
        seq.num_prefill = len(seq.token_ids)
        seq.capacity = len(self._blocks.table(seq.request_id)) * self._blocks.block_size
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
        )
        self._grown[slot] = 0
        self.running[seq.request_id] = self.prefilling[seq.request_id] = seq
        return True

    def pending(self, seq: Sequence) -> PendingPrefix | None:
        """A prefix of the request that a running one is about to compute: worth waiting for."""
        return self._blocks.pending(seq.token_ids, seq.cache_salt)

    def follow(self, seq: Sequence, prefix: PendingPrefix) -> bool:
        """Let a request wait until `woken` returns it: its prefix has come, or never will.

        False if as many wait as could ever run: a step's cost must not grow with the queue.
        """
        if sum(map(len, self._followers.values())) >= len(self._holder):
            return False
        self._followers.setdefault(prefix.request_id, []).append((prefix.num_tokens, seq))
        return True

    def unfollow(self, seq: Sequence) -> bool:
        """Forget a request that waits for a prefix; False if it does not."""
        for followers in self._followers.values():
            for i, (_, follower) in enumerate(followers):
                if follower is seq:
                    del followers[i]
                    return True
        if seq in self._woken:
            self._woken.remove(seq)
            return True
        return False

    def woken(self) -> list[Sequence]:
        """Requests that need not wait for a prefix any longer; each is returned once."""
        woken, self._woken = self._woken, []
        return woken

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

    def prefill(self, seq: Sequence, max_tokens: int) -> int:
        """Plan up to `max_tokens` of a request's known tokens; returns how many."""
        assert seq.slot is not None
        start = seq.num_scheduled
        num_tokens = min(max_tokens, seq.num_prefill - start)
        seq.num_scheduled = start + num_tokens
        samples = seq.num_scheduled == seq.num_prefill
        self._chunks.append(PrefillChunk(seq.slot, start, num_tokens, samples))
        seq.num_in_flight += 1
        if samples:
            seq.num_pending += 1
            del self.prefilling[seq.request_id]
            if _goes_on(seq):
                self.decoding[seq.request_id] = seq
        return num_tokens

    def decode(self, seqs: Iterable[Sequence]) -> None:
        """Plan one more token for each of `seqs`, all of `decoding` and with a reserved place."""
        ended = []
        for seq in seqs:
            assert seq.slot is not None
            seq.num_scheduled += 1
            seq.num_pending += 1
            seq.num_in_flight += 1
            self._decode.append(seq.slot)
            if not _goes_on(seq):
                ended.append(seq.request_id)
        for request_id in ended:
            del self.decoding[request_id]

    def preempt(self, seq: Sequence) -> None:
        """Take slot and blocks away; the request starts over from all its tokens, later."""
        assert seq.num_in_flight == 0, "a request in flight cannot be preempted"
        self._drop(seq)
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
            self._blocks.take_copies(),
        )
        self._new, self._grown, self._chunks, self._decode = {}, {}, [], []
        self._next_step_id += 1
        self.num_in_flight += 1
        return plan

    def commit(self, plan: StepPlan, result: StepResult) -> list[Sequence]:
        """Append the step's tokens, find stops, publish blocks; returns the finished requests."""
        self.num_in_flight -= 1
        if result.logprobs or result.prompt_logprobs:
            self._take_logprobs(plan, result)
        now = self._clock()
        tokens = iter(result.tokens)
        new_tokens = [next(tokens) if chunk.samples else [] for chunk in plan.prefill]
        new_tokens += tokens
        slots = [chunk.slot for chunk in plan.prefill] + list(plan.decode)
        counts = [chunk.num_tokens for chunk in plan.prefill] + [1] * len(plan.decode)
        holder, block_size = self._holder, self._blocks.block_size
        finished: list[Sequence] = []
        # One loop without calls: this is most of what the host does per token.
        for slot, num_computed, new in zip(slots, counts, new_tokens, strict=True):
            seq = holder[slot]
            assert seq is not None
            seq.num_in_flight -= 1
            if seq.finish_reason is not None:
                # Planned before the request's end was seen: what the row produced is dropped.
                if seq.num_in_flight == 0:
                    self._release(seq)
                continue
            before = seq.num_committed
            seq.num_committed = committed = before + num_computed
            seq.num_pending -= len(new)
            reason = None
            token_ids = seq.token_ids
            for token in new:
                token_ids.append(token)
                seq.token_times.append(now)
                if token in seq.stop_token_ids:
                    reason = "stop"
                    break
                if len(token_ids) >= seq.max_total_tokens:
                    reason = "length"
                    break
            if committed // block_size != before // block_size:
                self._blocks.commit(seq.request_id, token_ids, committed)
                if seq.request_id in self._followers:
                    self._wake(seq.request_id, committed)
            if reason is not None:
                finished.append(seq)
                self.finish(seq, reason)
        return finished

    def _take_logprobs(self, plan: StepPlan, result: StepResult) -> None:
        for slot, new in zip(plan.sampled_slots, result.logprobs or (), strict=False):
            seq = self._holder[slot]
            assert seq is not None
            if seq.finish_reason is None:
                seq.logprobs += new
        for chunk, found in zip(plan.prefill, result.prompt_logprobs or (), strict=False):
            seq = self._holder[chunk.slot]
            assert seq is not None
            # After a preemption some are there already.
            missing = len(seq.prompt_logprobs) - (chunk.start + 1)
            seq.prompt_logprobs += found[missing:]

    def finish(self, seq: Sequence, reason: str) -> None:
        """End a request; slot and blocks are kept until nothing in flight uses them."""
        seq.finish_reason = reason
        self._drop(seq)
        if seq.num_in_flight == 0 and seq.slot is not None:
            self._release(seq)

    def _drop(self, seq: Sequence) -> None:
        for group in (self.running, self.prefilling, self.decoding):
            group.pop(seq.request_id, None)

    def _wake(self, request_id: int, num_committed: int | None) -> None:
        """End the wait of those whose prefix has been committed; of all if nothing more comes."""
        followers = self._followers.pop(request_id)
        for num_tokens, seq in followers:
            if num_committed is None or num_tokens <= num_committed:
                self._woken.append(seq)
            else:
                self._followers.setdefault(request_id, []).append((num_tokens, seq))

    def _release(self, seq: Sequence) -> None:
        assert seq.slot is not None
        self._blocks.release(seq.request_id)
        if seq.request_id in self._followers:
            self._wake(seq.request_id, None)
        self._new.pop(seq.slot, None)
        self._grown.pop(seq.slot, None)
        self._holder[seq.slot] = None
        self._free_slots.append(seq.slot)
        seq.slot = None


def _goes_on(seq: Sequence) -> bool:
    """Whether it samples another token after those planned, of which the newest is not computed."""
    return seq.num_scheduled + 1 < seq.max_total_tokens
