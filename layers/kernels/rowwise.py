"""Kernels for RMSNorm (arXiv:1910.07467), SwiGLU (arXiv:2002.05202) and RoPE (arXiv:2104.09864)."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: ANN201

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from layers.norm_rope import GAIN
from layers.rotary import Rotation
from memory.kv_cache import KVLayer

_RESIDENT_WARPS = 132 * 64  # warps that an H100 or H200 runs at the same time


@triton.jit
def sum_pairs(x, LOG: tl.constexpr):
    """Add up axis 1, of size 2**LOG, of x [rows, 2**LOG]: neighbours first, as a binary tree.

    Each addition has two operands, whose order does not matter. So the result depends neither on
    the layout of x nor on the kernel. `product_kernels.sum_pairs` is the same tree.
    """
    for _ in tl.static_range(LOG):
        x = tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)), axis=2)
    return tl.reshape(x, (x.shape[0],))


@triton.jit
def sum_parts(ptr, stride, mask, PARTS: tl.constexpr):
    """Add up the PARTS float32 summands of a product at `ptr`, in the order of products.py."""
    x = tl.load(ptr, mask=mask, other=0.0)
    if PARTS > 1:
        x += tl.load(ptr + stride, mask=mask, other=0.0)
    if PARTS == 4:
        third = tl.load(ptr + 2 * stride, mask=mask, other=0.0)
        x += third + tl.load(ptr + 3 * stride, mask=mask, other=0.0)
    return x


@triton.jit
def normed(x, weight, size, eps, squares_ptr, GAIN: tl.constexpr, LOG: tl.constexpr):
    """Normalise one row x [2**LOG] and multiply it by `weight`.

    With `squares_ptr`, store the sum of squares there instead, and return x * weight * GAIN.
    """
    x = x.to(tl.float32)
    square = sum_pairs(tl.reshape(x * x, (1, 2**LOG)), LOG)
    if squares_ptr is not None:
        tl.store(squares_ptr + tl.arange(0, 1), square)
        out = x * (weight * GAIN)
    else:
        out = x * tl.rsqrt(tl.sum(square, axis=0) / size + eps) * weight
    return out


@triton.jit
def _norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    squares_ptr,
    post_ptr,
    strides,
    size,
    eps,
    post_eps,
    GAIN: tl.constexpr,
    PARTS: tl.constexpr,
    LOG: tl.constexpr,
    PDL: tl.constexpr,
):
    x_stride, part_stride, residual_stride = strides
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, 2**LOG)
    mask = cols < size
    if PDL:
        gdc_launch_dependents()
    # Read the weight before gdc_wait waits for earlier kernels, which do not write the weight.
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    x = sum_parts(x_ptr + row * x_stride + cols, part_stride, mask, PARTS).to(dtype)
    if post_ptr is not None:
        post = tl.load(post_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        x = normed(x, post, size, post_eps, None, 1.0, LOG).to(dtype)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * residual_stride + cols, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(dtype)
        tl.store(total_ptr + row * size + cols, x, mask=mask)
    if squares_ptr is not None:
        squares_ptr += row
    out = normed(x, weight, size, eps, squares_ptr, GAIN, LOG)
    tl.store(out_ptr + row * size + cols, out.to(dtype), mask=mask)


@functools.cache
def warps_of_row(size: int, columns: int = 512, most: int = 8) -> int:
    """Return how many warps handle a row: a power of 2, `columns` columns each, at most `most`."""
    return max(1, min(most, int(triton.next_power_of_2(size)) // columns))


def _warps_of_norm(tokens: int, size: int) -> int:
    """Return how many warps handle a row of a norm of so many tokens."""
    # More warps load more at the same time. On an H200 a norm of 64 rows [1024] takes 0.7 us less
    # with 8 warps than with 2, but one of 4,096 rows 1 us more, since not all rows run at once.
    warps = warps_of_row(size, 128, 16)
    return warps if tokens * warps <= _RESIDENT_WARPS else warps_of_row(size)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    part: Tensor | None = None,
    post: tuple[Tensor, float] | None = None,
    *,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return ``(s / sqrt(mean(s**2) + eps) * weight, s)``; s is x + part, or x if part is None.

    Args:
        x: residual stream [T, H] of T tokens.
        weight: contiguous RMSNorm weight [H].
        part: [T, H] in x's dtype, or float32 [S, T, H]: S summands, 2 or 4, of a product.
        post: weight [H] and eps of an RMS norm that part goes through first. Its result is rounded.
        pdl: use CUDA's programmatic dependent launch (compute capability 9.0 or later).

    Arithmetic is float32. The product and s are rounded to x's dtype.
    """
    out, _, total = _norm(x, weight, part, post, eps, 1.0, None, pdl)
    return out, total


