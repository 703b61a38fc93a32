"""Scheduling policies: four base classes, and their implementations.

A request's *length limit* is the maximum number of its prompt and output tokens. Its *expected
length* is the prompt's length plus `SamplingParams.predicted_tokens`, by default the length limit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections import OrderedDict, defaultdict
from collections.abc import Collection
from operator import attrgetter
from typing import Any, ClassVar

from config import Config
from engine.requests import Sequence
from engine.running_batch import RunningBatch
from engine.types import NO_BLOCK
from utils.lazy_heap import LazyHeap


class Policy(ABC):
    """Makes one kind of decision for a scheduler. The constructor takes the engine's Config."""

    name: ClassVar[str]

    def __init__(self, config: Config) -> None:
        del config


class QueuePolicy(Policy):
    """Orders the waiting requests. Thousands of them may wait, so no method may loop over all."""

    @abstractmethod
    def push(self, seq: Sequence) -> None:
        """Add a new request, or a popped request that must wait again, e.g. after a preemption."""

    @abstractmethod
    def first(self) -> Sequence | None:
        """Return the request to run next, or None if no request waits."""

    @abstractmethod
    def pop(self) -> Sequence:
        """Remove and return the request that `first` would return."""

    @abstractmethod
    def discard(self, seq: Sequence) -> None:
        """Remove a waiting request that was aborted. Its `finish_reason` is already set."""

    def ended(self, seq: Sequence) -> None:
        """Called when a request that was popped has finished or was aborted."""
        del seq


class AdmissionPolicy(Policy):
    """Decides whether a waiting request may join the running requests."""

    @abstractmethod
    def admits(self, seq: Sequence, batch: RunningBatch) -> bool:
        """Whether `seq`, the queue's first request, may join the running requests of `batch`.

        The method must not change `batch`. The scheduler checks afterwards whether blocks for `seq`
        are free. If no request runs, the scheduler admits `seq` without calling this method.
        """


class PreemptionPolicy(Policy):
    """Chooses which running request to preempt when a decode row needs a block but none is free."""

    @abstractmethod
    def victim(self, running: Collection[Sequence]) -> Sequence:
        """Return the request to preempt. `running` is not empty and is in order of admission."""


class StepPolicy(Policy):
    """Splits the token budget of a step between prefill chunks and decode rows."""

    @abstractmethod
    def prefill_budget(self, budget: int, num_decodes: int, gap: int) -> int:
        """Return the maximum number of prompt tokens in the step.

        The result is at most `budget`, and at least 1 if `num_decodes` is 0. If prompts leave fewer
        than `num_decodes` positions of the budget, no decoding request runs. Otherwise all run.

        Args:
            budget: maximum number of positions in the step, never below the option `max_num_seqs`.
            num_decodes: number of decoding requests, i.e. of requests that may get a decode row.
            gap: number of steps in a row, up to the last step, in which decoding requests waited.
        """


class FirstCome(QueuePolicy):
    """Runs requests in order of arrival. A preempted request keeps its place in this order."""

    name = "fcfs"

    def __init__(self, config: Config) -> None:
        self._arrived: OrderedDict[int, Sequence] = OrderedDict()
        self._back: list[Sequence] = []  # requests that were pushed again after a pop, sorted by id

    def push(self, seq: Sequence) -> None:
        if self._arrived and seq.request_id < next(reversed(self._arrived)):
            insort(self._back, seq, key=attrgetter("request_id"))
        else:
            self._arrived[seq.request_id] = seq

    def first(self) -> Sequence | None:
        arrived = next(iter(self._arrived.values()), None)
        if self._back and (arrived is None or self._back[0].request_id < arrived.request_id):
            return self._back[0]
        return arrived

    def pop(self) -> Sequence:
        seq = self.first()
        assert seq is not None, "pop() of an empty queue"
        self.discard(seq)
        return seq

    def discard(self, seq: Sequence) -> None:
        if not self._arrived.pop(seq.request_id, None):
            self._back.remove(seq)


class KeyedQueue(QueuePolicy):
    """Runs the request with the smallest key; if keys are equal, the earliest arrival first."""

    def __init__(self, config: Config) -> None:
        self.waiting: LazyHeap[Sequence] = LazyHeap()

    @abstractmethod
    def key(self, seq: Sequence) -> Any:
        """The request's sort key, comparable with `<`. Each `push` calls this method once."""

    def push(self, seq: Sequence) -> None:
        self.waiting.push((self.key(seq), seq.request_id), seq)

    def first(self) -> Sequence | None:
        return self.waiting.first()

    def pop(self) -> Sequence:
        return self.waiting.pop()[1]

    def discard(self, seq: Sequence) -> None:
        self.waiting.remove(seq)


class Priority(KeyedQueue):
    """Runs the request with the highest `SamplingParams.priority` first."""

    name = "priority"

    def key(self, seq: Sequence) -> int:
        return -seq.sampling.priority


class ShortestPrompt(KeyedQueue):
    """Runs the shortest prompt first. The output of a preempted request counts as prompt too."""

    name = "shortest_prompt"

    def key(self, seq: Sequence) -> int:
        return len(seq.token_ids)


class ShortestJob(KeyedQueue):
    """Runs first the request that is expected to generate the fewest further output tokens."""

    name = "shortest_job"

    def key(self, seq: Sequence) -> int:
        return seq.num_expected_tokens - len(seq.token_ids)


