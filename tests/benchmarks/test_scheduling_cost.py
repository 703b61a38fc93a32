"""What a step does does not grow with the queue, and the load that measures it keeps its length."""

from __future__ import annotations

import heapq
import statistics
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from benchmarks import scheduling_cost
from benchmarks.scheduling_cost import KINDS, Load, TextLoad, Texts
from config import Config
from engine.parts import PART_KINDS
from engine.policies import KeyedQueue, QueuePolicy
from engine.requests import Sequence


class InOrder(KeyedQueue):
    """The requests in order of arrival."""

    def key(self, seq: Sequence) -> int:
        return seq.request_id


class Scanning(InOrder):
    """Looks at all that wait."""

    name = "scanning"

    def first(self) -> Sequence | None:
        self.waiting.heap.sort()
        return super().first()


class Listing(InOrder):
    """Looks at all that wait, and compares nothing."""

    name = "listing"

    def first(self) -> Sequence | None:
        assert all(len(entry) == 3 for entry in self.waiting.heap)
        return super().first()


class _Entry(tuple[Any, ...]):
    """An entry of a heap, whose comparison is a line of Python and so counted as one."""

    __slots__ = ()

    def __lt__(self, other: tuple[Any, ...]) -> bool:
        return super().__lt__(other)


@pytest.fixture
def _entries_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    push = heapq.heappush
    monkeypatch.setattr(heapq, "heappush", lambda heap, entry: push(heap, _Entry(entry)))


def _work(policy: object, num_waiting: int) -> float:
    """Median over steps of the lines of Python that one runs."""
    return _lines(Load(policy, num_waiting))  # type: ignore[arg-type]


def _lines(load: Load | TextLoad) -> float:
    lines, work, before = 0, [], sys.gettrace()

    def trace(frame: FrameType, event: str, arg: object) -> Callable[..., Any]:
        nonlocal lines
        lines += event == "line"
        return trace

    for _ in range(30):
        lines = 0
        sys.settrace(trace)
        try:
            load.step()
        finally:
            sys.settrace(before)
        work.append(lines)
    return statistics.median(work)


def _ratio(policy: object) -> float:
    """The work of a step with 30,000 waiting, in units of one with 300."""
    return _work(policy, 30_000) / _work(policy, 300)


@pytest.mark.usefixtures("_entries_counted")
@pytest.mark.parametrize("policy", sorted(PART_KINDS["queue_policy"].known()))
def test_a_long_queue_does_not_slow_a_step(policy: str) -> None:
    assert _ratio(policy) < 1.05


@pytest.mark.usefixtures("_entries_counted")
@pytest.mark.parametrize("policy", [Scanning, Listing])
def test_a_policy_that_looks_at_all_that_wait_is_found_out(policy: type[QueuePolicy]) -> None:
    assert _ratio(policy) > 1.5


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_streams_and_stop_strings_that_wait_do_not_slow_a_step(kind: Texts) -> None:
    work = []
    for num_waiting in (20, 400):
        load = TextLoad(kind, num_waiting, num_running=8)
        work.append(_lines(load))
        waiting = load.llm.engine.stats.unfinished_requests - 8
        assert waiting == num_waiting
        load.llm.close()
    assert work[1] < 1.05 * work[0]


def test_a_thousand_stop_strings_cost_as_much_as_two() -> None:
    work = []
    for kind in KINDS[-2:]:
        load = TextLoad(kind, 0, num_running=8)
        work.append(_lines(load))
        load.llm.close()
    assert [kind.num_stops for kind in KINDS[-2:]] == [2, 1_000]
    assert work[1] < 1.5 * work[0]


def test_the_queue_keeps_its_length() -> None:
    load = Load("fcfs", 50)
    for _ in range(30):
        load.step()
    # One may have been admitted since the last arrivals.
    assert len(load.waiting) in (49, 50)
    assert scheduling_cost.NUM_RUNNING - load.scheduler.batch.num_running in (0, 1)
    assert len(load.seconds) == 30


def test_every_queue_forgets_the_aborted() -> None:
    """Requests that come and go without ever running must not pile up."""
    for name, make in PART_KINDS["queue_policy"].known().items():
        queue = make(Config(model="none"))
        load = Load("fcfs", 0)
        for _ in range(500):
            seq = load.request()
            queue.push(seq)
            seq.finish_reason = "abort"
            queue.discard(seq)
        assert len(getattr(queue, "_heap", [])) < 10, name
        assert queue.first() is None
