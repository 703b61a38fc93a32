"""The fake runner: right plans give the model's tokens, each wrong one other tokens or an error."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from config import Config
from engine.checking.fake_runner import FakeModel, FakeRunner
from engine.types import BlockCopy, BlockUpdate, KVGeometry, NewRequest, PrefillChunk, StepPlan
from llm import LLM, SamplingParams
from utils.errors import ConfigError, ContractError, EngineClosedError

GREEDY = SamplingParams(temperature=0)
PROMPT = tuple(range(20, 30))
ALONE = FakeModel().alone(list(PROMPT), 8, seed=5)
# A prompt of ten positions in pages 3, 0 and 2 of four positions each, then two decodes.
FIRST = StepPlan(
    0,
    (NewRequest(1, 0, PROMPT, GREEDY, 5),),
    (BlockUpdate(1, 0, (3, 0, 2)),),
    (PrefillChunk(1, 0, 10, True),),
)
SECOND, THIRD = StepPlan(1, decode=(1,)), StepPlan(2, decode=(1,))


def _runner(**options: object) -> FakeRunner:
    config = Config(model="none", max_num_seqs=3, max_num_batched_tokens=16)
    return FakeRunner(config, groups=(KVGeometry(1, 1, 1, 4, 6, 4),), **options)  # type: ignore[arg-type]


def _play(*plans: StepPlan) -> list[int]:
    runner = _runner()
    results = [runner.execute(plan).result() for plan in plans]
    assert [result.step_id for result in results] == [plan.step_id for plan in plans]
    return [token for result in results for (token,) in result.tokens]


def test_a_request_gets_the_tokens_of_the_model() -> None:
    assert _play(FIRST, SECOND, THIRD) == ALONE[:3]


def test_the_model_is_the_same_in_every_process() -> None:
    alone = f"FakeModel().alone({[*PROMPT]}, 8, seed=5)"
    code = f"from engine.checking.fake_runner import *; print({alone})"
    root = Path(__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=True)
    assert out.stdout.decode().strip() == str(ALONE)


def test_chunks_and_pages_change_nothing() -> None:
    first = replace(FIRST, prefill=(PrefillChunk(1, 0, 3, False),))
    rest = StepPlan(1, prefill=(PrefillChunk(1, 3, 7, True),))
    assert _play(first, rest, replace(SECOND, step_id=2)) == ALONE[:2]


def test_a_prefix_in_the_cache_is_read() -> None:
    shared = StepPlan(
        1,
        (NewRequest(0, 1, (*PROMPT[:8], 1), GREEDY, 9),),
        (BlockUpdate(0, 0, (3, 0, 5)),),
        (PrefillChunk(0, 8, 1, True),),
    )
    assert _play(FIRST, shared)[1:] == FakeModel().alone([*PROMPT[:8], 1], 1, seed=9)


# The first eight positions, in pages 3 and 4; page 4 is copied from page 0.
COPYING = StepPlan(
    1,
    (NewRequest(0, 1, PROMPT[:8], GREEDY, 9),),
    (BlockUpdate(0, 0, (3, 4)),),
    (PrefillChunk(0, 7, 1, True),),
    block_copies=(BlockCopy(0, 4),),
)


def test_a_copied_block_is_read() -> None:
    alone = FakeModel().alone([*PROMPT[:8]], 2, seed=9)
    tokens = _play(
        FIRST, COPYING, StepPlan(2, block_updates=(BlockUpdate(0, 2, (1,)),), decode=(0,))
    )
    assert tokens[1:] == alone


@pytest.mark.parametrize("copies", [(), (BlockCopy(3, 4),), (BlockCopy(5, 4),)])
def test_a_wrong_copy_changes_the_tokens(copies: tuple[BlockCopy, ...]) -> None:
    alone = FakeModel().alone([*PROMPT[:8]], 1, seed=9)
    assert _play(FIRST, replace(COPYING, block_copies=copies))[1:] != alone


@pytest.mark.parametrize(
    "table",
    [(0, 3, 1), (3, 4, 1), (2, 0, 1), (3, 3, 1)],
    ids=["order", "unwritten", "stale", "twice"],
)
def test_a_wrong_prefix_changes_the_tokens(table: tuple[int, ...]) -> None:
    tokens = [*PROMPT[:8], 1]
    shared = StepPlan(
        1,
        (NewRequest(0, 1, tuple(tokens), GREEDY, 9),),
        (BlockUpdate(0, 0, table),),
        (PrefillChunk(0, 8, 1, True),),
    )
    # Attention sums over the pages whatever their order, as a model does whose keys carry their
    # positions: the same pages in another order are the same context.
    same = sorted(table[:2]) == [0, 3]
    alone = FakeModel(vocab_size=10**9).alone(tokens, 1, seed=9)
    runner = _runner(model=FakeModel(vocab_size=10**9))
    runner.execute(FIRST)
    assert (runner.execute(shared).result().tokens == [alone]) == same


@pytest.mark.parametrize("table", [(0,), (5, 0)], ids=["written", "only-taken"])
def test_a_block_taken_away_too_early_changes_the_tokens(table: tuple[int, ...]) -> None:
    runner = _runner()
    assert runner.execute(FIRST).result().tokens == [ALONE[:1]]
    thief = StepPlan(
        1,
        (NewRequest(0, 1, (7,), GREEDY, 9),),
        (BlockUpdate(0, 0, table),),
        (PrefillChunk(0, 0, 1, True),),
    )
    runner.execute(thief).result()
    assert runner.execute(replace(SECOND, step_id=2)).result().tokens != [ALONE[1:2]]


_WRONG = {
    "out of order": [SECOND],
    "computes nothing": [replace(FIRST, prefill=())],
    "two rows": [FIRST, StepPlan(1, decode=(1, 1))],
    "exceed max_num_seqs": [FIRST, StepPlan(1, decode=(0, 1, 2, 3))],
    "exceed the token budget": [replace(FIRST, prefill=(PrefillChunk(1, 0, 17, True),))],
    "no slot 3": [replace(FIRST, new_requests=(replace(FIRST.new_requests[0], slot=3),))],
    "no request ever entered": [StepPlan(0, decode=(1,))],
    "a gap": [replace(FIRST, block_updates=(BlockUpdate(1, 1, (3,)),))],
    r"no such blocks as \(3, 6\)": [replace(FIRST, block_updates=(BlockUpdate(1, 0, (3, 6)),))],
    "position 4 has no block": [replace(FIRST, block_updates=(BlockUpdate(1, 0, (3,)),))],
    r"no such blocks as \(6, 4\)": [FIRST, replace(COPYING, block_copies=(BlockCopy(6, 4),))],
    "copies that overlap": [
        FIRST,
        replace(COPYING, block_copies=(BlockCopy(0, 4), BlockCopy(4, 5))),
    ],
    "an empty chunk": [replace(FIRST, prefill=(PrefillChunk(1, 0, 0, False),))],
    "are computed": [FIRST, StepPlan(1, prefill=(PrefillChunk(1, 0, 3, False),))],
    "10 tokens are known": [replace(FIRST, prefill=(PrefillChunk(1, 0, 11, True),))],
    "samples=False is wrong": [replace(FIRST, prefill=(PrefillChunk(1, 0, 10, False),))],
    "decodes in its prefill": [
        replace(FIRST, prefill=(PrefillChunk(1, 0, 3, False),)),
        StepPlan(1, decode=(1,)),
    ],
}


@pytest.mark.parametrize("rule", _WRONG)
def test_what_no_plan_may_ask_for(rule: str) -> None:
    with pytest.raises(ContractError, match=rule):
        _play(*_WRONG[rule])


def test_slots_and_blocks_in_flight_are_not_for_others() -> None:
    new = (NewRequest(1, 1, (7,), GREEDY, 9),)
    chunk = (PrefillChunk(1, 0, 1, True),)
    runner = _runner()
    first = runner.execute(FIRST)
    with pytest.raises(ContractError, match="slot 1 changes hands"):
        runner.execute(StepPlan(1, new, (BlockUpdate(1, 0, (5,)),), chunk))
    other = StepPlan(
        2,
        (replace(new[0], slot=0),),
        (BlockUpdate(0, 0, (2,)),),
        (replace(chunk[0], slot=0),),
    )
    with pytest.raises(ContractError, match=r"block 2: goes to slot 0 while slots \[1\] use it"):
        runner.execute(other)
    copying = replace(COPYING, step_id=3, block_copies=(BlockCopy(0, 3),))
    with pytest.raises(ContractError, match=r"block 3: is overwritten while slots \[1\] use it"):
        runner.execute(copying)
    first.result()
    runner.execute(replace(other, step_id=4))


def test_a_result_is_late_by_the_time_given() -> None:
    runner = _runner(seconds=lambda plan: 0.25 * plan.num_tokens)
    handles = [runner.execute(FIRST), runner.execute(replace(SECOND, timed=True))]
    assert (runner.now(), handles[0].done()) == (0.0, False)
    first = handles[0].result()
    assert (first.ended_at, first.device_seconds) == (2.5, None)
    assert (runner.now(), handles[0].done(), handles[1].done()) == (2.5, True, False)
    runner.wait_until(9.0)
    second = handles[1].result()
    assert (second.ended_at, second.device_seconds, runner.now()) == (2.75, 0.25, 9.0)
    runner.wait_until(1.0)
    # An idle device starts a step when it is planned.
    assert runner.execute(THIRD).result().ended_at == 9.25


def test_the_end_comes_by_chance() -> None:
    model = FakeModel(vocab_size=1000, eos_token_id=7, eos_chance=0.25)
    tokens = model.alone([1], 4000)
    assert 0.22 < tokens.count(7) / 4000 < 0.28
    assert model.alone([1], 4000, stop_token_ids={7}) == tokens[: tokens.index(7) + 1]
    assert replace(model, seed=1).alone([1], 8) != tokens[:8]


@pytest.mark.parametrize("depth", [0, 1])
def test_as_a_runner_of_the_engine(shipped: Path, depth: int) -> None:
    prompts = [list(range(1, n)) for n in (5, 100, 33)]
    params = [SamplingParams(seed=seed, max_tokens=20, ignore_eos=True) for seed in range(3)]
    options = {"pipeline_depth": depth, "kvcache_block_size": 16, "num_kvcache_blocks": 9}
    with LLM(shipped, model_runner="fake", **options) as llm:
        vocab_size = int(llm.engine.checkpoint.hf_config.vocab_size)
        outputs = llm.generate(prompts, params, use_tqdm=False)
    for prompt, one, out in zip(prompts, params, outputs, strict=True):
        assert one.seed is not None
        assert out["token_ids"] == FakeModel(vocab_size).alone(prompt, 20, seed=one.seed)


def test_with_a_model_of_its_own(shipped: Path) -> None:
    runner = partial(FakeRunner, model=FakeModel(vocab_size=1000, eos_chance=1.0, eos_token_id=0))
    with LLM(shipped, model_runner=runner) as llm:
        (out,) = llm.generate([[1, 2]], SamplingParams(ignore_eos=True), use_tqdm=False)
    assert out["token_ids"] == [0] * 64


def test_a_closed_runner_executes_nothing() -> None:
    runner = _runner()
    runner.close()
    runner.close()
    with pytest.raises(EngineClosedError):
        runner.execute(FIRST)


def test_it_has_no_devices_to_share_a_model() -> None:
    config = Config(model="none", max_num_seqs=3, tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="tensor_parallel_size"):
        FakeRunner(config, groups=(KVGeometry(1, 1, 1, 4, 6, 4),))


def test_an_engine_goes_on_after_an_exception(
    shipped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(shipped, model_runner="fake", num_kvcache_blocks=8) as llm:
        prompt, params = [[5, 6, 7]], SamplingParams(max_tokens=4, ignore_eos=True, seed=3)
        expected = llm.generate(prompt, params, use_tqdm=False)[0]["token_ids"]
        scheduler = llm.engine.scheduler

        def fails(*_: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(scheduler, "commit", fails)
        with pytest.raises(ZeroDivisionError):
            llm.generate(prompt, params, use_tqdm=False)
        assert llm.generate(prompt, params, use_tqdm=False)[0]["token_ids"] == expected


def test_a_row_fails_if_any_of_its_positions_does() -> None:
    answers = iter([False, True, False, False, False, False, False])

    class FailsInBetween(FakeModel):
        def fails(self, read: int, seed: int) -> bool:
            return next(answers)

    runner = _runner(model=FailsInBetween())
    assert runner.execute(FIRST).result().reports == {}
    update = BlockUpdate(1, 3, (1,))
    row = replace(SECOND, block_updates=(update,), decode_tokens=(6,))
    result = runner.execute(row).result()
    assert len(result.tokens[0]) > 1
    assert list(result.reports) == [0]


def test_blocks_are_poisoned_before_anything_else() -> None:
    """A dead block may be the target of a copy in the same plan."""
    copied = replace(COPYING, poisoned_blocks=((4,),))
    assert _play(FIRST, copied)[1:] == FakeModel().alone([*PROMPT[:8]], 1, seed=9)
    assert _play(FIRST, replace(SECOND, poisoned_blocks=((3,),)))[1:] != ALONE[1:2]
