"""How a batch is divided between the two kernels; `tests.kernels` has the kernels themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from layers.attention.base import AttentionBatch, AttentionSpec
from layers.attention.triton_paged import TritonAttention
from memory.kv_cache import KVLayer
from tests.kernels.interpreter import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")

HEADS, DIM, PER_DECODE = 4, 16, 3
SPEC = AttentionSpec(
    HEADS, 2, DIM, 0.25, 16, 64, 8, torch.float32, torch.device("cpu"), rows_per_decode=PER_DECODE
)


@pytest.mark.parametrize(("chunks", "decodes"), [((2, 5), 2), ((4,), 0), ((), 3)])
def test_chunks_come_first_and_decodes_have_all_their_rows(
    monkeypatch: pytest.MonkeyPatch, chunks: tuple[int, ...], decodes: int
) -> None:
    """Each kernel is given the slots and lengths of its rows, and where their output goes."""
    called: list[str] = []
    count, first = len(chunks), sum(chunks)
    lens = torch.arange(10, 10 + count + decodes, dtype=torch.int32)
    slots = torch.arange(count + decodes, dtype=torch.int32).flip(0)
    tables = torch.zeros(8, 4, dtype=torch.int32)
    q = torch.randn(first + decodes * PER_DECODE, HEADS, DIM)
    kv = KVLayer.of(torch.zeros(4, 16, 2, 2, DIM))
    starts = torch.tensor([0, *chunks], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    batch = AttentionBatch(
        tables, slots, lens, starts, count, first, max(chunks, default=0), PER_DECODE
    )

    def prefill(
        rows: Tensor, pages: KVLayer, *indices: Tensor, out: Tensor, **options: Any
    ) -> None:
        called.append("prefill")
        assert pages is kv
        for got, expected in zip(
            (rows, *indices), (q[:first], tables, slots[:count], starts, lens[:count]), strict=True
        ):
            assert torch.equal(got, expected)
        assert options["scale"] == SPEC.scale
        out.copy_(rows)

    def decode(rows: Tensor, pages: KVLayer, *indices: Tensor, out: Tensor, **options: Any) -> None:
        called.append("decode")
        assert pages is kv
        for got, expected in zip(
            (rows, *indices), (q[first:], tables, slots[count:], lens[count:]), strict=True
        ):
            assert torch.equal(got, expected)
        assert options["scale"] == SPEC.scale
        assert options["rows_per_request"] == PER_DECODE
        assert options["max_context_len"] == SPEC.max_model_len
        out.copy_(rows)

    monkeypatch.setattr("layers.attention.triton_paged.dependent_launch", lambda device: False)
    monkeypatch.setattr("layers.attention.triton_paged.has_wgmma", lambda device: False)
    monkeypatch.setattr("layers.kernels.paged_prefill.paged_prefill", prefill)
    monkeypatch.setattr("layers.kernels.paged_decode.paged_decode", decode)
    made: list[Any] = []
    monkeypatch.setattr(
        "layers.kernels.decode_launch.decode_workspace",
        lambda *sizes, **options: made.append((sizes[1:], options)),
    )
    backend = TritonAttention(SPEC)
    assert made == [((HEADS, 2, DIM, SPEC.max_model_len), {"rows_per_request": PER_DECODE})]
    out = backend.attend(q, kv, backend.prepare(batch))
    assert torch.equal(out, q.flatten(1))
    assert called == ["prefill"] * bool(chunks) + ["decode"] * bool(decodes)
