"""The schedulers: a common base class, continuous batching, and static batching.

A decode row computes a request's last token and its *drafts*: tokens that speculative decoding
proposes. A *deferred* request waits outside the queue until a running request has computed the KV
of a prefix that the two requests share.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import ClassVar

from config import Config
from engine.parts import POLICIES, make
from engine.policies import AdmissionPolicy, PreemptionPolicy, QueuePolicy, StepPolicy
from engine.requests import Sequence
from engine.running_batch import RunningBatch
from engine.types import BlockManager, Clock, PendingPrefix, Scheduler, StepPlan, StepResult


class QueuedScheduler(Scheduler):
    """Base class of schedulers with a queue and a RunningBatch. Subclasses define `schedule`."""

    policies: ClassVar[Collection[str]] = ("queue_policy",)

    def __init__(self, config: Config, block_manager: BlockManager, clock: Clock) -> None:
        self.budget = config.max_num_batched_tokens  # maximum number of positions in a step
        self.max_decode_tokens = 1 + config.num_speculative_tokens
        self.batch = RunningBatch(block_manager, config.max_num_seqs, clock)
        self.queue: QueuePolicy = make("queue_policy", config)
        self.deferred: dict[PendingPrefix, dict[int, Sequence]] = {}  # by prefix and request id
        self._awaited: dict[int, PendingPrefix] = {}  # request id -> prefix that it waits for
        self._most_deferred = config.max_num_seqs
        self._waiting: dict[int, Sequence] = {}

    @property
    def has_unfinished(self) -> bool:
        return bool(self._waiting or self.batch.num_running)

    def add(self, seq: Sequence) -> None:
        self.batch.check_fits(seq)
        self.wait(seq)

    def wait(self, seq: Sequence) -> None:
        """Put a new or preempted request into the queue."""
        self.queue.push(seq)
        self._waiting[seq.request_id] = seq

    def admit(self, seq: Sequence) -> bool:
        """Admit the queue's first request. Return False if no slot or too few blocks are free."""
        if not self.batch.admit(seq):
            return False
        self.queue.pop()
        del self._waiting[seq.request_id]
        return True

    def defer(self, prefix: PendingPrefix) -> bool:
        """Move the queue's first request to `deferred`. Return False if `deferred` is full."""
        # `deferred` has a size limit, because `rejoin` reads each prefix in each step.
        if len(self._awaited) >= self._most_deferred:
            return False
        seq = self.queue.pop()
        self._awaited[seq.request_id] = prefix
        self.deferred.setdefault(prefix, {})[seq.request_id] = seq
        return True

    def rejoin(self) -> None:
        """Requeue deferred requests whose prefix is now cached, or is no longer being computed."""
        for prefix in list(self.deferred):
            leader = self.batch.running.get(prefix.request_id)
            if leader is None or leader.num_committed >= prefix.num_tokens:
                for request_id, seq in self.deferred.pop(prefix).items():
                    del self._awaited[request_id]
                    self.queue.push(seq)

    def prefill_begun(self, left: int) -> int:
        """Plan up to `left` tokens for running prefills. Returns `left` minus planned tokens."""
        for seq in list(self.batch.prefilling.values()):
            if left <= 0:
                break
            left -= self.batch.prefill(seq, left)
        return left

    def decode_all(self, seqs: list[Sequence], left: int) -> int:
        """Plan decode rows with drafts for all `seqs`. Returns the number of planned positions.

        All rows together get at most `left` positions. `left` must be at least the number of rows.
        Drafts may use up `left`, so a scheduler plans prefill before it calls this method.
        """
        if not seqs:
            return 0
        return self.batch.decode(seqs, min(self.max_decode_tokens, left // len(seqs)))

    def commit(self, plan: StepPlan, result: StepResult) -> list[Sequence]:
        finished = self.batch.commit(plan, result)
        for seq in finished:
            self.queue.ended(seq)
        return finished

    def abort(self, request_id: int) -> Sequence | None:
        if seq := self._waiting.pop(request_id, None):
            self.batch.finish(seq, "abort")
            if prefix := self._awaited.pop(request_id, None):
                # `push` undoes the charge that `FairShare` made when `defer` popped the request.
                del self.deferred[prefix][request_id]
                if not self.deferred[prefix]:
                    del self.deferred[prefix]
                self.queue.push(seq)
            self.queue.discard(seq)
        elif seq := self.batch.running.get(request_id):
            self.batch.finish(seq, "abort")
            self.queue.ended(seq)
        return seq


class ContinuousScheduler(QueuedScheduler):
    """Continuous batching: each step may admit requests and run prefill chunks and decode rows.

    Iteration-level scheduling is from Orca (Yu et al., OSDI 2022), preemption by recomputation from
    vLLM (Kwon et al., SOSP 2023), chunked prefill from Sarathi-Serve (Agrawal et al., OSDI 2024).
    """

    name = "continuous"
    policies = POLICIES

    def __init__(self, config: Config, block_manager: BlockManager, clock: Clock) -> None:
        super().__init__(config, block_manager, clock)
        self._admission: AdmissionPolicy = make("admission_policy", config)
        self._preemption: PreemptionPolicy = make("preemption_policy", config)
        self._step: StepPolicy = make("step_policy", config)
        self._gap = 0

    def schedule(self) -> StepPlan | None:
        num_preemptions = self._reserve_decodes()
        if num_preemptions is None:
            return None
        decodes = list(self.batch.decoding.values())
        budget = self._step.prefill_budget(self.budget, len(decodes), self._gap)
        # A step with a preemption admits no request: it could admit the preempted request again.
        planned = self._prefill(min(budget, self.budget), may_admit=not num_preemptions)
        left = self.budget - planned
        if len(decodes) <= left:
            self.decode_all(decodes, left)
            self._gap = 0
        else:
            self._gap += 1
        return self.batch.build()

    def _prefill(self, budget: int, may_admit: bool) -> int:
        """Plan prefill of running and then of newly admitted requests. Returns the token count."""
        left = self.prefill_begun(budget)
        self.rejoin()
        self._admission.begin_step(self.batch)
        while left > 0 and may_admit and (admitted := self._admit_first()):
            left -= self.batch.prefill(admitted, left)
        return budget - left

    def _admit_first(self) -> Sequence | None:
        while self.batch.num_free_slots and (seq := self.queue.first()):
            if self.batch.running and not self._admission.admits(seq, self.batch):
                break
            prefix = self.batch.blocks.pending(*self.batch.prefix_of(seq))
            if prefix is None:
                if not self.admit(seq):
                    return None
                self._admission.admitted(seq, self.batch)
                return seq
            # A running request is computing the KV of a prefix of `seq`, so `seq` is deferred.
            if not self.defer(prefix):
                break
        return None

    def _reserve_decodes(self) -> int | None:
        """Reserve blocks for the decode rows of the step; preempt requests if blocks run out.

        Returns the number of preemptions, or None if blocks run out while a step is in flight.
        """
        num_preemptions = 0
        victims: Iterator[Sequence] | None = None
        full = [s for s in self.batch.decoding.values() if s.num_scheduled >= s.capacity]
        for seq in full:
            while seq.slot is not None and not self.batch.reserve(seq):
                if self.batch.num_in_flight:
                    return None
                if victims is None:
                    victims = iter(self._preemption.victims(list(self.batch.running.values())))
                victim = next(victims)
                self.batch.preempt(victim)
                self.wait(victim)
                num_preemptions += 1
        return num_preemptions


class StaticScheduler(QueuedScheduler):
    """Static batching (baseline in the Orca paper): runs a batch to its end, then admits the next.

    A batch takes requests from the queue while the cache has room for all of them at their length
    limits, so no request is preempted. If a request ends, its slot is empty until the batch ends.
    """

    name = "static"

    def schedule(self) -> StepPlan | None:
        batch = self.batch
        if not batch.num_running:
            left = [blocks.num_blocks for blocks in batch.blocks.groups]
            while seq := self.queue.first():
                left = [n - k for n, k in zip(left, batch.most_blocks(seq), strict=True)]
                if min(left) < 0 or not self.admit(seq):
                    break
        if batch.prefilling:
            self.prefill_begun(self.budget)
        else:
            decodes = [seq for seq in batch.decoding.values() if batch.reserve(seq)]
            self.decode_all(decodes, self.budget)
        return batch.build()
