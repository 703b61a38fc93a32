"""What schedulers have in common: a queue of those that wait, and a batch of those that run."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

from config import Config
from engine.parts import make_policy
from engine.policies.base import QueuePolicy
from engine.running_batch import RunningBatch
from engine.sequence import Sequence
from engine.types import BlockManager, Clock, PendingPrefix, Scheduler, StepPlan, StepResult


class QueuedScheduler(Scheduler):
    """A scheduler that lacks only `schedule`.

    Attributes:
        budget: most positions of one step.
        max_decode_tokens: most positions of one decode row.
        batch: the running requests and the plan under construction.
        queue: the waiting requests.
        deferred: waiting requests that are not in the queue until a running request has computed
            a prefix of theirs.
    """

    policies: ClassVar[Collection[str]] = ("queue_policy",)

    def __init__(self, config: Config, block_manager: BlockManager, clock: Clock) -> None:
        self.budget = config.max_num_batched_tokens
        self.max_decode_tokens = 1 + config.num_speculative_tokens
        self.batch = RunningBatch(block_manager, config.max_num_seqs, clock)
        self.queue: QueuePolicy = make_policy("queue_policy", config)
        self.deferred: list[tuple[Sequence, PendingPrefix]] = []
        self._most_deferred = config.max_num_seqs
        self._waiting: dict[int, Sequence] = {}

    @property
    def has_unfinished(self) -> bool:
        return bool(self._waiting or self.batch.num_running)

    def add(self, seq: Sequence) -> None:
        self.batch.check_fits(seq)
        self.wait(seq)

    def wait(self, seq: Sequence) -> None:
        """Put a request into the queue."""
        self._waiting[seq.request_id] = seq
        self.queue.push(seq)

    def admit(self, seq: Sequence) -> bool:
        """Start the first of the queue; False, unchanged, if slots or blocks do not suffice."""
        if not self.batch.admit(seq):
            return False
        self.queue.pop()
        del self._waiting[seq.request_id]
        return True

    def defer(self, prefix: PendingPrefix) -> bool:
        """Let the first of the queue wait for a prefix, and others pass.

        False if as many wait as could ever run: a step's cost must not grow with the queue.
        """
        if len(self.deferred) >= self._most_deferred:
            return False
        self.deferred.append((self.queue.pop(), prefix))
        return True

    def rejoin(self) -> None:
        """Put those back into the queue whose prefix has come, or never will."""
        running, deferred = self.batch.running, self.deferred
        self.deferred = []
        for seq, prefix in deferred:
            leader = running.get(prefix.request_id)
            if leader is not None and leader.num_committed < prefix.num_tokens:
                self.deferred.append((seq, prefix))
            else:
                self.queue.push(seq)

    def decode_all(self, seqs: list[Sequence], left: int) -> int:
        """Plan decode rows for all of `seqs`, with drafts; returns the positions planned.

        `left` is what is left of the budget: at least one position for each request. Drafts may use
        up all of it. So prompts that are to share the step are planned before.
        """
        if not seqs:
            return 0
        # Equal shares, or the first requests of a batch would be served faster.
        return self.batch.decode(seqs, min(self.max_decode_tokens, left // len(seqs)))

    def commit(self, plan: StepPlan, result: StepResult) -> list[Sequence]:
        finished = self.batch.commit(plan, result)
        for seq in finished:
            self.queue.ended(seq)
        return finished

    def abort(self, request_id: int) -> Sequence | None:
        seq = self._waiting.pop(request_id, None)
        if seq is not None:
            self.batch.finish(seq, "abort")
            others = [entry for entry in self.deferred if entry[0] is not seq]
            if len(others) < len(self.deferred):
                # Popped and never run: it has to cost its user nothing.
                self.deferred = others
                self.queue.push(seq)
            self.queue.discard(seq)
        elif seq := self.batch.running.get(request_id):
            self.batch.finish(seq, "abort")
            self.queue.ended(seq)
        return seq
