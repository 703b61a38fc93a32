"""Who runs next."""

from __future__ import annotations

import heapq
from abc import abstractmethod
from collections import defaultdict
from typing import Any

from config import Config
from engine.policies.base import QueuePolicy
from engine.sequence import Sequence


class KeyedQueue(QueuePolicy):
    """Runs the request with the smallest key, the earliest arrival among equals.

    A heap; aborted requests stay in it until they surface or are half of it, so that each
    operation costs O(log n).
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._heap: list[tuple[Any, int, Sequence]] = []
        self._num_dead = 0

    @abstractmethod
    def key(self, seq: Sequence) -> Any:
        """Comparable; taken when the request is pushed."""

    def push(self, seq: Sequence) -> None:
        heapq.heappush(self._heap, (self.key(seq), seq.request_id, seq))

    def first(self) -> Sequence | None:
        while self._heap and self._heap[0][2].finish_reason is not None:
            heapq.heappop(self._heap)
            self._num_dead -= 1
        return self._heap[0][2] if self._heap else None

    def pop(self) -> Sequence:
        return heapq.heappop(self._heap)[2]

    def discard(self, seq: Sequence) -> None:
        self._num_dead += 1
        if 2 * self._num_dead > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[2].finish_reason is None]
            heapq.heapify(self._heap)
            self._num_dead = 0


class FirstCome(KeyedQueue):
    """In order of arrival; a preempted request is back in its old place."""

    name = "fcfs"

    def key(self, seq: Sequence) -> int:
        return seq.request_id


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


class FairShare(QueuePolicy):
    """The user who was served the fewest tokens first; a user's own requests in order of arrival.

    The virtual token counter of Sheng et al. (Fairness in Serving Large Language Models, OSDI
    2024): a user who comes back is lifted to the level of those served now, so that idle time
    gives no credit. A request is charged its expected tokens when it starts, and settled to
    what it took when it ends; a preempted one, computed again, is charged once.
    """

    name = "fair_share"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._queues: defaultdict[str, FirstCome] = defaultdict(lambda: FirstCome(config))
        self._served: dict[str, int] = {}
        self._charged: dict[int, int] = {}
        # Every waiting user's present count is here, among outdated ones.
        self._order: list[tuple[int, str]] = []
        self._level = 0

    def push(self, seq: Sequence) -> None:
        user = seq.sampling.user
        if seq.request_id in self._charged:
            self._settle(seq, 0)
        if user not in self._queues:
            self._served[user] = max(self._served.get(user, 0), self._level)
            heapq.heappush(self._order, (self._served[user], user))
        self._queues[user].push(seq)

    def first(self) -> Sequence | None:
        while self._order:
            served, user = self._order[0]
            if user in self._queues and served == self._served[user]:
                if seq := self._queues[user].first():
                    return seq
                del self._queues[user]
            heapq.heappop(self._order)
        return None

    def pop(self) -> Sequence:
        self._level, user = self._order[0]
        seq = self._queues[user].pop()
        self._charged[seq.request_id] = seq.num_expected_tokens
        self._charge(user, seq.num_expected_tokens)
        return seq

    def discard(self, seq: Sequence) -> None:
        self._queues[seq.sampling.user].discard(seq)

    def ended(self, seq: Sequence) -> None:
        self._settle(seq, len(seq.token_ids))

    def _settle(self, seq: Sequence, tokens: int) -> None:
        self._charge(seq.sampling.user, tokens - self._charged.pop(seq.request_id))

    def _charge(self, user: str, tokens: int) -> None:
        self._served[user] += tokens
        if user in self._queues:
            heapq.heappush(self._order, (self._served[user], user))
