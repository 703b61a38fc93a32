"""`check_exact=True` finds lost bits, names where they were lost, and leaves no trace."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from config import Config
from engine.checking.fake_runner import FakeModel, FakeRunner
from engine.llm_engine import LLMEngine
from engine.model_runner import LocalRunner
from engine.ranks.runner import TensorParallelRunner
from engine.ranks.worker import Rank
from engine.requests import Sequence
from engine.scheduler import ContinuousScheduler
from engine.simulated_runner import SimulatedRunner
from engine.types import BlockManager, Clock, ModelRunner, StepHandle, StepPlan, StepResult
from layers.attention.base import AttentionBackend, AttentionBatch
from layers.attention.torch_sdpa import TorchAttention
from layers.attention.triton_paged import TritonAttention
from layers.exact_matmul import ExactMatmul
from layers.linear import Matmul
from llm import LLM, SamplingParams
from models.decoder import MLP, Attention, DecoderLM
from tests.custom_parts import OneAtATime
from tests.engine.fake_ranks import rank_pids
from tests.exact_parts import (
    Change,
    RowAttention,
    exact_products,
    next_float,
    recording_runner,
    when,
)
from utils.errors import (
    ConfigError,
    EngineClosedError,
    RequestError,
    RequestTooLongError,
    StepError,
)

# Probes have 1, 16, 17, 130 and 194 prompt tokens.
SMALL: dict[str, Any] = {
    "device": "cpu",
    "max_model_len": 200,
    "max_num_seqs": 100,
    "max_num_batched_tokens": 2048,
    "kvcache_block_size": 16,
    "num_kvcache_blocks": 300,
}
# Few enough rows for `RowAttention`.
SMALLER: dict[str, Any] = {
    **SMALL,
    "max_model_len": 64,
    "max_num_seqs": 20,
    "max_num_batched_tokens": 128,
    "num_kvcache_blocks": 80,
}


def refusal(model: Path, **options: Any) -> ConfigError:
    """The error of an engine that must not start."""
    with pytest.raises(ConfigError) as caught:
        LLM(model, check_exact=True, **options)
    error = caught.value
    assert (error.field, error.value) == ("check_exact", True)
    assert "check_exact=False" in error.fix
    assert "docs/exact.md" in error.fix
    assert str(error).startswith(f"check_exact=True: {error.problem}. ")
    return error


def _begun(plan: StepPlan) -> bool:
    """Whether a chunk goes on with a prompt that an earlier step began."""
    new = {one.slot for one in plan.new_requests}
    return any(chunk.start > 0 and chunk.slot not in new for chunk in plan.prefill)


def _hit(plan: StepPlan) -> bool:
    """Whether a request enters behind a cached prefix."""
    new = {one.slot for one in plan.new_requests}
    return any(chunk.start > 0 and chunk.slot in new for chunk in plan.prefill)


def _other_token(plan: StepPlan, result: StepResult) -> StepResult:
    return replace(result, tokens=[[token ^ 1 for token in row] for row in result.tokens])


def _other_plain_token(plan: StepPlan, result: StepResult) -> StepResult:
    """Other tokens of requests without log-probabilities, whose bits nothing else shows."""
    scored = result.logprobs or [[] for _ in result.tokens]
    pairs = zip(result.tokens, scored, strict=True)
    return replace(result, tokens=[row if found else [row[0] ^ 1] for row, found in pairs])


def _other_prompt(plan: StepPlan, result: StepResult) -> StepResult:
    rows = result.prompt_logprobs
    if rows is None:
        return result
    return replace(result, prompt_logprobs=[[dict.fromkeys(x, -1.0) for x in row] for row in rows])


class TestLosses:
    @pytest.mark.parametrize(
        ("leaks", "words"),
        [
            (lambda plan: len(plan.decode) > 1, "a decode of 7 requests"),
            (lambda plan: len(plan.decode) > 7, "a decode of 16 requests"),
            (lambda plan: len(plan.decode) > 16, "a decode of 64 requests"),
            (lambda plan: len(plan.decode) > 64, "a decode of 100 requests"),
            (lambda plan: len(plan.prefill) > 1, "a prefill of 2048 tokens"),
            (lambda plan: plan.num_prefill_tokens > 194, "a prefill of 2048 tokens"),
            (_begun, "a prompt in chunks of 48 tokens"),
            (_hit, "a prefix hit of 15 tokens"),
            (lambda plan: bool(plan.block_copies), "a prefix hit of 15 tokens"),
            (lambda plan: _hit(plan) and not plan.block_copies, "a prefix hit of 16 tokens"),
        ],
    )
    @pytest.mark.parametrize("depth", [0, 1])
    def test_one_lost_bit_is_found_and_the_setting_named(
        self, shipped: Path, leaks: Callable[[StepPlan], bool], words: str, depth: int
    ) -> None:
        runner = recording_runner(when(leaks))
        error = refusal(shipped, model_runner=runner, pipeline_depth=depth, **SMALL)
        assert error.problem.startswith(f"{words} changes the bits of output token ")

    @pytest.mark.parametrize("change", [_other_token, _other_plain_token])
    def test_a_lost_token(self, shipped: Path, change: Change) -> None:
        runner = recording_runner(when(lambda plan: len(plan.decode) > 7, change))
        error = refusal(shipped, model_runner=runner, **SMALL)
        assert error.problem.startswith(
            "a decode of 16 requests changes the bits of output token 2"
        )

    def test_the_first_lost_token_of_all_requests_is_named(self, shipped: Path) -> None:
        """In the decodes of 16 the probes have the rows 4 to 10."""
        rows: list[int] = []

        def change(plan: StepPlan, result: StepResult) -> StepResult:
            if len(plan.decode) != 16:
                return result
            rows.append(4 if rows else 5)
            tokens = [list(row) for row in result.tokens]
            tokens[rows[-1]][0] ^= 1
            return replace(result, tokens=tokens)

        error = refusal(shipped, model_runner=recording_runner(change), **SMALL)
        victim = "output token 2 of a request with prompt length 16"
        assert error.problem == f"a decode of 16 requests changes the bits of {victim}"

    def test_lost_log_probabilities_of_a_prompt(self, shipped: Path) -> None:
        runner = recording_runner(when(lambda plan: len(plan.prefill) > 1, _other_prompt))
        error = refusal(shipped, model_runner=runner, **SMALL)
        victim = "output token 1 of a request with prompt length 17"
        assert error.problem == f"a prefill of 2048 tokens changes the bits of {victim}"

    def test_a_loss_in_a_mixed_step(self, shipped: Path) -> None:
        """With 100 tokens a step the long prompts go on while the short ones decode."""
        runner = recording_runner(when(lambda plan: len(plan.prefill) > 0 < len(plan.decode)))
        options = {**SMALL, "max_num_batched_tokens": 100, "model_runner": runner}
        assert refusal(shipped, **options).problem.startswith("a prefill of ")
        assert " beside a decode of " in refusal(shipped, **options).problem

    def test_a_prefill_whose_loss_shows_in_a_decode(self, shipped: Path) -> None:
        """As if only the keys and values of a prefill had lost bits."""
        touched: set[int] = set()

        def change(plan: StepPlan, result: StepResult) -> StepResult:
            touched.difference_update(one.slot for one in plan.new_requests)
            if len(plan.prefill) > 1:
                touched.update(chunk.slot for chunk in plan.prefill)
            return next_float(plan, result) if touched.intersection(plan.decode) else result

        error = refusal(shipped, model_runner=recording_runner(change), **SMALL)
        victim = "output token 2 of a request with prompt length 1"
        assert error.problem == f"a prefill of 2048 tokens changes the bits of {victim}"

    def test_other_bits_in_every_run(self, shipped: Path) -> None:
        runs: list[int] = []

        def change(plan: StepPlan, result: StepResult) -> StepResult:
            runs.append(plan.step_id)
            return next_float(plan, result) if len(runs) % 5 == 0 else result

        depth = {"pipeline_depth": 0}
        error = refusal(shipped, model_runner=recording_runner(change), **SMALL, **depth)
        assert error.problem.startswith("a second run of the same request changes the bits of ")

    def test_nothing_runs_after_a_loss(self, shipped: Path) -> None:
        runner = recording_runner(when(_begun))
        refusal(shipped, model_runner=runner, **SMALL)
        assert _begun(runner.plans[-6])
        assert all(len(plan.row_slots) == 1 for plan in runner.plans)

    def test_the_runner_is_closed(self, shipped: Path) -> None:
        made: list[ModelRunner] = []

        def make(*args: Any) -> ModelRunner:
            made.append(recording_runner(when(_hit))(*args))
            return made[0]

        refusal(shipped, model_runner=make, **SMALL)
        with pytest.raises(EngineClosedError):
            made[0].execute(StepPlan(0))

    @pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
    def test_the_runner_is_closed_if_the_test_is_interrupted(
        self, shipped: Path, error: type[BaseException]
    ) -> None:
        made: list[ModelRunner] = []

        class Interrupted(FakeRunner):
            def execute(self, plan: StepPlan) -> StepHandle:
                made.append(self)
                if len(made) == 20:
                    raise error
                return super().execute(plan)

        for depth in (0, 1):
            made.clear()
            options = {**SMALL, "model_runner": Interrupted, "pipeline_depth": depth}
            with pytest.raises(error):
                LLM(shipped, check_exact=True, **options)
            with pytest.raises(EngineClosedError):
                made[0].execute(StepPlan(0))

    def test_a_request_that_fails(self, shipped: Path) -> None:
        make = partial(FakeRunner, model=FakeModel(4096, error_chance=1.0))
        error = refusal(shipped, model_runner=make, **SMALL)
        assert "a request of the test failed (ValueError('a row of the fake model'))" in str(error)
        assert isinstance(error.__cause__, ValueError)

    def test_types_and_order_of_log_probabilities_are_no_bits(self, shipped: Path) -> None:
        """But all bits of a tensor count: its `repr` shows only some digits."""

        def change(plan: StepPlan, result: StepResult, added: float = 0.0) -> StepResult:
            if result.logprobs is None or len(plan.decode) < 2:
                return result

            def other(scores: dict[int, float]) -> dict[int, Any]:
                pairs = reversed(scores.items())
                return {t: torch.tensor(x + added, dtype=torch.float64) for t, x in pairs}

            return replace(result, logprobs=[[*map(other, row)] for row in result.logprobs])

        with LLM(shipped, model_runner=recording_runner(change), check_exact=True, **SMALL):
            pass
        runner = recording_runner(partial(change, added=1e-12))
        error = refusal(shipped, model_runner=runner, **SMALL)
        assert error.problem.startswith("a decode of 7 requests")

    def test_a_chunk_of_one_token(self, shipped: Path) -> None:
        """Alone, a step has two tokens, so chunks start at even positions."""
        leaks = when(lambda plan: any(chunk.start % 2 for chunk in plan.prefill), _other_token)
        options = {**SMALL, "max_num_seqs": 2, "max_num_batched_tokens": 2}
        error = refusal(shipped, model_runner=recording_runner(leaks), **options)
        assert error.problem.startswith("a prompt in chunks of 1 token changes ")

    def test_a_request_that_fails_in_company(self, shipped: Path) -> None:
        class Fails(FakeRunner):
            def _reports(self, outputs: list[list[int]]) -> Any:
                for slot in self._rows:
                    self._requests[slot].failed |= len(self._rows) > 7
                return super()._reports(outputs)

        error = refusal(shipped, model_runner=Fails, **SMALL)
        assert str(error.__cause__) == "a row of the fake model"
        assert error.problem.startswith(
            "a prefill of 2048 tokens changes the bits of output token 1"
        )

    @pytest.mark.parametrize("tensor_parallel_size", [1, 2])
    def test_a_cpu_in_float32(self, shipped: Path, tensor_parallel_size: int) -> None:
        """Products of few and of many rows run by different code."""
        options = {**SMALL, "tensor_parallel_size": tensor_parallel_size}
        assert " changes the bits of output token " in refusal(shipped, **options).problem
        assert rank_pids() == []


LEAKS: dict[str, tuple[Callable[[AttentionBatch], bool], str]] = {
    "decode": (lambda batch: len(batch.slots) - batch.num_prefills > 15, "a decode of 16 requests"),
    "prefill": (lambda batch: batch.num_prefill_tokens > 58, "a prefill of 128 tokens"),
    # A prefill of one request whose first position is not computed now.
    "hit": (
        lambda batch: 0 < batch.num_prefill_tokens < int(batch.context_lens[0]),
        "a prompt in chunks of 48 tokens",
    ),
}


class TestLocalRunner:
    """The engine's own runner on a CPU, with parts that compute row by row."""

    @pytest.mark.parametrize("depth", [0, 1])
    def test_exact_parts_pass(self, shipped: Path, depth: int) -> None:
        options = {**SMALLER, "attention_backend": RowAttention, "pipeline_depth": depth}
        with exact_products(), LLM(shipped, check_exact=True, **options) as llm:
            assert llm.stats().steps == 0

    @pytest.mark.parametrize("kind", LEAKS)
    def test_attention_that_loses_bits(self, shipped: Path, kind: str) -> None:
        leaks, words = LEAKS[kind]

        leaky = type("Leaky", (RowAttention,), {"leaks": staticmethod(leaks)})
        with exact_products():
            error = refusal(shipped, attention_backend=leaky, **SMALLER)
        assert error.problem.startswith(words)

    def test_a_product_that_loses_bits(self, shipped: Path) -> None:
        def leaky(self: Matmul, x: Any, stream: Any) -> Any:
            return added(self, x + 1e-3 if x.shape[0] > 100 else x, stream)

        with exact_products() as patch:
            added = Matmul.added
            patch.setattr("layers.linear.CPUMatmul.added", leaky)
            error = refusal(shipped, attention_backend=RowAttention, **SMALLER)
        assert error.problem.startswith("a prefill of 128 tokens")

    def test_the_first_outputs_are_those_of_an_engine_without_the_test(self, shipped: Path) -> None:
        """Requests without a seed too, and blocks that the test has written."""
        prompts = [[5, 6, 7], list(range(40)), list(range(40))]
        params = [
            SamplingParams(temperature=temperature, max_tokens=8, logprobs=1, ignore_eos=True)
            for temperature in (1.0, 0.0, 1.0)
        ]
        found: list[Any] = []
        with exact_products():
            for check in (False, True):
                options = {**SMALLER, "attention_backend": RowAttention, "check_exact": check}
                with LLM(shipped, **options) as llm:
                    outputs = llm.generate(prompts, params, use_tqdm=False)
                    found.append(
                        [
                            (
                                out["token_ids"],
                                out["logprobs"],
                                out["metrics"]["cached_prompt_tokens"],
                            )
                            for out in outputs
                        ]
                    )
                    found.append([llm.stats(), llm.add_request([1], SamplingParams(max_tokens=2))])
        assert found[:2] == found[2:]


