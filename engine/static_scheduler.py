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
        batch = self.batch
        if not batch.num_running:
            self._admit_batch()
        left = self.budget
        prompts = list(batch.prefilling.values())
        for seq in prompts:
            if left > 0:
                left -= batch.prefill(seq, left)
        if not prompts:
            decodes = [seq for seq in batch.decoding.values() if batch.reserve(seq)]
            self.decode_all(decodes, self.budget)
        return batch.build()

    def _admit_batch(self) -> None:
        num_blocks = 0
        while seq := self.queue.first():
            num_blocks += self.batch.most_blocks(seq)
            if num_blocks > self.batch.blocks.num_blocks or not self.admit(seq):
                break
