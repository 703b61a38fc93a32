"""The flash_attn backend on a stand-in for its package; the real one: tests/gpu."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from engine.device_state import chunks_header
from engine.types import PrefillChunk
from layers.attention.base import AttentionSpec
from layers.attention.flash_attn import FlashAttention
from layers.attention.torch_sdpa import TorchAttention
from layers.step_rows import StepRows
from llm import LLM, SamplingParams
from tests.contracts.attention import AttentionContract, Request, make_case
from tests.layers.attention import fake_flash_attn
from utils.errors import ConfigError

GPU_SPEC = AttentionSpec(4, 2, 64, 0.125, 256, 1024, 4, torch.bfloat16, torch.device("cuda"))


class OnCPU(FlashAttention):
    @staticmethod
    def unsupported(spec: AttentionSpec) -> str | None:
        return FlashAttention.unsupported(replace(spec, device=torch.device("cuda")))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, hopper: None) -> ModuleType:
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash_attn)
    return fake_flash_attn


@pytest.mark.usefixtures("package")
class TestFlashAttention(AttentionContract):
    make_backend = OnCPU
    dtypes = (torch.bfloat16, torch.float16)
    block_size = 256


@pytest.mark.usefixtures("package")
def test_what_it_can_serve() -> None:
    assert FlashAttention.unsupported(GPU_SPEC) is None


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": torch.device("cpu")}, "CUDA device"),
        ({"dtype": torch.float32}, "not torch.float32"),
        ({"head_dim": 264}, "not 264"),
        ({"head_dim": 60}, "not 60"),
        ({"block_size": 128}, "multiple of 256 as kvcache_block_size, not 128"),
    ],
    ids=str,
)
def test_what_it_cannot_serve(change: dict[str, Any], reason: str) -> None:
    assert reason in (FlashAttention.unsupported(replace(GPU_SPEC, **change)) or "")


@pytest.mark.usefixtures("package")
def test_an_old_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0" in (FlashAttention.unsupported(GPU_SPEC) or "")


@pytest.mark.parametrize("version", ["2.6.3", "3.0.0", "1.0", None])
def test_a_version_with_other_functions_is_refused(
    package: ModuleType, monkeypatch: pytest.MonkeyPatch, version: str | None
) -> None:
    monkeypatch.setattr(package, "__version__", version)
    assert f"2.7 or a later 2.x, not {version}" in (FlashAttention.unsupported(GPU_SPEC) or "")


@pytest.mark.parametrize("version", ["2.7.0", "2.7.4.post1", "2.10.0"])
def test_versions_that_do(
    package: ModuleType, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(package, "__version__", version)
    assert FlashAttention.unsupported(GPU_SPEC) is None


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch, hopper: None) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)


@pytest.mark.usefixtures("missing")
def test_without_the_package_it_says_so(shipped: Path) -> None:
    assert "cannot be imported" in (FlashAttention.unsupported(GPU_SPEC) or "")
    with pytest.raises(ConfigError, match="cannot be imported"):
        LLM(shipped, device="cpu", dtype="bfloat16", attention_backend=OnCPU)


@pytest.mark.usefixtures("missing")
def test_without_the_package_nothing_needs_an_option(shipped: Path) -> None:
    with LLM(shipped, device="cpu", max_num_seqs=2) as llm:
        (output,) = llm.generate("def f", SamplingParams(max_tokens=2), use_tqdm=False)
    assert len(output["token_ids"]) == 2


@pytest.mark.usefixtures("package")
def test_an_engine_on_it_gives_the_tokens_of_the_reference(shipped: Path) -> None:
    """Prompts in chunks beside decodes, and prompts whose beginning is cached."""
    common = list(range(300, 700))
    prompts = [common + [7 * i + 3] * (5 + 40 * i) for i in range(4)]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    options: dict[str, Any] = {
        "dtype": "bfloat16",
        "max_num_batched_tokens": 200,
        "max_num_seqs": 3,
    }
    tokens = []
    for backend in (OnCPU, TorchAttention):
        with LLM(shipped, device="cpu", attention_backend=backend, **options) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        tokens.append([out["token_ids"] for out in outputs])
    assert tokens[0] == tokens[1]


@pytest.mark.usefixtures("package")
def test_padding_of_captured_chunks_is_no_decode() -> None:
    """Two chunks of a captured step of 24 rows, of which the last 15 are padding."""
    case = make_case(
        [Request(40, 5), Request(4, 4)],
        [],
        block_size=256,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    chunks = tuple(PrefillChunk(slot, 0, n, True) for slot, n in ((0, 5), (1, 4)))
    rows = StepRows.empty(
        torch.from_numpy(chunks_header(chunks, 2, 24, len(case.batch.block_tables) - 1)),
        24,
        2,
        num_chunks=2,
    ).first_rows(24)
    rows.query_start[:3], rows.context_lens[:2] = case.batch.query_start, case.batch.context_lens
    rows.slots[:2] = case.batch.slots
    backend = OnCPU(case.spec)
    q = torch.cat((case.q, torch.zeros(15, *case.q.shape[1:], dtype=case.q.dtype)))
    out = backend.attend(q, case.kv, backend.prepare(rows.attention(case.batch.block_tables)))
    torch.testing.assert_close(out[:9], case.expected, atol=1e-2, rtol=1e-2)
