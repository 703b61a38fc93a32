"""The reference backend against attention written out in float64, over shuffled pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.types import KVGeometry
from layers.attention.base import AttentionBatch, AttentionSpec
from layers.attention.torch_sdpa import TorchAttention
from memory.kv_cache import KVCache, KVLayer
from tests.layers.tensors import CPU

MAX_LEN = 200


@dataclass(frozen=True)
class Request:
    """Visible tokens, and how many of the last ones are queries."""

    context: int
    queries: int = 1


@dataclass
class Case:
    """Requests with pages all over a cache in which everything else is NaN."""

    spec: AttentionSpec
    batch: AttentionBatch
    kv: KVLayer
    q: Tensor
    expected: Tensor


def _case(
    prefills: list[Request],
    decodes: list[Request],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    in_order: bool = False,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    requests = prefills + decodes
    max_blocks = -(-MAX_LEN // block_size)
    num_slots = len(requests) + 2
    num_blocks = num_slots * max_blocks
    spec = AttentionSpec(
        heads, kv_heads, head_dim, 0.11, block_size, MAX_LEN, num_slots, dtype, CPU
    )
    geometry = KVGeometry(1, kv_heads, head_dim, block_size, num_blocks, dtype.itemsize)
    (kv,) = KVCache(geometry, dtype, CPU).layers()
    kv.flat.fill_(float("nan"))
    order = (
        torch.arange(num_blocks) if in_order else torch.randperm(num_blocks, generator=generator)
    )
    # Whatever is not written below is stale: blocks of other requests, or of none.
    tables = order.view(num_slots, max_blocks).int()
    slots = torch.randperm(num_slots, generator=generator)[: len(requests)]
    queries, outputs = [], []
    for request, slot in zip(requests, slots.tolist(), strict=True):
        n, length = request.queries, request.context
        keys, values = (
            torch.randn(length, kv_heads, head_dim, generator=generator).to(dtype) for _ in "kv"
        )
        for position in range(length):
            block = int(tables[slot, position // block_size])
            kv.k[block, position % block_size] = keys[position]
            kv.v[block, position % block_size] = values[position]
        q = torch.randn(n, heads, head_dim, generator=generator).to(dtype)
        queries.append(q)
        outputs.append(_naive(q, keys, values, spec.scale))
    counts = [request.queries for request in prefills]
    batch = AttentionBatch(
        block_tables=tables,
        slots=slots,
        context_lens=torch.tensor([request.context for request in requests]),
        query_start=torch.tensor([0, *counts]).cumsum(0),
        num_prefills=len(prefills),
        num_prefill_tokens=sum(counts),
        max_query_len=max(counts, default=0),
        max_context_len=max((request.context for request in prefills), default=0),
    )
    return Case(spec, batch, kv, torch.cat(queries), torch.cat(outputs).to(dtype))


def _naive(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Causal attention of the last len(q) positions, one head at a time, in float64."""
    n, heads, _ = q.shape
    length, kv_heads, _ = keys.shape
    out = torch.empty(q.shape, dtype=torch.float64)
    for head in range(heads):
        kv_head = head // (heads // kv_heads)
        scores = q[:, head].double() @ keys[:, kv_head].double().T * scale
        for row in range(n):
            visible = length - n + row + 1
            weights = torch.softmax(scores[row, :visible], dim=0)
            out[row, head] = weights @ values[:visible, kv_head].double()
    return out.flatten(1)


def _attend(case: Case, q: Tensor | None = None) -> Tensor:
    backend = TorchAttention(case.spec)
    return backend.attend(case.q if q is None else q, case.kv, backend.prepare(case.batch))


def _check(case: Case) -> None:
    tolerance = 1e-5 if case.spec.dtype == torch.float32 else 2e-2
    out = _attend(case)
    assert out.shape == case.expected.shape
    torch.testing.assert_close(out, case.expected, rtol=tolerance, atol=tolerance)


PREFILLS = [Request(40, 40), Request(1, 1), Request(50, 7), Request(33, 1), Request(17, 16)]
DECODES = [Request(1), Request(16), Request(17), Request(150), Request(64)]
MIXTURES = {
    "prefill": ([Request(40, 40)], []),
    "prefill-with-prefix": ([Request(70, 9)], []),
    "prefills": (PREFILLS, []),
    "decode": ([], [Request(45)]),
    "decodes": ([], DECODES),
    "decodes-of-one-length": ([], [Request(35)] * 3),
    "one-of-each": ([Request(20, 20)], [Request(31)]),
    "mixed": (PREFILLS, DECODES),
}


@pytest.mark.parametrize("in_order", [False, True], ids=["shuffled", "in-order"])
@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_of_prefills_and_decodes(name: str, in_order: bool) -> None:
    prefills, decodes = MIXTURES[name]
    _check(_case(prefills, decodes, in_order=in_order))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (2, 1), (8, 2), (6, 1), (12, 2)])
def test_group_sizes(heads: int, kv_heads: int, head_dim: int) -> None:
    _check(_case(PREFILLS, DECODES, heads=heads, kv_heads=kv_heads, head_dim=head_dim))


@pytest.mark.parametrize("block_size", [16, 32, 64, 256])
def test_block_sizes(block_size: int) -> None:
    _check(_case(PREFILLS, DECODES, block_size=block_size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    _check(_case(PREFILLS, DECODES, dtype=dtype))


@pytest.mark.parametrize("seed", range(8))
def test_random_mixtures(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def below(limit: int) -> int:
        return int(torch.randint(1, limit, (1,), generator=generator))

    prefills = []
    for _ in range(below(4)):
        context = below(MAX_LEN)
        prefills.append(Request(context, below(context + 1)))
    decodes = [Request(below(MAX_LEN)) for _ in range(below(6))]
    _check(_case(prefills, decodes, seed=seed))


def test_rows_of_queries_may_be_strided() -> None:
    """They are a part of each row of the QKV projection."""
    case = _case(PREFILLS, DECODES)
    wide = torch.full((case.q.shape[0], 9, case.q.shape[2]), float("nan"))
    wide[:, :4] = case.q
    torch.testing.assert_close(_attend(case, wide[:, :4]), case.expected, rtol=1e-5, atol=1e-5)


def test_the_pages_are_left_as_they_were() -> None:
    case = _case(PREFILLS, DECODES)
    before = case.kv.flat.clone()
    _attend(case)
    assert torch.equal(case.kv.flat.nan_to_num(7.0), before.nan_to_num(7.0))


def test_what_is_prepared_serves_every_layer() -> None:
    case = _case(PREFILLS, DECODES)
    backend = TorchAttention(case.spec)
    prepared: Any = backend.prepare(case.batch)
    first = backend.attend(case.q, case.kv, prepared)
    assert torch.equal(backend.attend(case.q, case.kv, prepared), first)