def gain_rows(
    x: Tensor,
    weight: Tensor,
    part: Tensor | None = None,
    post: tuple[Tensor, float] | None = None,
    *,
    pdl: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(s * weight * GAIN, (s**2).sum(1), s)`` for `rms_norm`'s s; see `norm_rope.Scale`.

    The sums of squares are float32 [1, T].
    """
    squares = x.new_empty(1, x.shape[0], dtype=torch.float32)
    return _norm(x, weight, part, post, 0.0, GAIN[x.dtype], squares, pdl)


def _norm(
    x: Tensor,
    weight: Tensor,
    part: Tensor | None,
    post: tuple[Tensor, float] | None,
    eps: float,
    gain: float,
    squares: Tensor | None,
    pdl: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if x.dim() != 2 or x.stride(1) != 1:
        raise ValueError(f"x must be [T, H] with contiguous rows, got {tuple(x.shape)}")
    source, residual, total = x, None, None
    if part is not None:
        if part.shape[-2:] != x.shape or part.dim() not in (2, 3) or part.stride(-1) != 1:
            raise ValueError(f"part {tuple(part.shape)} does not fit x {tuple(x.shape)}")
        if part.dtype != (torch.float32 if part.dim() == 3 else x.dtype):
            raise ValueError("part must be in x's dtype, or float32 summands [S, T, H]")
        if part.dim() == 3 and part.shape[0] not in (2, 4):
            raise ValueError(f"a product has 2 or 4 summands, got {part.shape[0]}")
        source, residual, total = part, x, x.new_empty(x.shape)
    (tokens, size), out = x.shape, x.new_empty(x.shape)
    parts, part_stride = (source.shape[0], source.stride(0)) if source.dim() == 3 else (1, 0)
    if tokens:
        _norm_kernel[(tokens,)](
            *(source, residual, weight, out, total, squares, post and post[0]),
            *((source.stride(-2), part_stride, x.stride(0)), size, eps, post[1] if post else 0.0),
            *(gain, parts, (size - 1).bit_length(), pdl),
            num_warps=_warps_of_norm(tokens, size),
            launch_pdl=pdl,
        )
    return out, out if squares is None else squares, x if total is None else total


@triton.jit
def _gate_kernel(
    x_ptr, out_ptr, x_stride, size, BLOCK: tl.constexpr, GATE: tl.constexpr, PDL: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < size
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    gate = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + size + cols, mask=mask, other=0.0).to(tl.float32)
    x = gate
    if GATE == "gelu_tanh":
        # As in `product_kernels.gated`.
        x = gate * tl.fma(gate * gate, 0.07135481627159, 1.5957691216057308)
    out = gate * tl.sigmoid(x) * up
    tl.store(out_ptr + row * size + cols, out.to(out_ptr.dtype.element_ty), mask=mask)


def gate_mul(gate_up: Tensor, gate: str = "silu", *, pdl: bool = False) -> Tensor:
    """Return ``f(gate_up[:, :I]) * gate_up[:, I:]`` [T, I] for ``gate_up`` [T, 2I], T tokens.

    `gate` names f: "silu" or "gelu_tanh" (layers/linear.py). Arithmetic is float32; only the result
    is rounded. For `pdl` see `rms_norm`.
    """
    if gate_up.dim() != 2 or gate_up.stride(1) != 1 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up must be [T, 2I] with contiguous rows: {tuple(gate_up.shape)}")
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, size)
    # With 4 warps for 1,024 columns each thread loads 16 bytes of gate and 16 bytes of up.
    block = min(1024, triton.next_power_of_2(size))
    if tokens:
        _gate_kernel[(tokens, triton.cdiv(size, block))](
            *(gate_up, out, gate_up.stride(0), size, block, gate, pdl), num_warps=4, launch_pdl=pdl
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
    LOG: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    positions_ptr, cos_ptr, sin_ptr = rotation
    qkv_stride, block_stride, slot_stride, head_stride = strides
    # Each program handles HEADS heads of TOKENS tokens. HEADS divides the number of query heads and
    # the number of KV heads. So the program's heads are all query, all key or all value heads.
    rows = tl.arange(0, TOKENS * HEADS)
    token = (tl.program_id(0) * TOKENS + rows // HEADS).to(tl.int64)
    first_head = tl.program_id(1) * HEADS
    head = first_head + rows % HEADS
    cols = tl.arange(0, 2**LOG)
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
            square = sum_pairs(a * a, LOG) + sum_pairs(b * b, LOG)
            scale = tl.rsqrt(square / (2 * HALF) + eps)[:, None]
            a, b = a * scale * weight_a, b * scale * weight_b
        # Without these explicit operations, the compiler chooses which product it does not round.
        rotated_a, rotated_b = tl.fma(a, cos, -(b * sin)), tl.fma(b, cos, a * sin)
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
        qkv: Hq query heads, Hkv key heads and Hkv value heads of size D, [T, (Hq + 2 * Hkv) * D].
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
    if qkv.stride(-1) != 1:
        raise ValueError("rows of qkv must be contiguous")
    out = kv.k.new_empty(tokens, q_heads, dim)
    heads = next(h for h in (4, 2, 1) if q_heads % h == 0 and kv_heads % h == 0)
    # Programs for a single token are fast only if there are few tokens. For 8,192 tokens such
    # programs took 80 us on an H200, 2.5 times as long as a copy of the data.
    per_program = 1 if tokens < 512 else max(1, 16 // heads)
    if tokens:
        grid = (triton.cdiv(tokens, per_program), (q_heads + 2 * kv_heads) // heads)
        _qk_norm_rope_store_kernel[grid](
            *(qkv, weights, (rotation.positions, rotation.cos, rotation.sin)),
            *(slot_mapping, out, kv.k, kv.v),
            *((qkv.stride(-2), *kv.k.stride()[:3]), block_size, tokens, eps),
            *(q_heads, kv_heads, dim // 2, heads, per_program, (dim // 2 - 1).bit_length(), pdl),
            num_warps=1 if per_program == 1 else 4,
            launch_pdl=pdl,
        )
    return out
