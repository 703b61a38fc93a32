"""Logits against transformers, at every position, through the runner's paged path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llm import LLM, SamplingParams
from tests.checkpoints import (
    VARIANTS,
    Checkpoints,
    random_prompts,
    reference_logits,
    reference_model,
)
from tests.recording import RecordingRunner

TOLERANCE = 1e-4
NUM_DECODES = 32
# Lengths around the block size of 16, one token, and one of several chunks and blocks.
LENGTHS = [1, 15, 16, 17, 100]
CONTEXT = 160


def _largest_error(path: Path, prompts: list[list[int]], **options: Any) -> tuple[float, int]:
    """Largest relative error of any logit of any computed position; number of positions."""
    params = SamplingParams(temperature=0, max_tokens=NUM_DECODES + 1, ignore_eos=True)
    options |= {"device": "cpu", "max_model_len": CONTEXT, "model_runner": RecordingRunner}
    with LLM(path, **options) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        runner: Any = llm.engine.runner
        recorded = runner.logits
    sequences = [out["prompt_token_ids"] + out["token_ids"] for out in outputs]
    expected = reference_logits(reference_model(path), sequences, CONTEXT)
    worst = 0.0
    for request_id, rows in enumerate(expected):
        # The last token is sampled, not computed.
        ours = torch.stack([recorded[request_id, i] for i in range(len(rows) - 1)])
        error = (ours - rows[:-1]).abs().max() / rows.abs().max()
        worst = max(worst, float(error))
    return worst, len(recorded)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("budget", [pytest.param(1024, id="whole"), pytest.param(23, id="chunked")])
def test_logits_of_every_position_equal_transformers(
    checkpoints: Checkpoints, name: str, budget: int
) -> None:
    prompts = random_prompts(LENGTHS, seed=1)
    error, positions = _largest_error(
        checkpoints[name],
        prompts,
        max_num_seqs=5,
        max_num_batched_tokens=budget,
        kvcache_block_size=16,
    )
    assert error < TOLERANCE
    assert positions == sum(LENGTHS) + NUM_DECODES * len(LENGTHS)


@pytest.mark.parametrize("block_size", [64, 256])
@pytest.mark.parametrize("depth", [0, 1])
def test_logits_at_other_block_sizes_and_depths(
    checkpoints: Checkpoints, block_size: int, depth: int
) -> None:
    error, _ = _largest_error(
        checkpoints["qwen3-gqa2-wide-heads"],
        random_prompts(LENGTHS, seed=2),
        max_num_seqs=3,
        max_num_batched_tokens=48,
        kvcache_block_size=block_size,
        pipeline_depth=depth,
    )
    assert error < TOLERANCE


def test_logits_of_a_single_request_equal_transformers(checkpoints: Checkpoints) -> None:
    """Alone, a request whose blocks lie in order is read in place."""
    error, _ = _largest_error(
        checkpoints["qwen2-gqa6"],
        random_prompts([100], seed=3),
        max_num_seqs=1,
        kvcache_block_size=16,
    )
    assert error < TOLERANCE


def test_logits_of_recomputed_requests_equal_transformers(checkpoints: Checkpoints) -> None:
    lengths = [20, 21, 22, 23]
    error, _ = _largest_error(
        checkpoints["qwen3-gqa6"],
        random_prompts(lengths, seed=4),
        max_num_seqs=4,
        kvcache_block_size=16,
        num_kvcache_blocks=8,
    )
    assert error < TOLERANCE


def test_logits_of_the_shipped_model_equal_transformers(shipped: Path) -> None:
    error, _ = _largest_error(
        shipped,
        random_prompts(LENGTHS, seed=5, vocab_size=4096),
        max_num_seqs=4,
        max_num_batched_tokens=32,
        kvcache_block_size=16,
    )
    assert error < TOLERANCE


def test_scaled_rope_differs_from_plain_rope(checkpoints: Checkpoints) -> None:
    """The scaled variants would prove nothing if scaling changed nothing at these lengths."""
    tokens = random_prompts([CONTEXT], seed=6)
    for name in ("qwen3-yarn", "qwen2-linear", "qwen3-llama3", "qwen3-dynamic", "qwen2-longrope"):
        model = reference_model(checkpoints[name])
        scaled = reference_logits(model, tokens, CONTEXT)[0]
        model.config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        rotary = type(model.model.rotary_emb)(model.config)
        model.model.rotary_emb = rotary
        plain = reference_logits(model, tokens, CONTEXT)[0]
        assert (scaled - plain).abs().max() / plain.abs().max() > 100 * TOLERANCE, name
