"""Static batching: what is in a step; that the tokens are right is in contracts/."""

from __future__ import annotations

import pytest

from engine.scheduler import StaticScheduler
from memory.block_manager import PagedBlockManager
from sampling_params import SamplingParams
from tests.contracts.driver import Driver, Setting
from tests.fakes import VOCAB_SIZE, Bench

DEPTHS = [0, 1]


def _bench(**values: int) -> Bench:
    return Bench(make_scheduler=StaticScheduler, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_next_batch_starts_when_the_last_request_ended(depth: int) -> None:
    bench = _bench(max_num_seqs=2, depth=depth)
    for max_tokens in (2, 9, 4, 3, 5):
        bench.add(4, max_tokens)
    bench.run()
    bench.check_idle()
    batches = [(plan.step_id, len(plan.new_requests)) for plan in bench.plans if plan.new_requests]
    # A batch takes as many steps as its longest output.
    assert batches == [(0, 2), (9, 2), (13, 1)]


def test_the_next_batch_waits_for_a_step_in_flight_of_a_request_that_ended() -> None:
    """Until the step has ended, its request keeps slot and blocks, which the batch would lack."""
    bench = _bench(max_num_seqs=2, depth=1)
    bench.add(4, 1)
    bench.add(4, 20, stop=frozenset(range(VOCAB_SIZE)))
    for _ in range(2):
        bench.add(4, 3)
    bench.run()
    bench.check_idle()
    assert bench.plans[1].decode == (1,)
    assert [len(plan.new_requests) for plan in bench.plans if plan.new_requests] == [2, 2]


def test_slots_of_early_ends_stay_empty() -> None:
    bench = _bench(max_num_seqs=2)
    bench.add(4, 20, stop=frozenset(range(VOCAB_SIZE)))
    bench.add(4, 6)
    late = bench.add(4, 6)
    bench.run(until=lambda: len(bench.plans) == 6)
    assert late.slot is None
    assert [plan.decode for plan in bench.plans[1:]] == [(1,)] * 5


def test_all_prompts_come_before_the_first_decode() -> None:
    bench = _bench(max_num_seqs=3, budget=10)
    for n in (8, 12, 3):
        bench.add(n, 4)
    bench.run()
    kinds = [bool(plan.prefill) for plan in bench.plans]
    assert kinds == [True] * 3 + [False] * 3
    assert not any(plan.prefill and plan.decode for plan in bench.plans)


def test_a_batch_fits_at_its_longest_so_no_one_is_preempted() -> None:
    bench = _bench(num_blocks=5, max_num_seqs=4)
    for _ in range(4):
        bench.add(15, 18)
    bench.run()
    bench.check_idle()
    assert [len(plan.new_requests) for plan in bench.plans if plan.new_requests] == [2, 2]
    assert sum(seq.num_preemptions for seq in bench.seqs) == 0


def test_the_queue_policy_orders_the_batches() -> None:
    setting = Setting(max_num_seqs=1, options={"queue_policy": "shortest_prompt"})
    driver = Driver(setting, StaticScheduler, PagedBlockManager)
    for n in (9, 2, 5, 1):
        driver.submit([1] * n, SamplingParams(temperature=0, max_tokens=3))
    driver.abort(1)
    driver.run()
    admitted = [new.request_id for plan in driver.plans for new in plan.new_requests]
    assert admitted == [3, 2, 0]