class _Told(ContinuousScheduler):
    """Keeps what it is told, one list for each scheduler."""

    name = "told"
    all_of_them: list[_Told]

    def __init__(self, config: Config, block_manager: BlockManager, clock: Clock) -> None:
        super().__init__(config, block_manager, clock)
        self.added: list[int] = []
        self.times: list[float] = []
        self.num_in_flight = 0
        self.all_of_them.append(self)

    def add(self, seq: Sequence) -> None:
        super().add(seq)
        self.added.append(seq.request_id)
        self.times.append(seq.added_at)

    def schedule(self) -> StepPlan | None:
        plan = super().schedule()
        self.num_in_flight = max(self.num_in_flight, self.batch.num_in_flight)
        return plan


class TestNoTrace:
    def test_statistics_ids_and_caches(self, shipped: Path) -> None:
        runner = recording_runner()
        with LLM(shipped, model_runner=runner, **SMALL) as llm:
            before = llm.stats()
        assert runner.plans == []
        with LLM(shipped, model_runner=runner, check_exact=True, **SMALL) as llm:
            assert len(runner.plans) > 100
            assert llm.stats() == before
            assert not llm.has_unfinished
            assert llm.engine.num_new_tokens == 0
            runner.plans.clear()
            assert llm.add_request(list(range(100))) == 0
            llm.step()
            plan = runner.plans[0]
            # The first plan of an engine: nothing is cached, and slots and blocks are fresh.
            assert (plan.step_id, plan.new_requests[0].request_id) == (0, 0)
            assert (plan.prefill[0].slot, plan.prefill[0].start) == (0, 0)
            fresh = plan
        with LLM(shipped, model_runner=runner, **SMALL) as llm:
            runner.plans.clear()
            llm.add_request(list(range(100)))
            llm.step()
        assert runner.plans[0] == fresh

    def test_the_scheduler_that_serves_has_seen_nothing(self, shipped: Path) -> None:
        made: list[_Told] = []
        _Told.all_of_them = made
        options = {**SMALL, "scheduler": _Told, "queue_policy": "fair_share"}
        with LLM(shipped, model_runner=recording_runner(), check_exact=True, **options) as llm:
            assert llm.engine.scheduler is made[-1]
            assert made[-1].added == []
            assert sum(len(one.added) for one in made) > 100
            assert all(one.batch.blocks is not llm.engine.blocks for one in made[:-1])

    @pytest.mark.parametrize("depth", [0, 1])
    def test_steps_overlap_and_requests_arrive_as_in_serving(
        self, shipped: Path, depth: int
    ) -> None:
        made: list[_Told] = []
        _Told.all_of_them = made
        options = {**SMALL, "scheduler": _Told, "pipeline_depth": depth}
        runner = partial(FakeRunner, seconds=lambda plan: 1.0)
        with LLM(shipped, model_runner=runner, check_exact=True, **options) as llm:
            assert max(one.num_in_flight for one in made) == depth + 1
            times = [time for one in made for time in one.times]
            assert times == sorted(times)
            assert 0 == times[0] < times[-1] < llm.now()

    def test_random_numbers_of_the_program(self, shipped: Path) -> None:
        random.seed(5)
        torch.manual_seed(5)
        states = random.getstate(), torch.get_rng_state()
        with LLM(shipped, model_runner=recording_runner(), check_exact=True, **SMALL):
            assert random.getstate() == states[0]
            assert torch.equal(torch.get_rng_state(), states[1])

    def test_without_the_option_nothing_runs(self, shipped: Path) -> None:
        runner = recording_runner(when(lambda plan: True))
        for options in ({}, {"check_exact": False}):
            with LLM(shipped, model_runner=runner, **options, **SMALL):
                assert runner.plans == []


