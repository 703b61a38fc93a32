"""The flash_attn backend with the real package on a CUDA device."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

pytest.importorskip("flash_attn")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from layers.attention.base import AttentionBackend
from layers.attention.flash_attn import FlashAttention
from layers.attention.torch_sdpa import TorchAttention
from llm import LLM
from tests.contracts.attention import AttentionContract, Request, make_case
from tests.gpu.test_engine_gpu import SMALL, TIE, TINY, greedy, random_prompts, worst_gap

pytestmark = pytest.mark.gpu


class TestFlashAttention(AttentionContract):
    make_backend = FlashAttention
    device = "cuda"
    dtypes = (torch.bfloat16, torch.float16)
    block_size = 256


@pytest.mark.parametrize("num_decodes", [1, 9, 150])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(16, 8, 128), (12, 2, 128), (14, 2, 64), (4, 4, 64)]
)
def test_large_batches_against_the_torch_backend(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, num_decodes: int
) -> None:
    """Some of the requests prefill behind a prefix; what is not theirs in the pages is NaN."""
    prefills = [Request(n + random.choice((0, 256, 700)), n) for n in (1, 300, 1500)]
    decodes = [Request(random.randint(1, 3000)) for _ in range(num_decodes)]
    case = make_case(
        prefills,
        decodes,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=256,
        dtype=dtype,
        device=torch.device("cuda"),
    )
    backends: list[AttentionBackend] = [FlashAttention(case.spec), TorchAttention(case.spec)]
    out, expected = (b.attend(case.q, case.kv, b.prepare(case.batch)) for b in backends)
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "options",
    [
        {"enable_cuda_graphs": True},
        {"enforce_eager": True},
        {"max_num_seqs": 3, "num_kvcache_blocks": 5},
        {"max_num_batched_tokens": 48},
    ],
    ids=str,
)
def test_greedy_tokens_are_those_of_the_triton_backend_bar_ties(
    reference: Any, options: dict[str, Any]
) -> None:
    """Twice, so that the second time prefixes are cached and longer than what is computed."""
    prompts = random_prompts(4, 200) + [p + [7] * 600 for p in random_prompts(4, 200)]
    runs = []
    for backend in ("triton", "flash_attn"):
        with LLM(TINY, attention_backend=backend, **{**SMALL, **options}) as llm:
            runs.append([greedy(llm, prompts, 32) for _ in range(2)])
    for expected, outputs in zip(*runs, strict=True):
        for prompt, a, b in zip(prompts, expected, outputs, strict=True):
            if a != b:
                assert worst_gap(reference, [prompt, prompt], [a, b]) < TIE
