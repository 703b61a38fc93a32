"""Kernels of one pass over the rows: RMSNorm with the residual add, and the gate of SwiGLU.

RMSNorm: Zhang and Sennrich 2019 (arXiv:1910.07467). SwiGLU: Shazeer 2020 (arXiv:2002.05202).
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


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
    mask = cols < size  # [BLOCK], as all below
    if PDL:
        gdc_launch_dependents()
    # The weight never depends on an earlier kernel, so it may be read before the wait.
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        x += tl.load(x_ptr + split * split_stride + row * x_stride + cols, mask=mask, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * residual_stride + cols, mask=mask, other=0.0)
        # The sum is rounded before it is normalised: what is stored is what is normalised.
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(residual.dtype)
        tl.store(total_ptr + row * size + cols, x, mask=mask)
    x32 = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x32 * x32, axis=0) / size + eps)
    normed = (x32 * scale * weight).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * size + cols, normed, mask=mask)


def warps_of_row(size: int) -> int:
    """One warp per 512 columns, 1 to 8: 16 elements and two 16-byte loads a thread."""
    return max(1, min(8, int(triton.next_power_of_2(size)) // 512))


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, part: Tensor | None = None, *, pdl: bool = False
) -> tuple[Tensor, Tensor]:
    """Return ``(s / sqrt(mean(s**2) + eps) * weight, s)`` with ``s = x + part``, or x alone.

    Args:
        x: [T, H] residual stream.
        weight: [H], contiguous.
        part: [T, H] in x's dtype, or [S, T, H] float32: the partial sums of a linear whose input
            dimension was split, which are added up here.
        pdl: launch with programmatic dependent launch (compute capability 9.0 and later).

    Arithmetic is float32 with one rounding; s is rounded to x's dtype before it is normalised.
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
    """Return ``silu(gate_up[:, :I]) * gate_up[:, I:]`` as [T, I] for ``gate_up`` [T, 2I].

    Float32 inside, one rounding. For `pdl` see `rms_norm`.
    """
    if gate_up.dim() != 2 or gate_up.stride(1) != 1 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up must be [T, 2I] with contiguous rows: {tuple(gate_up.shape)}")
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, size)
    # 1024 columns and 4 warps: one 16-byte load of each half a thread.
    block = min(1024, triton.next_power_of_2(size))
    if tokens:
        _silu_mul_kernel[(tokens, triton.cdiv(size, block))](
            *(gate_up, out, gate_up.stride(0), size, block, pdl), num_warps=4, launch_pdl=pdl
        )
    return out
