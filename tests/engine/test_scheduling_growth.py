"""The scheduler's work grows with requests and tokens, and with nothing else. Lines are counted."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from benchmarks.scheduling_growth import Loop
from engine.admission import LookAhead
from engine.fair_share import FairShare
from engine.parts import PART_KINDS
from engine.policies import AdmissionPolicy
from engine.requests import Sequence
from engine.running_batch import RunningBatch
from engine.types import StepResult


def lines(call: Callable[[], object]) -> int:
    """The lines of Python that a call runs; a loop on one line counts once for each turn."""
    count, before = 0, sys.gettrace()

    def trace(frame: FrameType, event: str, arg: object) -> Callable[..., Any]:
        nonlocal count
        count += event in ("line", "call")
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


class AllForEach(AdmissionPolicy):
    """Looks at all running requests for each that it admits."""

    name = "all_for_each"

    def admits(self, seq: Sequence, batch: RunningBatch) -> bool:
        return all(other.slot is not None for other in batch.running.values())


def _burst(admission: object, count: int, blocks_each: float) -> int:
    """The work of a step that admits so many requests."""
    rng = random.Random(0)
    loop = Loop(
        int(blocks_each * count),
        max_num_seqs=count,
        max_num_batched_tokens=2**20,
        admission_policy=admission,
    )
    for _ in range(count):
        num_prompt, num_output = rng.randint(100, 500), rng.randint(64, 1_024)
        loop.add([rng.randrange(50_000) for _ in range(num_prompt)], num_output)
    work = lines(loop.scheduler.schedule)
    assert len(loop.scheduler.batch.running) == count
    policy = loop.scheduler._admission
    if isinstance(policy, LookAhead):
        # With few blocks, the bounds alone do not admit all.
        assert policy.num_checks == (1 if blocks_each == 8 else 2)
    return work


@pytest.mark.parametrize("blocks_each", [8.0, 2.4])
@pytest.mark.parametrize("admission", sorted(PART_KINDS["admission_policy"].known()))
def test_a_burst_is_admitted_in_linear_time(admission: str, blocks_each: float) -> None:
    if admission == "reserve":
        blocks_each = 8  # or they do not fit at their length limits
    small, large = (_burst(admission, count, blocks_each) for count in (256, 1_024))
    assert 3 < large / small < 5


def test_a_policy_that_looks_at_all_for_each_is_found_out() -> None:
    small, large = (_burst(AllForEach, count, 8) for count in (256, 1_024))
    assert large / small > 6


@pytest.mark.parametrize("preemption", sorted(PART_KINDS["preemption_policy"].known()))
def test_many_preemptions_in_a_step_take_linear_time(preemption: str) -> None:
    """Each request needs a second block in the same step, and there are none."""
    work = []
    for count in (128, 512):
        loop = Loop(
            count,
            max_num_seqs=count,
            max_num_batched_tokens=2**20,
            preemption_policy=preemption,
        )
        for i in range(count):
            loop.add([i] * 256, 8)
        loop.step()
        assert len(loop.scheduler.batch.decoding) == count
        work.append(lines(loop.scheduler.schedule))
        assert len(loop.scheduler.batch.running) == count // 2
    assert 3 < work[1] / work[0] < 4.4


def _total(count: int, prompt: Callable[[int], list[int]], **options: object) -> int:
    """The work of all steps of so many requests, and of their arrivals and ends."""
    loop = Loop(64, max_num_seqs=32, max_num_batched_tokens=1_024, **options)

    def serve() -> None:
        for i in range(count):
            loop.add(prompt(i), 3, user=str(i))
        loop.run()

    return lines(serve)


@pytest.mark.parametrize("queue", sorted(PART_KINDS["queue_policy"].known()))
@pytest.mark.parametrize("same", [False, True])
def test_many_requests_take_linear_time(queue: str, same: bool) -> None:
    """Prompts of their own, or outputs of one prompt, of which the first computes the most."""

    def prompt(i: int) -> list[int]:
        return [0 if same else i] * 600

    few, many = (_total(count, prompt, queue_policy=queue) for count in (250, 1_000))
    assert 3.5 < many / few < 4.3


def _deferring(num_followers: int) -> Loop:
    """The step of a prompt is in flight, and others wait for it."""
    loop = Loop(200, max_num_seqs=1_024, max_num_batched_tokens=1_024)
    for i in range(1 + num_followers):
        loop.add([*range(1_000), i], 3)
    loop.scheduler.schedule()
    assert len(loop.scheduler._awaited) == num_followers
    return loop


def test_a_step_does_not_read_all_that_wait_for_a_prefix() -> None:
    few, many = (lines(_deferring(count).scheduler.schedule) for count in (10, 500))
    assert few == many


def test_aborts_of_requests_that_wait_for_a_prefix_take_linear_time() -> None:
    work = []
    for count in (100, 400):
        scheduler = _deferring(count).scheduler

        def abort_all(scheduler: Any = scheduler, count: int = count) -> None:
            for i in range(1, 1 + count):
                scheduler.abort(i)

        work.append(lines(abort_all))
        assert not scheduler.deferred
        assert not scheduler._awaited
        assert list(scheduler._waiting) == []
    assert 3.8 < work[1] / work[0] < 4.2


def test_a_step_does_not_look_at_prompts_beyond_its_budget() -> None:
    work = []
    for count in (10, 500):
        loop = Loop(600, max_num_seqs=512, max_num_batched_tokens=512)
        seqs = [loop.add([i] * 250, 3) for i in range(count)]
        batch = loop.scheduler.batch
        for seq in seqs:
            assert loop.scheduler.admit(seq)
        loop.step()
        assert len(batch.prefilling) == count - 2
        work.append(lines(loop.scheduler.schedule))
    assert work[0] == work[1]


class Remembers(FairShare):
    """Forgets no user."""

    name = "remembers"

    def _leave(self, user: str) -> None:
        self._counts[user] -= 1
        if not self._counts[user]:
            del self._counts[user]
            self._idle.push(self.levels[user], user)


class TestUsers:
    @staticmethod
    def _kept(queue: Any) -> int:
        held = (queue.levels, queue.charged, queue._queues, queue._order, queue._idle)
        return max(map(len, (*held, queue._counts)))

    def test_many_users_of_one_request_leave_nothing(self) -> None:
        loop = Loop(1_024, max_num_seqs=256, queue_policy="fair_share")
        queue: Any = loop.scheduler.queue
        for i in range(10_000):
            loop.add([i % 7] * 4, 2, user=str(i))
            if i % 5 == 0:
                loop.scheduler.abort(i)
        loop.run()
        assert self._kept(queue) == 0

    def test_users_are_forgotten_while_others_have_requests(self) -> None:
        """For each user who has left, two came, one after the other, and had short requests."""
        loop = Loop(1_024, max_num_seqs=16, queue_policy="fair_share")
        queue: Any = loop.scheduler.queue
        most = 0
        loop.add([1], 4_000, user="always")
        for i in range(2_000):
            loop.add([i % 7] * 4, 2, user=str(i))
            loop.step()
            most = max(most, self._kept(queue))
        assert queue._counts["always"] == 1
        assert most < 30

    @pytest.mark.parametrize("seed", range(5))
    def test_no_one_gains_from_having_been_forgotten(self, seed: int) -> None:
        """The requests start in the same order if no user is ever forgotten."""
        orders = []
        forgotten = 0
        for policy in (FairShare, Remembers):
            rng = random.Random(seed)
            loop = Loop(1_024, max_num_seqs=4, queue_policy=policy)
            queue: Any = loop.scheduler.queue
            loop.add([1], 4_000, user="always")
            order: list[int] = []
            for _ in range(1_500):
                for _ in range(rng.choice((0, 0, 0, 0, 0, 1, 5))):
                    user = str(rng.randrange(12))
                    loop.add([7] * rng.randint(1, 60), rng.randint(1, 9), user=user)
                known = set(queue.levels)
                plan = loop.scheduler.schedule()
                assert plan is not None
                order += [new.request_id for new in plan.new_requests]
                tokens = [[7] for _ in plan.sampled_slots]
                loop.scheduler.commit(plan, StepResult(plan.step_id, tokens, 0.0))
                forgotten += len(known.difference(queue.levels))
            orders.append(order)
        assert len(orders[0]) > 200
        assert forgotten > 3
        assert orders[0] == orders[1]

    def test_all_begin_anew_when_no_one_has_requests(self) -> None:
        """What the first user got before, nobody waited for."""
        loop = Loop(1_024, max_num_seqs=1, queue_policy="fair_share")
        for _ in range(5):
            loop.add([1] * 100, 10, user="a")
        loop.run()
        queue: Any = loop.scheduler.queue
        before = queue.fair_level
        for user in "ab":
            loop.add([1] * 100, 10, user=user)
        assert queue.levels == {"a": before, "b": before}
