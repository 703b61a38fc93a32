"""Scheduling policies: contracts and what ships. Pure CPU work, between steps, from one thread."""

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
from utils.lazy_heap import LazyHeap


class Policy(ABC):
    """One decision of a scheduler; its constructor takes the engine's options."""

    name: ClassVar[str]

    def __init__(self, config: Config) -> None:
        del config


class QueuePolicy(Policy):
    """Holds the waiting requests and says which runs next.

    Thousands may wait: no method may look at all of them. `KeyedQueue` does the work for a key.
    """

    @abstractmethod
    def push(self, seq: Sequence) -> None:
        """A request waits: new, or back after `pop`, preempted (`seq.num_preemptions`) or not."""

    @abstractmethod
    def first(self) -> Sequence | None:
        """The request to run next; None if none waits."""

    @abstractmethod
    def pop(self) -> Sequence:
        """Take out what `first` returned."""

    @abstractmethod
    def discard(self, seq: Sequence) -> None:
        """A waiting request was aborted: its `finish_reason` is set, `first` must not return it."""

    def ended(self, seq: Sequence) -> None:
        """A request that had been popped has finished or was aborted."""
        del seq


class AdmissionPolicy(Policy):
    """Whether a waiting request may join the running ones."""

    @abstractmethod
    def admits(self, seq: Sequence, batch: RunningBatch) -> bool:
        """Whether `seq`, the first of the queue, may start beside those that run.

        Blocks for its known tokens are checked afterwards. The batch must not be changed.
        """


class PreemptionPolicy(Policy):
    """Who gives up its blocks when a running request needs one and none is free."""

    @abstractmethod
    def victim(self, running: Collection[Sequence]) -> Sequence:
        """One of `running`, which is in order of admission and never empty."""


class StepPolicy(Policy):
    """How a step's token budget is split between prompts and running decodes."""

    @abstractmethod
    def prefill_budget(self, budget: int, num_decodes: int, gap: int) -> int:
        """Tokens, 1 to `budget`, that prompts may take; the decodes run if the rest holds them all.

        `budget` is at least the number of requests that can run. `num_decodes` running requests
        could each compute one token, and had to wait in the last `gap` steps.
        """


class FirstCome(QueuePolicy):
    """In order of arrival; a preempted request is back in its old place."""

    name = "fcfs"

    def __init__(self, config: Config) -> None:
        # Both by rising id. The list has requests that are back, no more than run or are deferred.
        self._arrived: OrderedDict[int, Sequence] = OrderedDict()
        self._back: list[Sequence] = []

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
    """Runs the request with the smallest key, the earliest arrival among equals, in O(log n)."""

    def __init__(self, config: Config) -> None:
        self.waiting: LazyHeap[Sequence] = LazyHeap()

    @abstractmethod
    def key(self, seq: Sequence) -> Any:
        """Comparable; taken when the request is pushed."""

    def push(self, seq: Sequence) -> None:
        self.waiting.push((self.key(seq), seq.request_id), seq)

    def first(self) -> Sequence | None:
        return self.waiting.first()

    def pop(self) -> Sequence:
        return self.waiting.pop()[1]

    def discard(self, seq: Sequence) -> None:
        self.waiting.remove(seq)


class Priority(KeyedQueue):
    """The highest `SamplingParams.priority` first."""

    name = "priority"

    def key(self, seq: Sequence) -> int:
        return -seq.sampling.priority


class ShortestPrompt(KeyedQueue):
    """The fewest tokens to prefill first, which after a preemption are prompt and output."""

    name = "shortest_prompt"

    def key(self, seq: Sequence) -> int:
        return len(seq.token_ids)


class ShortestJob(KeyedQueue):
    """The fewest output tokens to go first, by `predicted_tokens` or else by `max_tokens`."""

    name = "shortest_job"

    def key(self, seq: Sequence) -> int:
        return seq.num_expected_tokens - len(seq.token_ids)


class _UserQueue(QueuePolicy):
    """The next request of the user at the lowest level; a user's own in order of arrival."""

    def __init__(self, config: Config) -> None:
        # One number for every user seen; users who wait are also in a queue and in the order.
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
    """The user who was served the fewest tokens first.

    The virtual token counter of Sheng et al. (Fairness in Serving Large Language Models, OSDI
    2024). Idle time gives no credit: a user who comes back is lifted to the level of those served
    now. A request is charged its expected tokens when it starts, and what it took when it ends.
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
    """Admits whatever has blocks now; if outputs grow beyond the cache, someone is preempted."""

    name = "optimistic"

    def admits(self, seq: Sequence, batch: RunningBatch) -> bool:
        return True


class ReserveOutput(AdmissionPolicy):
    """Admits if all running requests can reach their length limits: no one is ever preempted."""

    name = "reserve"

    def admits(self, seq: Sequence, batch: RunningBatch) -> bool:
        held = sum(s.capacity for s in batch.running.values()) // batch.blocks.block_size
        most = sum(batch.most_blocks(s) for s in (*batch.running.values(), seq))
        return most - held <= batch.blocks.num_free_blocks


class LookAhead(AdmissionPolicy):
    """Admits if the running requests fit at every moment, each growing to its expected length.

    The worst moment is one at which a request ends. The idea is from Past-Future (Gong et al.,
    ASPLOS 2025), which learns the expected lengths.
    """

    name = "lookahead"

    def admits(self, seq: Sequence, batch: RunningBatch) -> bool:
        size, seqs = batch.blocks.block_size, [*batch.running.values(), seq]
        # Steps to the end, and the position of the newest token; the last to end comes first.
        ends = [(s.num_expected_tokens - len(s.token_ids), len(s.token_ids) - 1) for s in seqs]
        ends.sort(reverse=True)
        full = 0
        offsets: list[int] = []
        for count, (steps, position) in enumerate(ends, 1):
            full += position // size
            insort(offsets, position % size)
            # At `steps` from now `count` requests are left, each with `steps - 1` more positions.
            more, rest = divmod(steps - 1, size)
            crossed = count - bisect_left(offsets, size - rest)
            if full + count * (more + 1) + crossed > batch.blocks.num_blocks:
                return False
        return True


class Latest(PreemptionPolicy):
    """The last admitted."""

    name = "latest"

    def victim(self, running: Collection[Sequence]) -> Sequence:
        return list(running)[-1]


class LowestPriority(PreemptionPolicy):
    """The lowest `SamplingParams.priority`, the last admitted among equals."""

    name = "lowest_priority"

    def victim(self, running: Collection[Sequence]) -> Sequence:
        return min(reversed(list(running)), key=lambda seq: seq.sampling.priority)


class FewestComputed(PreemptionPolicy):
    """The one with the least to compute again, the last admitted among equals."""

    name = "fewest_computed"

    def victim(self, running: Collection[Sequence]) -> Sequence:
        return min(reversed(list(running)), key=lambda seq: seq.num_committed)


class DecodeFirst(StepPolicy):
    """Every running request decodes in every step; prompts fill the rest (Sarathi-Serve)."""

    name = "decode_first"

    def prefill_budget(self, budget: int, num_decodes: int, gap: int) -> int:
        return budget - num_decodes


class PrefillFirst(StepPolicy):
    """Prompts take whole steps, at most `max_gap` in a row while requests decode.

    First tokens come sooner, the others less evenly.
    """

    name = "prefill_first"
    max_gap = 4

    def prefill_budget(self, budget: int, num_decodes: int, gap: int) -> int:
        return budget if gap < self.max_gap else budget - num_decodes