class _Counting(SimulatedRunner):
    """A fast runner that has not been measured."""

    plans: list[StepPlan]

    def execute(self, plan: StepPlan) -> Any:
        self.plans.append(plan)
        return super().execute(plan)


def _tried(model: Path, **options: Any) -> list[StepPlan]:
    """All plans of a test that nothing fails."""
    plans: list[StepPlan] = []
    _Counting.plans = plans
    with LLM(model, model_runner=_Counting, check_exact=True, device="cpu", **options):
        return plans


class TestSettings:
    def test_the_defaults(self, shipped: Path) -> None:
        plans = _tried(shipped)
        assert {len(plan.decode) for plan in plans} >= {1, 7, 16, 64, 256}
        assert max(len(plan.decode) for plan in plans) == 256
        alone = {plan.prefill[0].num_tokens for plan in plans if len(plan.prefill) == 1}
        assert {1, 17, 48, 130, 256, 1000} <= alone
        full = [plan for plan in plans if plan.num_prefill_tokens == 4096 and not plan.decode]
        assert len(full) == 7
        hits = {chunk.start for plan in plans if _hit(plan) for chunk in plan.prefill}
        assert hits == {255, 768}
        assert any(plan.block_copies for plan in plans)
        # On a GPU a step takes some 10 ms.
        assert len(plans) < 350
        assert sum(plan.num_tokens for plan in plans) < 60_000

    def test_lengths_and_requests(self, shipped: Path) -> None:
        new = [one for plan in _tried(shipped) for one in plan.new_requests]
        assert {1, 17, 130, 256, 1000} <= {len(one.token_ids) for one in new}
        params = [one.sampling for one in new]
        assert {one.temperature > 0 for one in params if one.logprobs is not None} == {True, False}
        assert any(one.temperature > 0 and not one.needs_logits for one in params)
        assert all(one.seed is not None for one in params)
        others = [one for one in params if (one.max_tokens or 0) > 6]
        assert {one.temperature > 0 for one in others} == {True, False}

    @pytest.mark.parametrize(
        "options",
        [
            {"max_num_seqs": 1},
            {"max_num_seqs": 2},
            {"max_num_seqs": 3, "max_num_batched_tokens": 3},
            {"max_num_seqs": 1, "max_num_batched_tokens": 1, "max_model_len": 20},
            {"max_model_len": 2},
            {"max_model_len": 3, "max_num_seqs": 1},
            {"num_kvcache_blocks": 1},
            {"num_kvcache_blocks": 2, "max_num_seqs": 8},
            {"num_kvcache_blocks": 1, "max_model_len": 2, "max_num_seqs": 1},
            {"enable_prefix_caching": False},
            {"block_manager": "radix"},
            {"kvcache_block_size": 256},
            {"kv_sanitizer": True},
            {"scheduler": "static"},
            {"scheduler": OneAtATime},
            {"queue_policy": "shortest_prompt", "admission_policy": "reserve"},
            {"queue_policy": "fair_share", "admission_policy": "lookahead"},
            {"step_policy": "prefill_first"},
            {"num_speculative_tokens": 3},
            {"pipeline_depth": 1, "num_kvcache_blocks": 14},
            {"preset": "low_latency", "max_model_len": 100},
        ],
        ids=str,
    )
    def test_an_exact_runner_passes_under_all_limits(
        self, shipped: Path, options: dict[str, Any]
    ) -> None:
        runner = recording_runner()
        limits = {k: v for k, v in SMALL.items() if "preset" not in options or k == "device"}
        with LLM(shipped, model_runner=runner, check_exact=True, **{**limits, **options}) as llm:
            assert llm.stats().num_free_blocks == llm.stats().num_blocks
            assert llm.stats().steps == 0
        assert runner.plans

    def test_a_tiny_cache_is_filled(self, shipped: Path) -> None:
        """The block has room for 16 positions: the last one of 17 tokens is never written."""
        plans = _tried(shipped, num_kvcache_blocks=1, kvcache_block_size=16)
        new = [one for plan in plans for one in plan.new_requests]
        scored = {len(one.token_ids): one for one in new if one.sampling.logprobs is not None}
        assert sorted(scored) == [1, 11]
        assert scored[11].max_total_tokens == 17

    def test_max_num_seqs_bounds_decodes(self, shipped: Path) -> None:
        assert max(len(plan.decode) for plan in _tried(shipped, max_num_seqs=40)) == 40

    def test_two_requests_fill_a_prefill(self, shipped: Path) -> None:
        plans = _tried(shipped, max_num_seqs=2, max_num_batched_tokens=2000)
        # The other request, whose only output token comes from the prefill.
        others = {
            len(new.token_ids)
            for plan in plans
            for new in plan.new_requests
            if len(plan.prefill) == 2 and new.max_total_tokens == len(new.token_ids) + 1
        }
        assert others == {2000 - length for length in (1, 17, 130, 256, 1000)}

    def test_max_num_batched_tokens_bounds_prefills(self, shipped: Path) -> None:
        plans = _tried(shipped, max_num_batched_tokens=700)
        assert max(plan.num_prefill_tokens for plan in plans) == 700

    def test_a_small_budget_still_fills_a_decode(self, shipped: Path) -> None:
        plans = _tried(shipped, max_num_batched_tokens=128, max_num_seqs=64)
        # The probes with short prompts have ended when the longest prompt is computed.
        assert max(len(plan.decode) for plan in plans) >= 64 - 7 + 1
        # When the last probe has ended, the others end too.
        assert any(plan.prefill for plan in plans[-6:])

    def test_others_do_not_decode_for_ever(self, shipped: Path) -> None:
        """With 16 tokens a step the prompts take more steps than others may decode."""
        plans = _tried(shipped, max_num_batched_tokens=16, max_num_seqs=16, max_model_len=200)
        new = [one for plan in plans for one in plan.new_requests]
        assert max(one.max_total_tokens - len(one.token_ids) for one in new) == 6 + 1 + 64


