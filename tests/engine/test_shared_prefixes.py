"""Requests that start alike and come together: the shared part is computed once."""

from __future__ import annotations

from typing import Any

import pytest

from config import Config
from engine.requests import Sequence
from engine.scheduler import ContinuousScheduler, StaticScheduler
from engine.types import KVGeometry, PendingPrefix, StepResult
from memory.block_manager import PrefixCacheManager, RadixCacheManager
from sampling_params import SamplingParams
from tests.contracts.driver import Driver, Setting

DEPTHS = [0, 1]


def _driver(**setting: object) -> Driver:
    return Driver(Setting(**setting), ContinuousScheduler, PrefixCacheManager)  # type: ignore[arg-type]


def _prompt(shared: int, own: int, name: int) -> list[int]:
    return [i % 47 for i in range(shared)] + [(name * 7 + i) % 50 for i in range(own)]


def _submit(driver: Driver, prompt: list[int], max_tokens: int = 4, **params: object) -> Sequence:
    return driver.submit(
        prompt,
        SamplingParams(temperature=0, max_tokens=max_tokens, **params),  # type: ignore[arg-type]
    )


def _prefill_tokens(driver: Driver) -> int:
    return sum(plan.num_prefill_tokens for plan in driver.plans)


def _deferred(driver: Driver) -> list[Sequence]:
    scheduler = driver.scheduler
    assert isinstance(scheduler, ContinuousScheduler)
    return [seq for followers in scheduler.deferred.values() for seq in followers.values()]


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("budget", [1024, 16384])
def test_the_shared_part_of_many_prompts_is_computed_once(depth: int, budget: int) -> None:
    driver = _driver(num_blocks=256, block_size=256, max_num_seqs=64, budget=budget, depth=depth)
    for i in range(64):
        _submit(driver, _prompt(2048, 128, i))
    driver.finish()
    least = 2048 + 64 * 128
    assert least <= _prefill_tokens(driver) <= 1.02 * least


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("scheduler", [ContinuousScheduler, StaticScheduler])
@pytest.mark.parametrize("manager", [PrefixCacheManager, RadixCacheManager])
def test_a_known_prompt_computes_one_token(manager: Any, scheduler: Any, depth: int) -> None:
    driver = Driver(Setting(depth=depth), scheduler, manager)
    _submit(driver, _prompt(64, 0, 0))
    driver.finish()
    # Of 4 blocks, of 4 blocks and a token, and of 3 blocks and all but a token of the next.
    for prompt, least in [(64, 1), (65, 1), (63, 15)]:
        for _ in range(2):
            before = _prefill_tokens(driver)
            _submit(driver, _prompt(prompt, 0, 0))
            driver.finish()
            assert _prefill_tokens(driver) - before == least


@pytest.mark.parametrize("depth", DEPTHS)
def test_equal_prompts_that_come_together_are_computed_once(depth: int) -> None:
    driver = _driver(num_blocks=64, max_num_seqs=8, depth=depth)
    for _ in range(8):
        _submit(driver, _prompt(64, 0, 0))
    driver.finish()
    assert _prefill_tokens(driver) == 64 + 7


@pytest.mark.parametrize("depth", DEPTHS)
def test_only_those_who_share_wait(depth: int) -> None:
    driver = _driver(max_num_seqs=8, budget=256, depth=depth)
    leader, follower = (_submit(driver, _prompt(96, 5, i)) for i in range(2))
    other = _submit(driver, [49] * 20)
    salted = _submit(driver, _prompt(96, 5, 4), cache_salt="other")
    driver.run(until=lambda: leader.slot is not None)
    assert follower.slot is None
    driver.run(until=lambda: other.slot is not None and salted.slot is not None)
    assert follower.slot is None
    driver.finish()
    assert driver.blocks.num_hit_tokens == 96


