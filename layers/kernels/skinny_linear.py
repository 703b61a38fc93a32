"""Linear layers for decode batches of 1 to 64 tokens, where reading the weight is all the work.

A step of a small model at such batches is a chain of a hundred short kernels. What costs time is
not bandwidth but the gap between one kernel and the next, so these kernels are built for
programmatic dependent launch: they start while their predecessor still runs, copy their slice of
the *weight*, which no kernel writes, into shared memory with asynchronous copies, and only then
wait for the predecessor's output. Several kernels' weights are under way at once.

Two kernels share the idea:

* up to 16 tokens, ``rows_kernel``: a program computes 16 or 32 outputs of all tokens with
  mma.sync, its warps splitting the input dimension, and so can normalise its input and add a
  residual on the way;
* up to 64 tokens, ``tile_kernel``: a program computes a [64, 32 or 64] tile with wgmma. Where the
  output is narrow the input dimension is split over programs, and the float32 partial sums are
  added up by the norm that follows (``add_rms_norm``): no atomics, the same bits every time.
"""

import torch
import triton

from layers.kernels.skinny_kernels import rows_kernel, tile_kernel

__all__ = [
    "MAX_FUSED_TOKENS",
    "MAX_TOKENS",
    "skinny_linear",
    "skinny_linear_reference",
    "skinny_splits",
    "supports_skinny_linear",
]

MAX_FUSED_TOKENS = 16
MAX_TOKENS = 64
# Shared memory of one multiprocessor of an H100 or H200, less what the driver keeps.
_SHARED_BYTES = 227 * 1024
# The largest weight, in elements, with which the tile kernel beat cuBLAS.
_TILE_WEIGHTS = 8 * 1024 * 1024


