"""Prefix caching as a user meets it: the same tokens, less work."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from engine.types import CacheStats
from llm import LLM, SamplingParams
from memory.block_manager import PagedBlockManager, PrefixCacheManager
from tests.checkpoints import random_prompts
from utils.errors import ConfigError, EngineClosedError

GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
MANAGERS = ["prefix", "radix"]
SIZE = 16


def _prompts() -> list[list[int]]:
    """Two families that share 100 and 48 tokens, a prompt of whole blocks twice, a stranger."""
    first, second, whole, other, *own = random_prompts(
        [100, 48, 64, 30, 1, 17, 40, 5, 33], seed=31, vocab_size=4096
    )
    families = [first + tail for tail in own[:3]] + [second + tail for tail in own[3:]]
    return [*families, whole, other, whole, first[:70]]


@cache
def _alone(path: Path) -> list[list[int]]:
    """Each request by itself, nothing cached."""
    with LLM(path, device="cpu", kvcache_block_size=SIZE, enable_prefix_caching=False) as llm:
        assert llm.config.block_manager == "paged"
        tokens = [_generate(llm, [prompt])[0] for prompt in _prompts()]
        assert llm.cache_stats() == CacheStats()
    return tokens


def _generate(llm: LLM, prompts: list[list[int]], params: Any = GREEDY) -> list[list[int]]:
    return [out["token_ids"] for out in llm.generate(prompts, params, use_tqdm=False)]


@pytest.mark.parametrize(("manager", "depth"), product(MANAGERS, [0, 1]))
@pytest.mark.parametrize("budget", [24, 2048], ids=["chunked", "whole"])
@pytest.mark.parametrize("num_blocks", [13, 200], ids=["small", "ample"])
def test_tokens_are_those_of_each_request_alone(
    shipped: Path, manager: str, depth: int, budget: int, num_blocks: int
) -> None:
    """The second round finds what the first one left; the small cache preempts and evicts."""
    with LLM(
        shipped,
        device="cpu",
        block_manager=manager,
        pipeline_depth=depth,
        kvcache_block_size=SIZE,
        max_num_seqs=6,
        max_num_batched_tokens=budget,
        num_kvcache_blocks=num_blocks,
    ) as llm:
        assert llm.config.enable_prefix_caching
        for _ in range(2):
            ids = [llm.add_request(prompt, GREEDY) for prompt in _prompts()]
            outputs: dict[int, list[int]] = {}
            before = llm.stats().preemptions
            while llm.has_unfinished:
                outputs |= {out["request_id"]: out["token_ids"] for out in llm.step()}
            assert [outputs[i] for i in ids] == _alone(shipped)
            assert (llm.stats().preemptions > before) == (num_blocks == 13)
        stats = llm.cache_stats()
    assert stats.hit_tokens > 0
    assert (stats.evicted_blocks > 0) == (num_blocks == 13)


@pytest.fixture(scope="module")
def cached_llm(shipped: Path) -> Iterator[LLM]:
    with LLM(shipped, device="cpu", kvcache_block_size=SIZE, num_kvcache_blocks=200) as llm:
        yield llm


@pytest.fixture
def llm(cached_llm: LLM) -> LLM:
    cached_llm.reset_prefix_cache()
    return cached_llm


def _hits(llm: LLM, prompt: list[int], params: SamplingParams = GREEDY) -> int:
    """Tokens of the prompt that were found."""
    before = llm.cache_stats().hit_tokens
    _generate(llm, [prompt], params)
    return llm.cache_stats().hit_tokens - before


def test_is_on_by_default(llm: LLM) -> None:
    assert llm.config.block_manager == "prefix"
    assert llm.config.enable_prefix_caching


def test_a_follow_up_turn_finds_prompt_and_answer(llm: LLM) -> None:
    (prompt,) = random_prompts([30], seed=1)
    (answer,) = _generate(llm, [prompt])
    # The last token was never computed.
    assert _hits(llm, [*prompt, *answer, 7, 8, 9]) == (30 + 40 - 1) // SIZE * SIZE


@pytest.mark.parametrize("manager", MANAGERS)
@pytest.mark.parametrize("depth", [0, 1])
def test_a_known_prompt_computes_one_token(shipped: Path, manager: str, depth: int) -> None:
    """And has the same output; the sanitizer sees that nothing which others share is written."""
    whole, tail = random_prompts([64, 1], seed=2, vocab_size=4096)
    outputs: list[list[list[int]]] = []
    prefilled: list[int] = []
    with LLM(
        shipped,
        device="cpu",
        block_manager=manager,
        pipeline_depth=depth,
        kvcache_block_size=SIZE,
        num_kvcache_blocks=40,
        kv_sanitizer=True,
    ) as llm:
        for prompt in [whole, whole, whole + tail, whole]:
            seqs = [llm.engine.add_request(prompt, GREEDY) for _ in range(2)]
            prefilled.append(0)
            while llm.engine.has_unfinished:
                plan, _ = llm.engine.step()
                prefilled[-1] += plan.num_prefill_tokens if plan else 0
            outputs.append([seq.output_token_ids for seq in seqs])
    assert prefilled == [64 + 1, 1 + 1, 1 + 1, 1 + 1]
    with LLM(shipped, device="cpu", enable_prefix_caching=False) as llm:
        alone, longer = _generate(llm, [whole])[0], _generate(llm, [whole + tail])[0]
    assert outputs == [[alone] * 2, [alone] * 2, [longer] * 2, [alone] * 2]


def test_a_salt_keeps_others_out(llm: LLM) -> None:
    (prompt,) = random_prompts([40], seed=3)
    salted = SamplingParams(temperature=0, max_tokens=4, cache_salt="tenant")
    assert _hits(llm, prompt) == 0
    assert _hits(llm, prompt, salted) == 0
    assert _hits(llm, prompt, salted) == 32


def test_reset_forgets(llm: LLM) -> None:
    (prompt,) = random_prompts([40], seed=4)
    _generate(llm, [prompt])
    llm.reset_prefix_cache()
    assert llm.cache_stats().cached_blocks == 0
    assert _hits(llm, prompt) == 0


def test_reset_after_close(shipped: Path) -> None:
    llm = LLM(shipped, device="cpu", num_kvcache_blocks=4)
    llm.close()
    with pytest.raises(EngineClosedError):
        llm.reset_prefix_cache()


def _make_caching(config: Any, geometry: Any) -> PrefixCacheManager:
    return PrefixCacheManager(config, geometry)


def _make_paged(config: Any, geometry: Any) -> PagedBlockManager:
    return PagedBlockManager(config, geometry)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"enable_prefix_caching": True, "block_manager": "paged"}, "enable_prefix_caching"),
        ({"enable_prefix_caching": False, "block_manager": "prefix"}, "enable_prefix_caching"),
        ({"enable_prefix_caching": False, "block_manager": "radix"}, "enable_prefix_caching"),
        ({"enable_prefix_caching": False, "eviction_policy": "lfu"}, "eviction_policy"),
        ({"block_manager": "paged", "eviction_policy": "cost"}, "eviction_policy"),
        ({"eviction_policy": "mru"}, "eviction_policy"),
        # What a factory makes is known only once it is made.
        ({"enable_prefix_caching": False, "block_manager": _make_caching}, "enable_prefix_caching"),
        ({"enable_prefix_caching": True, "block_manager": _make_paged}, "enable_prefix_caching"),
        ({"block_manager": _make_paged, "eviction_policy": "lfu"}, "eviction_policy"),
        ({"block_manager": _make_caching, "eviction_policy": "mru"}, "eviction_policy"),
    ],
)
def test_contradictions_are_refused(shipped: Path, options: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LLM(shipped, device="cpu", **options)
    assert caught.value.field == field


@pytest.mark.parametrize(("make", "caches"), [(_make_caching, True), (_make_paged, False)])
def test_a_factory_may_make_either_kind(shipped: Path, make: Any, caches: bool) -> None:
    with LLM(shipped, device="cpu", num_kvcache_blocks=4, block_manager=make) as llm:
        assert llm.config.enable_prefix_caching is caches
