"""What each policy decides, seen in the plans; that all give the right tokens is in contracts/."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engine.policies
from config import Config
from engine.admission import LookAhead, ReserveOutput
from engine.policies import (
    AdmissionPolicy,
    FirstCome,
    KeyedQueue,
    PreemptionPolicy,
    PrefillFirst,
    StepPolicy,
)
from engine.requests import Sequence
from engine.running_batch import RunningBatch
from engine.scheduler import ContinuousScheduler
from engine.types import NO_BLOCK, KVGeometry, StepResult, WindowPages
from memory.block_manager import PagedBlockManager, PrefixCacheManager
from memory.cache_groups import WindowBlockManager, grouped
from sampling_params import SamplingParams
from tests.contracts.driver import Driver, Setting

DEPTHS = [0, 1]


class Bench(Driver):
    """A driver of the continuous scheduler, with requests that are made up."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        max_num_seqs: int = 4,
        budget: int = 64,
        depth: int = 0,
        **options: Any,
    ) -> None:
        setting = Setting(num_blocks, 16, max_num_seqs, budget, depth, options=options)
        super().__init__(setting, ContinuousScheduler, PagedBlockManager)

    def add(
        self,
        num_prompt: int = 4,
        max_tokens: int = 4,
        *,
        stops_at_once: bool = False,
        **values: Any,
    ) -> Sequence:
        """Queue a request; `values` are further sampling parameters."""
        prompt = [(len(self.seqs) * 7 + i * 3) % 50 for i in range(num_prompt)]
        params = SamplingParams(temperature=0, max_tokens=max_tokens, **values)
        stop = frozenset(range(50)) if stops_at_once else frozenset[int]()
        return self.submit(prompt, params, stop_token_ids=stop)

    def add_predicted(self, num_prompt: int, max_tokens: int) -> Sequence:
        """Queue a request that stops after just as many tokens as it predicts, or at the limit."""
        prompt, stop = [len(self.seqs) % 50, *range(num_prompt - 1)], frozenset({7})
        tokens = self.model.alone(prompt, max_tokens, stop_token_ids=stop, seed=len(self.seqs))
        params = SamplingParams(max_tokens=max_tokens, predicted_tokens=len(tokens))
        return self.submit(prompt, params, stop_token_ids=stop)

    @property
    def admitted(self) -> list[int]:
        return [new.request_id for plan in self.plans for new in plan.new_requests]

    @property
    def num_preemptions(self) -> int:
        return sum(seq.num_preemptions for seq in self.seqs)


def test_every_policy_is_short() -> None:
    for node in ast.parse(Path(engine.policies.__file__).read_text()).body:
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 40, node.name


class ByArrival(KeyedQueue):
    def key(self, seq: Sequence) -> int:
        return seq.request_id