def test_a_follower_waits_for_the_shared_part_alone() -> None:
    config = Config(model="none", max_num_seqs=2, max_num_batched_tokens=500)
    blocks = PrefixCacheManager(config, KVGeometry(1, 1, 1, 16, 64, 4))
    scheduler = ContinuousScheduler(config, blocks, lambda: 0.0)
    batch = scheduler.batch
    leader, follower = (
        Sequence(i, _prompt(48, own, i), SamplingParams(), max_total_tokens=500)
        for i, own in enumerate((400, 5))
    )
    scheduler.add(leader)
    assert blocks.pending(leader.token_ids) is None
    assert scheduler.admit(leader)
    scheduler.add(follower)
    prefix = blocks.pending(follower.token_ids)
    assert prefix == PendingPrefix(0, 48)
    assert scheduler.defer(prefix)
    assert scheduler.queue.first() is None
    for num_tokens in (32, 15):
        batch.prefill(leader, num_tokens)
        plan = batch.build()
        assert plan is not None
        scheduler.commit(plan, StepResult(plan.step_id, [], 0.0))
        scheduler.rejoin()
        assert scheduler.deferred == {prefix: {1: follower}}
        assert scheduler.queue.first() is None
    batch.prefill(leader, 1)
    plan = batch.build()
    assert plan is not None
    scheduler.commit(plan, StepResult(plan.step_id, [], 0.0))
    scheduler.rejoin()
    assert scheduler.deferred == {}
    assert scheduler.queue.first() is follower
    assert blocks.pending(follower.token_ids) is None
    assert scheduler.admit(follower)
    assert follower.num_scheduled == 48
    assert scheduler.queue.first() is None


@pytest.mark.parametrize("depth", DEPTHS)
def test_no_one_waits_for_an_aborted_request(depth: int) -> None:
    driver = _driver(max_num_seqs=4, budget=512, depth=depth)
    leader, *followers = (_submit(driver, _prompt(400, 5, i)) for i in range(3))
    driver.launch()
    assert _deferred(driver) == followers
    driver.abort(leader.request_id)
    driver.finish()
    assert all(seq.finish_reason == "length" for seq in followers)
    # The leader's step, then the shared part once more, for the first follower.
    assert _prefill_tokens(driver) == 405 + 405 + 5


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_follower_can_be_aborted(depth: int) -> None:
    driver = _driver(max_num_seqs=4, budget=512, depth=depth)
    leader, follower, last = (_submit(driver, _prompt(100, 5, i)) for i in range(3))
    driver.launch()
    driver.abort(follower.request_id)
    assert _deferred(driver) == [last]
    driver.finish()
    assert (leader.finish_reason, last.finish_reason) == ("length", "length")
    assert follower.output_token_ids == []


@pytest.mark.parametrize("depth", DEPTHS)
def test_without_a_free_slot_all_stay_in_the_queue(depth: int) -> None:
    driver = _driver(max_num_seqs=1, budget=512, depth=depth)
    for i in range(2):
        _submit(driver, _prompt(100, 5, i))
    driver.launch()
    assert _deferred(driver) == []
    driver.finish()
    assert _prefill_tokens(driver) < 2 * 105


@pytest.mark.parametrize("depth", DEPTHS)
def test_no_more_wait_than_could_run(depth: int) -> None:
    """A step looks at as many requests as there are slots, however many share a prefix."""
    driver = _driver(max_num_seqs=4, budget=256, depth=depth)
    for i in range(60):
        _submit(driver, _prompt(160, 3, i), max_tokens=2)
    driver.launch()
    assert len(_deferred(driver)) == 4
    driver.finish()
    assert _prefill_tokens(driver) == 160 + 60 * 3


@pytest.mark.parametrize("depth", DEPTHS)
def test_preempted_requests_find_their_blocks_again(depth: int) -> None:
    driver = _driver(num_blocks=9, block_size=16, max_num_seqs=2, depth=depth)
    seqs = [_submit(driver, _prompt(0, 40, i), max_tokens=60) for i in range(2)]
    driver.finish()
    assert sum(seq.num_preemptions for seq in seqs) > 0
    assert driver.blocks.num_hit_tokens > 0
