"""Mistakes with KV blocks, and the sanitizer that names them."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from config import Config
from engine.checking.fake_runner import FakeRunner
from engine.checking.kv_sanitizer import SanitizedBlocks, SanitizedRunner
from engine.scheduler import ContinuousScheduler
from engine.types import (
    BlockCopy,
    BlockManager,
    BlockUpdate,
    KVGeometry,
    ModelRunner,
    NewRequest,
    PrefillChunk,
    StepPlan,
    WindowPages,
)
from layers.attention.base import AttentionBatch
from layers.attention.torch_sdpa import TorchAttention
from llm import LLM, SamplingParams
from memory.block_manager import PagedBlockManager, PrefixCacheManager
from memory.cache_groups import WindowBlockManager
from memory.kv_cache import KVLayer
from tests.checkpoints import random_prompts
from utils.errors import KVSanitizerError

SIZE = 16
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
SHARED = random_prompts([48], seed=1)[0]
PROMPTS = [*([*SHARED, i, i + 1] for i in range(4)), SHARED]


def _llm(path: Path, **options: Any) -> LLM:
    defaults = {
        "device": "cpu",
        "kv_sanitizer": True,
        "kvcache_block_size": SIZE,
        "num_kvcache_blocks": 12,
        "max_num_seqs": 3,
    }
    return LLM(path, **{**defaults, **options})


def _run(llm: LLM) -> list[list[int]]:
    return [out["token_ids"] for out in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


def _error(path: Path, **options: Any) -> KVSanitizerError:
    """What the sanitizer finds within three rounds."""
    with _llm(path, **options) as llm:
        try:
            for _ in range(3):
                _run(llm)
        except KVSanitizerError as error:
            return error
    raise AssertionError("nothing was found")


@pytest.mark.parametrize("manager", ["paged", "prefix", "radix"])
@pytest.mark.parametrize("depth", [0, 1])
def test_right_parts_give_the_same_tokens(shipped: Path, manager: str, depth: int) -> None:
    outputs = []
    for sanitizer in (False, True):
        with _llm(
            shipped, kv_sanitizer=sanitizer, block_manager=manager, pipeline_depth=depth
        ) as llm:
            outputs.append([_run(llm), _run(llm)])
            if manager != "paged":
                assert llm.cache_stats().evicted_blocks > 0
    assert outputs[0] == outputs[1]


def test_dead_blocks_are_nan(shipped: Path) -> None:
    layers: dict[int, KVLayer] = {}

    class Watched(TorchAttention):
        """Takes note of the pages that it reads."""

        def attend(self, q: Tensor, kv: KVLayer, prepared: Any) -> Tensor:
            layers[kv.k.data_ptr()] = kv
            return super().attend(q, kv, prepared)

    with _llm(shipped, block_manager="paged", max_num_seqs=1, attention_backend=Watched) as llm:
        _run(llm)
        _run(llm)
        assert len(layers) == llm.engine.runner.kv_groups[0].num_layers
        for layer in layers.values():
            # Written by no request, and not by the padding of a kernel either.
            assert layer.k[-1].isnan().all()
            assert layer.v[-1].isnan().all()


class PublishesTooEarly(PrefixCacheManager):
    """Publishes all known tokens, computed or not."""

    def grow(self, request_id: int, num_tokens: int) -> bool:
        grown = super().grow(request_id, num_tokens)
        self._requests[request_id].publishes = True
        tokens = self._requests[request_id].tokens
        if grown:
            self.commit(request_id, tokens, min(len(tokens), num_tokens))
        return grown


class SharesTooMuch(PrefixCacheManager):
    """Hides one of the found blocks from the scheduler, which computes it again."""

    def begin(
        self, request_id: int, token_ids: list[int], cache_salt: str = "", most: int | None = None
    ) -> int:
        return max(0, super().begin(request_id, token_ids, cache_salt, most) - SIZE)


class ForgetsCopies(PrefixCacheManager):
    """Takes blocks for copies that it does not ask for."""

    def take_copies(self) -> tuple[BlockCopy, ...]:
        super().take_copies()
        return ()


class CopiesBack(PrefixCacheManager):
    """Takes the new block for the source."""

    def take_copies(self) -> tuple[BlockCopy, ...]:
        return tuple(BlockCopy(copy.target, copy.source) for copy in super().take_copies())


class FreesTwice(PagedBlockManager):
    """Puts the first block of a request into the free list twice."""

    def release(self, request_id: int) -> None:
        first = self._tables[request_id][:1]
        super().release(request_id)
        self._free += first


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(
    ("manager", "problem"),
    [
        (PublishesTooEarly, "found in the cache, and 0 of its 16 positions"),
        (SharesTooMuch, "written while requests|goes to slot"),
        (ForgetsCopies, "position 32 is read and was never written"),
        (CopiesBack, "copied|overwritten while"),
        (FreesTwice, "hold it"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_wrong_block_manager(
    shipped: Path, manager: type[BlockManager], problem: str, depth: int
) -> None:
    error = _error(shipped, block_manager=manager, model_runner="fake", pipeline_depth=depth)
    assert re.search(problem, error.problem)
    assert 0 <= error.block < 12
    assert f"request {error.request_id}, block {error.block}: " in str(error)


def _lost_update(plan: StepPlan) -> StepPlan:
    return replace(plan, block_updates=plan.block_updates[1:])


def _stale_update(plan: StepPlan) -> StepPlan:
    updates = [replace(u, block_ids=(7, *u.block_ids[1:])) for u in plan.block_updates]
    return replace(plan, block_updates=tuple(updates))


def _skipped_position(plan: StepPlan) -> StepPlan:
    chunks = [replace(c, start=c.start + 1, num_tokens=c.num_tokens - 1) for c in plan.prefill]
    return replace(plan, prefill=tuple(chunks))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_lost_update, "has no block"),
        (_stale_update, "used after it was given up"),
        (_skipped_position, "position 0 is read and was never written"),
    ],
)
def test_a_wrong_plan(shipped: Path, change: Callable[[StepPlan], StepPlan], problem: str) -> None:
    class Broken(ContinuousScheduler):
        name = "broken"

        def schedule(self) -> StepPlan | None:
            plan = super().schedule()
            return change(plan) if plan and plan.step_id == 0 else plan

    error = _error(shipped, scheduler=Broken, model_runner="fake", enable_prefix_caching=False)
    assert problem in error.problem
    assert (error.step_id, error.request_id) == (0, 0)


class ReadsTooFar(TorchAttention):
    """Attends to one position more than there is, from the 30th on."""

    def prepare(self, batch: AttentionBatch) -> Any:
        lens = torch.where(batch.context_lens > 60, batch.context_lens + 1, batch.context_lens)
        return super().prepare(replace(batch, context_lens=lens))


@pytest.mark.parametrize("depth", [0, 1])
def test_a_kernel_that_reads_past_the_end(shipped: Path, depth: int) -> None:
    error = _error(
        shipped,
        attention_backend=ReadsTooFar,
        pipeline_depth=depth,
        max_num_seqs=1,
        enable_prefix_caching=False,
    )
    assert "position 60 is NaN" in error.problem
    assert (error.step_id, error.request_id) == (11, 0)


def test_the_request_that_has_the_slot_now_is_named(shipped: Path) -> None:
    options = {"attention_backend": ReadsTooFar, "enable_prefix_caching": False}
    with _llm(shipped, max_num_seqs=1, **options) as llm:
        short = SamplingParams(temperature=0, max_tokens=3)
        llm.generate(PROMPTS[0], short, use_tqdm=False)
        with pytest.raises(KVSanitizerError, match="is NaN") as caught:
            _run(llm)
    assert caught.value.request_id == 1


def test_the_engine_goes_on_after_an_error(shipped: Path) -> None:
    with _llm(shipped, attention_backend=ReadsTooFar) as llm:
        with pytest.raises(KVSanitizerError):
            _run(llm)
        short = SamplingParams(temperature=0, max_tokens=5)
        assert len(llm.generate(PROMPTS[0], short, use_tqdm=False)[0]["token_ids"]) == 5


def test_without_it_nothing_is_wrapped(shipped: Path) -> None:
    with _llm(shipped, kv_sanitizer=False, model_runner="fake") as llm:
        runner: ModelRunner = llm.engine.runner
        assert runner.name == "fake"
        assert isinstance(llm.engine.blocks, PrefixCacheManager)


def test_the_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(KVSanitizerError(3, 4, 5, "gone")))
    assert str(error) == "step 3, request 4, block 5: gone"
    assert (error.step_id, error.request_id, error.block) == (3, 4, 5)


_CONFIG = Config(model="none", max_num_seqs=3, max_num_batched_tokens=16)
_SMALL = KVGeometry(1, 1, 1, block_size=4, num_blocks=6, dtype_bytes=4)


def _watched_groups(
    *groups: KVGeometry,
) -> tuple[SanitizedRunner, tuple[SanitizedBlocks, ...]]:
    """A request with ten positions of a prompt in slot 1, and in each group blocks for sixteen."""
    runner = SanitizedRunner(FakeRunner(_CONFIG, groups=groups), _CONFIG)
    watched = runner.watch([PagedBlockManager(_CONFIG, group) for group in groups])
    managers = cast(tuple[SanitizedBlocks, ...], watched)
    tokens = list(range(20, 30))
    for blocks in managers:
        blocks.begin(0, tokens)
        assert blocks.grow(0, 16)
    new = NewRequest(1, 0, tuple(tokens), GREEDY, 5)
    tables = [tuple(blocks.table(0)) for blocks in managers]
    updates = tuple(BlockUpdate(1, 0, table, i) for i, table in enumerate(tables))
    runner.execute(StepPlan(0, (new,), updates, (PrefillChunk(1, 0, 10, True),))).result()
    return runner, managers


def _watched() -> tuple[SanitizedRunner, SanitizedBlocks]:
    runner, (blocks,) = _watched_groups(_SMALL)
    return runner, blocks


def _num_written(blocks: SanitizedBlocks) -> int:
    return sum(blocks.filled[block] for block in blocks.table(0))


def test_drafts_count_as_written_until_they_are_not_kept() -> None:
    runner, blocks = _watched()
    handle = runner.execute(StepPlan(1, decode=(1,), decode_tokens=(5,)))
    assert _num_written(blocks) == 15
    ((*tokens,),) = handle.result().tokens
    assert len(tokens) < 5
    assert _num_written(blocks) == 10 + len(tokens)


def test_drafts_that_are_not_kept_are_forgotten_in_every_group() -> None:
    runner, managers = _watched_groups(_SMALL, replace(_SMALL, kind=WindowPages(8)))
    handle = runner.execute(StepPlan(1, decode=(1,), decode_tokens=(5,)))
    assert [*map(_num_written, managers)] == [15, 15]
    ((*tokens,),) = handle.result().tokens
    assert len(tokens) < 5
    assert [*map(_num_written, managers)] == [10 + len(tokens)] * 2


def test_the_next_step_is_named_while_it_is_planned() -> None:
    _, blocks = _watched()
    for holders in blocks.holders:
        holders.add(7)
    with pytest.raises(KVSanitizerError, match="handed out while requests") as error:
        blocks.grow(0, 17)
    assert (error.value.step_id, error.value.request_id) == (1, 0)


def test_a_copy_goes_to_a_block_of_one_request() -> None:
    runner, blocks = _watched()
    first, *_, last = blocks.table(0)
    blocks.holders[last].add(7)
    with pytest.raises(KVSanitizerError, match=r"copied to; holders \[0, 7\]"):
        runner.execute(StepPlan(1, decode=(1,), block_copies=(BlockCopy(first, last),)))


def test_a_copy_is_made_of_a_full_block() -> None:
    runner, blocks = _watched()
    *_, source, target = blocks.table(0)
    with pytest.raises(KVSanitizerError, match="copied, and 2 of its 4 positions are written"):
        runner.execute(StepPlan(1, decode=(1,), block_copies=(BlockCopy(source, target),)))


def test_a_block_that_leaves_the_window_dies_then_and_once() -> None:
    geometry = replace(_SMALL, kind=WindowPages(4))
    blocks = SanitizedBlocks(WindowBlockManager(_CONFIG, geometry))
    tokens = [0] * 12
    blocks.begin(0, tokens)
    assert blocks.grow(0, 12)
    first, *rest = blocks.table(0)
    blocks.take_dead()
    blocks.commit(0, tokens, 9)
    assert blocks.take_dead() == (first,)
    assert blocks.holders[first] == set()
    blocks.release(0)
    assert blocks.take_dead() == tuple(sorted(rest))


def test_a_block_that_was_cached_for_another_request_dies_with_its_next_one() -> None:
    """The cache gives the block up for the second request, which never publishes it."""
    blocks = SanitizedBlocks(PrefixCacheManager(_CONFIG, _SMALL))
    tokens = list(range(24))
    blocks.begin(0, tokens)
    assert blocks.grow(0, 24)
    blocks.commit(0, tokens, 24)
    blocks.release(0)
    others = [50] * 24
    blocks.begin(1, others)
    assert blocks.grow(1, 24)
    blocks.take_dead()
    blocks.release(1)
    assert blocks.take_dead() == tuple(range(6))


def test_a_cached_block_dies_when_the_cache_is_reset() -> None:
    blocks = SanitizedBlocks(PrefixCacheManager(_CONFIG, _SMALL))
    tokens = [0] * 4
    blocks.begin(0, tokens)
    assert blocks.grow(0, 4)
    table = tuple(blocks.table(0))
    blocks.commit(0, tokens, 4)
    blocks.release(0)
    blocks.take_dead()
    blocks.reset_prefix_cache()
    assert set(table) <= set(blocks.take_dead())


def test_blocks_of_a_request_that_ran_at_a_reset_of_the_cache_die_with_it() -> None:
    blocks = SanitizedBlocks(PrefixCacheManager(_CONFIG, _SMALL))
    tokens = [0] * 8
    blocks.begin(0, tokens)
    assert blocks.grow(0, 8)
    table = set(blocks.table(0))
    blocks.commit(0, tokens, 4)
    blocks.reset_prefix_cache()
    blocks.take_dead()
    blocks.commit(0, tokens, 8)
    assert blocks.take_dead() == ()
    blocks.release(0)
    assert set(blocks.take_dead()) == table


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("depth", [0, 1])
def test_drafts_give_the_same_tokens_at_the_same_times(
    shipped: Path, depth: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock of the runner is that of the engine, with the sanitizer in between."""

    def sleep(seconds: float) -> None:
        raise AssertionError(f"a virtual clock, and {seconds} s of sleep")

    monkeypatch.setattr("engine.types.time.sleep", sleep)
    full = KVGeometry(1, 1, 1, SIZE, 12, dtype_bytes=4)
    kinds = (full, replace(full, kind=WindowPages(20)))[:groups]
    runner = partial(FakeRunner, groups=kinds, seconds=lambda plan: 0.25)
    found = []
    for sanitizer in (False, True):
        with _llm(
            shipped,
            kv_sanitizer=sanitizer,
            model_runner=runner,
            pipeline_depth=depth,
            num_speculative_tokens=3,
        ) as llm:
            llm.wait_until(9.0)
            outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
            found.append((outputs, llm.now()))
    assert found[0] == found[1]