class _Refuses(ContinuousScheduler):
    """Takes no long prompts, though the cache has room for them."""

    name = "refuses"
    longest = 0

    def add(self, seq: Sequence) -> None:
        if len(seq.token_ids) > self.longest:
            raise RequestTooLongError("prompt", len(seq.token_ids), "is too long", "Use less.")
        super().add(seq)


class _RefusesInCompany(ContinuousScheduler):
    """Takes three requests at most."""

    name = "refuses_in_company"

    def add(self, seq: Sequence) -> None:
        if len(self._waiting) == 3:
            raise RequestTooLongError("prompt", len(seq.token_ids), "is too much", "Wait.")
        super().add(seq)


class _OwnLimit(ContinuousScheduler):
    """Refuses by an error that is no RequestTooLongError."""

    name = "own_limit"

    def add(self, seq: Sequence) -> None:
        if len(seq.token_ids) > 100:
            raise RequestError("prompt", len(seq.token_ids), "is not for me", "Use less.")
        super().add(seq)


class _Whole(ContinuousScheduler):
    """Computes no prompt in chunks: it waits for a step that has room for all of it."""

    name = "whole"

    def schedule(self) -> StepPlan | None:
        decodes = [seq for seq in self.batch.decoding.values() if self.batch.reserve(seq)]
        left = self.budget - len(decodes)
        while (seq := self.queue.first()) and len(seq.token_ids) <= left and self.admit(seq):
            left -= self.batch.prefill(seq, left)
        self.decode_all(decodes, left + len(decodes))
        return self.batch.build()


