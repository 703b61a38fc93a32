"""The contract of an attention backend: subclass AttentionContract and pytest does the rest.

The reference is attention written out in float64, over shuffled pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from engine.types import KVGeometry
from layers.attention.base import AttentionBackend, AttentionBatch, AttentionSpec
from memory.kv_cache import KVCache, KVLayer

# In blocks of 16 tokens; lengths grow with the block, so that requests have several.
MAX_LEN = 200


@dataclass(frozen=True)
class Request:
    """Visible tokens, and how many of the last ones are queries."""

    context: int
    queries: int = 1

    def times(self, factor: int) -> Request:
        """Longer by `factor`; what is 1 stays 1."""
        context, queries = (n if n == 1 else n * factor for n in (self.context, self.queries))
        return Request(context, queries)


@dataclass
class Case:
    """Requests with pages all over a cache in which everything else is NaN."""

    spec: AttentionSpec
    batch: AttentionBatch
    kv: KVLayer
    q: Tensor
    expected: Tensor


def make_case(
    prefills: list[Request],
    decodes: list[Request],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype,
    device: torch.device,
    in_order: bool = False,
    window: int | None = None,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    requests = prefills + decodes
    max_len = max(MAX_LEN, *(request.context for request in requests))
    max_blocks = -(-max_len // block_size)
    num_slots = len(requests) + 2
    num_blocks = num_slots * max_blocks
    per_decode = decodes[0].queries if decodes else 1
    sizes = heads, kv_heads, head_dim, 0.11, block_size, max_len, num_slots
    spec = AttentionSpec(*sizes, dtype, device, per_decode, windowed=window is not None)
    geometry = KVGeometry(1, kv_heads, head_dim, block_size, num_blocks, dtype.itemsize)
    (kv,) = KVCache(geometry, dtype, device).layers()
    kv.flat.fill_(float("nan"))
    order = (
        torch.arange(num_blocks) if in_order else torch.randperm(num_blocks, generator=generator)
    )
    # Whatever is not written below is stale: blocks of other requests, or of none.
    tables = order.view(num_slots, max_blocks).int().to(device)
    slots = torch.randperm(num_slots, generator=generator)[: len(requests)]
    queries, outputs = [], []
    for request, slot in zip(requests, slots.tolist(), strict=True):
        n, length = request.queries, request.context
        keys, values = (
            torch.randn(length, kv_heads, head_dim, generator=generator).to(device, dtype)
            for _ in "kv"
        )
        positions = torch.arange(length, device=device)
        pages = tables[slot, positions // block_size].long()
        # Blocks before the windows have been freed: they stay NaN.
        first_read = 0 if window is None else max(0, length - n - window + 1)
        kept = positions // block_size >= first_read // block_size
        kv.k[pages[kept], positions[kept] % block_size] = keys[kept]
        kv.v[pages[kept], positions[kept] % block_size] = values[kept]
        q = torch.randn(n, heads, head_dim, generator=generator).to(device, dtype)
        queries.append(q)
        outputs.append(_naive(q, keys, values, spec.scale, window))
    counts = [request.queries for request in prefills]
    int32: dict[str, Any] = {"dtype": torch.int32, "device": device}
    batch = AttentionBatch(
        block_tables=tables,
        slots=slots.to(device, torch.int32),
        context_lens=torch.tensor([request.context for request in requests], **int32),
        query_start=torch.tensor([0, *counts], **int32).cumsum(0, dtype=torch.int32),
        num_prefills=len(prefills),
        num_prefill_tokens=sum(counts),
        max_query_len=max(counts, default=0),
        rows_per_decode=per_decode,
        window=window,
    )
    return Case(spec, batch, kv, torch.cat(queries), torch.cat(outputs).to(dtype))


def _naive(
    q: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None = None
) -> Tensor:
    """Causal attention of the last len(q) positions, one head at a time, in float64."""
    n, heads, _ = q.shape
    length, kv_heads, _ = keys.shape
    hidden = torch.ones(n, length, dtype=torch.bool, device=q.device).triu(length - n + 1)
    if window is not None:
        hidden |= torch.ones_like(hidden).tril(length - n - window)
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    for head in range(heads):
        kv_head = head // (heads // kv_heads)
        scores = q[:, head].double() @ keys[:, kv_head].double().T * scale
        weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=1)
        out[:, head] = weights @ values[:, kv_head].double()
    return out.flatten(1)


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


class AttentionContract:
    """What an attention backend must compute.

        class TestMyAttention(AttentionContract):
            make_backend = MyAttention

    What `unsupported` refuses is skipped, with the reason.

    Attributes:
        make_backend: the class.
        device: where.
        dtypes: of queries and cache.
        block_size: where a test is not about it.
    """

    make_backend: ClassVar[type[AttentionBackend]]
    device: ClassVar[str] = "cpu"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.bfloat16, torch.float16)
    block_size: ClassVar[int] = 16

    @pytest.mark.parametrize("in_order", [False, True], ids=["shuffled", "in-order"])
    @pytest.mark.parametrize("name", MIXTURES)
    def test_mixtures_of_prefills_and_decodes(self, name: str, in_order: bool) -> None:
        for dtype in self.dtypes:
            self.check(self.case(*MIXTURES[name], in_order=in_order, dtype=dtype))

    @pytest.mark.parametrize("head_dim", [64, 128])
    @pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (2, 1), (8, 2), (6, 1), (12, 2)])
    def test_group_sizes(self, heads: int, kv_heads: int, head_dim: int) -> None:
        self.check(self.case(heads=heads, kv_heads=kv_heads, head_dim=head_dim))

    @pytest.mark.parametrize("block_size", [16, 32, 64, 256, 512])
    def test_block_sizes(self, block_size: int) -> None:
        self.check(self.case(block_size=block_size))

    @pytest.mark.parametrize("seed", range(8))
    def test_random_mixtures(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def below(limit: int) -> int:
            return int(torch.randint(1, limit, (1,), generator=generator))

        prefills = []
        for _ in range(below(4)):
            context = below(MAX_LEN)
            prefills.append(Request(context, below(context + 1)))
        decodes = [Request(below(MAX_LEN)) for _ in range(below(6))]
        self.check(self.case(prefills, decodes, seed=seed))

    @pytest.mark.parametrize("rows", [2, 3, 5])
    @pytest.mark.parametrize("groups", [(4, 2), (6, 1), (12, 2)], ids=str)
    def test_decodes_of_several_rows(self, rows: int, groups: tuple[int, int]) -> None:
        """Every decode has as many, each of which sees one position more than the one before."""
        decodes = [Request(max(r.context, rows), rows) for r in DECODES]
        heads, kv_heads = groups
        for some in (decodes, decodes[:1], [Request(35, rows)] * 3):
            for prefills in ([], PREFILLS):
                self.check(self.case(prefills, some, heads=heads, kv_heads=kv_heads))

    @pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 40, 100, 500])
    @pytest.mark.parametrize("name", MIXTURES)
    def test_windows(self, name: str, window: int) -> None:
        """A backend whose `windows` is False is skipped."""
        if not type(self).make_backend.windows:
            pytest.skip("the backend has no sliding windows")
        for in_order in (False, True):
            self.check(self.case(*MIXTURES[name], window=window, in_order=in_order))
        if not MIXTURES[name][0]:
            decodes = [Request(max(r.context, 3), 3) for r in MIXTURES[name][1]]
            self.check(self.case([], decodes, window=window))

    @pytest.mark.parametrize("window", [1, 2, 16, 17, 40])
    @pytest.mark.parametrize("extra", [-1, 0, 1, 2])
    def test_prompts_about_as_long_as_a_window(self, window: int, extra: int) -> None:
        """As a whole, and in two chunks. A backend whose `windows` is False is skipped."""
        if not type(self).make_backend.windows:
            pytest.skip("the backend has no sliding windows")
        length = max(1, window + extra)
        for num_queries in {length, max(1, length - 1), 1}:
            self.check(self.case([Request(length, num_queries)], [], window=window))

    def test_rows_of_queries_may_be_strided(self) -> None:
        """They are a part of each row of the QKV projection."""
        case = self.case()
        shape = (case.q.shape[0], 9, case.q.shape[2])
        wide = torch.full(shape, float("nan"), dtype=case.q.dtype, device=case.q.device)
        wide[:, :4] = case.q
        self.check(case, wide[:, :4])

    def test_the_pages_are_left_as_they_were(self) -> None:
        case = self.case()
        before = case.kv.flat.clone()
        self.check(case)
        assert torch.equal(case.kv.flat.nan_to_num(7.0), before.nan_to_num(7.0))

    def test_what_is_prepared_serves_every_layer(self) -> None:
        case = self.case()
        backend = type(self).make_backend(case.spec)
        prepared: Any = backend.prepare(case.batch)
        first = backend.attend(case.q, case.kv, prepared).clone()
        assert torch.equal(backend.attend(case.q, case.kv, prepared), first)

    def case(
        self,
        prefills: list[Request] | None = None,
        decodes: list[Request] | None = None,
        **options: Any,
    ) -> Case:
        """Requests, a mixture if none are given, on this device; of lengths for blocks of 16."""
        if prefills is None or decodes is None:
            prefills, decodes = MIXTURES["mixed"]
        defaults = {"dtype": self.dtypes[0], "device": torch.device(self.device)}
        options = {**defaults, "block_size": self.block_size, **options}
        factor = options["block_size"] // 16
        prefills, decodes = ([r.times(factor) for r in part] for part in (prefills, decodes))
        made = make_case(prefills, decodes, **options)
        reason = type(self).make_backend.unsupported(made.spec)
        if reason is not None:
            pytest.skip(reason)
        return made

    def check(self, case: Case, q: Tensor | None = None) -> None:
        """Compare with the reference."""
        backend = type(self).make_backend(case.spec)
        out = backend.attend(case.q if q is None else q, case.kv, backend.prepare(case.batch))
        # Sums of hundreds of products in float32; probabilities and outputs rounded to 16 bits.
        tolerance = 1e-5 if case.spec.dtype == torch.float32 else 2e-2
        assert out.shape == case.expected.shape
        torch.testing.assert_close(out, case.expected, rtol=tolerance, atol=tolerance)
