"""Continuous batching by policies, with chunked prefill and preemption by recomputation."""

from __future__ import annotations

from config import Config
from engine.parts import POLICIES, make_policy
from engine.policies.base import AdmissionPolicy, PreemptionPolicy, StepPolicy
from engine.queued_scheduler import QueuedScheduler
from engine.sequence import Sequence
from engine.types import BlockManager, Clock, StepPlan


class ContinuousScheduler(QueuedScheduler):
    """Each step decodes the running requests and fills its token budget with prefill.

    Requests join in the order of the queue policy as long as slots, blocks, budget and the
    admission policy allow. When a running request needs a block and none is free, the victim of
    the preemption policy gives up its blocks and is computed again later. Iteration-level
    scheduling is from Orca (Yu et al., OSDI 2022), preemption by recomputation from vLLM (Kwon
    et al., SOSP 2023), prefill in chunks beside decodes from Sarathi-Serve (Agrawal et al.,
    OSDI 2024).
    """

    name = "continuous"
    policies = POLICIES

    def __init__(self, config: Config, block_manager: BlockManager, clock: Clock) -> None:
        super().__init__(config, block_manager, clock)
        self._admission: AdmissionPolicy = make_policy("admission_policy", config)
        self._preemption: PreemptionPolicy = make_policy("preemption_policy", config)
        self._step: StepPolicy = make_policy("step_policy", config)
        self._gap = 0

    def schedule(self) -> StepPlan | None:
        num_preemptions = self._reserve_decodes()
        if num_preemptions is None:
            return None
        # Those whose prefill ends in this step decode from the next one on.
        decodes = list(self.batch.decoding.values())
        budget = self._step.prefill_budget(self.budget, len(decodes), self._gap)
        # Admitting right after a preemption would hand the blocks back to the victim.
        planned = self._prefill(min(budget, self.budget), may_admit=not num_preemptions)
        left = self.budget - planned
        if len(decodes) <= left:
            self.decode_all(decodes, left)
            self._gap = 0
        else:
            self._gap += 1
        return self.batch.build()

    def _prefill(self, budget: int, may_admit: bool) -> int:
        """Plan prompts, begun ones first; returns the number of tokens."""
        left = budget
        for seq in list(self.batch.prefilling.values()):
            if left > 0:
                left -= self.batch.prefill(seq, left)
        self.rejoin()
        while left > 0 and may_admit and (admitted := self._admit_first()):
            left -= self.batch.prefill(admitted, left)
        return budget - left

    def _admit_first(self) -> Sequence | None:
        while self.batch.num_free_slots and (seq := self.queue.first()):
            # Alone, every request fits: no policy may keep the engine from going on.
            if self.batch.running and not self._admission.admits(seq, self.batch):
                break
            prefix = self.batch.blocks.pending(seq.token_ids, seq.cache_salt)
            if prefix is None:
                return seq if self.admit(seq) else None
            # What a running request is about to compute is not computed twice.
            if not self.defer(prefix):
                break
        return None

    def _reserve_decodes(self) -> int | None:
        """A block for each next decode position; the number of preemptions, None to drain."""
        num_preemptions = 0
        full = [s for s in self.batch.decoding.values() if s.num_scheduled >= s.capacity]
        for seq in full:
            while seq.slot is not None and not self.batch.reserve(seq):
                if self.batch.num_in_flight:
                    return None
                victim = self._preemption.victim(self.batch.running.values())
                self.batch.preempt(victim)
                self.wait(victim)
                num_preemptions += 1
        return num_preemptions
