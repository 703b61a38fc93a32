"""The caller's torch state changes no output on a CUDA device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from llm import LLM, SamplingParams
from tests.engine.test_torch_state import PARAMS, PROMPTS, STATES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


@contextmanager
def _blas(name: str) -> Iterator[None]:
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(name)
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


GPU_STATES: dict[str, Any] = {
    **STATES,
    "autocast on the device": partial(torch.autocast, "cuda", dtype=torch.float16),
    "cuBLASLt": partial(_blas, "cublaslt"),
}


@pytest.fixture(scope="module", params=[{}, {"enforce_eager": True}, {"pipeline_depth": 0}])
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    model = Path(__file__).parents[2] / "assets" / "qwen3-tiny-python"
    options = {"num_kvcache_blocks": 64, "max_num_seqs": 16, "max_model_len": 128}
    with LLM(model, **options, **request.param) as llm:
        yield llm


def _generated(llm: LLM) -> list[Any]:
    more = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, logprobs=1)
    outs = llm.generate([*PROMPTS, PROMPTS[0]], [*PARAMS, more], use_tqdm=False)
    return [[out[key] for key in ("token_ids", "logprobs", "prompt_logprobs")] for out in outs]


@pytest.fixture(scope="module")
def plain(llm: LLM) -> list[Any]:
    expected = _generated(llm)
    assert _generated(llm) == expected
    return expected


@pytest.mark.parametrize("name", GPU_STATES)
def test_generate_in_any_state(llm: LLM, plain: list[Any], name: str) -> None:
    state: AbstractContextManager[Any] = GPU_STATES[name]()
    with state:
        assert _generated(llm) == plain
    assert _generated(llm) == plain
