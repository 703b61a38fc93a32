"""Static batching, the baseline."""

from __future__ import annotations

from engine.queued_scheduler import QueuedScheduler
from engine.types import StepPlan


class StaticScheduler(QueuedScheduler):
    """Admits a batch and runs it to its end before it admits the next one.

    A batch is the first of the queue that fit with all outputs at their limits, so no one is
    preempted. Its prompts are prefilled first, then all decode together; requests that end
    early leave their slots empty. What Orca (Yu et al., OSDI 2022) compares with.
    """

    name = "static"

    def schedule(self) -> StepPlan | None:
        ledger = self.ledger
        if not ledger.num_running:
            self._admit_batch()
        left = self.budget
        prompts = list(ledger.prefilling.values())
        for seq in prompts:
            if left > 0:
                left -= ledger.prefill(seq, left)
        if not prompts:
            decodes = [seq for seq in ledger.decoding.values() if ledger.reserve(seq)]
            self.decode(decodes, self.budget)
        return ledger.build()

    def _admit_batch(self) -> None:
        num_blocks = 0
        while seq := self.queue.first():
            num_blocks += self.ledger.most_blocks(seq)
            if num_blocks > self.ledger.num_blocks or not self.admit(seq):
                break
