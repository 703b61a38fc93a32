"""The simulated runner: virtual time, and runs that depend on nothing but their requests."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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
from engine.outputs import make_output
from engine.requests import Sequence
from engine.simulated_runner import STEP_SECONDS, SimulatedRunner
from engine.types import (
    BlockUpdate,
    KVGeometry,
    NewRequest,
    PrefillChunk,
    SeedKind,
    StepHandle,
    StepPlan,
)
from llm import LLM, SamplingParams
from utils.errors import ConfigError
from utils.text import decoder

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "assets" / "qwen3-tiny-python"
_SPIN = "while True: pass"


def simulate(**options: Any) -> str:
    """Outputs, times and totals of 120 requests that arrive one after the other, as JSON."""
    rng = random.Random(0)
    config = Config.from_options(
        SHIPPED,
        model_runner="simulated",
        max_num_seqs=8,
        max_num_batched_tokens=256,
        kvcache_block_size=16,
        num_kvcache_blocks=24,
        **options,
    )
    engine = LLMEngine(config)
    seqs: list[Sequence] = []
    plans = []
    arrival = 0.0
    for _ in range(120):
        arrival += rng.expovariate(20)
        while engine.has_unfinished and engine.runner.now() < arrival:
            plans.append(engine.step()[0])
        engine.runner.wait_until(arrival)
        prompt = [rng.randrange(100) for _ in range(rng.randint(1, 100))]
        params = SamplingParams(max_tokens=rng.randint(1, 60), user=rng.choice("ab"))
        seqs.append(engine.add_request(prompt, params))
    while engine.has_unfinished:
        plans.append(engine.step()[0])
    outputs = [make_output([seq], decoder(None)) for seq in seqs]
    totals = str(engine.stats)
    engine.close()
    return json.dumps([outputs, totals, list(map(str, plans))])


@contextmanager
def busy(count: int) -> Iterator[None]:
    """As many processes that take all the time they get."""
    others = [subprocess.Popen([sys.executable, "-c", _SPIN]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def simulate_all() -> str:
    """At both depths, with and without drafts."""
    return "\n".join(
        simulate(pipeline_depth=depth, num_speculative_tokens=count)
        for depth, count in ((0, 0), (1, 3))
    )


def test_a_busy_machine_gives_the_same_run_to_the_byte() -> None:
    code = f"from {__name__} import busy, simulate_all\nwith busy(4): print(simulate_all())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
    idle = simulate_all()
    assert done.stdout == idle + "\n"
    for line in idle.split("\n"):
        outputs, totals, plans = json.loads(line)
        assert len(outputs) == 120
        assert "preemptions=0" not in totals
        assert len(plans) > 120


def test_times_are_virtual_and_exact() -> None:
    """Two requests and one slot: the second waits for the first, from its arrival on."""
    options = {"max_num_seqs": 1, "num_kvcache_blocks": 8}
    with LLM(SHIPPED, model_runner="simulated", **options) as llm:
        params = SamplingParams(max_tokens=4, ignore_eos=True)
        first, second = llm.generate([[1], [2]], params, use_tqdm=False)
    # A prefill and three decodes each.
    assert first["metrics"]["queue_time"] == 0.0
    assert first["metrics"]["time_to_first_token"] == pytest.approx(STEP_SECONDS)
    assert second["metrics"]["queue_time"] == pytest.approx(4 * STEP_SECONDS)
    assert second["metrics"]["time_to_first_token"] == pytest.approx(5 * STEP_SECONDS)
    assert second["metrics"]["longest_inter_token_time"] == pytest.approx(STEP_SECONDS)


def test_planning_ahead_hides_behind_the_device() -> None:
    """At depth 1 a step begins when the one before it ends, and no step is lost."""
    ends = []
    for depth in (0, 1):
        options = {"pipeline_depth": depth, "num_kvcache_blocks": 8}
        with LLM(SHIPPED, model_runner="simulated", **options) as llm:
            llm.generate([[1]], SamplingParams(max_tokens=9, ignore_eos=True), use_tqdm=False)
            ends.append(llm.now())
    assert ends == [pytest.approx(9 * STEP_SECONDS)] * 2


def test_drafts_change_how_many_steps_there_are_and_no_token() -> None:
    found = []
    for count in (0, 3):
        options = {"num_speculative_tokens": count, "num_kvcache_blocks": 8}
        with LLM(SHIPPED, model_runner="simulated", **options) as llm:
            params = SamplingParams(max_tokens=50, ignore_eos=True, seed=3)
            (out,) = llm.generate([[1, 2]], params, use_tqdm=False)
            found.append((out["token_ids"], llm.stats().steps))
    (tokens, steps), (drafted, fewer) = found
    assert tokens == drafted
    assert fewer < 0.7 * steps


def test_it_has_no_devices_to_share_a_model() -> None:
    config = Config(model="none", tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="tensor_parallel_size"):
        SimulatedRunner(config)


def test_who_drafts_nothing_takes_no_speculative_tokens() -> None:
    class Loads(LocalRunner):
        def __init__(self, *args: Any) -> None:
            raise AssertionError("this takes long")

    for runner in ("local", Loads):
        with pytest.raises(ConfigError, match=r"num_speculative_tokens=2: .*drafts no tokens"):
            LLM(SHIPPED, device="cpu", num_speculative_tokens=2, model_runner=runner)


@pytest.mark.parametrize("cuda", [False, True])
def test_a_run_does_not_depend_on_the_devices_of_the_machine(
    cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    for runner in ("simulated", "fake", partial(SimulatedRunner)):
        with LLM(SHIPPED, model_runner=runner, num_kvcache_blocks=8) as llm:
            assert (llm.config.device, llm.config.pipeline_depth) == ("cpu", 0)
            assert llm.config.dtype == "float32"


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf, None, "x"])
def test_a_cost_that_is_no_time(seconds: Any) -> None:
    runner = partial(SimulatedRunner, seconds=lambda plan: seconds if plan.step_id == 1 else 0.5)
    with LLM(SHIPPED, model_runner=runner, num_kvcache_blocks=8) as llm:
        with pytest.raises(ConfigError, match=r"seconds=.*step 1"):
            llm.generate([[1]], SamplingParams(max_tokens=4), use_tqdm=False)
        params = SamplingParams(max_tokens=1)
        (out,) = llm.generate([[1]], params, use_tqdm=False)
        assert out["metrics"]["time_to_first_token"] == 0.5


@pytest.mark.parametrize("kind", [SimulatedRunner, FakeRunner])
@pytest.mark.parametrize("where", ["seconds", "execute"])
def test_an_exception_in_a_step_leaves_the_next_requests_alone(
    kind: type[SimulatedRunner], where: str
) -> None:
    """Also an interruption after the step has been taken in and before its handle is returned."""
    calls = iter(range(100))

    class Interrupted(kind):  # type: ignore[misc, valid-type]
        name = "interrupted"

        def execute(self, plan: StepPlan) -> StepHandle:
            handle: StepHandle = super().execute(plan)
            if where == "execute" and next(calls) == 2:
                raise KeyboardInterrupt
            return handle

    def seconds(plan: StepPlan) -> float:
        if where == "seconds" and next(calls) == 2:
            raise KeyboardInterrupt
        return 0.5

    runner = partial(Interrupted, seconds=seconds)
    for depth in (0, 1):
        options: dict[str, Any] = {"pipeline_depth": depth, "num_kvcache_blocks": 8}
        with LLM(SHIPPED, model_runner=runner, **options) as llm:
            params = SamplingParams(max_tokens=6, ignore_eos=True, seed=1)
            if depth == 0:
                with pytest.raises(KeyboardInterrupt):
                    llm.generate([[1], [2]], params, use_tqdm=False)
            first, again = (llm.generate([[1]], params, use_tqdm=False)[0] for _ in range(2))
            assert first["token_ids"] == again["token_ids"]
            assert len(first["token_ids"]) == 6


@pytest.mark.parametrize("runner", ["simulated", "fake"])
def test_requests_get_what_they_ask_for(runner: str) -> None:
    with LLM(SHIPPED, model_runner=runner, num_kvcache_blocks=8) as llm:
        params = SamplingParams(
            max_tokens=30,
            min_tokens=20,
            stop_token_ids=[*range(0, 4096, 2)],
            logprobs=2,
            prompt_logprobs=1,
            seed=4,
        )
        (out,) = llm.generate([[5, 6, 7]], params, use_tqdm=False)
    tokens = out["token_ids"]
    assert len(tokens) > 20
    assert not any(token % 2 == 0 for token in tokens[:20])
    assert [next(iter(scores)) for scores in out["logprobs"]] == tokens
    assert [len(scores) for scores in out["logprobs"][:3]] == [3] * 3
    assert [scores and next(iter(scores)) for scores in out["prompt_logprobs"]] == [None, 6, 7]


@pytest.mark.parametrize("count", [0, 7])
def test_totals_count_the_tokens_that_were_given(count: int) -> None:
    """A stop string takes tokens back that came with it in one step."""
    given = 0
    with LLM(SHIPPED, model_runner="fake", num_speculative_tokens=count) as llm:
        for seed in range(12):
            params = SamplingParams(max_tokens=20, seed=seed, ignore_eos=True)
            (full,) = llm.generate([[3, 4]], params, use_tqdm=False)
            stop = full["text"][4:6] or "none"
            (out,) = llm.generate([[3, 4]], replace(params, stop=stop), use_tqdm=False)
            given += len(full["token_ids"]) + len(out["token_ids"])
        assert llm.stats().output_tokens == given


def test_an_error_of_a_row_reaches_its_user_and_nobody_else() -> None:
    model = FakeModel(4096, 2, error_chance=0.05)
    with LLM(SHIPPED, model_runner=partial(FakeRunner, model=model)) as llm:
        params = [SamplingParams(max_tokens=20, seed=i, ignore_eos=True) for i in range(20)]
        outputs = llm.generate([[i] for i in range(20)], params, use_tqdm=False)
        stream = [*llm.stream([[i] for i in range(20)], params)]
    reasons = {out["finish_reason"] for out in outputs}
    assert reasons == {"error", "length"}
    for i, out in enumerate(outputs):
        failed = out["finish_reason"] == "error"
        assert isinstance(out["error"], ValueError) == failed
        alone = FakeModel(4096, 2).alone([i], 20, seed=i)
        assert out["token_ids"] == alone[: len(out["token_ids"])]
    ends = {told["index"]: told["error"] for told in stream if told["finish_reason"]}
    assert [ends[i] is None for i in range(20)] == [out["error"] is None for out in outputs]


def test_rows_have_as_many_drafts_as_are_asked_for_and_all_tokens_are_counted() -> None:
    config = Config.from_options(
        SHIPPED, model_runner="simulated", num_kvcache_blocks=8, num_speculative_tokens=3
    )
    engine = LLMEngine(config)
    seq = engine.add_request([1, 2], SamplingParams(max_tokens=50, ignore_eos=True, seed=3))
    most = count = 0
    while engine.has_unfinished:
        plan, _ = engine.step()
        assert plan is not None
        most = max(most, *plan.decode_counts, 0)
        count += engine.num_new_tokens
    engine.close()
    assert most == 4
    assert count == len(seq.output_token_ids) == 50


def test_a_preemption_changes_no_token() -> None:
    found = []
    for num_blocks in (64, 8):
        options = {"kvcache_block_size": 16, "num_kvcache_blocks": num_blocks}
        with LLM(SHIPPED, model_runner="simulated", num_speculative_tokens=2, **options) as llm:
            params = [SamplingParams(max_tokens=60, ignore_eos=True, seed=i) for i in range(4)]
            outs = llm.generate([[1, 2]] * 4, params, use_tqdm=False)
            found.append(([out["token_ids"] for out in outs], llm.stats().preemptions > 0))
    (tokens, calm), (others, crowded) = found
    assert (calm, crowded) == (False, True)
    assert tokens == others


def test_runners_of_one_process_do_not_influence_each_other() -> None:
    config = Config(model="none")
    geometry = KVGeometry(1, 1, 1, block_size=16, num_blocks=4, dtype_bytes=4)
    chunk, update = PrefillChunk(0, 0, 1, True), BlockUpdate(0, 0, (0,))

    def played(seeds: list[int]) -> list[list[list[int]]]:
        """The tokens of three steps of as many runners, which take turns."""
        runners = [SimulatedRunner(config, groups=(geometry,)) for _ in seeds]
        results = []
        for runner, seed in zip(runners, seeds, strict=True):
            new = NewRequest(0, 0, (1,), SamplingParams(), seed)
            results.append(runner.execute(StepPlan(0, (new,), (update,), (chunk,))).result())
        for step_id in (1, 2):
            results += [r.execute(StepPlan(step_id, decode=(0,))).result() for r in runners]
        return [result.tokens for result in results]

    both = played([3, 4])
    assert (both[::2], both[1::2]) == (played([3]), played([4]))


@pytest.mark.parametrize(("seed", "kind"), [(None, SeedKind.DERIVED), (0, SeedKind.GIVEN)])
def test_the_runner_is_told_of_which_kind_the_seed_is_and_which_output(
    seed: int | None, kind: SeedKind
) -> None:
    config = Config(model=str(SHIPPED), model_runner="simulated", num_kvcache_blocks=8)
    engine = LLMEngine(config)
    engine.add_request([1], SamplingParams(max_tokens=1, seed=seed), sample=2)
    plan, _ = engine.step()
    engine.close()
    assert plan is not None
    (new,) = plan.new_requests
    assert (new.seed_kind, new.sample) == (kind, 2)


def test_a_runner_that_drafts_nothing_is_closed_when_it_is_refused() -> None:
    closed = []

    class DraftsNothing(SimulatedRunner):
        drafts = False

        def close(self) -> None:
            closed.append(self)

    with pytest.raises(ConfigError, match="drafts no tokens"):
        LLM(
            SHIPPED,
            model_runner=lambda *args: DraftsNothing(*args),
            num_kvcache_blocks=8,
            num_speculative_tokens=2,
        )
    assert len(closed) == 1
