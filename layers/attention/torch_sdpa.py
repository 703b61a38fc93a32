"""The reference backend: torch's scaled_dot_product_attention over gathered pages."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.attention.base import AttentionBackend, AttentionBatch, AttentionSpec
from memory.kv_cache import KVLayer


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


class TorchAttention(AttentionBackend):
    """Gathers each request's K and V from its pages and calls SDPA; any device and dtype.

    Prefill runs one request at a time. Decodes run together, padded to the longest context,
    with the query heads of one KV head as the rows of one product. A single request whose
    blocks lie in order is read in place.
    """

    name = "torch"

    def __init__(self, spec: AttentionSpec) -> None:
        self._spec = spec
        self._group = spec.num_heads // spec.num_kv_heads
        self._offsets = torch.arange(spec.block_size, device=spec.device)
        self._columns = torch.arange(spec.max_model_len, device=spec.device)
        cpu = spec.device.type == "cpu"
        self._gathered = torch.empty(0, dtype=spec.dtype) if cpu else None

    def prepare(self, batch: AttentionBatch) -> tuple[list[_Prefill], _Decodes | None]:
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

    def _decodes(self, batch: AttentionBatch) -> _Decodes:
        first = batch.num_prefill_tokens
        context_lens = batch.context_lens[batch.num_prefills :].tolist()
        longest = max(context_lens)
        if len(context_lens) == 1:
            rows = self._request_rows(batch, batch.num_prefills, longest)
            return _Decodes(first, rows, None)
        rows = self._cache_rows(batch.block_tables[batch.slots[batch.num_prefills :]], longest)
        if min(context_lens) == longest:
            return _Decodes(first, rows.flatten(), None)
        lens = batch.context_lens[batch.num_prefills :].unsqueeze(1)
        visible = self._columns[:longest] < lens
        # Padding reads the request's own first row: other rows may hold anything, even NaN,
        # and a zero weight would not stop that.
        rows = torch.where(visible, rows, rows[:, :1])
        mask = torch.zeros(rows.shape, dtype=self._spec.dtype, device=rows.device)
        mask.masked_fill_(~visible, float("-inf"))
        return _Decodes(first, rows.flatten(), mask[:, None, None])

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
        self, q: Tensor, kv: KVLayer, prepared: tuple[list[_Prefill], _Decodes | None]
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

    def _decode(self, q: Tensor, kv: KVLayer, decodes: _Decodes) -> Tensor:
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

    def _gather(self, kv: KVLayer, rows: Tensor | slice, n: int) -> tuple[Tensor, Tensor]:
        """K and V at n requests' cache rows: [n, num_kv_heads, L, head_dim] each.

        On a CPU they are good until the next call.
        """
        if isinstance(rows, slice):
            start, length = rows.start, rows.stop - rows.start
            return kv.keys.narrow(2, start, length), kv.values.narrow(2, start, length)
        heads, dim = kv.flat.shape[1:]
        out = None
        if self._gathered is not None:
            # malloc takes more than 32 MiB from the kernel each time, page by page: 4 times as
            # slow.
            size = rows.shape[0] * heads * dim
            if self._gathered.numel() < size:
                self._gathered = self._gathered.new_empty(size + size // 8)
            out = self._gathered[:size].view(-1, heads, dim)
        pages = torch.index_select(kv.flat, 0, rows, out=out)
        pages = pages.view(n, -1, heads, dim).transpose(1, 2)
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
