"""Greedy tokens against transformers' generate, under every way of cutting the work up."""

from __future__ import annotations

from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from engine.parts import PART_KINDS, POLICIES
from engine.requests import Sequence
from llm import LLM, SamplingParams
from tests.checkpoints import MAX_POSITION, Checkpoints, Greedy, random_prompts, reference_greedy

MAX_TOKENS = 40
# Answers of the shipped model end after fewer.
SHIPPED_MAX_TOKENS = 64
# Around the block sizes 16, 64 and 256; several cross a border of 256 while they decode.
LENGTHS = [1, 230, 5, 250, 17, 240, 16, 64, 15, 33, 3, 100, 255, 256, 48, 200]
LONGEST = max(LENGTHS) + MAX_TOKENS
BLOCK_SIZES = [16, 64, 256]
MAX_NUM_SEQS = [1, 3, 16]
# One checkpoint of each family that has no tests of its own here.
OTHERS = (
    *("llama-tied", "mistral", "smollm3-nope", "granite", "phi3"),
    *("olmo2", "olmo3", "gemma3", "ministral", "ministral3"),
)
WINDOWED = (
    *("mistral-window", "qwen3-windows", "qwen2-window", "smollm3-windows"),
    *("olmo3-windows", "gemma3-windows", "ministral-windows"),
)
DEPTHS = [0, 1]


@cache
def _reference(path: Path) -> Greedy:
    return reference_greedy(path, random_prompts(LENGTHS, seed=11), MAX_TOKENS)


