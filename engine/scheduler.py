"""Continuous batching: first come, first served, preemption by recomputation."""

from __future__ import annotations

from collections import deque

from config import Config
from engine.ledger import Ledger
from engine.sequence import Sequence
from engine.types import BlockManager, Scheduler, StepPlan, StepResult
from utils.errors import RequestTooLongError


class ContinuousScheduler(Scheduler):
    """Each step decodes every running request and fills the token budget with prefill.

    Requests are admitted in order of arrival, as long as slots, blocks and budget last. When a
    running request needs a block and none is free, the latest arrival gives up its blocks and
    is computed again later. Iteration-level scheduling is from Orca (Yu et al., OSDI 2022),
    preemption by recomputation from vLLM (Kwon et al., SOSP 2023), prefill in chunks beside
    decodes from Sarathi-Serve (Agrawal et al., OSDI 2024).

    Args:
        config: for max_num_seqs and max_num_batched_tokens.
        block_manager: where KV blocks come from; used by this scheduler alone.
    """

    name = "continuous"

    def __init__(self, config: Config, block_manager: BlockManager) -> None:
        self._max_num_batched_tokens = config.max_num_batched_tokens
        self._num_blocks = block_manager.num_blocks
        self._ledger = Ledger(block_manager, config.max_num_seqs)
        self._waiting: deque[Sequence] = deque()
        self._running: dict[int, Sequence] = {}

    @property
    def has_unfinished(self) -> bool:
        return bool(self._waiting or self._ledger.num_running)

    def add(self, seq: Sequence) -> None:
        # The last token is only sampled, never computed, so it needs no place in the cache.
        needed = self._ledger.blocks_for(seq.max_total_tokens - 1)
        if needed > self._num_blocks:
            raise RequestTooLongError(
                "prompt",
                f"{seq.num_prompt_tokens} tokens",
                f"with its output it needs {needed} KV blocks and the whole cache has "
                f"{self._num_blocks}",
                "Lower max_tokens, or give the engine more num_kvcache_blocks, "
                "kvcache_memory_bytes or gpu_memory_utilization.",
            )
        self._waiting.append(seq)

    def schedule(self) -> StepPlan | None:
        num_preemptions = self._reserve_decodes()
        if num_preemptions is None:
            return None
        decodes = [seq for seq in self._running.values() if _decodes(seq)]
        self._ledger.decode(decodes)
        budget = self._max_num_batched_tokens - len(decodes)
        for seq in self._running.values():
            if seq.num_scheduled < seq.num_prefill:
                budget -= self._prefill(seq, budget)
        # Admitting right after a preemption would hand the blocks back to the victim.
        while budget > 0 and self._waiting and not num_preemptions:
            seq = self._waiting[0]
            if not self._ledger.admit(seq):
                break
            self._waiting.popleft()
            self._running[seq.request_id] = seq
            budget -= self._prefill(seq, budget)
        return self._ledger.build()

    def commit(self, plan: StepPlan, result: StepResult) -> list[Sequence]:
        finished = self._ledger.commit(plan, result)
        for seq in finished:
            del self._running[seq.request_id]
        return finished

    def abort(self, request_id: int) -> Sequence | None:
        seq = self._running.pop(request_id, None)
        if seq is None:
            seq = next((s for s in self._waiting if s.request_id == request_id), None)
            if seq is None:
                return None
            self._waiting.remove(seq)
        self._ledger.finish(seq, "abort")
        return seq

    def _prefill(self, seq: Sequence, budget: int) -> int:
        num_tokens = min(budget, seq.num_prefill - seq.num_scheduled)
        if num_tokens > 0:
            self._ledger.prefill(seq, num_tokens)
        return num_tokens

    def _reserve_decodes(self) -> int | None:
        """A block for each next decode position; the number of preemptions, None to drain."""
        num_preemptions = 0
        full = [s for s in self._running.values() if s.num_scheduled == s.capacity and _decodes(s)]
        for seq in full:
            while seq.slot is not None and not self._ledger.reserve(seq):
                if self._ledger.num_in_flight:
                    return None
                _, victim = self._running.popitem()
                self._ledger.preempt(victim)
                self._waiting.appendleft(victim)
                num_preemptions += 1
        return num_preemptions


def _decodes(seq: Sequence) -> bool:
    """Whether the request is past its prefill and short of its length limit."""
    return (
        seq.num_scheduled >= seq.num_prefill
        and len(seq.token_ids) + seq.num_pending < seq.max_total_tokens
    )
