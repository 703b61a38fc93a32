"""Log-probabilities of a part of the prompt: the tokens before it may come from the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm import LLM, SamplingParams
from tests.checkpoints import Checkpoints, random_prompts

SIZE = 16
LENGTHS = [90, 70, 65]


def _params(start: int, **more: Any) -> SamplingParams:
    values = {"temperature": 0, "max_tokens": 8, "ignore_eos": True, "prompt_logprobs": 1}
    return SamplingParams(prompt_logprobs_start=start, **{**values, **more})


def _llm(path: Path, **options: Any) -> LLM:
    defaults = {"device": "cpu", "kvcache_block_size": SIZE, "max_model_len": 128}
    return LLM(path, **{**defaults, "num_kvcache_blocks": 60, **options})


def _check(got: list[Any], whole: list[Any], start: int) -> None:
    unscored = min(max(1, start), len(whole))
    assert got[:unscored] == [None] * unscored
    assert len(got) == len(whole)
    for entry, expected in zip(got[unscored:], whole[unscored:], strict=True):
        assert list(entry) == list(expected)
        assert entry == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("manager", ["prefix", "radix", "paged"])
@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("budget", [24, 1024], ids=["chunked", "whole"])
def test_only_tokens_before_the_start_come_from_the_cache(
    shipped: Path, manager: str, depth: int, budget: int
) -> None:
    """The token before the start must be computed, since its logits give the first entry."""
    (prompt,) = random_prompts(LENGTHS[:1], seed=3, vocab_size=4096)
    options = {"block_manager": manager, "pipeline_depth": depth, "max_num_batched_tokens": budget}
    with _llm(shipped, max_num_seqs=4, **options) as llm:
        (whole,) = llm.generate([prompt], _params(0), use_tqdm=False)
        for start in (0, 1, 16, 17, 32, 33, 80, 81, 89, 90, 500):
            (out,) = llm.generate([prompt], _params(start), use_tqdm=False)
            assert out["token_ids"] == whole["token_ids"]
            _check(out["prompt_logprobs"], whole["prompt_logprobs"], start)
            most = 90 - 1 if start >= 90 else max(0, start - 1)
            cached = 0 if manager == "paged" else most // SIZE * SIZE
            assert out["metrics"]["cached_prompt_tokens"] == cached


def test_several_groups_share_what_the_start_allows(checkpoints: Checkpoints) -> None:
    (prompt,) = random_prompts([100], seed=4)
    options = {"num_kvcache_blocks": 80, "max_num_batched_tokens": 128, "max_num_seqs": 4}
    with _llm(checkpoints["qwen3-windows"], **options) as llm:
        (whole,) = llm.generate([prompt], _params(0), use_tqdm=False)
        for start in (16, 17, 70, 98):
            (out,) = llm.generate([prompt], _params(start), use_tqdm=False)
            assert out["token_ids"] == whole["token_ids"]
            _check(out["prompt_logprobs"], whole["prompt_logprobs"], start)
            assert out["metrics"]["cached_prompt_tokens"] == (start - 1) // SIZE * SIZE


@pytest.mark.parametrize("start", [0, 40])
def test_after_a_preemption_only_missing_entries_are_computed(shipped: Path, start: int) -> None:
    """All prompts begin alike; there are blocks for two of three, which end up in the cache."""
    first, *own = random_prompts([40, 50, 30, 25], seed=5, vocab_size=4096)
    prompts = [first + rest for rest in own]
    params = _params(start, max_tokens=30, logprobs=0, n=2)
    with _llm(shipped) as ample:
        expected = ample.generate(prompts, params, use_tqdm=False)
    for depth in (0, 1):
        with _llm(
            shipped,
            num_kvcache_blocks=14,
            max_num_batched_tokens=32,
            max_num_seqs=4,
            pipeline_depth=depth,
        ) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            assert llm.stats().preemptions > 0
        for out, one in zip(outputs, expected, strict=True):
            assert [o["token_ids"] for o in out["outputs"]] == [
                o["token_ids"] for o in one["outputs"]
            ]
            _check(out["prompt_logprobs"], one["prompt_logprobs"], start)


def test_a_request_with_a_start_waits_only_for_what_it_may_use(shipped: Path) -> None:
    """Two equal prompts at once: the second one waits for a prefix if its start allows one."""
    (prompt,) = random_prompts([90], seed=6, vocab_size=4096)
    for start, cached in ((0, 0), (50, 48), (90, 80)):
        with _llm(shipped) as llm:
            plain = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
            _, out = llm.generate([prompt, prompt], [plain, _params(start)], use_tqdm=False)
            assert out["metrics"]["cached_prompt_tokens"] == cached
            assert len(out["prompt_logprobs"]) == 90
