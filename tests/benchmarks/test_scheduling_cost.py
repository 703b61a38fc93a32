"""The measurement of scheduling can tell a flat queue from one that is not."""

from __future__ import annotations

import pytest

from benchmarks import scheduling_cost
from benchmarks.scheduling_cost import Load
from config import Config
from engine.policies.base import QueuePolicy
from engine.policies.queue import FirstCome
from engine.sequence import Sequence
from utils.registry import parts_in


class Scanning(FirstCome):
    """Looks at all that wait."""

    name = "scanning"

    def first(self) -> Sequence | None:
        self._heap.sort()
        return super().first()


def _ratio(policy: object) -> float:
    """Median step with 30,000 waiting, in units of one with 300."""
    loads = [Load(policy, n) for n in (300, 30_000)]  # type: ignore[arg-type]
    for _ in range(80):
        for load in loads:
            load.step()
    few, many = (scheduling_cost.Cost("", load.num_waiting, load.seconds).median for load in loads)
    return many / few


@pytest.mark.parametrize("policy", sorted(parts_in("engine.policies", QueuePolicy)))
def test_a_long_queue_does_not_slow_a_step(policy: str) -> None:
    # The benchmark shows 1.00 to 1.03 over many more steps; other processes disturb so few.
    assert any(_ratio(policy) < 1.25 for _ in range(5))


def test_a_policy_that_looks_at_all_that_wait_is_found_out() -> None:
    assert _ratio(Scanning) > 1.5


def test_the_queue_keeps_its_length() -> None:
    load = Load("fcfs", 50)
    for _ in range(30):
        load.step()
    scheduler = load._scheduler
    # One may have been admitted since the last arrivals.
    assert len(load._waiting) == len(scheduler._waiting) in (49, 50)
    assert scheduling_cost.NUM_RUNNING - scheduler.ledger.num_running in (0, 1)
    assert len(load.seconds) == 30


def test_every_queue_forgets_the_aborted() -> None:
    """Requests that come and go without ever running must not pile up."""
    for name, make in parts_in("engine.policies", QueuePolicy).items():
        queue = make(Config(model="none"))
        load = Load("fcfs", 0)
        for _ in range(500):
            seq = load._request()
            queue.push(seq)
            seq.finish_reason = "abort"
            queue.discard(seq)
        assert len(getattr(queue, "_heap", [])) < 10, name
        assert queue.first() is None
