"""Who runs next."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from config import Config
from engine.policies.base import QueuePolicy
from engine.sequence import Sequence
from utils.lazy_heap import LazyHeap


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
