"""A whole model in shards, one thread per rank, against the undivided one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from config import Config
from engine.model_runner import LocalRunner
from engine.parts import resolve
from engine.ranks.collectives import GroupContext, gloo_context
from engine.requests import Sequence
from layers.parallel import ParallelContext
from llm import LLM, SamplingParams
from tests.checkpoints import VOCAB_SIZE, Checkpoints, random_prompts
from tests.ranks import ThreadedRanks
from tests.recording import Logits, RecordingRunner
from utils.checkpoint import open_checkpoint
from utils.errors import ConfigError

TOLERANCE = 1e-5
PROMPTS = random_prompts([20, 3, 37, 9], seed=31)
# The last one begins with a block that the first one leaves in the cache.
PROMPTS.append(PROMPTS[0][:16] + PROMPTS[1])
# Greedy and sampled requests in one batch; the second is alone among the greedy ones for a while.
PARAMS = [
    SamplingParams(temperature=temperature, max_tokens=12, ignore_eos=True, seed=i)
    for i, temperature in enumerate([0.0, 0.0, 0.8, 1.5, 0.0])
]
# 7 blocks for five requests of up to 49 tokens: some are thrown out and recomputed.
OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "max_model_len": 64,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "kvcache_block_size": 16,
    "num_kvcache_blocks": 7,
}


def _run(path: Any, make_runner: Any, depth: int) -> tuple[list[list[int]], Logits, int]:
    """Tokens, logits of every position, and preemptions."""
    with LLM(path, model_runner=make_runner, pipeline_depth=depth, **OPTIONS) as llm:
        seqs: list[Sequence] = []
        add = llm.engine.add_request

        def watched(*args: Any, **options: Any) -> Sequence:
            seqs.append(add(*args, **options))
            return seqs[-1]

        llm.engine.add_request = watched  # type: ignore[method-assign]
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        runner: Any = llm.engine.runner
        logits: Logits = runner.logits
        assert llm.cache_stats().hit_tokens or "window" in path.name
    return [o["token_ids"] for o in outputs], logits, sum(s.num_preemptions for s in seqs)


@cache
def _whole(path: Any, depth: int) -> tuple[list[list[int]], Logits, int]:
    return _run(path, RecordingRunner, depth)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(
    ("name", "size"),
    [
        # KV heads replicated twice and four times.
        ("qwen3-gqa4-bias-tied", 2),
        ("qwen3-gqa4-bias-tied", 4),
        ("qwen3-gqa6", 4),
        ("qwen3-gqa2-wide-heads", 2),
        # KV heads divided.
        ("qwen2-gqa2-wide-heads-tied", 2),
        ("qwen2-linear", 4),
        ("qwen3-mha-bias", 2),
        ("qwen3-sharded", 2),
        ("qwen2-bfloat16", 4),
        ("llama-bias", 2),
        ("mistral", 2),
        ("ministral3", 2),
        ("gemma3", 2),
        ("smollm3-nope", 2),
        ("granite", 2),
        # Fused projections, with KV heads divided and replicated.
        ("phi3", 2),
        ("phi3", 4),
        # Two cache groups, whose blocks all ranks have alike.
        ("qwen3-windows", 2),
    ],
)
def test_shards_compute_the_logits_and_tokens_of_the_whole(
    checkpoints: Checkpoints, name: str, size: int, depth: int
) -> None:
    """The vocabulary of 259 divides by none of the sizes, nor is any share of it full of tokens."""
    path = checkpoints[name]
    tokens, logits, num_preemptions = _run(path, partial(ThreadedRanks, size=size), depth)
    whole_tokens, whole_logits, _ = _whole(path, depth)
    assert num_preemptions
    assert logits.keys() == whole_logits.keys()
    for place, row in whole_logits.items():
        assert row.shape == (VOCAB_SIZE,)
        assert (logits[place] - row).abs().max() <= TOLERANCE * row.abs().max()
    assert tokens == whole_tokens


@pytest.mark.parametrize(
    ("name", "counts"), [("qwen3-square-tied", [8]), ("qwen3-windows", [8, 8])]
)
def test_the_cache_is_that_of_the_rank_with_the_fewest_blocks(
    checkpoints: Checkpoints, name: str, counts: list[int]
) -> None:
    checkpoint = open_checkpoint(str(checkpoints[name]))
    config = Config(model="x", device="cpu", max_num_seqs=1, max_model_len=48)
    config = replace(resolve(config, checkpoint), tensor_parallel_size=2)
    store = dist.HashStore()  # type: ignore[attr-defined]

    def num_blocks(rank: int) -> list[int]:
        mine = replace(config, num_kvcache_blocks=9 - rank)
        runner = LocalRunner(mine, checkpoint, gloo_context(rank, 2, store))
        return [group.num_blocks for group in runner.kv_groups]

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(num_blocks, range(2))) == [counts, counts]


def test_a_model_that_does_not_divide_is_refused(checkpoints: Checkpoints) -> None:
    checkpoint = open_checkpoint(str(checkpoints["qwen2-gqa6"]))
    config = Config(model="x", device="cpu", max_num_seqs=1, max_model_len=48)
    config = replace(resolve(config, checkpoint), tensor_parallel_size=4)
    with pytest.raises(ConfigError, match="6 query heads") as caught:
        RecordingRunner(config, checkpoint, ParallelContext(0, 4))
    assert caught.value.field == "tensor_parallel_size"


def test_the_group_of_one_needs_no_partners() -> None:
    alone = ParallelContext()
    x: Tensor = torch.ones(2, 3)
    assert alone.all_reduce(x) is x
    assert alone.all_max(x) is x
    assert torch.equal(alone.all_gather(x), x.unsqueeze(0))
    assert alone.kv_heads(4) == (0, 4)


def test_a_rehearsal_needs_no_partners_either() -> None:
    """The other rank never joins: its collective would last for ever."""
    rank = GroupContext(0, 2, group=None)
    x = torch.arange(3)
    with rank.rehearsal():
        # A step of the rehearsal may take the values for token ids.
        assert torch.equal(rank.all_reduce(torch.ones(2, 3)), torch.zeros(2, 3))
        assert torch.equal(rank.all_gather(x), torch.zeros(2, 3))
        assert torch.equal(rank.all_max(x), torch.arange(3))
    with pytest.raises(AttributeError):
        rank.all_reduce(x)


def test_a_rehearsal_that_fails_ends_too() -> None:
    rank = GroupContext(0, 2, group=None)
    with pytest.raises(ValueError, match="no such kernel"), rank.rehearsal():
        raise ValueError("no such kernel")
    with pytest.raises(AttributeError):
        rank.all_reduce(torch.arange(3))