class _Pins(ContinuousScheduler):
    """Takes a block for itself at once, as for a prompt that all requests share."""

    name = "pins"

    def __init__(self, config: Config, block_manager: BlockManager, clock: Clock) -> None:
        super().__init__(config, block_manager, clock)
        assert block_manager.num_free_blocks == block_manager.num_blocks
        block_manager.begin(-1, [1])
        block_manager.grow(-1, 1)


class _Idle(ContinuousScheduler):
    name = "idle"

    def schedule(self) -> None:
        return None


class TestSchedulers:
    def test_prompts_that_the_scheduler_refuses_are_left_out(self, shipped: Path) -> None:
        class Short(_Refuses):
            longest = 20

        runner = recording_runner()
        options = {**SMALL, "scheduler": Short, "model_runner": runner}
        with LLM(shipped, check_exact=True, **options):
            pass
        sizes = {len(new.token_ids) for plan in runner.plans for new in plan.new_requests}
        assert {1, 16, 17} <= sizes
        assert max(sizes) <= 20

    def test_requests_that_are_refused_in_company_are_left_out(self, shipped: Path) -> None:
        runner = recording_runner()
        options = {**SMALL, "scheduler": _RefusesInCompany, "model_runner": runner}
        with LLM(shipped, check_exact=True, **options):
            assert max(len(plan.row_slots) for plan in runner.plans) == 3

    @pytest.mark.parametrize("scheduler", [_OwnLimit, _Whole, _Pins])
    def test_what_serves_without_the_test_starts_with_it(
        self, shipped: Path, scheduler: type[ContinuousScheduler]
    ) -> None:
        options = {**SMALL, "scheduler": scheduler, "model_runner": recording_runner()}
        with LLM(shipped, check_exact=True, **options) as llm:
            (out,) = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=3), use_tqdm=False)
            assert len(out["token_ids"]) == 3

    def test_a_scheduler_that_refuses_all(self, shipped: Path) -> None:
        error = refusal(shipped, model_runner=recording_runner(), scheduler=_Refuses, **SMALL)
        assert error.problem == "the scheduler takes no request of the test"

    def test_a_scheduler_that_plans_nothing(self, shipped: Path) -> None:
        options = {**SMALL, "scheduler": _Idle, "model_runner": recording_runner()}
        with pytest.raises(StepError, match="_Idle planned nothing although requests of the test"):
            LLM(shipped, check_exact=True, **options)


