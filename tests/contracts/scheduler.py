"""The contract of a scheduler: subclass SchedulerContract and pytest does the rest."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from sampling_params import SamplingParams
from tests.contracts.driver import Driver, MakeBlocks, Setting
from tests.contracts.traces import Combination, Trace, shipped_managers, shipped_policies
from utils.errors import RequestTooLongError

_ENDS = [frozenset[int](), frozenset({0}), frozenset(range(12))]


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of arrivals, aborts, plans and commits; the driver checks each."""

    def __init__(self, parts: Combination) -> None:
        super().__init__()
        self.parts = parts
        self.driver: Driver | None = None
        self.broken = False

    @initialize(
        num_blocks=st.integers(1, 16),
        block_size=st.sampled_from([1, 2, 4]),
        max_num_seqs=st.integers(1, 4),
        spare=st.integers(0, 24),
        eos_chance=st.sampled_from([0.0, 0.2]),
        num_drafts=st.integers(0, 3),
        window=st.sampled_from([0, 0, 1, 5]),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        spare: int,
        eos_chance: float,
        num_drafts: int,
        window: int,
    ) -> None:
        setting = Setting(
            num_blocks,
            block_size,
            max_num_seqs,
            max_num_seqs + spare,
            self.parts.depth,
            eos_chance,
            {**self.parts.options, "num_speculative_tokens": num_drafts},
            window,
            num_blocks,
        )
        self.driver = Driver(setting, self.parts.scheduler, self.parts.blocks)

    # Few words as long as blocks: equal blocks appear behind equal and other beginnings.
    @rule(
        words=st.lists(st.integers(0, 2), max_size=5),
        tail=st.lists(st.integers(0, 49), max_size=3),
        max_tokens=st.integers(1, 20),
        stop=st.sampled_from(_ENDS),
        priority=st.integers(0, 2),
        user=st.sampled_from("ab"),
        salt=st.sampled_from(["", "salt"]),
    )
    def add(
        self,
        words: list[int],
        tail: list[int],
        max_tokens: int,
        stop: frozenset[int],
        priority: int,
        user: str,
        salt: str,
    ) -> None:
        size = self._driver.setting.block_size
        prompt = [word for word in words for _ in range(size)] + tail
        params = SamplingParams(
            temperature=0, max_tokens=max_tokens, priority=priority, user=user, cache_salt=salt
        )
        with suppress(RequestTooLongError):
            self._move("submit", prompt or [0], params, stop_token_ids=stop)

    @precondition(lambda self: self.driver and self.driver.seqs)
    @rule(which=st.integers(0), tail=st.lists(st.integers(0, 49), min_size=1, max_size=3))
    def add_next_turn(self, which: int, tail: list[int]) -> None:
        seqs = self._driver.seqs
        before = seqs[which % len(seqs)].token_ids
        with suppress(RequestTooLongError):
            self._move("submit", [*before, *tail], SamplingParams(temperature=0, max_tokens=4))

    @precondition(lambda self: self.driver and self.driver.seqs)
    @rule(which=st.integers(0))
    def abort(self, which: int) -> None:
        self._move("abort", which % len(self._driver.seqs))

    @rule()
    def step(self) -> None:
        self._move("step")

    @precondition(lambda self: self.driver and len(self.driver.pipeline) <= self.parts.depth)
    @rule()
    def launch(self) -> None:
        self._move("launch")

    @precondition(lambda self: self.driver and self.driver.pipeline)
    @rule()
    def land(self) -> None:
        self._move("land")

    def teardown(self) -> None:
        if self.driver is not None and not self.broken:
            self.driver.finish()
            self.driver.check_pickles()

    @property
    def _driver(self) -> Driver:
        assert self.driver is not None
        return self.driver

    def _move(self, name: str, *args: Any, **named: Any) -> None:
        try:
            getattr(self._driver, name)(*args, **named)
        except RequestTooLongError:
            raise
        except Exception:
            self.broken = True
            raise


