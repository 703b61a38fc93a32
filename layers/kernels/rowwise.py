"""Kernels for RMSNorm (arXiv:1910.07467), SwiGLU (arXiv:2002.05202) and RoPE (arXiv:2104.09864)."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from layers.norm_rope import Rotation
from memory.kv_cache import KVLayer


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    strides,
    size,
    eps,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    x_stride, split_stride, residual_stride = strides
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < size  # [BLOCK]
    if PDL:
        gdc_launch_dependents()
    # Read the weight before gdc_wait waits for earlier kernels, which do not write the weight.
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        x += tl.load(x_ptr + split * split_stride + row * x_stride + cols, mask=mask, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * residual_stride + cols, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(residual.dtype)
        tl.store(total_ptr + row * size + cols, x, mask=mask)
    x32 = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x32 * x32, axis=0) / size + eps)
    normed = (x32 * scale * weight).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * size + cols, normed, mask=mask)


def warps_of_row(size: int) -> int:
    """Return how many warps handle a row: size / 512, rounded up to a power of 2, from 1 to 8."""
    return max(1, min(8, int(triton.next_power_of_2(size)) // 512))


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, part: Tensor | None = None, *, pdl: bool = False
) -> tuple[Tensor, Tensor]:
    """Return ``(s / sqrt(mean(s**2) + eps) * weight, s)``; s is x + part, or x if part is None.

    Args:
        x: residual stream [T, H] of T tokens.
        weight: contiguous RMSNorm weight [H].
        part: [T, H] in x's dtype, or float32 [S, T, H]: S partial sums, which the kernel adds up.
        pdl: use CUDA's programmatic dependent launch (compute capability 9.0 or later).

    Arithmetic is float32. The sum s is rounded to x's dtype before the norm is computed from s.
    """
    if x.dim() != 2 or x.stride(1) != 1:
        raise ValueError(f"x must be [T, H] with contiguous rows, got {tuple(x.shape)}")
    source, residual, total = x, None, None
    if part is not None:
        if part.shape[-2:] != x.shape or part.dim() not in (2, 3) or part.stride(-1) != 1:
            raise ValueError(f"part {tuple(part.shape)} does not fit x {tuple(x.shape)}")
        if part.dtype != (torch.float32 if part.dim() == 3 else x.dtype):
            raise ValueError("part must be in x's dtype, or float32 partial sums [S, T, H]")
        source, residual, total = part, x, x.new_empty(x.shape)
    (tokens, size), out = x.shape, x.new_empty(x.shape)
    splits, split_stride = (source.shape[0], source.stride(0)) if source.dim() == 3 else (1, 0)
    if tokens:
        _rms_norm_kernel[(tokens,)](
            *(source, residual, weight, out, total),
            *((source.stride(-2), split_stride, x.stride(0)), size, eps),
            *(splits, triton.next_power_of_2(size), pdl),
            num_warps=warps_of_row(size),
            launch_pdl=pdl,
        )
    return out, x if total is None else total


@triton.jit
def _silu_mul_kernel(x_ptr, out_ptr, x_stride, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < size
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    gate = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + size + cols, mask=mask, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * size + cols, out.to(out_ptr.dtype.element_ty), mask=mask)


def silu_mul(gate_up: Tensor, *, pdl: bool = False) -> Tensor:
    """Return ``silu(gate_up[:, :I]) * gate_up[:, I:]`` [T, I] for ``gate_up`` [T, 2I], T tokens.

    Arithmetic is float32; only the result is rounded. For `pdl` see `rms_norm`.
    """
    if gate_up.dim() != 2 or gate_up.stride(1) != 1 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up must be [T, 2I] with contiguous rows: {tuple(gate_up.shape)}")
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, size)
    # With 4 warps for 1,024 columns each thread loads 16 bytes of gate and 16 bytes of up.
    block = min(1024, triton.next_power_of_2(size))
    if tokens:
        _silu_mul_kernel[(tokens, triton.cdiv(size, block))](
            *(gate_up, out, gate_up.stride(0), size, block, pdl), num_warps=4, launch_pdl=pdl
        )
    return out


@triton.jit(do_not_specialize=["tokens"])
def _qk_norm_rope_store_kernel(
    qkv_ptr,
    weights,
    rotation,
    slots_ptr,
    out_ptr,
    k_ptr,
    v_ptr,
    strides,
    block_size,
    tokens,
    eps,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    positions_ptr, cos_ptr, sin_ptr = rotation
    qkv_stride, split_stride, block_stride, slot_stride, head_stride = strides
    HALF_BLOCK: tl.constexpr = triton.next_power_of_2(HALF)
    # Each program handles HEADS heads of TOKENS tokens. HEADS divides the number of query heads and
    # the number of KV heads. So the program's heads are all query, all key or all value heads.
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
    if weights is not None:
        # Read the weights before gdc_wait waits for earlier kernels, which do not write them.
        weight_ptr = weights[1]
        if is_query:
            weight_ptr = weights[0]
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
        a, b = first.to(tl.float32), second.to(tl.float32)
        if weights is not None:
            square = tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)
            scale = tl.rsqrt(square / (2 * HALF) + eps)[:, None]
            a, b = a * scale * weight_a, b * scale * weight_b
        rotated_a, rotated_b = a * cos - b * sin, b * cos + a * sin
        if is_query:
            target = out_ptr + ((token * Q_HEADS + head) * (2 * HALF))[:, None] + cols[None, :]
            tl.store(target, rotated_a.to(out_ptr.dtype.element_ty), mask=mask)
            tl.store(target + HALF, rotated_b.to(out_ptr.dtype.element_ty), mask=mask)
        else:
            row = block * block_stride + offset * slot_stride + (head - Q_HEADS) * head_stride
            target = k_ptr + row[:, None] + cols[None, :]
            tl.store(target, rotated_a.to(k_ptr.dtype.element_ty), mask=stored)
            tl.store(target + HALF, rotated_b.to(k_ptr.dtype.element_ty), mask=stored)
    else:
        value_head = head - Q_HEADS - KV_HEADS
        row = block * block_stride + offset * slot_stride + value_head * head_stride
        target = v_ptr + row[:, None] + cols[None, :]
        tl.store(target, first.to(v_ptr.dtype.element_ty), mask=stored)
        tl.store(target + HALF, second.to(v_ptr.dtype.element_ty), mask=stored)


def qk_norm_rope_store(
    qkv: Tensor,
    weights: tuple[Tensor, Tensor] | None,
    eps: float,
    rotation: Rotation,
    slot_mapping: Tensor,
    kv: KVLayer,
    *,
    pdl: bool = False,
) -> Tensor:
    """Apply RMSNorm and RoPE to Q and K, store K and V in the KV cache `kv`, and return Q.

    Args:
        qkv: Hq query heads, Hkv key heads and Hkv value heads of size D, [T, (Hq + 2 * Hkv) * D];
            or float32 [S, T, (Hq + 2 * Hkv) * D]: S partial sums, which the kernel adds up.
        weights: an RMSNorm weight [D] for Q and one for K, or None for no RMSNorm.
        rotation: positions [T] of the tokens, int32 or int64; cosines and sines [P, D / 2] for
            positions 0 to P - 1. RoPE rotates elements i and i + D / 2 of a head as a pair.
        slot_mapping: each token's place in the cache, ``block * block_size + offset``, int32 or
            int64 [T]. If a token's place is negative, the token's K and V are not stored.

    Arithmetic is float32. The returned Q is [T, Hq, D] in the dtype of `kv`.
    """
    _, block_size, kv_heads, dim = kv.k.shape
    tokens = qkv.shape[-2]
    q_heads = qkv.shape[-1] // dim - 2 * kv_heads
    if (q_heads + 2 * kv_heads) * dim != qkv.shape[-1] or q_heads < 1 or dim % 2:
        raise ValueError(f"qkv {tuple(qkv.shape)} does not fit a cache {tuple(kv.k.shape)}")
    if qkv.stride(-1) != 1 or (qkv.dim() == 3 and qkv.dtype != torch.float32):
        raise ValueError("rows of qkv must be contiguous, partial sums float32")
    out = kv.k.new_empty(tokens, q_heads, dim)
    heads = next(h for h in (4, 2, 1) if q_heads % h == 0 and kv_heads % h == 0)
    # Programs for a single token are fast only if there are few tokens. For 8,192 tokens such
    # programs took 80 us on an H200, 2.5 times as long as a copy of the data.
    per_program = 1 if tokens < 512 else max(1, 16 // heads)
    splits, split_stride = (qkv.shape[0], qkv.stride(0)) if qkv.dim() == 3 else (1, 0)
    if tokens:
        grid = (triton.cdiv(tokens, per_program), (q_heads + 2 * kv_heads) // heads)
        _qk_norm_rope_store_kernel[grid](
            *(qkv, weights, (rotation.positions, rotation.cos, rotation.sin)),
            *(slot_mapping, out, kv.k, kv.v),
            *((qkv.stride(-2), split_stride, *kv.k.stride()[:3]), block_size, tokens, eps),
            *(q_heads, kv_heads, dim // 2, heads, per_program, splits, pdl),
            num_warps=1 if per_program == 1 else 4,
            launch_pdl=pdl,
        )
    return out