@cache
def _shipped_reference(path: Path) -> Greedy:
    """Prompts of noise, and questions whose answers end by themselves."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompts = random_prompts([1, 40, 200, 16], seed=12, vocab_size=4096)
    for task in ("Return x plus one.", "Return the name of the file.", "Return the length."):
        question = f'<|im_start|>user\ndef f(x):\n    """{task}"""<|im_end|>\n'
        prompts.append(tokenizer.encode(question + "<|im_start|>assistant\n"))
    return reference_greedy(path, prompts, SHIPPED_MAX_TOKENS)


def _check(
    path: Path,
    expected: Greedy,
    *,
    preempts: bool | None,
    max_tokens: int = MAX_TOKENS,
    **options: Any,
) -> None:
    """`preempts`: whether someone has to be preempted; None if that is not known."""
    # What policies look at must not change a token.
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            priority=i * 7 % 3,
            user="abc"[i * 5 % 3],
            predicted_tokens=1 + i * 23 % max_tokens,
        )
        for i in range(len(expected.prompts))
    ]
    # Rope scaling makes some checkpoints' maximum longer, and windows of MAX_POSITION would count.
    options = {"max_model_len": MAX_POSITION, **options}
    with LLM(path, device="cpu", **options) as llm:
        seqs: list[Sequence] = []
        add = llm.engine.add_request

        def watched(*args: Any, **options: Any) -> Sequence:
            seqs.append(add(*args, **options))
            return seqs[-1]

        llm.engine.add_request = watched  # type: ignore[method-assign]
        outputs = llm.generate(expected.prompts, params, use_tqdm=False)
        engine = llm.engine
        assert engine.blocks.num_free_blocks == engine.blocks.num_blocks
    assert [out["token_ids"] for out in outputs] == expected.outputs
    if preempts is not None:
        assert (sum(seq.num_preemptions for seq in seqs) > 0) == preempts


def _smallest_cache(block_size: int) -> int:
    """Blocks for the longest request, and one more to admit another one beside it."""
    return -(-(LONGEST - 1) // block_size) + 1


@pytest.mark.parametrize("name", ["qwen3-gqa2-wide-heads", "qwen2-gqa6", *OTHERS, *WINDOWED])
def test_no_token_of_the_reference_is_a_tie(checkpoints: Checkpoints, name: str) -> None:
    """Otherwise a difference below could be rounding; if this fails, choose another seed."""
    assert _reference(checkpoints[name]).smallest_lead > 1e-4


def _ways() -> list[Any]:
    """All ways to cut the work up; every other one is slow, so that each pair is among the rest."""
    factors = (DEPTHS, BLOCK_SIZES, MAX_NUM_SEQS, ["ample", "small"], [False, True])
    odd = (sum(levels) % 2 for levels in product(*(range(len(factor)) for factor in factors)))
    return [
        pytest.param(*way, marks=[pytest.mark.slow] * more)
        for way, more in zip(product(*factors), odd, strict=True)
    ]


@pytest.mark.parametrize(("depth", "block_size", "max_num_seqs", "cache_size", "chunked"), _ways())
def test_greedy_tokens_equal_transformers(
    checkpoints: Checkpoints,
    depth: int,
    block_size: int,
    max_num_seqs: int,
    cache_size: str,
    chunked: bool,
) -> None:
    path = checkpoints["qwen3-gqa2-wide-heads"]
    small = cache_size == "small"
    _check(
        path,
        _reference(path),
        preempts=small and max_num_seqs > 1,
        pipeline_depth=depth,
        kvcache_block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=40 if chunked else 2048,
        num_kvcache_blocks=_smallest_cache(block_size) if small else None,
    )


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("name", OTHERS)
def test_greedy_tokens_of_other_families(checkpoints: Checkpoints, name: str, depth: int) -> None:
    """In chunks, with prefix hits, and preempted."""
    path = checkpoints[name]
    _check(
        path,
        _reference(path),
        preempts=True,
        pipeline_depth=depth,
        kvcache_block_size=16,
        max_num_seqs=4,
        max_num_batched_tokens=40,
        num_kvcache_blocks=_smallest_cache(16),
    )


@pytest.mark.parametrize("blocks", [None, 22])
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("name", WINDOWED)
def test_greedy_tokens_with_windows(
    checkpoints: Checkpoints, name: str, depth: int, blocks: int | None
) -> None:
    """In chunks, with freed blocks full of NaN."""
    path = checkpoints[name]
    _check(
        path,
        _reference(path),
        preempts=None if name == "mistral-window" else blocks is not None,
        pipeline_depth=depth,
        kvcache_block_size=16,
        max_num_seqs=4,
        max_num_batched_tokens=40,
        num_kvcache_blocks=blocks,
        kv_sanitizer=True,
    )


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("name", ["mistral-window", "gemma3-windows"])
def test_windows_with_prefix_hits(checkpoints: Checkpoints, name: str, depth: int) -> None:
    """One after another and together, longer ones too; freed blocks are full of NaN."""
    path = checkpoints[name]
    expected = _reference(path)
    params = SamplingParams(temperature=0, max_tokens=len(expected.outputs[0]))
    options: dict[str, Any] = {"kvcache_block_size": 16, "num_kvcache_blocks": 600}
    options |= {
        "max_model_len": MAX_POSITION,
        "max_num_seqs": 3,
        "max_num_batched_tokens": 40,
        "kv_sanitizer": True,
    }
    with LLM(path, device="cpu", pipeline_depth=depth, **options) as llm:
        alone = [
            llm.generate([prompt], params, use_tqdm=False)[0]["token_ids"]
            for prompt in [*expected.prompts, *expected.prompts]
        ]
        together = llm.generate(expected.prompts, params, use_tqdm=False)
        hits = llm.cache_stats().hit_tokens
        more = [p + o for p, o in zip(expected.prompts, expected.outputs, strict=True)]
        longer = llm.generate(more, params, use_tqdm=False)
        assert llm.cache_stats().hit_tokens > hits > 0
        llm.reset_prefix_cache()
        again = llm.generate(more, params, use_tqdm=False)
    assert [out["token_ids"] for out in longer] == [out["token_ids"] for out in again]
    assert alone == expected.outputs * 2
    assert [out["token_ids"] for out in together] == expected.outputs


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("blocks", [3, 4, 9])
def test_a_window_needs_few_blocks_for_a_long_prompt(
    checkpoints: Checkpoints, blocks: int, depth: int
) -> None:
    """3 blocks of 16 are the fewest for a window of 20; the prompts have up to 16 blocks."""
    path = checkpoints["mistral-window"]
    _check(
        path,
        _reference(path),
        preempts=None,
        pipeline_depth=depth,
        kvcache_block_size=16,
        max_num_seqs=3,
        max_num_batched_tokens=64,
        num_kvcache_blocks=blocks,
        kv_sanitizer=True,
    )


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_greedy_tokens_of_qwen2_equal_transformers(
    checkpoints: Checkpoints, depth: int, block_size: int
) -> None:
    path = checkpoints["qwen2-gqa6"]
    _check(
        path,
        _reference(path),
        preempts=True,
        pipeline_depth=depth,
        kvcache_block_size=block_size,
        max_num_seqs=5,
        max_num_batched_tokens=50,
        num_kvcache_blocks=_smallest_cache(block_size),
    )


def _mixtures() -> list[dict[str, Any]]:
    """Every queue policy under every admission, the rest in turn; and with static batching."""
    queues, admissions, victims, steps = (sorted(PART_KINDS[option].known()) for option in POLICIES)
    mixtures: list[dict[str, Any]] = [
        {
            "queue_policy": queue,
            "admission_policy": admission,
            "preemption_policy": victims[(i + i // len(admissions)) % len(victims)],
            "step_policy": steps[i // 2 % len(steps)],
            "pipeline_depth": i % 2,
        }
        for i, (queue, admission) in enumerate(product(queues, admissions))
    ]
    return mixtures + [{"scheduler": "static", "queue_policy": queue} for queue in queues]


@pytest.mark.parametrize(
    "mixture", _mixtures(), ids=lambda mixture: "-".join(map(str, mixture.values()))
)
def test_greedy_tokens_are_the_same_under_every_policy(
    checkpoints: Checkpoints, mixture: dict[str, Any]
) -> None:
    path = checkpoints["qwen2-gqa6"]
    expected = _reference(path)
    expected = Greedy(expected.prompts[:8], expected.outputs[:8], expected.smallest_lead)
    preempts = {"optimistic": True, "lookahead": None}.get(
        mixture.get("admission_policy", ""), False
    )
    _check(
        path,
        expected,
        preempts=preempts,
        kvcache_block_size=16,
        max_num_seqs=5,
        max_num_batched_tokens=50,
        num_kvcache_blocks=_smallest_cache(16),
        **mixture,
    )


@pytest.mark.parametrize("max_num_batched_tokens", [1, 2, 7])
def test_greedy_tokens_with_budgets_of_a_few_tokens(
    checkpoints: Checkpoints, max_num_batched_tokens: int
) -> None:
    path = checkpoints["qwen2-gqa6"]
    expected = _reference(path)
    expected = Greedy(expected.prompts[:5], expected.outputs[:5], expected.smallest_lead)
    _check(
        path,
        expected,
        preempts=False,
        kvcache_block_size=16,
        max_num_seqs=min(2, max_num_batched_tokens),
        max_num_batched_tokens=max_num_batched_tokens,
    )


def test_the_shipped_reference_has_no_ties_and_both_kinds_of_ends(shipped: Path) -> None:
    expected = _shipped_reference(shipped)
    assert expected.smallest_lead > 1e-4
    ended = [len(tokens) < SHIPPED_MAX_TOKENS for tokens in expected.outputs]
    assert ended == [False] * 4 + [True] * 3


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize(
    ("block_size", "max_num_seqs", "budget", "blocks"),
    [(16, 3, 30, 18), (256, 5, 1024, None), (64, 1, 100, None)],
)
def test_greedy_tokens_of_the_shipped_model_equal_transformers(
    shipped: Path, depth: int, block_size: int, max_num_seqs: int, budget: int, blocks: int | None
) -> None:
    """Its end-of-sequence tokens are honoured here."""
    _check(
        shipped,
        _shipped_reference(shipped),
        preempts=blocks is not None,
        max_tokens=SHIPPED_MAX_TOKENS,
        pipeline_depth=depth,
        kvcache_block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        num_kvcache_blocks=blocks,
    )