class TogetherContract:
    """What a scheduler and a block manager must do together.

    Attributes:
        options: further options of `Config`.
        num_traces: random traces for each pair of parts and pipeline depth.
        num_examples: state machines that hypothesis tries likewise.
    """

    options: ClassVar[dict[str, Any]] = {}
    num_traces: ClassVar[int] = 200
    num_examples: ClassVar[int] = 40

    @pytest.mark.parametrize("depth", [0, 1])
    def test_random_traces_break_no_rule(self, depth: int) -> None:
        for parts in self.combinations(depth):
            for seed in range(self.num_traces):
                Trace(str(seed), parts).run().check_pickles()

    @pytest.mark.parametrize("depth", [0, 1])
    def test_no_order_of_moves_breaks_a_rule(self, depth: int) -> None:
        for parts in self.combinations(depth):
            run_machine(partial(SchedulerMachine, parts), self.num_examples)

    def combinations(self, depth: int) -> list[Combination]:
        """The parts to be tested together."""
        raise NotImplementedError


def run_machine(make: Any, num_examples: int) -> None:
    """Let hypothesis look for a sequence of rules that fails."""
    run_state_machine_as_test(
        make,
        settings=settings(
            max_examples=num_examples,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


class SchedulerContract(TogetherContract):
    """What a scheduler must do, on whatever block manager.

        class TestMyScheduler(SchedulerContract):
            make_scheduler = MyScheduler

    Attributes:
        make_scheduler: the class or a factory.
        make_blocks: the block managers it is tested on; all that the engine has if None.
        max_gap: most steps that a running request may wait for its next token while others
            arrive and nothing runs out.
    """

    make_scheduler: ClassVar[Any]
    make_blocks: ClassVar[tuple[MakeBlocks, ...] | None] = None
    max_gap: ClassVar[int] = 8

    def combinations(self, depth: int) -> list[Combination]:
        make = type(self).make_scheduler
        return [
            Combination(make, blocks, depth, self.options, shipped_policies(make, blocks))
            for blocks in type(self).make_blocks or shipped_managers()
        ]

    @pytest.mark.parametrize("depth", [0, 1])
    def test_no_running_request_starves(self, depth: int) -> None:
        """New prompts arrive in every step and take several steps each."""
        policies = self.combinations(depth)[0].policies
        for step_policy in policies.get("step_policy", [None]):
            options = self.options if step_policy is None else {"step_policy": step_policy}
            self._starve(Setting(512, 4, 8, 16, depth, options={**options, **self.options}))

    def _starve(self, setting: Setting) -> None:
        driver = self._driver(setting)
        first = driver.submit([1, 2, 3], SamplingParams(temperature=0, max_tokens=40))
        driver.run(until=lambda: first.token_ids[3:] != [])
        gap = length = 0
        while first.finish_reason is None:
            if len(driver.seqs) < 200:
                driver.submit([5] * 45, SamplingParams(temperature=0, max_tokens=2))
            driver.step()
            gap = gap + 1 if len(first.token_ids) == length else 0
            length = len(first.token_ids)
            assert gap < self.max_gap, f"{gap} steps without a token for {first}"
        driver.finish()

    def test_a_decode_plan_names_only_slots(self) -> None:
        """What a runner knows already is not sent again."""
        driver = self._driver(Setting(options=self.options))
        driver.submit([1, 2, 3], SamplingParams(temperature=0, max_tokens=8))
        driver.run(until=lambda: len(driver.plans) == 2)
        plan = driver.plans[1]
        assert (plan.new_requests, plan.block_updates, plan.prefill) == ((), (), ())
        assert len(plan.decode) == 1
        driver.finish()

    def _driver(self, setting: Setting) -> Driver:
        parts = self.combinations(setting.depth)[0]
        return Driver(setting, parts.scheduler, parts.blocks)
