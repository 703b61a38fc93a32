"""The two functions of flash-attn that the engine calls, in plain torch, as documented.

They are as strict as the compiled ones about dtypes, shapes and strides, leave NaN in query rows
that belong to no request, and, like them, do not see keys beyond `max_seqlen_k`.
"""

from __future__ import annotations

import torch
from torch import Tensor

__version__ = "2.8.3"


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float,
    causal: bool,
    block_table: Tensor,
) -> Tensor:
    """q [T, H, D], pages [N, size, Hkv, D] -> [T, H, D]."""
    batch = cu_seqlens_q.shape[0] - 1
    _check(q, k, v, block_table, batch)
    _check_index(cu_seqlens_q, batch + 1)
    _check_index(cu_seqlens_k, batch + 1)
    out = torch.full_like(q, float("nan"))
    starts, key_starts = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    if max_seqlen_q == 1 and starts != list(range(batch + 1)):
        raise RuntimeError("max_seqlen_q=1 is for exactly one row per request")
    for i in range(batch):
        first, last = starts[i], starts[i + 1]
        if last - first > max_seqlen_q:
            raise RuntimeError("longer than max_seqlen_q")
        length = min(key_starts[i + 1] - key_starts[i], max_seqlen_k)
        keys, values = (_gather(pages, block_table[i], length) for pages in (k, v))
        out[first:last] = _attention(q[first:last], keys, values, softmax_scale, causal)
    return out


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    block_table: Tensor,
    softmax_scale: float,
    causal: bool,
) -> Tensor:
    """q [B, n, H, D], pages [N, size, Hkv, D] -> [B, n, H, D]."""
    _check(q, k_cache, v_cache, block_table, q.shape[0])
    _check_index(cache_seqlens, q.shape[0])
    out = torch.empty_like(q)
    for i, length in enumerate(cache_seqlens.tolist()):
        keys, values = (_gather(pages, block_table[i], length) for pages in (k_cache, v_cache))
        out[i] = _attention(q[i], keys, values, softmax_scale, causal)
    return out


def _attention(q: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool) -> Tensor:
    """Aligned at the bottom right; a row that sees nothing is zero."""
    n, length = q.shape[0], keys.shape[0]
    group = q.shape[1] // keys.shape[1]
    k, v = (x.float().repeat_interleave(group, dim=1) for x in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * scale
    if causal:
        hidden = torch.ones(n, length, dtype=torch.bool).triu(length - n + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)
    return torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)


def _gather(pages: Tensor, table: Tensor, length: int) -> Tensor:
    size = pages.shape[1]
    return pages[table[: -(-length // size)].long()].flatten(0, 1)[:length]


def _check(q: Tensor, k: Tensor, v: Tensor, block_table: Tensor, batch: int) -> None:
    if q.dtype not in (torch.float16, torch.bfloat16) or not q.dtype == k.dtype == v.dtype:
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    if any(x.stride(-1) != 1 for x in (q, k, v, block_table)):
        raise RuntimeError("Input tensor must have contiguous last dimension")
    if k.shape[1] % 256:
        raise RuntimeError("Paged KV cache block size must be divisible by 256")
    if q.shape[-2] % k.shape[2] or k.shape != v.shape or q.shape[-1] != k.shape[3]:
        raise RuntimeError("heads do not fit")
    if block_table.dtype != torch.int32 or block_table.shape[0] != batch:
        raise RuntimeError("block_table must be [batch_size, blocks] of int32")


def _check_index(x: Tensor, length: int) -> None:
    if x.dtype != torch.int32 or not x.is_contiguous() or x.shape != (length,):
        raise RuntimeError("lengths must be contiguous, of int32, one per request")