class TestQueue:
    @pytest.mark.parametrize(
        ("policy", "expected"),
        [
            ("fcfs", [0, 1, 2, 3, 4]),
            ("priority", [2, 4, 0, 3, 1]),
            ("shortest_prompt", [4, 1, 0, 3, 2]),
            ("shortest_job", [3, 0, 2, 4, 1]),
        ],
    )
    def test_order(self, policy: str, expected: list[int]) -> None:
        bench = Bench(max_num_seqs=1, queue_policy=policy)
        bench.add(8, 9, priority=0, predicted_tokens=5)
        bench.add(5, 9, priority=-1)
        bench.add(9, 6, priority=7)
        bench.add(8, 4, priority=0)
        bench.add(3, 8, priority=7)
        bench.run()
        assert bench.admitted == expected

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.tuples(st.sampled_from(["new", "back", "pop", "discard"]), st.randoms())))
    def test_fcfs_is_a_heap_by_arrival(self, moves: list[tuple[str, Random]]) -> None:
        config, started = Config(model="none"), list[Sequence]()
        queue, heap, waiting = FirstCome(config), ByArrival(config), list[Sequence]()
        for number, (move, random) in enumerate(moves):
            if move == "new":
                seq = Sequence(number, [1], SamplingParams(), max_total_tokens=2)
            elif move == "back" and started:
                seq = started.pop(random.randrange(len(started)))
            elif move == "pop" and waiting:
                seq = queue.pop()
                assert heap.pop() is seq
                started.append(seq)
            elif move == "discard" and waiting:
                seq = random.choice(waiting)
                queue.discard(seq)
                heap.discard(seq)
            else:
                continue
            if move in ("new", "back"):
                queue.push(seq)
                heap.push(seq)
                waiting.append(seq)
            else:
                waiting.remove(seq)
            assert queue.first() is heap.first()

    def test_a_prediction_beyond_max_tokens_is_not_believed(self) -> None:
        bench = Bench(max_num_seqs=1, queue_policy="shortest_job")
        bench.add(4, 9)
        bench.add(4, 8, predicted_tokens=30)
        bench.run()
        assert bench.admitted == [1, 0]

    @pytest.mark.parametrize(
        ("policy", "expected"), [("fcfs", [0, 1, 1, 2]), ("priority", [0, 1, 2, 1])]
    )
    def test_the_policy_places_the_preempted(self, policy: str, expected: list[int]) -> None:
        bench = Bench(num_blocks=4, max_num_seqs=2, queue_policy=policy)
        bench.add(15, 40, priority=1)
        victim = bench.add(15, 40)
        bench.run(until=lambda: victim.num_preemptions > 0)
        bench.add(1, priority=1)
        bench.run()
        assert bench.admitted == expected

    @pytest.mark.parametrize("policy", ["fcfs", "priority", "fair_share"])
    def test_the_aborted_never_run(self, policy: str) -> None:
        bench = Bench(max_num_seqs=1, queue_policy=policy)
        for i in range(10):
            bench.add(user=str(i % 3))
        for i in (0, 3, 4, 9):
            bench.abort(i)
        bench.run()
        assert sorted(bench.admitted) == [1, 2, 5, 6, 7, 8]