def _fake_rank(config: Config, checkpoint: Any, rank: Rank) -> ModelRunner:
    return FakeRunner(replace(config, tensor_parallel_size=1), checkpoint)


def _leaky_rank(config: Config, checkpoint: Any, rank: Rank) -> ModelRunner:
    leaky = recording_runner(when(lambda plan: len(plan.decode) > 7))
    return leaky(replace(config, tensor_parallel_size=1), checkpoint)


class TestRanks:
    def options(self, make_runner: Any) -> dict[str, Any]:
        runner = partial(TensorParallelRunner, make_runner=make_runner)
        return {**SMALL, "model_runner": runner, "tensor_parallel_size": 2}

    def test_exact_ranks_pass(self, shipped: Path) -> None:
        with LLM(shipped, check_exact=True, **self.options(_fake_rank)) as llm:
            assert llm.stats().steps == 0
            (out,) = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=3), use_tqdm=False)
            assert len(out["token_ids"]) == 3

    def test_ranks_that_lose_bits(self, shipped: Path) -> None:
        error = refusal(shipped, **self.options(_leaky_rank))
        assert error.problem.startswith("a decode of 16 requests")
        assert rank_pids() == []


class _MeasuredAttention(TorchAttention):
    exact = True


class _Subclass(LocalRunner):
    name = "subclass"