class _UserQueue(QueuePolicy):
    """Serves the user with the lowest level first. A level is a user's total charge in tokens."""

    def __init__(self, config: Config) -> None:
        self.levels: defaultdict[str, int] = defaultdict(int)
        self._queues: defaultdict[str, FirstCome] = defaultdict(lambda: FirstCome(config))
        self._order: LazyHeap[str] = LazyHeap()
        self._now = 0

    def push(self, seq: Sequence) -> None:
        user = seq.sampling.user
        returns = user not in self._queues
        self._queues[user].push(seq)
        if returns:
            self._raise(user, max(0, self._now - self.levels[user]))

    def first(self) -> Sequence | None:
        while (user := self._order.first()) is not None:
            if seq := self._queues[user].first():
                return seq
            del self._queues[user]
            self._order.remove(user)
        return None

    def pop(self) -> Sequence:
        user = self._order.first()
        assert user is not None, "pop() of an empty queue"
        self._now = self.levels[user]
        return self._queues[user].pop()

    def discard(self, seq: Sequence) -> None:
        self._queues[seq.sampling.user].discard(seq)

    def _raise(self, user: str, tokens: int) -> None:
        self.levels[user] += tokens
        if user in self._queues:
            self._order.push((self.levels[user], user), user)


class FairShare(_UserQueue):
    """Serves the waiting user who has been charged the fewest tokens so far.

    Implements the virtual token counter (Sheng et al., Fairness in Serving Large Language Models,
    OSDI 2024). When a request leaves the queue, its user is charged the request's expected length.
    When the request ends, the charge is changed to the request's real length. If a user without
    waiting requests adds one, the user's charge is raised at least to that of the last served user.
    """

    name = "fair_share"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.charged: dict[int, int] = {}

    def push(self, seq: Sequence) -> None:
        if seq.request_id in self.charged:
            self._settle(seq, 0)
        super().push(seq)

    def pop(self) -> Sequence:
        seq = super().pop()
        self.charged[seq.request_id] = seq.num_expected_tokens
        self._raise(seq.sampling.user, seq.num_expected_tokens)
        return seq

    def ended(self, seq: Sequence) -> None:
        self._settle(seq, len(seq.token_ids))

    def _settle(self, seq: Sequence, tokens: int) -> None:
        self._raise(seq.sampling.user, tokens - self.charged.pop(seq.request_id))


class Optimistic(AdmissionPolicy):
    """Admits a request if its current tokens find free blocks. Its output may cause preemptions."""

    name = "optimistic"

    def admits(self, seq: Sequence, batch: RunningBatch) -> bool:
        return True


class ReserveOutput(AdmissionPolicy):
    """Admits a request if it and the running requests fit the cache even at their length limits."""

    name = "reserve"

    def admits(self, seq: Sequence, batch: RunningBatch) -> bool:
        most = map(sum, zip(*map(batch.most_blocks, (*batch.running.values(), seq)), strict=True))
        for count, blocks in zip(most, batch.blocks.groups, strict=True):
            tables = map(blocks.table, batch.running)
            held = sum(len(table) - table.count(NO_BLOCK) for table in tables)
            if count - held > blocks.num_free_blocks:
                return False
        return True


class LookAhead(AdmissionPolicy):
    """Admits a request if it and all running requests fit the cache up to their expected lengths.

    Requests take more and more blocks until one of them ends. So `admits` checks only the steps in
    which a request ends. The method is from Past-Future (Gong et al., ASPLOS 2025).
    """

    name = "lookahead"

    def admits(self, seq: Sequence, batch: RunningBatch) -> bool:
        size, seqs = batch.blocks.block_size, [*batch.running.values(), seq]
        # Each request's expected number of steps until its end, and its newest token's position.
        ends = [(s.num_expected_tokens - len(s.token_ids), len(s.token_ids) - 1) for s in seqs]
        ends.sort(reverse=True)
        full = 0
        offsets: list[int] = []
        for count, (steps, position) in enumerate(ends, 1):
            full += position // size
            insort(offsets, position % size)
            # In this request's last step `count` requests run, with `steps - 1` new tokens each.
            more, rest = divmod(steps - 1, size)
            crossed = count - bisect_left(offsets, size - rest)
            if full + count * (more + 1) + crossed > batch.blocks.num_blocks:
                return False
        return True


class Latest(PreemptionPolicy):
    """Preempts the request that was admitted last."""

    name = "latest"

    def victim(self, running: Collection[Sequence]) -> Sequence:
        return list(running)[-1]


class LowestPriority(PreemptionPolicy):
    """Preempts the request of lowest `SamplingParams.priority`; on a tie, the last admitted."""

    name = "lowest_priority"

    def victim(self, running: Collection[Sequence]) -> Sequence:
        return min(reversed(list(running)), key=lambda seq: seq.sampling.priority)


class FewestComputed(PreemptionPolicy):
    """Preempts the request with the fewest committed positions; on a tie, the last admitted."""

    name = "fewest_computed"

    def victim(self, running: Collection[Sequence]) -> Sequence:
        return min(reversed(list(running)), key=lambda seq: seq.num_committed)


class DecodeFirst(StepPolicy):
    """All decoding requests run in each step; prompts get the remaining budget (Sarathi-Serve)."""

    name = "decode_first"

    def prefill_budget(self, budget: int, num_decodes: int, gap: int) -> int:
        return budget - num_decodes


class PrefillFirst(StepPolicy):
    """Prompts may fill a whole step. Decoding requests wait at most `max_gap` steps in a row."""

    name = "prefill_first"
    max_gap = 4

    def prefill_budget(self, budget: int, num_decodes: int, gap: int) -> int:
        return budget if gap < self.max_gap else budget - num_decodes
