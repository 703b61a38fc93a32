"""Who runs next."""

from __future__ import annotations

import heapq
from abc import abstractmethod
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
