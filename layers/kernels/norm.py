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
    x_strides,
    residual_stride,
    size,
    eps,
    ADD: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    x_stride, split_stride = x_strides
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
    if ADD:
        residual = tl.load(residual_ptr + row * residual_stride + cols, mask=mask, other=0.0)
        # The sum is rounded before it is normalised: what is stored is what is normalised.
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(residual.dtype)
        tl.store(residual_out_ptr + row * size + cols, x, mask=mask)
    x32 = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x32 * x32, axis=0) / size + eps)
    normed = (x32 * scale * weight).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * size + cols, normed, mask=mask)


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

    Arithmetic is float32 with one rounding at the end. For `out` and `pdl` see `add_rms_norm`.
    """
    return _launch(x, None, weight, eps, out, None, pdl)[0]


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
    if x.shape[-2:] != residual.shape or x.dim() not in (2, 3) or x.stride(-1) != 1:
        raise ValueError(f"x {tuple(x.shape)} does not fit residual {tuple(residual.shape)}")
    if x.dtype != (torch.float32 if x.dim() == 3 else residual.dtype):
        raise ValueError("x must be in residual's dtype, or float32 partial sums [S, T, H]")
    return _launch(x, residual, weight, eps, out, residual_out, pdl)


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    pdl: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    like = x if residual is None else residual
    if like.dim() != 2 or like.stride(1) != 1:
        raise ValueError(f"x must be [T, H] with contiguous rows, got {tuple(like.shape)}")
    tokens, size = like.shape
    if weight.shape != (size,) or not weight.is_contiguous():
        raise ValueError(f"weight must be contiguous [{size}], got {tuple(weight.shape)}")
    if out is None:
        out = torch.empty((tokens, size), dtype=like.dtype, device=like.device)
    if residual is None:
        residual_out = out
    elif residual_out is None:
        residual_out = torch.empty((tokens, size), dtype=like.dtype, device=like.device)
    splits, split_stride = (x.shape[0], x.stride(0)) if x.dim() == 3 else (1, 0)
    if tokens:
        _rms_norm_kernel[(tokens,)](
            *(x, like, weight, out, residual_out),
            *((x.stride(-2), split_stride), 0 if residual is None else like.stride(0), size, eps),
            ADD=residual is not None,
            SPLITS=splits,
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
