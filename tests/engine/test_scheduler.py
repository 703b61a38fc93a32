"""The scheduler against a fake model; no torch."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from engine.requests import Sequence
from engine.scheduler import ContinuousScheduler
from engine.types import StepPlan
from memory.block_manager import PagedBlockManager
from sampling_params import SamplingParams
from tests.contracts.driver import Driver, Setting
from tests.fakes import VOCAB_SIZE, Bench, tokens_alone
from utils.errors import RequestTooLongError

DEPTHS = [0, 1]
EVERY_TOKEN = frozenset(range(VOCAB_SIZE))


def _slots(plan: StepPlan | None) -> list[int]:
    assert plan is not None
    return [chunk.slot for chunk in plan.prefill] + list(plan.decode)


def test_scheduling_needs_no_torch() -> None:
    code = (
        "import sys, engine.scheduler, engine.running_batch, memory.block_manager, tests.fakes; "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)


@pytest.mark.parametrize("depth", DEPTHS)
def test_outputs_are_those_of_each_request_alone(depth: int) -> None:
    bench = Bench(depth=depth, budget=32)
    for num_prompt, max_tokens in [(1, 1), (5, 20), (40, 3), (16, 17), (100, 2), (17, 1), (2, 64)]:
        bench.add(num_prompt, max_tokens)
    bench.run()
    bench.assert_outputs()
    bench.check_idle()


def test_requests_are_admitted_in_order_of_arrival() -> None:
    bench = Bench(max_num_seqs=2)
    for _ in range(5):
        bench.add(4)
    bench.run()
    admitted = [new.request_id for plan in bench.plans for new in plan.new_requests]
    assert admitted == [0, 1, 2, 3, 4]


def test_a_request_that_does_not_fit_yet_is_not_overtaken() -> None:
    bench = Bench(num_blocks=4, max_num_seqs=3)
    first, big, small = bench.add(20), bench.add(40), bench.add(1)
    bench.step()
    assert (first.slot, big.slot, small.slot) != (None, None, None)
    assert first.slot is not None
    assert big.slot is None
    assert small.slot is None
    bench.run()
    bench.check_idle()


def test_no_more_requests_run_than_slots() -> None:
    bench = Bench(max_num_seqs=3)
    for _ in range(9):
        bench.add(4)
    bench.run()
    assert max(len(_slots(plan)) for plan in bench.plans) == 3


def test_a_long_prompt_takes_several_steps_and_samples_in_the_last() -> None:
    bench = Bench(budget=32)
    bench.add(70, max_tokens=1)
    bench.run()
    chunks = [plan.prefill[0] for plan in bench.plans]
    assert [(c.start, c.num_tokens, c.samples) for c in chunks] == [
        (0, 32, False),
        (32, 32, False),
        (64, 6, True),
    ]


def test_decodes_go_on_beside_a_long_prefill() -> None:
    bench = Bench(budget=8)
    decoding = bench.add(3, max_tokens=20)
    bench.step()
    bench.add(40)
    for _ in range(4):
        plan = bench.launch()
        assert plan is not None
        assert plan.decode == (decoding.slot,)
        assert plan.prefill[0].num_tokens == 7
        bench.land()


def test_several_prompts_share_a_step() -> None:
    bench = Bench(budget=64)
    for _ in range(4):
        bench.add(10)
    plan = bench.launch()
    assert plan is not None
    assert [chunk.num_tokens for chunk in plan.prefill] == [10] * 4


def test_a_token_budget_splits_the_last_prompt_of_a_step() -> None:
    bench = Bench(budget=25)
    for _ in range(3):
        bench.add(10)
    plan = bench.launch()
    assert plan is not None
    assert [chunk.num_tokens for chunk in plan.prefill] == [10, 10, 5]


def test_steps_are_numbered_in_order_of_planning() -> None:
    bench = Bench(depth=1)
    bench.add(5)
    bench.run()
    assert [plan.step_id for plan in bench.plans] == list(range(len(bench.plans)))


def test_blocks_are_taken_as_the_request_grows() -> None:
    bench = Bench(num_blocks=8)
    seq = bench.add(16, max_tokens=18)
    taken = []
    while seq.finish_reason is None:
        bench.step()
        taken.append(bench.blocks.num_blocks - bench.blocks.num_free_blocks)
    # 16 prompt positions, then one more computed per step up to 33, the last token uncomputed.
    assert taken == [1] + [2] * 16 + [0]


def test_a_request_takes_all_blocks_but_none_for_its_last_token() -> None:
    bench = Bench(num_blocks=2)
    bench.add(31, max_tokens=2)
    bench.run()
    bench.assert_outputs()
    bench.check_idle()


@pytest.mark.parametrize(("num_prompt", "max_tokens"), [(32, 2), (33, 1), (1, 33), (400, 1)])
def test_a_request_larger_than_the_cache_is_refused(num_prompt: int, max_tokens: int) -> None:
    bench = Bench(num_blocks=2)
    with pytest.raises(RequestTooLongError, match="2") as caught:
        bench.add(num_prompt, max_tokens)
    assert caught.value.field == "prompt"
    assert not bench.scheduler.has_unfinished
    bench.add(1)
    bench.run()
    bench.assert_outputs()


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_latest_arrival_is_preempted_and_runs_again(depth: int) -> None:
    bench = Bench(num_blocks=4, max_num_seqs=3, depth=depth)
    seqs = [bench.add(15, max_tokens=30) for _ in range(3)]
    bench.run()
    assert seqs[0].num_preemptions == 0
    assert seqs[2].num_preemptions > 0
    assert seqs[1].num_preemptions <= seqs[2].num_preemptions
    bench.assert_outputs()
    bench.check_idle()


def test_the_preempted_request_runs_before_later_arrivals() -> None:
    bench = Bench(num_blocks=4, max_num_seqs=2)
    bench.add(15, max_tokens=40)
    victim = bench.add(15, max_tokens=40)
    bench.add(1)
    bench.run(until=lambda: victim.num_preemptions > 0)
    bench.add(1)
    bench.run()
    admitted = [new.request_id for plan in bench.plans for new in plan.new_requests]
    assert admitted == [0, 1, 1, 2, 3]


def test_the_recomputed_request_gets_prompt_and_output_so_far() -> None:
    bench = Bench(num_blocks=4, max_num_seqs=2)
    bench.add(15, max_tokens=40)
    victim = bench.add(15, max_tokens=40)
    bench.run(until=lambda: victim.num_preemptions > 0 and victim.slot is not None)
    (again,) = [n for plan in bench.plans for n in plan.new_requests if n.request_id == 1][1:]
    assert (
        list(again.token_ids)
        == (victim.token_ids[:15] + tokens_alone(victim))[: len(again.token_ids)]
    )
    assert len(again.token_ids) > 15


def test_no_one_is_admitted_in_the_step_of_a_preemption() -> None:
    """The newcomer would take the blocks back that the preemption freed."""
    bench = Bench(num_blocks=4, max_num_seqs=3)
    for _ in range(4):
        bench.add(15, max_tokens=30)
    preemptions = 0
    while bench.pipeline or bench.scheduler.has_unfinished:
        bench.step()
        now = sum(seq.num_preemptions for seq in bench.seqs)
        if now > preemptions:
            assert not bench.plans[-1].new_requests
        preemptions = now
    assert preemptions


def test_not_even_who_would_fit_is_admitted_in_the_step_of_a_preemption() -> None:
    """Of two blocks that the victim gives up one is left, and the first that waits needs one."""
    setting = Setting(4, 16, 3, 64, options={"queue_policy": "shortest_prompt"})
    driver = Driver(setting, ContinuousScheduler, PagedBlockManager)
    params = SamplingParams(temperature=0, max_tokens=10)
    _, victim = (driver.submit([token] * 31, params) for token in (1, 2))
    driver.step()
    driver.submit([3], params)
    while not victim.num_preemptions:
        assert not driver.plans[-1].new_requests or len(driver.plans) == 1
        driver.step()
    assert driver.blocks.num_free_blocks == 1
    assert not driver.plans[-1].new_requests
    driver.step()
    assert [new.request_id for new in driver.plans[-1].new_requests] == [2]
    driver.finish()


def test_out_of_blocks_with_work_in_flight_drains_before_preempting() -> None:
    bench = Bench(num_blocks=2, max_num_seqs=2, depth=1)
    seqs = [bench.add(15, max_tokens=10) for _ in range(2)]
    bench.launch()
    bench.launch()
    assert bench.scheduler.schedule() is None
    assert all(seq.slot is not None and seq.num_preemptions == 0 for seq in seqs)
    bench.drain()
    plan = bench.launch()
    assert plan is not None
    assert seqs[1].num_preemptions == 1
    assert plan.decode == (seqs[0].slot,)
    bench.run()
    bench.assert_outputs()
    bench.check_idle()


def test_an_end_seen_while_draining_makes_preemption_needless() -> None:
    bench = Bench(num_blocks=2, max_num_seqs=2, depth=1)
    bench.add(15, max_tokens=10)
    other = bench.add(15, max_tokens=10)
    stop = tokens_alone(other)[0]
    other.stop_token_ids = frozenset({stop})
    bench.run()
    assert sum(seq.num_preemptions for seq in bench.seqs) == 0
    bench.assert_outputs()
    bench.check_idle()


def test_late_rows_after_a_stop_are_dropped() -> None:
    bench = Bench(depth=1)
    seq = bench.add(5, max_tokens=10, stop=EVERY_TOKEN)
    bench.launch()
    late = bench.launch()
    assert late is not None
    assert late.decode == (0,)
    assert bench.land() == [seq]
    assert (seq.finish_reason, seq.output_token_ids) == ("stop", tokens_alone(seq))
    assert bench.blocks.num_free_blocks < bench.blocks.num_blocks, "still written in flight"
    assert bench.scheduler.has_unfinished
    assert bench.land() == []
    assert len(seq.output_token_ids) == 1
    bench.check_idle()


def test_a_slot_is_not_reused_before_its_late_row_landed() -> None:
    bench = Bench(depth=1, max_num_seqs=1)
    bench.add(5, stop=EVERY_TOKEN)
    second = bench.add(5, stop=EVERY_TOKEN)
    bench.launch()
    bench.launch()
    bench.land()
    assert bench.scheduler.schedule() is None
    assert second.slot is None
    bench.run()
    bench.assert_outputs()
    bench.check_idle()


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("max_tokens", [1, 2, 3, 16])
def test_a_length_stop_never_plans_a_token_too_many(depth: int, max_tokens: int) -> None:
    bench = Bench(depth=depth)
    seq = bench.add(5, max_tokens)
    bench.run()
    sampled = sum(len(plan.sampled_slots) for plan in bench.plans)
    assert sampled == max_tokens
    assert (seq.finish_reason, len(seq.output_token_ids)) == ("length", max_tokens)


def test_a_stop_token_at_the_length_limit_counts_as_stop() -> None:
    bench = Bench()
    seq = bench.add(5, max_tokens=1, stop=EVERY_TOKEN)
    bench.run()
    assert seq.finish_reason == "stop"


@pytest.mark.parametrize("depth", DEPTHS)
def test_both_depths_compute_the_same(depth: int) -> None:
    outputs = []
    for d in (0, depth):
        bench = Bench(num_blocks=5, depth=d, budget=20)
        for n in (3, 30, 18, 7, 50):
            bench.add(n, 20, stop=frozenset({1, 2}))
        bench.run()
        outputs.append([(seq.output_token_ids, seq.finish_reason) for seq in bench.seqs])
    assert outputs[0] == outputs[1]


class TestAbort:
    """In every state that a request can be in."""

    def test_while_waiting(self) -> None:
        bench = Bench(max_num_seqs=1)
        bench.add(5)
        waiting = bench.add(5)
        bench.step()
        assert bench.abort(1) is waiting
        bench.run()
        assert (waiting.finish_reason, waiting.output_token_ids) == ("abort", [])
        bench.assert_outputs()
        bench.check_idle()

    def test_while_prefilling(self) -> None:
        bench = Bench(budget=8)
        seq = bench.add(30)
        bench.step()
        assert 0 < seq.num_committed < 30
        assert bench.abort(0) is seq
        bench.check_idle()

    def test_while_decoding(self) -> None:
        bench = Bench()
        seq = bench.add(5)
        bench.run(until=lambda: len(seq.output_token_ids) == 3)
        assert bench.abort(0) is seq
        assert seq.output_token_ids == tokens_alone(seq)[:3]
        bench.check_idle()

    @pytest.mark.parametrize("num_launched", [1, 2])
    @pytest.mark.parametrize("budget", [4, 64], ids=["prefilling", "decoding"])
    def test_in_flight(self, num_launched: int, budget: int) -> None:
        bench = Bench(depth=1, budget=budget)
        seq = bench.add(20)
        for _ in range(num_launched):
            bench.launch()
        assert bench.abort(0) is seq
        assert seq.finish_reason == "abort"
        assert bench.blocks.num_free_blocks < bench.blocks.num_blocks, "still written in flight"
        for _ in range(num_launched):
            assert bench.scheduler.schedule() is None
            assert bench.land() == []
        assert seq.output_token_ids == []
        bench.check_idle()

    def test_after_preemption(self) -> None:
        bench = Bench(num_blocks=4, max_num_seqs=2)
        bench.add(15, max_tokens=40)
        victim = bench.add(15, max_tokens=40)
        bench.run(until=lambda: victim.num_preemptions > 0)
        assert victim.slot is None
        assert bench.abort(1) is victim
        bench.run()
        bench.assert_outputs()
        bench.check_idle()

    @pytest.mark.parametrize("depth", DEPTHS)
    def test_of_one_leaves_the_others_alone(self, depth: int) -> None:
        bench = Bench(depth=depth)
        for n in (5, 6, 7):
            bench.add(n, max_tokens=20)
        bench.run(until=lambda: len(bench.seqs[0].output_token_ids) == 5)
        bench.abort(1)
        bench.run()
        assert [seq.finish_reason for seq in bench.seqs] == ["length", "abort", "length"]
        bench.assert_outputs()
        bench.check_idle()

    def test_of_unknown_and_ended_requests_does_nothing(self) -> None:
        bench = Bench(depth=1)
        seq = bench.add(5)
        assert bench.abort(77) is None
        bench.launch()
        assert bench.abort(0) is seq
        assert bench.abort(0) is None
        bench.drain()
        bench.check_idle()

    def test_of_a_finished_request_with_a_late_row(self) -> None:
        bench = Bench(depth=1)
        seq = bench.add(5, stop=EVERY_TOKEN)
        bench.launch()
        bench.launch()
        bench.land()
        assert bench.abort(0) is None
        assert seq.finish_reason == "stop"
        bench.drain()
        bench.check_idle()

    def test_frees_the_place_for_another(self) -> None:
        bench = Bench(num_blocks=2, max_num_seqs=1)
        bench.add(20)
        bench.step()
        other = bench.add(20)
        bench.abort(0)
        bench.run()
        assert other.finish_reason == "length"
        bench.assert_outputs()
        bench.check_idle()


def test_plans_survive_pickling() -> None:
    bench = Bench(num_blocks=5, budget=20)
    for n in (3, 30, 18):
        bench.add(n, 20)
    bench.run()
    for plan in bench.plans:
        assert pickle.loads(pickle.dumps(plan)) == plan


def test_a_decode_plan_for_256_requests_is_small() -> None:
    bench = Bench(num_blocks=1024, max_num_seqs=256, budget=4096)
    for _ in range(256):
        bench.add(16, max_tokens=40)
    sizes = {}
    while (plan := bench.launch()) is not None:
        bench.land()
        if len(plan.decode) == 256:
            sizes[bool(plan.block_updates)] = len(pickle.dumps(plan))
    # With and without a new block for each of them.
    assert sizes[False] <= 8192
    assert sizes[True] <= 16384


def test_a_decode_plan_without_new_blocks_names_only_slots() -> None:
    bench = Bench()
    bench.add(3, max_tokens=5)
    bench.step()
    plan = bench.launch()
    assert plan == StepPlan(1, decode=(0,))


def test_finished_requests_are_reported_once() -> None:
    bench = Bench(depth=1, num_blocks=5)
    for n in (3, 30, 18, 7):
        bench.add(n, 20, stop=frozenset({1, 2, 3}))
    finished: list[Sequence] = bench.run()
    assert sorted(seq.request_id for seq in finished) == [0, 1, 2, 3]
