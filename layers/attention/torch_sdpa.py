"""The reference backend: torch's scaled_dot_product_attention over gathered pages."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.attention.base import AttentionBackend, AttentionBatch, AttentionSpec
from memory.kv_cache import KVLayer

# From 8 query heads a KV head on, two products of matrices are faster than one bag for each.
_MOST_BAGS_A_HEAD = 7


@dataclass(frozen=True, slots=True)
class _Prefill:
    """One request's query rows [first, last), its L cache rows and the mask [n, L]."""

    first: int
    last: int
    rows: Tensor | slice
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class _Decodes:
    """The decode requests: query rows from `first`, B * L cache rows, mask [B, 1, 1, L]."""

    first: int
    rows: Tensor | slice
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class _BagDecodes:
    """The decode requests, where values are summed up in place: query rows from `first`.

    The rows of a table of heads [.., head_dim]: of K [B * num_kv_heads * L], of V
    [B * num_heads * L] with the first one of each bag, and the mask [B * num_kv_heads or 1, 1, L
    or 1].
    """

    first: int
    keys: Tensor
    values: Tensor
    bags: Tensor
    mask: Tensor


class TorchAttention(AttentionBackend):
    """Gathers each request's K and V from its pages and calls SDPA; any device and dtype.

    Prefill runs one request at a time. Decodes run together, padded to the longest context,
    with the query heads of one KV head as the rows of one product. A single request whose
    blocks lie in order is read in place.

    On a CPU the values of several float32 decodes are not gathered: FBGEMM's embedding bag, a
    weighted sum of rows of a table, reads them in place. 30 requests of 2 KV heads and 60 to 340
    positions: 0.7 of SDPA's time.
    """

    name = "torch"

    def __init__(self, spec: AttentionSpec) -> None:
        self._spec = spec
        self._group = spec.num_heads // spec.num_kv_heads
        self._offsets = torch.arange(spec.block_size, device=spec.device)
        self._columns = torch.arange(spec.max_model_len, device=spec.device)
        cpu = spec.device.type == "cpu"
        self._gathered = torch.empty(0, dtype=spec.dtype) if cpu else None
        self._in_bags = (
            cpu
            and spec.dtype == torch.float32
            and self._group <= _MOST_BAGS_A_HEAD
            and "fbgemm" in torch.backends.quantized.supported_engines
        )
        heads = torch.arange(2 * spec.num_kv_heads, device=spec.device).unsqueeze(1)
        self._key_heads, values = heads.chunk(2)
        self._value_heads = values.repeat_interleave(self._group, 0)
        self._no_mask = torch.zeros(1, 1, 1, dtype=spec.dtype, device=spec.device)

    def prepare(
        self, batch: AttentionBatch
    ) -> tuple[list[_Prefill], _Decodes | _BagDecodes | None]:
        context_lens = batch.context_lens.tolist()
        starts = batch.query_start.tolist() if batch.num_prefills else []
        prefills = []
        for i in range(batch.num_prefills):
            context = context_lens[i]
            rows = self._request_rows(batch, i, context)
            n = starts[i + 1] - starts[i]
            mask = None
            if n != context:
                positions = self._columns[context - n : context]
                mask = self._columns[:context] <= positions.unsqueeze(1)
            prefills.append(_Prefill(starts[i], starts[i + 1], rows, mask))
        if len(context_lens) == batch.num_prefills:
            return prefills, None
        return prefills, self._decodes(_one_row_each(batch))

    def _decodes(self, batch: AttentionBatch) -> _Decodes | _BagDecodes:
        first = batch.num_prefill_tokens
        context_lens = batch.context_lens[batch.num_prefills :].tolist()
        longest = max(context_lens)
        if len(context_lens) == 1:
            rows = self._request_rows(batch, batch.num_prefills, longest)
            return _Decodes(first, rows, None)
        rows = self._cache_rows(batch.block_tables[batch.slots[batch.num_prefills :]], longest)
        if min(context_lens) == longest:
            return self._together(first, rows, None)
        lens = batch.context_lens[batch.num_prefills :].unsqueeze(1)
        visible = self._columns[:longest] < lens
        # Padding reads the request's own first row: other rows may hold anything, even NaN,
        # and a zero weight would not stop that.
        rows = torch.where(visible, rows, rows[:, :1])
        mask = torch.zeros(rows.shape, dtype=self._spec.dtype, device=rows.device)
        mask.masked_fill_(~visible, float("-inf"))
        return self._together(first, rows, mask)

    def _together(self, first: int, rows: Tensor, mask: Tensor | None) -> _Decodes | _BagDecodes:
        """Decodes of the cache rows [B, L] and their mask [B, L]."""
        if not self._in_bags:
            padding = None if mask is None else mask[:, None, None]
            return _Decodes(first, rows.flatten(), padding)
        requests, length = rows.shape
        kv_heads, heads = self._spec.num_kv_heads, self._spec.num_heads
        starts = rows.unsqueeze(1) * (2 * kv_heads)
        return _BagDecodes(
            first,
            keys=(starts + self._key_heads).flatten(),
            values=(starts + self._value_heads).flatten(),
            bags=torch.arange(0, requests * heads * length, length),
            mask=self._no_mask if mask is None else mask.repeat_interleave(kv_heads, 0)[:, None],
        )

    def _request_rows(self, batch: AttentionBatch, index: int, length: int) -> Tensor | slice:
        """Flat cache rows of one request's first `length` positions."""
        tables = batch.block_tables[batch.slots[index : index + 1]]
        blocks = tables[0, : -(-length // self._spec.block_size)].tolist()
        first = blocks[0]
        if blocks == list(range(first, first + len(blocks))):
            start = first * self._spec.block_size
            return slice(start, start + length)
        return self._cache_rows(tables, length)[0]

    def _cache_rows(self, tables: Tensor, length: int) -> Tensor:
        """Flat cache rows [B, length] of the first `length` positions behind `tables` [B, N]."""
        size = self._spec.block_size
        blocks = tables[:, : -(-length // size)].long()
        return (blocks.unsqueeze(-1) * size + self._offsets).flatten(1)[:, :length]

    def attend(
        self,
        q: Tensor,
        kv: KVLayer,
        prepared: tuple[list[_Prefill], _Decodes | _BagDecodes | None],
    ) -> Tensor:
        prefills, decodes = prepared
        parts = [self._prefill(q[p.first : p.last], kv, p) for p in prefills]
        if decodes is not None:
            parts.append(self._decode(q[decodes.first :], kv, decodes))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _prefill(self, q: Tensor, kv: KVLayer, prefill: _Prefill) -> Tensor:
        k, v = self._gather(kv, prefill.rows, 1)
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1).unsqueeze(0),
            k,
            v,
            attn_mask=prefill.mask,
            is_causal=prefill.mask is None,
            scale=self._spec.scale,
            enable_gqa=self._group > 1,
        )
        return out[0].transpose(0, 1).reshape(q.shape[0], -1)

    def _decode(self, q: Tensor, kv: KVLayer, decodes: _Decodes | _BagDecodes) -> Tensor:
        if isinstance(decodes, _BagDecodes):
            return self._decode_in_bags(q, kv, decodes)
        spec = self._spec
        n = q.shape[0]
        k, v = self._gather(kv, decodes.rows, n)
        out = F.scaled_dot_product_attention(
            q.reshape(n, spec.num_kv_heads, self._group, spec.head_dim),
            k,
            v,
            attn_mask=decodes.mask,
            scale=spec.scale,
        )
        return out.reshape(n, -1)

    def _decode_in_bags(self, q: Tensor, kv: KVLayer, decodes: _BagDecodes) -> Tensor:
        n, _, dim = q.shape
        table = kv.flat.view(-1, dim)
        k = self._select(table, decodes.keys).view(n * self._spec.num_kv_heads, -1, dim)
        q = q.reshape(-1, self._group, dim)
        scores = torch.baddbmm(decodes.mask, q, k.transpose(1, 2), alpha=self._spec.scale)
        weights = scores.softmax(-1).flatten()
        out = torch.embedding_bag(
            table, decodes.values, decodes.bags, mode=0, per_sample_weights=weights
        )
        return out[0].view(n, -1)

    def _select(self, table: Tensor, rows: Tensor) -> Tensor:
        """The rows [R] of `table` [N, ..]; on a CPU good until the next call."""
        if self._gathered is None:
            return table.index_select(0, rows)
        # malloc takes more than 32 MiB from the kernel each time, page by page: 4 times as slow.
        shape = (rows.shape[0], *table.shape[1:])
        size = math.prod(shape)
        if self._gathered.numel() < size:
            self._gathered = self._gathered.new_empty(size + size // 8)
        return torch.index_select(table, 0, rows, out=self._gathered[:size].view(shape))

    def _gather(self, kv: KVLayer, rows: Tensor | slice, n: int) -> tuple[Tensor, Tensor]:
        """K and V at n requests' cache rows: [n, num_kv_heads, L, head_dim] each."""
        if isinstance(rows, slice):
            start, length = rows.start, rows.stop - rows.start
            return kv.keys.narrow(2, start, length), kv.values.narrow(2, start, length)
        heads, dim = kv.flat.shape[1:]
        pages = self._select(kv.flat, rows).view(n, -1, heads, dim).transpose(1, 2)
        k, v = pages.chunk(2, dim=1)
        return k, v


def _one_row_each(batch: AttentionBatch) -> AttentionBatch:
    """The batch with a request for each row of a decode, which sees what the row sees."""
    count, first = batch.rows_per_decode, batch.num_prefills
    if count == 1:
        return batch
    hidden = torch.arange(count - 1, -1, -1, device=batch.context_lens.device)
    lens = batch.context_lens[first:].unsqueeze(1) - hidden
    slots = batch.slots[first:].repeat_interleave(count)
    return replace(
        batch,
        slots=torch.cat((batch.slots[:first], slots)),
        context_lens=torch.cat((batch.context_lens[:first], lens.flatten())),
        rows_per_decode=1,
    )
