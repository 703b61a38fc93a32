"""What lies between the QKV projection and attention, in one kernel.

RMSNorm of every query and key head (Qwen3; Qwen2 has none), rotary position embedding
(Su et al. 2021, arXiv:2104.09864, in the rotate-half arrangement of the Hugging Face Qwen
models) and the store of the keys and values into the paged cache.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit(do_not_specialize=["tokens"])
def _qk_norm_rope_store_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    slots_ptr,
    q_out_ptr,
    k_cache_ptr,
    v_cache_ptr,
    qkv_strides,
    cache_strides,
    block_size,
    tokens,
    eps,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    NORM: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    qkv_stride, split_stride = qkv_strides
    block_stride, slot_stride, head_stride = cache_strides
    HALF_BLOCK: tl.constexpr = triton.next_power_of_2(HALF)
    # Rows are (token, head) pairs, heads fastest. HEADS divides both head counts, so a program
    # holds query, key or value heads, never a mix.
    rows = tl.arange(0, TOKENS * HEADS)
    token = (tl.program_id(0) * TOKENS + rows // HEADS).to(tl.int64)
    first_head = tl.program_id(1) * HEADS
    head = first_head + rows % HEADS
    cols = tl.arange(0, HALF_BLOCK)
    in_row = cols < HALF
    live = token < tokens
    mask = live[:, None] & in_row[None, :]
    is_query = first_head < Q_HEADS
    is_key = (first_head >= Q_HEADS) & (first_head < Q_HEADS + KV_HEADS)
    if NORM:
        # Weights never depend on an earlier kernel, so they may be read before the wait.
        weight_ptr = k_weight_ptr
        if is_query:
            weight_ptr = q_weight_ptr
        weight_a = tl.load(weight_ptr + cols, mask=in_row, other=0.0).to(tl.float32)[None, :]
        weight_b = tl.load(weight_ptr + HALF + cols, mask=in_row, other=0.0).to(tl.float32)[None, :]
    if PDL:
        gdc_wait()
    source = qkv_ptr + (token * qkv_stride + head * (2 * HALF))[:, None] + cols[None, :]
    first = tl.load(source, mask=mask, other=0.0)
    second = tl.load(source + HALF, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        first += tl.load(source + split * split_stride, mask=mask, other=0.0)
        second += tl.load(source + split * split_stride + HALF, mask=mask, other=0.0)
    slot = tl.load(slots_ptr + token, mask=live, other=-1).to(tl.int64)
    block = slot // block_size
    offset = slot % block_size
    stored = mask & (slot >= 0)[:, None]
    if is_query | is_key:
        position = tl.load(positions_ptr + token, mask=live, other=0).to(tl.int64)
        table = (position * HALF)[:, None] + cols[None, :]
        cos = tl.load(cos_ptr + table, mask=mask, other=0.0)
        sin = tl.load(sin_ptr + table, mask=mask, other=0.0)
        a = first.to(tl.float32)
        b = second.to(tl.float32)
        if NORM:
            square = tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)
            scale = tl.rsqrt(square / (2 * HALF) + eps)[:, None]
            a = a * scale * weight_a
            b = b * scale * weight_b
        rotated_a = a * cos - b * sin
        rotated_b = b * cos + a * sin
        if is_query:
            target = q_out_ptr + ((token * Q_HEADS + head) * (2 * HALF))[:, None] + cols[None, :]
            tl.store(target, rotated_a.to(q_out_ptr.dtype.element_ty), mask=mask)
            tl.store(target + HALF, rotated_b.to(q_out_ptr.dtype.element_ty), mask=mask)
        else:
            row = block * block_stride + offset * slot_stride + (head - Q_HEADS) * head_stride
            target = k_cache_ptr + row[:, None] + cols[None, :]
            tl.store(target, rotated_a.to(k_cache_ptr.dtype.element_ty), mask=stored)
            tl.store(target + HALF, rotated_b.to(k_cache_ptr.dtype.element_ty), mask=stored)
    else:
        value_head = head - Q_HEADS - KV_HEADS
        row = block * block_stride + offset * slot_stride + value_head * head_stride
        target = v_cache_ptr + row[:, None] + cols[None, :]
        tl.store(target, first.to(v_cache_ptr.dtype.element_ty), mask=stored)
        tl.store(target + HALF, second.to(v_cache_ptr.dtype.element_ty), mask=stored)


def qk_norm_rope_store(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """Normalise and rotate queries and keys, store keys and values, return the queries.

    Args:
        qkv: [T, (Hq + 2 * Hkv) * D], query heads first, then key heads, then value heads; or
            [S, T, ...] float32, partial sums that are added up here.
        q_weight, k_weight: [D] RMSNorm weights of query and key heads, or None twice for no norm.
        eps: of the RMSNorm.
        cos, sin: [P, D / 2] float32 tables, contiguous.
        positions: [T] int32 or int64, rows of the tables.
        slot_mapping: [T] int32 or int64, ``block * block_size + offset`` in the cache; a
            negative slot stores nothing.
        k_cache, v_cache: [num_blocks, block_size, Hkv, D], with equal strides, the last one 1.
        out: contiguous [T, Hq, D], made when absent.
        pdl: launch with programmatic dependent launch (compute capability 9.0 and later).

    Returns:
        [T, Hq, D] in the caches' dtype. Arithmetic is float32 with one rounding at the end.
    """
    kv_heads, dim = k_cache.shape[2], k_cache.shape[3]
    tokens = qkv.shape[-2]
    q_heads = qkv.shape[-1] // dim - 2 * kv_heads
    if (q_heads + 2 * kv_heads) * dim != qkv.shape[-1] or q_heads < 1 or dim % 2:
        raise ValueError(f"qkv {tuple(qkv.shape)} does not fit a cache {tuple(k_cache.shape)}")
    if qkv.dim() == 3 and qkv.dtype != torch.float32:
        raise ValueError(f"partial sums must be float32, not {qkv.dtype}")
    if qkv.stride(-1) != 1 or k_cache.stride(3) != 1:
        raise ValueError("the last dimension of qkv and of the caches must be contiguous")
    if k_cache.stride() != v_cache.stride():
        raise ValueError(f"strides of K {k_cache.stride()} and V {v_cache.stride()} differ")
    if (q_weight is None) != (k_weight is None):
        raise ValueError("give both q_weight and k_weight, or neither")
    half = dim // 2
    if cos.shape[1] != half or not cos.is_contiguous() or not sin.is_contiguous():
        raise ValueError(f"cos and sin must be contiguous [P, {half}]")
    if out is None:
        out = torch.empty((tokens, q_heads, dim), dtype=k_cache.dtype, device=qkv.device)
    heads = next(h for h in (4, 2, 1) if q_heads % h == 0 and kv_heads % h == 0)
    # One warp and a few heads a program spread a decode step widely; a prefill wants larger
    # programs: 65,536 one-warp programs took 80 us at 8,192 tokens on an H200, 2.5 times the copy.
    per_program = 1 if tokens < 512 else max(1, 16 // heads)
    weights = (qkv, qkv) if q_weight is None else (q_weight, k_weight)
    splits, split_stride = (qkv.shape[0], qkv.stride(0)) if qkv.dim() == 3 else (1, 0)
    if tokens:
        grid = (triton.cdiv(tokens, per_program), (q_heads + 2 * kv_heads) // heads)
        _qk_norm_rope_store_kernel[grid](
            *(qkv, *weights, cos, sin, positions, slot_mapping, out, k_cache, v_cache),
            *((qkv.stride(-2), split_stride), k_cache.stride()[:3], k_cache.shape[1], tokens, eps),
            Q_HEADS=q_heads,
            KV_HEADS=kv_heads,
            HALF=half,
            HEADS=heads,
            TOKENS=per_program,
            NORM=q_weight is not None,
            SPLITS=splits,
            PDL=pdl,
            num_warps=1 if per_program == 1 else 4,
            launch_pdl=pdl,
        )
    return out


def qk_norm_rope_store_reference(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
) -> torch.Tensor:
    """Plain torch version of :func:`qk_norm_rope_store`; it too writes into the caches."""
    block_size, kv_heads, dim = k_cache.shape[1:]
    qkv = qkv.sum(0) if qkv.dim() == 3 else qkv
    q_heads = qkv.shape[1] // dim - 2 * kv_heads
    heads = qkv.view(qkv.shape[0], q_heads + 2 * kv_heads, dim)
    query, key, value = heads.split([q_heads, kv_heads, kv_heads], dim=1)

    def transform(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        x = x.float()
        if weight is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()
        c, s = cos[positions.long()].unsqueeze(1), sin[positions.long()].unsqueeze(1)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * c - b * s, b * c + a * s], dim=-1)

    kept = slot_mapping >= 0
    slots = slot_mapping[kept].long()
    where = (slots // block_size, slots % block_size)
    k_cache[where] = transform(key, k_weight)[kept].to(k_cache.dtype)
    v_cache[where] = value[kept].to(v_cache.dtype)
    return transform(query, q_weight).to(k_cache.dtype)