class TestMeasurements:
    """Where all parts say that they were measured, nothing runs."""

    @pytest.fixture
    def _measured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Matmul, "exact", True)

    def started(self, model: Path, **options: Any) -> ModelRunner:
        """The runner of an engine that has started without a step."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LocalRunner, "execute", lambda self, plan: pytest.fail("a step"))
            with LLM(model, check_exact=True, **{**SMALLER, **options}) as llm:
                return llm.engine.runner

    @pytest.mark.usefixtures("_measured")
    @pytest.mark.parametrize("sanitizer", [False, True])
    def test_no_step_runs(self, shipped: Path, sanitizer: bool) -> None:
        runner = self.started(shipped, attention_backend=_MeasuredAttention, kv_sanitizer=sanitizer)
        assert runner.exact

    @pytest.mark.usefixtures("_measured")
    @pytest.mark.parametrize("option", ["attention_backend", "model_runner", "subclass of model"])
    def test_one_part_without_a_measurement_is_enough(
        self, shipped: Path, monkeypatch: pytest.MonkeyPatch, option: str
    ) -> None:
        options: dict[str, Any] = {"attention_backend": _MeasuredAttention}
        if option == "subclass of model":
            other = type("Other", (DecoderLM,), {})
            monkeypatch.setattr("models.qwen3.MODEL", other)
        else:
            options |= {option: {"attention_backend": "torch", "model_runner": _Subclass}[option]}
        refusal(shipped, **{**SMALL, **options})

    @pytest.mark.parametrize(
        ("owner", "layer"),
        [
            (Attention, "qkv_proj"),
            (Attention, "o_proj"),
            (MLP, "gate_up_proj"),
            (MLP, "down_proj"),
            (DecoderLM, "lm_head"),
        ],
    )
    @pytest.mark.usefixtures("_measured")
    def test_one_product_without_a_measurement_is_enough(
        self, shipped: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, layer: str
    ) -> None:
        prepare_all = owner.prepare

        def prepare(self: Any, *args: Any) -> None:
            one = getattr(self, layer)
            prepare_one = one.prepare

            def unmeasured(*args: Any, **kwargs: Any) -> None:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(Matmul, "exact", False)
                    prepare_one(*args, **kwargs)

            one.prepare = unmeasured
            prepare_all(self, *args)

        monkeypatch.setattr(owner, "prepare", prepare)
        refusal(shipped, **SMALL, attention_backend=_MeasuredAttention)

    def test_what_the_parts_say(self) -> None:
        assert ExactMatmul.exact
        assert not Matmul.exact
        assert not AttentionBackend.exact
        assert not DecoderLM.exact
        assert not ModelRunner.exact

    @pytest.mark.parametrize("major", [8, 9, 10])
    def test_triton_attention_is_exact_on_hopper_gpus(
        self, monkeypatch: pytest.MonkeyPatch, major: int
    ) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, 0))
        monkeypatch.setattr(
            "layers.kernels.decode_launch.decode_workspace", lambda *args, **kwargs: None
        )
        from tests.contracts.attention import Request, make_case

        case = make_case([Request(3)], [], dtype=torch.float16, device=torch.device("cpu"))
        monkeypatch.setattr("layers.attention.triton_paged.has_wgmma", lambda device: major == 9)
        assert TritonAttention(case.spec).exact == (major == 9)
        assert not type("Mine", (TritonAttention,), {})(case.spec).exact
        assert type("Mine", (TritonAttention,), {"exact": True})(case.spec).exact

    def test_a_simulated_clock_does_not_move(self, shipped: Path) -> None:
        options = {**SMALL, "model_runner": "simulated"}
        with LLM(shipped, check_exact=True, **options) as llm:
            assert llm.now() == 0.0

    def test_ranks_tell(self, shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for make, most, exact in (
            (_measured_rank, None, True),
            (_half_measured, None, False),
            (_measured_rank, 1, False),  # if requests on two ranks were not compared
        ):
            if most is not None:
                monkeypatch.setattr("engine.ranks.runner._MEASURED_RANKS", most)
            runner = partial(TensorParallelRunner, make_runner=make)
            config = Config.from_options(
                shipped, **{**SMALL, "model_runner": runner, "tensor_parallel_size": 2}
            )
            with closing(LLMEngine(config)) as engine:
                assert engine.runner.exact == exact

    def test_a_subclass_that_was_measured_says_so(
        self, shipped: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        says = {"name": "says", "exact": True}
        for runner in (SimulatedRunner, FakeRunner, LocalRunner):
            mine = type("Says", (runner,), says)
            with LLM(shipped, model_runner=mine, **SMALL) as llm:
                assert llm.engine.runner.exact, runner
        ranks = type("Says", (TensorParallelRunner,), says)
        options = {**SMALL, "tensor_parallel_size": 2}
        options["model_runner"] = partial(ranks, make_runner=_fake_rank)
        with LLM(shipped, **options) as llm:
            assert llm.engine.runner.exact
        monkeypatch.setattr("models.qwen3.MODEL", type("Says", (DecoderLM,), {"exact": True}))
        with LLM(shipped, attention_backend=_MeasuredAttention, **SMALL) as llm:
            assert llm.engine.runner.exact


def _measured_rank(config: Config, checkpoint: Any, rank: Rank) -> ModelRunner:
    return SimulatedRunner(replace(config, tensor_parallel_size=1), checkpoint)


def _half_measured(config: Config, checkpoint: Any, rank: Rank) -> ModelRunner:
    make = _fake_rank if rank.index else _measured_rank
    return make(config, checkpoint, rank)