def _rows_config(tokens: int, n: int, k: int, swiglu: bool) -> dict[str, int]:
    """Tile of the rows kernel.

    Measured on an H200, us for all layers in one graph, norms, residuals and SwiGLU fused, against
    cuBLAS's linears alone (and with the three small kernels a layer that the fusion saves):

    ===========================  ============  ============  ============
    batch                        1             8             16
    ===========================  ============  ============  ============
    Qwen3-0.6B, 28 layers        312           332           405
    cuBLAS                       821 (1,042)   682 (861)     698 (864)
    Qwen2-1.5B, 28 layers        903           917           926
    cuBLAS                       1,173         1,141         1,161
    Qwen3-8B, 8 layers           814           831           874
    cuBLAS                       870           892           866
    ===========================  ============  ============  ============

    The constants: 16 rows and 4 warps of 64 everywhere took 340 / 352 / 426 with Qwen3-0.6B; 32
    rows for wide outputs -21 / -12 / +1, for gate and up +3 / +4 / -17; 4 warps of 128 at k = 2048
    -10 / -4 / 0; 8 warps of 128 at k = 3072 -17 / -4 / -12. With 32 tokens this kernel took 612,
    the other one 543.
    """
    wide = tokens > 8 if swiglu else n >= 4096
    bm, bn = (8 if tokens <= 8 else 16), (32 if wide else 16)
    if k <= 2048:
        warps, kc = 4, 64 if k < 2048 else 128
    else:
        warps, kc = 8, 64 if wide or swiglu else 128
    chunks = triton.cdiv(k, warps * kc)
    stage = warps * kc * (bn * (2 if swiglu else 1) + bm) * 2
    # All of a program's weights at once where they fit, else a ring that leaves room for two
    # programs a multiprocessor.
    stages = chunks if chunks * stage <= 200 * 1024 else max(2, 100 * 1024 // stage)
    return {"BM": bm, "BN": bn, "KC": kc, "WARPS": warps, "CHUNKS": chunks, "STAGES": stages}


def _tile_config(n: int, k: int, swiglu: bool, splits: int) -> dict[str, int] | None:
    """Tile of the wgmma kernel, or None where the weight slice does not fit.

    Measured as above with Qwen3-0.6B at batch 24 / 32 / 48 / 64, norms counted in: 526 / 543 / 542
    / 559 against cuBLAS's 714 / 707 / 745 / 725 for the linears alone. Of the constants, 16
    outputs a tile instead of 32 cost qkv 22, four stages instead of eight there 47; 64 outputs a
    tile cost the o projection 13. Gate, up and down of Qwen2-1.5B lost to cuBLAS (batch 32, small
    kernels counted in: 1,507 with all four linears here, 1,265 with qkv and o, 1,456 with none):
    hence the limit on the weight. So did Qwen3-8B at batch 64 and Qwen3-0.6B at batch 128.
    """
    parts = 2 if swiglu else 1
    if k % (128 * splits) or n % 64 or n * k * parts > _TILE_WEIGHTS:
        return None
    chunks = k // splits // 128
    wide = splits > 1 and n // 32 * splits > 160
    for bn in (64, 32, 16) if wide else (32, 16):
        stages = min(chunks, 8, (_SHARED_BYTES - chunks * parts * bn * 256) // (64 * 256))
        if stages >= min(3, chunks) and chunks <= 16:
            return {"BN": bn, "CHUNKS": chunks, "STAGES": stages}
    return None


def skinny_splits(n: int, k: int) -> int:
    """How many ways to split the input of a narrow [n, k] weight above MAX_FUSED_TOKENS tokens.

    Slices of 512 where they divide k, more where that would give more than 8 partial sums.
    """
    chunks = k // 128
    return next((chunks // c for c in range(4, 17) if chunks % c == 0 and chunks // c <= 8), 1)


def supports_skinny_linear(
    tokens: int, n: int, k: int, *, swiglu: bool = False, splits: int = 1
) -> bool:
    """Whether :func:`skinny_linear` takes these shapes and is worth it on an H200.

    ``n`` counts the outputs after any SwiGLU.
    """
    if not 1 <= tokens <= MAX_TOKENS or n % 16 or k % 16:
        return False
    if tokens <= MAX_FUSED_TOKENS:
        return splits == 1 and k <= 16 * 1024
    return _tile_config(n, k, swiglu, splits) is not None


def skinny_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
    swiglu: bool = False,
    splits: int = 1,
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """``f(rms_norm(x) @ weight.T + bias) + residual`` for 1 to 64 tokens, each part optional.

    Args:
        x: [M, K] bf16 or fp16; rows may be strided by a multiple of 16.
        weight: [N, K], or with ``swiglu`` [2N, K], gate rows first; contiguous. It is read before
            the preceding kernels of the stream have finished, so they must not write it.
        bias: [N]; not together with ``swiglu``.
        norm_weight: [K]: the input is RMS-normalised with it first. Up to MAX_FUSED_TOKENS tokens.
        eps: of that norm.
        residual: [M, N], added to the result. Up to MAX_FUSED_TOKENS tokens.
        swiglu: f is ``silu(gate) * up`` instead of the identity.
        splits: above MAX_FUSED_TOKENS tokens, how many slices of K to sum apart (see
            :func:`skinny_splits`); the result is then [splits, M, N] float32, for
            :func:`~layers.kernels.norm.add_rms_norm` to add up.
        out: made when absent; contiguous rows. It must be none of the inputs.
        pdl: launch with programmatic dependent launch.

    Returns:
        [M, N] in ``x``'s dtype, or the partial sums. Products are accumulated in float32 in an
        order that depends on the shapes alone.

    Needs compute capability 9.0.
    """
    tokens, k = x.shape
    n = weight.shape[0] // (2 if swiglu else 1)
    if weight.shape[1] != k or not weight.is_contiguous() or weight.dtype != x.dtype:
        raise ValueError(f"weight must be contiguous [N, {k}] in x's dtype, got {weight.shape}")
    if x.stride(1) != 1 or x.stride(0) % 16 or x.data_ptr() % 16 or weight.data_ptr() % 16:
        raise ValueError("x and weight must be aligned to 16 bytes, rows of x to 16 elements")
    if not supports_skinny_linear(tokens, n, k, swiglu=swiglu, splits=splits):
        raise ValueError(f"no skinny linear for {tokens} tokens, {n} x {k}, {splits} splits")
    fused = tokens <= MAX_FUSED_TOKENS
    if not fused and (norm_weight is not None or residual is not None):
        raise ValueError(f"norm and residual are fused up to {MAX_FUSED_TOKENS} tokens only")
    if bias is not None and (swiglu or splits > 1):
        raise ValueError("bias goes with neither swiglu nor splits")
    if out is None and splits > 1:
        out = torch.empty((splits, tokens, n), dtype=torch.float32, device=x.device)
    elif out is None:
        out = torch.empty((tokens, n), dtype=x.dtype, device=x.device)
    if fused:
        rows = _rows_config(tokens, n, k, swiglu)
        rows_kernel[(triton.cdiv(n, rows["BN"]),)](
            x,
            weight,
            x if bias is None else bias,
            x if norm_weight is None else norm_weight,
            x if residual is None else residual,
            out,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            out.stride(0),
            tokens,
            n,
            k,
            eps,
            **rows,
            EVEN=k == rows["CHUNKS"] * rows["WARPS"] * rows["KC"] and n % rows["BN"] == 0,
            NORM=norm_weight is not None,
            BIAS=bias is not None,
            RESIDUAL=residual is not None,
            SWIGLU=swiglu,
            PDL=pdl,
            num_warps=rows["WARPS"],
            launch_pdl=pdl,
        )
        return out
    tile = _tile_config(n, k, swiglu, splits)
    assert tile is not None
    tile_kernel[(n // tile["BN"], splits)](
        x,
        weight,
        x if bias is None else bias,
        out,
        x.stride(0),
        out.stride(-2),
        out.stride(0) if splits > 1 else 0,
        tokens,
        n,
        k,
        **tile,
        BIAS=bias is not None,
        SWIGLU=swiglu,
        PDL=pdl,
        num_warps=4,
        launch_pdl=pdl,
    )
    return out


def skinny_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
    swiglu: bool = False,
) -> torch.Tensor:
    """Plain torch version of :func:`skinny_linear`, in float32 with one rounding at the end."""
    y = x.float()
    if norm_weight is not None:
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * norm_weight.float()
    y = y @ weight.float().T
    if bias is not None:
        y = y + bias.float()
    if swiglu:
        gate, up = y.chunk(2, dim=-1)
        y = gate * torch.sigmoid(gate) * up
    if residual is not None:
        y = y + residual.float()
    return y.to(x.dtype)