class TestFairShare:
    def test_users_take_turns_whatever_their_number_of_requests(self) -> None:
        bench = Bench(max_num_seqs=1, queue_policy="fair_share")
        for _ in range(8):
            bench.add(user="many")
        for _ in range(3):
            bench.add(user="few")
        bench.run()
        assert bench.admitted == [8, 0, 9, 1, 10, 2, 3, 4, 5, 6, 7]

    def test_turns_are_counted_in_tokens(self) -> None:
        bench = Bench(max_num_seqs=1, queue_policy="fair_share")
        for _ in range(3):
            bench.add(10, 30, user="long")
        for _ in range(12):
            bench.add(2, 8, user="short")
        bench.run()
        # Forty tokens for one request of "long" are four of "short".
        assert [i < 3 for i in bench.admitted] == ([True] + [False] * 4) * 3

    def test_idle_time_gives_no_credit(self) -> None:
        bench = Bench(max_num_seqs=1, queue_policy="fair_share")
        for _ in range(8):
            bench.add(user="a")
        bench.run(until=lambda: len(bench.admitted) == 5)
        for _ in range(4):
            bench.add(user="b")
        bench.run()
        assert [i >= 8 for i in bench.admitted[5:]] == [True, False, True, False, True, False, True]

    def test_tokens_that_never_came_are_not_charged(self) -> None:
        bench = Bench(max_num_seqs=1, queue_policy="fair_share")
        for _ in range(4):
            bench.add(4, 60, stops_at_once=True, user="stops")
            bench.add(4, 1, user="short")
        bench.run()
        # Both users' requests take five tokens, though one asks for 64.
        assert bench.admitted == [1, 0, 3, 2, 5, 4, 7, 6]

    def test_a_preempted_request_is_charged_once(self) -> None:
        bench = Bench(num_blocks=4, max_num_seqs=2, queue_policy="fair_share")
        bench.add(15, 40, user="a")
        bench.add(15, 40, user="b")
        bench.run(until=lambda: bench.num_preemptions > 0)
        scheduler: Any = bench.scheduler
        queue = scheduler.queue
        assert queue.levels == {"a": 55, "b": 0}
        bench.run(until=lambda: bench.seqs[0].finish_reason is not None)
        # Of the 55 tokens of "a", an equal share for two users is a half.
        assert (queue.levels["a"], queue.fair_level) == (55, 27.5)
        bench.run(until=lambda: bench.seqs[1].slot is not None)
        assert queue.levels == {"a": 55, "b": 55}
        bench.run()
        assert not queue.charged

    def test_an_aborted_request_is_charged_what_it_took(self) -> None:
        bench = Bench(queue_policy="fair_share")
        seq = bench.add(5, 40, user="a")
        bench.add(5, 45, user="b")
        bench.run(until=lambda: len(seq.output_token_ids) == 3)
        bench.abort(0)
        scheduler: Any = bench.scheduler
        # The 8 tokens, divided by the number of users. As 8 is more, "a" is not forgotten yet.
        assert scheduler.queue.levels == {"a": 8, "b": 50}
        assert scheduler.queue.fair_level == 4

    def test_users_are_forgotten_when_nobody_has_requests(self) -> None:
        bench = Bench(max_num_seqs=2, queue_policy="fair_share")
        first = bench.add(5, 45, user="a")
        bench.run(until=lambda: len(first.output_token_ids) == 40)
        bench.add(2, 20, user="b")
        scheduler: Any = bench.scheduler
        queue = scheduler.queue
        bench.run(until=lambda: first.finish_reason is not None)
        assert queue.levels["a"] == 50 > queue.fair_level
        bench.run()
        # The fair level has not reached the level of "a".
        assert queue.fair_level == 25 + 22
        assert queue.levels == {}

    def test_a_user_who_returns_keeps_a_level_above_the_fair_one(self) -> None:
        bench = Bench(max_num_seqs=2, queue_policy="fair_share")
        first = bench.add(5, 45, user="a")
        bench.run(until=lambda: len(first.output_token_ids) == 40)
        bench.add(2, 20, user="b")
        bench.run(until=lambda: first.finish_reason is not None)
        bench.add(1, 1, user="a")
        scheduler: Any = bench.scheduler
        assert (scheduler.queue.levels["a"], scheduler.queue.fair_level) == (50, 25)

    def test_an_aborted_request_that_waited_for_a_prefix_is_charged_nothing(self) -> None:
        setting = Setting(options={"queue_policy": "fair_share"})
        driver = Driver(setting, ContinuousScheduler, PrefixCacheManager)
        prompt, params = list(range(40)), SamplingParams(temperature=0, user="a")
        driver.submit(prompt, params)
        driver.submit(prompt, replace(params, user="b"))
        driver.launch()
        driver.abort(1)
        scheduler: Any = driver.scheduler
        assert "b" not in scheduler.queue.levels
        assert list(scheduler.queue.charged) == [0]
        driver.finish()


