"""What schedulers have in common: a queue of the waiting and a ledger of the running."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

from config import Config
from engine.ledger import Ledger
from engine.parts import make_policy
from engine.policies.base import QueuePolicy
from engine.sequence import Sequence
from engine.types import BlockManager, Clock, PendingPrefix, Scheduler, StepPlan, StepResult


class QueuedScheduler(Scheduler):
    """A scheduler that lacks only `schedule`.

    Args:
        config: the engine's options.
        block_manager: where KV blocks come from; used by this scheduler alone.
        clock: the runner's.

    Attributes:
        budget: most positions of one step.
        max_decode_tokens: most positions of one decode row.
        ledger: slots, blocks and the plan under construction.
        queue: the waiting requests.
    """

    policies: ClassVar[Collection[str]] = ("queue_policy",)

    def __init__(self, config: Config, block_manager: BlockManager, clock: Clock) -> None:
        self.budget = config.max_num_batched_tokens
        self.max_decode_tokens = 1 + config.num_speculative_tokens
        self.ledger = Ledger(block_manager, config.max_num_seqs, clock)
        self.queue: QueuePolicy = make_policy("queue_policy", config)
        self._waiting: dict[int, Sequence] = {}

    @property
    def has_unfinished(self) -> bool:
        return bool(self._waiting or self.ledger.num_running)

    def add(self, seq: Sequence) -> None:
        self.ledger.check_fits(seq)
        self.wait(seq)

    def wait(self, seq: Sequence) -> None:
        """Put a request into the queue."""
        self._waiting[seq.request_id] = seq
        self.queue.push(seq)

    def admit(self, seq: Sequence) -> bool:
        """Start the first of the queue; False, unchanged, if slots or blocks do not suffice."""
        if not self.ledger.admit(seq):
            return False
        self.queue.pop()
        del self._waiting[seq.request_id]
        return True

    def defer(self, seq: Sequence, prefix: PendingPrefix) -> bool:
        """Let the first of the queue wait for a prefix, and others pass; False if too many wait."""
        if not self.ledger.follow(seq, prefix):
            return False
        self.queue.pop()
        return True

    def rejoin(self) -> None:
        """Put those that waited for a prefix back into the queue."""
        for seq in self.ledger.woken():
            self.wait(seq)

    def decode(self, seqs: list[Sequence], left: int) -> int:
        """Plan decode rows for all of `seqs`, with drafts; returns the positions planned.

        Drafts may use up all that is left of the budget. So prompts that are to share the step are
        planned before.

        Args:
            left: positions of the budget, at least one for each request.
        """
        if not seqs:
            return 0
        # Equal shares, or the first requests of a batch would be served faster.
        return self.ledger.decode(seqs, min(self.max_decode_tokens, left // len(seqs)))

    def commit(self, plan: StepPlan, result: StepResult) -> list[Sequence]:
        finished = self.ledger.commit(plan, result)
        for seq in finished:
            self.queue.ended(seq)
        return finished

    def abort(self, request_id: int) -> Sequence | None:
        seq = self._waiting.pop(request_id, None)
        if seq is not None:
            self.ledger.finish(seq, "abort")
            if self.ledger.unfollow(seq):
                # Popped and never run: it has to cost its user nothing.
                self.queue.push(seq)
            self.queue.discard(seq)
        elif seq := self.ledger.running.get(request_id):
            self.ledger.finish(seq, "abort")
            self.queue.ended(seq)
        return seq
