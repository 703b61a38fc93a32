"""Scheduling policies: four base classes, and their implementations.

A request's *length limit* is the maximum number of its prompt and output tokens. Its *expected
length* is the prompt's length plus `SamplingParams.predicted_tokens`, by default the length limit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, ClassVar

from config import Config
from engine.requests import Sequence
from engine.running_batch import RunningBatch
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
    """Decides whether a waiting request may join the running requests.

    `begin_step` and `admitted` let a policy look at all running requests once in a step, and not
    for each request that it admits in this step. `engine.admission` has examples.
    """

    def begin_step(self, batch: RunningBatch) -> None:
        """Called before `admits` in each step. All requests may have changed."""
        del batch

    @abstractmethod
    def admits(self, seq: Sequence, batch: RunningBatch) -> bool:
        """Whether `seq`, the queue's first request, may join the running requests of `batch`.

        The method must not change `batch`. The scheduler checks afterwards whether blocks for `seq`
        are free. If no request runs, the scheduler admits `seq` without calling this method.
        """

    def admitted(self, seq: Sequence, batch: RunningBatch) -> None:
        """Called when `seq` has joined, after the call of `admits` for `seq` if there was one."""
        del seq, batch


class PreemptionPolicy(Policy):
    """Chooses which running request to preempt when a decode row needs a block but none is free."""

    @abstractmethod
    def victims(self, running: list[Sequence]) -> Iterable[Sequence]:
        """Return all of `running` in the order in which to preempt them, as many as it takes.

        Called at most once in a step. `running` is in order of admission. The method may reorder
        this list, which is a copy.
        """


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
        self._back: LazyHeap[Sequence] = LazyHeap()  # requests that were pushed again after a pop

    def push(self, seq: Sequence) -> None:
        if self._arrived and seq.request_id < next(reversed(self._arrived)):
            self._back.push(seq.request_id, seq)
        else:
            self._arrived[seq.request_id] = seq

    def first(self) -> Sequence | None:
        arrived, back = next(iter(self._arrived.values()), None), self._back.first()
        if back is None or (arrived is not None and arrived.request_id < back.request_id):
            return arrived
        return back

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


class Optimistic(AdmissionPolicy):
    """Admits a request if its current tokens find free blocks. Its output may cause preemptions."""

    name = "optimistic"

    def admits(self, seq: Sequence, batch: RunningBatch) -> bool:
        return True


class Latest(PreemptionPolicy):
    """Preempts the request that was admitted last."""

    name = "latest"

    def victims(self, running: list[Sequence]) -> Iterable[Sequence]:
        return reversed(running)


class LowestPriority(PreemptionPolicy):
    """Preempts the request of lowest `SamplingParams.priority`; on a tie, the last admitted."""

    name = "lowest_priority"

    def victims(self, running: list[Sequence]) -> Iterable[Sequence]:
        running.reverse()
        return sorted(running, key=lambda seq: seq.sampling.priority)


class FewestComputed(PreemptionPolicy):
    """Preempts the request with the fewest committed positions; on a tie, the last admitted."""

    name = "fewest_computed"

    def victims(self, running: list[Sequence]) -> Iterable[Sequence]:
        running.reverse()
        return sorted(running, key=lambda seq: seq.num_committed)


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