class TestAdmission:
    def _load(self, policy: str, **values: Any) -> Bench:
        bench = Bench(num_blocks=6, max_num_seqs=6, budget=128, admission_policy=policy)
        for _ in range(6):
            bench.add(16, 33, **values)
        bench.run()
        bench.check_idle()
        return bench

    def test_optimistic_fills_the_cache_and_preempts(self) -> None:
        bench = self._load("optimistic")
        assert bench.plans[0].new_requests[-1].request_id == 5
        assert bench.num_preemptions > 0

    def test_reserve_admits_what_fits_at_its_longest(self) -> None:
        bench = self._load("reserve")
        # Each may come to 48 positions, which are three blocks.
        assert [len(plan.new_requests) for plan in bench.plans if plan.new_requests] == [2, 2, 2]
        assert bench.num_preemptions == 0

    @pytest.mark.parametrize(
        ("num_full", "num_window", "fits"), [(24, 8, True), (24, 7, False), (23, 8, False)]
    )
    def test_reserve_counts_every_group_and_what_windows_hold(
        self, num_full: int, num_window: int, fits: bool
    ) -> None:
        """Each request comes to 12 blocks, or 4 with a window: 16 positions and 31 uncommitted."""
        config = Config(model="none", max_num_batched_tokens=16, max_num_seqs=2)
        window = KVGeometry(1, 1, 1, 16, num_window, 4, WindowPages(16))
        full = PagedBlockManager(config, KVGeometry(1, 1, 1, 16, num_full, 4))
        batch = RunningBatch(grouped((full, WindowBlockManager(config, window))), 2, lambda: 0.0)
        first, second = (
            Sequence(i, [0] * 80, SamplingParams(), max_total_tokens=193) for i in (0, 1)
        )
        batch.admit(first)
        while batch.prefilling:
            batch.prefill(first, 16)
            plan = batch.build()
            assert plan is not None
            batch.commit(plan, StepResult(plan.step_id, [[1]] * len(plan.sampled_slots), 0.0))
        assert batch.blocks.groups[1].table(0).count(NO_BLOCK) == 4
        assert batch.most_blocks(second) == [12, 4]
        assert ReserveOutput(config).admits(second, batch) == fits

    @pytest.mark.parametrize(("max_tokens", "fits"), [(3, True), (30, False)])
    def test_lookahead_admits_what_fits_at_every_moment(self, max_tokens: int, fits: bool) -> None:
        bench = Bench(num_blocks=5, max_num_seqs=3, admission_policy="lookahead")
        bench.add(16, 33)
        bench.add(16, 17)
        bench.step()
        assert bench.admitted == [0, 1]
        # One block for three steps, or a second one while the others have two and two.
        bench.add(14, max_tokens)
        bench.step()
        assert (2 in bench.admitted) == fits
        bench.run()
        assert bench.num_preemptions == 0

    def test_lookahead_trusts_predictions(self) -> None:
        assert len(self._load("lookahead").plans[0].new_requests) == 2
        assert len(self._load("lookahead", predicted_tokens=17).plans[0].new_requests) == 3

    def test_a_lone_request_runs_whatever_the_policy_says(self) -> None:
        bench = Bench(admission_policy=Never)
        for _ in range(3):
            bench.add()
        bench.run()
        assert bench.admitted == [0, 1, 2]
        assert max(len(plan.decode) for plan in bench.plans) == 1

    @settings(max_examples=500, deadline=None)
    @given(
        st.lists(
            st.tuples(st.integers(1, 40), st.integers(0, 40), st.integers(0, 40)),
            min_size=1,
            max_size=12,
        ),
        st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=12),
        st.integers(1, 60),
        st.sampled_from([1, 4, 16]),
        st.sampled_from([25, 30, 16384]),
    )
    def test_lookahead_is_the_simulation_step_by_step(
        self,
        running: list[tuple[int, int, int]],
        candidates: list[tuple[int, int]],
        num_blocks: int,
        block_size: int,
        budget: int,
    ) -> None:
        """One candidate after the other joins, if it fits by a sum over each step to come."""
        config = Config(model="none", max_num_batched_tokens=budget, max_num_seqs=24)
        geometry = KVGeometry(1, 1, 1, block_size, num_blocks, 4)
        batch = RunningBatch(PagedBlockManager(config, geometry), 24, lambda: 0.0)
        # For each request its position in this step, its last one, and its number of steps.
        courses: list[tuple[int, int, int]] = []
        for i, (prompt, done, left) in enumerate(running):
            length = prompt + done + left + 1
            seq = Sequence(i, [1] * prompt, SamplingParams(), max_total_tokens=length)
            seq.slot, seq.num_prefill, seq.num_scheduled = i, prompt, prompt + done
            batch.running[i] = seq
            position = prompt + done
            courses.append((position, max(position, length - 2), left + 1))
        policy, hasty = LookAhead(config), LookAhead(config)
        policy.max_checks, hasty.max_checks = 100, 1
        policy.begin_step(batch)
        hasty.begin_step(batch)
        for i, (prompt, output) in enumerate(candidates, len(running)):
            seq = Sequence(i, [1] * prompt, SamplingParams(), max_total_tokens=prompt + output)
            steps = output + -(-(prompt - 1) // (budget - len(batch.running)))
            course = prompt - 1, prompt + output - 2, steps
            most = max(
                sum(min(at + step, last) // block_size + 1 for at, last, n in all_ if step < n)
                for step in range(90)
                if (all_ := [*courses, course])
            )
            fits = policy.admits(seq, batch)
            assert fits == (most <= num_blocks)
            # Without further checks, some wait until the next step, and none joins too early.
            joins = hasty.admits(seq, batch)
            assert fits or not joins
            assert hasty.num_checks == 1
            if fits:
                batch.running[i] = seq
                policy.admitted(seq, batch)
                hasty.begin_step(batch)
                courses.append(course)

    @pytest.mark.parametrize("depth", DEPTHS)
    @pytest.mark.parametrize("step_policy", ["decode_first", "prefill_first"])
    @pytest.mark.parametrize(("budget", "num_blocks"), [(16, 20), (40, 30), (300, 30)])
    def test_lookahead_with_right_predictions_preempts_no_one(
        self, budget: int, num_blocks: int, step_policy: str, depth: int
    ) -> None:
        """And it uses the cache: twice as many requests run as with `reserve`."""
        running, preemptions = {}, {}
        for policy in ("lookahead", "reserve", "optimistic"):
            options = {"admission_policy": policy, "step_policy": step_policy}
            bench = Bench(
                num_blocks=num_blocks, max_num_seqs=16, budget=budget, depth=depth, **options
            )
            rng = Random(budget)
            for _ in range(120):
                bench.add_predicted(rng.randint(1, 90), 150)
            total = 0
            while bench.scheduler.has_unfinished:
                bench.step()
                batch: Any = bench.scheduler
                total += len(batch.batch.running)
            running[policy] = total / len(bench.plans)
            preemptions[policy] = bench.num_preemptions
        assert preemptions["lookahead"] == preemptions["reserve"] == 0
        assert preemptions["optimistic"] > 0
        assert running["lookahead"] > 1.8 * running["reserve"]
        assert running["lookahead"] > 0.85 * running["optimistic"]


class Never(AdmissionPolicy):
    """A policy that would stop the engine if it were asked alone."""

    name = "never"

    def admits(self, seq: Sequence, batch: RunningBatch) -> bool:
        assert batch.running
        return False


class TestPreemption:
    @pytest.mark.parametrize(
        ("policy", "victim"), [("latest", 2), ("lowest_priority", 1), ("fewest_computed", 2)]
    )
    def test_victim(self, policy: str, victim: int) -> None:
        bench = Bench(num_blocks=6, max_num_seqs=3, preemption_policy=policy)
        for priority, num_prompt in ((1, 20), (0, 18), (1, 17)):
            bench.add(num_prompt, 40, priority=priority)
        bench.run(until=lambda: bench.num_preemptions > 0)
        assert [seq.num_preemptions for seq in bench.seqs].index(1) == victim

    @pytest.mark.parametrize("policy", ["latest", "lowest_priority", "fewest_computed"])
    def test_the_last_admitted_among_equals(self, policy: str) -> None:
        bench = Bench(num_blocks=6, max_num_seqs=3, preemption_policy=policy)
        for _ in range(3):
            bench.add(20, 40)
        bench.run(until=lambda: bench.num_preemptions > 0)
        assert bench.seqs[2].num_preemptions == 1

    def test_the_least_computed_need_not_be_the_latest(self) -> None:
        bench = Bench(num_blocks=6, max_num_seqs=2, preemption_policy="fewest_computed")
        bench.add(17, 60)
        bench.step()
        bench.add(40, 40)
        bench.run(until=lambda: bench.num_preemptions > 0)
        assert [seq.num_preemptions for seq in bench.seqs] == [1, 0]


class TestStep:
    """Between two tokens of a running request lie few steps and few computed tokens."""

    @pytest.mark.parametrize("depth", DEPTHS)
    @pytest.mark.parametrize(
        ("policy", "most_steps"), [("decode_first", 1), ("prefill_first", PrefillFirst.max_gap + 1)]
    )
    @pytest.mark.parametrize("budget", [8, 20])
    def test_no_decode_starves(self, policy: str, most_steps: int, budget: int, depth: int) -> None:
        bench = Bench(max_num_seqs=8, budget=budget, depth=depth, step_policy=policy)
        running = [bench.add(3, 60) for _ in range(2)]
        bench.run(until=lambda: all(len(seq.output_token_ids) for seq in running))
        for _ in range(30):
            bench.add(50, 3)
        gaps = self._gaps(bench, running[0])
        assert max(steps for steps, _ in gaps) == most_steps
        assert max(tokens for _, tokens in gaps) <= most_steps * budget
        bench.check_idle()

    @staticmethod
    def _gaps(bench: Bench, seq: Sequence) -> list[tuple[int, int]]:
        """Steps and computed tokens from each token of `seq` to the next one."""
        slot = seq.slot
        bench.run()
        gaps, steps, tokens = [], 0, 0
        for plan in bench.plans[1:]:
            steps += 1
            tokens += plan.num_tokens
            if slot in plan.decode:
                gaps.append((steps, tokens))
                steps = tokens = 0
        # Later the slot is another's.
        return gaps[: len(seq.output_token_ids) - 1]

    def test_prefill_first_brings_first_tokens_sooner(self) -> None:
        assert self._steps_to_first_token("prefill_first") == 9
        assert self._steps_to_first_token("decode_first") == 11

    @staticmethod
    def _steps_to_first_token(policy: str) -> int:
        """Until a prompt of 30 that came after the fifth has its first token, 8 in a step."""
        bench = Bench(max_num_seqs=4, budget=8, step_policy=policy)
        for _ in range(3):
            bench.add(3, 60)
        bench.run(until=lambda: len(bench.plans) == 5)
        late = bench.add(30, 2)
        bench.run(until=lambda: bool(late.output_token_ids))
        return len(bench.plans)

    def test_decodes_run_beside_prompts_that_leave_them_room(self) -> None:
        bench = Bench(budget=64, step_policy="prefill_first")
        bench.add(3, 20)
        bench.step()
        bench.add(30)
        plan = bench.launch()
        assert plan is not None
        assert (plan.num_prefill_tokens, plan.decode) == (30, (0,))


class TwiceTheBudget(StepPolicy):
    """Asks for more prompt tokens than a step may have."""

    def prefill_budget(self, budget: int, num_decodes: int, gap: int) -> int:
        return 2 * budget


def test_no_step_policy_exceeds_the_token_budget() -> None:
    bench = Bench(budget=8, step_policy=TwiceTheBudget)
    bench.add(30)
    plan = bench.launch()
    assert plan is not None
    assert plan.num_tokens == 8


class LongestFirst(KeyedQueue):
    """A user's own: all there is to write."""

    name = "longest_first"

    def key(self, seq: Sequence) -> int:
        return -len(seq.token_ids)


class OldestVictim(PreemptionPolicy):
    name = "oldest"

    def victims(self, running: list[Sequence]) -> list[Sequence]:
        return running


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("queue", [LongestFirst, f"{__name__}:LongestFirst"])
def test_policies_of_ones_own(queue: object, depth: int) -> None:
    bench = Bench(
        num_blocks=5,
        max_num_seqs=2,
        depth=depth,
        queue_policy=queue,
        preemption_policy=lambda config: OldestVictim(config),
    )
    for n in (3, 9, 5):
        bench.add(n, 50)
    bench.run()
    bench.check_idle()
    assert bench.admitted[:2] == [1, 2]
    assert bench.seqs[1].num_preemptions > 0
