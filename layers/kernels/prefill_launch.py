"""Launches the kernel of hopper_prefill.py."""

import math

import torch
import triton
from torch import Tensor

from layers.kernels.attention_parts import LOG2_E, SPLIT
from layers.kernels.hopper_prefill import hopper_prefill_kernel
from layers.kernels.tma import descriptor
from memory.kv_cache import KVLayer


def fits_hopper(q: Tensor, kv: KVLayer) -> bool:
    """Whether `hopper_prefill` can compute this, on a GPU of compute capability 9.0."""
    return (
        q.shape[2] in (64, 128)
        and kv.k.shape[1] % 16 == 0
        and q.dtype == kv.k.dtype
        and q.dtype in (torch.bfloat16, torch.float16)
    )


def hopper_prefill(
    q: Tensor,
    kv: KVLayer,
    block_tables: Tensor,
    slots: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    out: Tensor,
    window: int | None = None,
) -> Tensor:
    """Compute what `paged_prefill` does, where `fits_hopper` allows it."""
    (rows, num_heads, dim), (_, page, kv_heads, _) = q.shape, kv.k.shape
    group, batch = num_heads // kv_heads, slots.numel()
    # One descriptor serves K and V: a row has all heads of K, then all heads of V.
    kv_desc = descriptor(kv.flat.view(kv.flat.shape[0], -1), math.gcd(page, SPLIT), 64)
    # Each sequence's last tile may be partly empty, so up to `batch` more tiles are needed.
    tiles = triton.cdiv(rows * group, 64) + batch
    batch_pad = 32 if batch <= 32 else max(256, triton.next_power_of_2(batch))  # few variants
    hopper_prefill_kernel[(kv_heads * tiles,)](
        *(q, kv_desc, block_tables, slots, query_start, context_lens, out),
        *(scale * LOG2_E, batch, block_tables.stride(0)),
        (*q.stride()[:2], *out.stride()[:2]),
        *(kv_heads, group, dim, page, batch_pad, window or 0),
        num_warps=4,
        # So many registers let two programs run: 232 for a thread of the consumer, 24 for others.
        maxnreg=128,
    )
    return out
