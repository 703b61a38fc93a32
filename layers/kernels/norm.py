"""RMSNorm over the last dimension, with and without a residual add.

RMSNorm: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization" (arXiv:1910.07467).
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    residual_out_ptr,
    x_stride,
    split_stride,
    residual_stride,
    size,
    eps,
    ADD: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < size
    if PDL:
        gdc_launch_dependents()
    # The weight never depends on an earlier kernel, so it may be read before the wait.
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        x += tl.load(x_ptr + split * split_stride + row * x_stride + cols, mask=mask, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + row * residual_stride + cols, mask=mask, other=0.0)
        # The sum is rounded before it is normalised: what is stored is what is normalised.
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(residual.dtype)
        tl.store(residual_out_ptr + row * size + cols, x, mask=mask)
    x32 = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x32 * x32, axis=0) / size + eps)
    normed = (x32 * scale * weight).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * size + cols, normed, mask=mask)


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    if x.dim() != 2 or x.stride(1) != 1:
        raise ValueError(f"x must be [T, H] with contiguous rows, got {tuple(x.shape)}")
    if weight.shape != (x.shape[1],) or not weight.is_contiguous():
        raise ValueError(f"weight must be contiguous [{x.shape[1]}], got {tuple(weight.shape)}")


def warps_of_row(size: int) -> int:
    """One warp per 512 columns, 1 to 8: 16 elements and two 16-byte loads a thread."""
    return max(1, min(8, int(triton.next_power_of_2(size)) // 512))


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """Return ``x / sqrt(mean(x**2) + eps) * weight`` for ``x`` [T, H], in ``x``'s dtype.

    Arithmetic is float32 with one rounding at the end. ``out`` must be contiguous; it may be
    ``x`` itself when ``x`` is contiguous. ``pdl`` launches with programmatic dependent launch
    (compute capability 9.0 and later).
    """
    _check(x, weight)
    tokens, size = x.shape
    out = torch.empty((tokens, size), dtype=x.dtype, device=x.device) if out is None else out
    if tokens:
        _rms_norm_kernel[(tokens,)](
            x,
            x,
            weight,
            out,
            out,
            x.stride(0),
            0,
            0,
            size,
            eps,
            ADD=False,
            SPLITS=1,
            BLOCK=triton.next_power_of_2(size),
            PDL=pdl,
            num_warps=warps_of_row(size),
            launch_pdl=pdl,
        )
    return out


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    out: torch.Tensor | None = None,
    residual_out: torch.Tensor | None = None,
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(rms_norm(s, weight, eps), s)`` with ``s = x + residual``.

    Args:
        x: [T, H] in ``residual``'s dtype, or [S, T, H] float32: the partial sums of a linear
            whose input dimension was split, which are added up here.
        residual: [T, H].
        weight: [H].
        eps: of the norm.
        out: contiguous [T, H]; may alias a contiguous ``x`` (of two dimensions) or ``residual``.
        residual_out: likewise, but not the same one as ``out``.
        pdl: launch with programmatic dependent launch (compute capability 9.0 and later).

    ``s`` is rounded to ``residual``'s dtype before it is normalised.
    """
    _check(residual, weight)
    if x.shape[-2:] != residual.shape or x.dim() not in (2, 3) or x.stride(-1) != 1:
        raise ValueError(f"x {tuple(x.shape)} does not fit residual {tuple(residual.shape)}")
    if x.dtype != (torch.float32 if x.dim() == 3 else residual.dtype):
        raise ValueError("x must be in residual's dtype, or float32 partial sums [S, T, H]")
    tokens, size = residual.shape
    if out is None:
        out = torch.empty((tokens, size), dtype=residual.dtype, device=residual.device)
    if residual_out is None:
        residual_out = torch.empty((tokens, size), dtype=residual.dtype, device=residual.device)
    if tokens:
        _rms_norm_kernel[(tokens,)](
            x,
            residual,
            weight,
            out,
            residual_out,
            x.stride(-2),
            x.stride(0) if x.dim() == 3 else 0,
            residual.stride(0),
            size,
            eps,
            ADD=True,
            SPLITS=x.shape[0] if x.dim() == 3 else 1,
            BLOCK=triton.next_power_of_2(size),
            PDL=pdl,
            num_warps=warps_of_row(size),
            launch_pdl=pdl,
        )
    return out, residual_out


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Plain torch version of :func:`rms_norm`."""
    x32 = x.float()
    scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (x32 * scale * weight.float()).to(x.dtype)


def add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain torch version of :func:`add_rms_norm`."""
    x = x.sum(0) if x.dim() == 3 else x
    total = (x.float() + residual.float()).to(residual.dtype)
    return rms_norm_reference(total, weight, eps), total
