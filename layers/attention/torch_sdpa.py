"""The reference attention backend: torch's scaled_dot_product_attention (SDPA).

A query row: the queries of one token. A cache row: K and V of one position in `KVLayer.flat`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.attention.base import AttentionBackend, AttentionBatch, AttentionSpec
from layers.attention.sdpa_parts import decode_groups, masked_attention
from memory.kv_cache import KVLayer


@dataclass(frozen=True, slots=True)
class _Part:
    """The query rows of one prefill, or n query rows of decodes that are one SDPA call.

    `queries` are the indices of the query rows, and `rows` those of the cache rows that they see.
    For decodes, `rows` has L indices for each query row, where L is the most that any of them sees,
    and `mask` is [n, 1, 1, L] or None for no mask.
    """

    queries: Tensor | slice
    rows: Tensor | slice
    mask: Tensor | None = None
    decodes: bool = True
    window: int | None = None


class TorchAttention(AttentionBackend):
    """Gathers each request's K and V from the cache and calls SDPA, on any device, for any dtype.

    Decodes of similar lengths together are one SDPA call, with K and V padded to the length of the
    longest. If a prefill, or a call's only decode, has consecutive block ids, its K and V are read
    in place, not gathered.
    """

    name = "torch"
    windows = True

    def __init__(self, spec: AttentionSpec) -> None:
        self._spec = spec
        self._group = spec.num_heads // spec.num_kv_heads
        self._row_bytes = 2 * spec.num_kv_heads * spec.head_dim * spec.dtype.itemsize
        self._offsets = torch.arange(spec.block_size, device=spec.device)
        self._columns = torch.arange(spec.max_model_len, device=spec.device)
        cpu = spec.device.type == "cpu"
        self._gathered = torch.empty(0, dtype=spec.dtype, device="cpu") if cpu else None

    def prepare(self, batch: AttentionBatch) -> list[_Part]:
        count, window, parts = batch.num_prefills, batch.window, []
        tables = batch.block_tables[batch.slots]
        starts = batch.query_start.tolist() if count else []
        for i, context in enumerate(batch.context_lens[:count].tolist()):
            queries = slice(starts[i], starts[i + 1])
            first = max(0, context - (queries.stop - queries.start) - window + 1) if window else 0
            rows = self._request_rows(tables[i : i + 1], first, context)
            parts.append(_Part(queries, rows, decodes=False, window=window))
        if count < len(batch.slots):
            parts += self._decodes(batch, tables[count:])
        return parts

    def _decodes(self, batch: AttentionBatch, tables: Tensor) -> list[_Part]:
        lens, count = batch.context_lens[batch.num_prefills :], batch.rows_per_decode
        if count > 1:
            # Each query row is treated as a separate request that ends with the row's token.
            lens = (lens.unsqueeze(1) + torch.arange(1 - count, 1, device=lens.device)).flatten()
            tables = tables.repeat_interleave(count, 0)
        first, window = batch.num_prefill_tokens, batch.window
        groups = decode_groups([min(n, window or n) for n in lens.tolist()], self._row_bytes)
        if len(groups) == 1:
            return [self._decode_part(slice(first, None), lens, tables, window)]
        each = (torch.tensor(group, device=lens.device) for group in groups)
        return [self._decode_part(at + first, lens[at], tables[at], window) for at in each]

    def _decode_part(
        self, queries: Tensor | slice, lens: Tensor, tables: Tensor, window: int | None
    ) -> _Part:
        known = lens.tolist()
        longest = max(known)
        if len(known) == 1:
            begin = max(0, longest - window) if window else 0
            return _Part(queries, self._request_rows(tables, begin, longest))
        rows, mask = self._cache_rows(tables, longest), None
        if window and longest > window:
            begins = (lens - window).clamp(min=0)
            columns = begins.unsqueeze(1) + self._columns[:window]
            rows = rows.gather(1, columns.clamp(max=longest - 1))
            lens, longest = lens - begins, window
        if min(known) < longest:
            visible = self._columns[:longest] < lens.unsqueeze(1)
            # Masked entries read the request's first cache row instead of unused cache rows. Unused
            # rows may contain NaN, and NaN times an attention weight of 0 is NaN.
            rows = torch.where(visible, rows, rows[:, :1])
            mask = torch.zeros(rows.shape, dtype=self._spec.dtype, device=rows.device)
            mask = mask.masked_fill_(~visible, float("-inf"))[:, None, None]
        return _Part(queries, rows.flatten(), mask)

    def _request_rows(self, table: Tensor, begin: int, end: int) -> Tensor | slice:
        """Return the indices of the cache rows of one request's tokens `begin` to `end` - 1."""
        size = self._spec.block_size
        blocks = table[0, begin // size : -(-end // size)].tolist()
        first = blocks[0]
        if blocks == list(range(first, first + len(blocks))):
            start = first * size + begin % size
            return slice(start, start + end - begin)
        return self._cache_rows(table, end)[0, begin:]

    def _cache_rows(self, tables: Tensor, length: int) -> Tensor:
        """Return the cache row indices [B, length] of each request's first `length` tokens."""
        size = self._spec.block_size
        blocks = tables[:, : -(-length // size)].long()
        return (blocks.unsqueeze(-1) * size + self._offsets).flatten(1)[:, :length]

    def attend(self, q: Tensor, kv: KVLayer, prepared: list[_Part]) -> Tensor:
        if len(prepared) == 1:
            return self._part(q, kv, prepared[0])
        out = q.new_empty(q.shape[0], q.shape[1] * q.shape[2])
        for part in prepared:
            out[part.queries] = self._part(q[part.queries], kv, part)
        return out

    def _part(self, q: Tensor, kv: KVLayer, part: _Part) -> Tensor:
        return (self._decode if part.decodes else self._prefill)(q, kv, part)

    def _prefill(self, q: Tensor, kv: KVLayer, part: _Part) -> Tensor:
        k, v = self._gather(kv, part.rows, 1)
        n = q.shape[0]
        q, gqa, scale = q.transpose(0, 1).unsqueeze(0), self._group > 1, self._spec.scale
        if n == k.shape[2] and not (part.window and n > part.window):
            attention = F.scaled_dot_product_attention
            out = attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
        else:
            out = masked_attention(q, k, v, self._columns, part.window, scale)
        return out[0].transpose(0, 1).reshape(n, -1)

    def _decode(self, q: Tensor, kv: KVLayer, part: _Part) -> Tensor:
        spec, n = self._spec, q.shape[0]
        k, v = self._gather(kv, part.rows, n)
        q = q.reshape(n, spec.num_kv_heads, self._group, spec.head_dim)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=part.mask, scale=spec.scale)
        return out.reshape(n, -1)

    def _gather(self, kv: KVLayer, rows: Tensor | slice, n: int) -> tuple[Tensor, ...]:
        """Return K and V of n requests, for L cache rows each: [n, num_kv_heads, L, head_dim]."""
        if isinstance(rows, slice):
            start, length = rows.start, rows.stop - rows.start
            return kv.keys.narrow(2, start, length), kv.values.narrow(2, start, length)
        (heads, dim), out = kv.flat.shape[1:], None
        if self._gathered is not None:
            # Gathering over 32 MiB into a new tensor takes 4 times as long as into a reused tensor.
            size = rows.shape[0] * heads * dim
            if self._gathered.numel() < size:
                self._gathered = self._gathered.new_empty(size + size // 8)
            out = self._gathered[:size].view(-1, heads, dim)
        pages = torch.index_select(kv.flat, 0, rows, out=out)
        return pages.view(n, -1, heads, dim).transpose(1, 2).chunk(2, dim=1)
