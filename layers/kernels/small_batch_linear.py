"""Linear layers for decode batches of 1 to 256 tokens.

A layer computes N outputs from K inputs of each token; its weight is [N, K]. In a decode step a
small model runs many short kernels, and the gaps between kernels take longer than the kernels'
memory traffic. So the kernels of this module use programmatic dependent launch: a kernel starts
early, copies its slice of the weight to shared memory, and then waits for the previous kernel.

``rows_kernel`` serves 1 to 16 tokens. A program computes 16 or 32 of the N outputs for all tokens,
with mma.sync. The kernel can also apply an RMSNorm to its input and add a residual to its output.
``tile_kernel`` serves 17 to 256 tokens. A program computes a *tile*, 32 or 64 outputs of 64 or 128
tokens, with wgmma. If N is small, K is split among programs, whose results are partial sums. The
next RMSNorm kernel adds up these partial sums.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from layers.kernels.small_batch_kernels import rows_kernel, tile_kernel

MAX_FUSED_TOKENS, MAX_TOKENS = 16, 256
_MULTIPROCESSORS = 132  # H100 and H200
# Without SwiGLU, tiles of 128 tokens are used only for weights of at most this many elements. On an
# H200, for 128 tokens and a weight [1536, 8960], such tiles take 11.7 us and cuBLAS 12.8 us. For
# 128 tokens and a weight [4096, 4096], such tiles take 18.2 us and cuBLAS 14.5 us.
_TALL_WEIGHTS = 14 * 2**20


def _rows_config(tokens: int, n: int, k: int, swiglu: bool) -> dict[str, int]:
    # On an H200 a CUDA graph of all linear layers of Qwen3-0.6B, with norms, residuals and SwiGLU,
    # takes 310 us with `rows_kernel` and 1,082 us with cuBLAS and separate kernels for norms,
    # residuals and SwiGLU. These times are for 1 token. For 16 tokens they are 402 us and 926 us.
    wide = tokens > 8 if swiglu else n >= 4096
    bm, bn = (8 if tokens <= 8 else 16), (32 if wide else 16)
    if k <= 2048:
        warps, kc = 4, 64 if k < 2048 else 128
    else:
        warps, kc = 8, 64 if wide or swiglu else 128
    chunks = triton.cdiv(k, warps * kc)
    stage = warps * kc * (bn * (2 if swiglu else 1) + bm) * 2
    # A stage is shared memory for one chunk of the K inputs and for the chunk's weights. If 200 KB
    # hold all chunks, each chunk has its own stage. Otherwise stages are reused: as many as fit
    # 100 KB, but at least 2. A multiprocessor can run two programs of 100 KB each.
    stages = chunks if chunks * stage <= 200 * 1024 else max(2, 100 * 1024 // stage)
    even = k == chunks * warps * kc and n % bn == 0
    tile = {"BM": bm, "BN": bn, "KC": kc, "WARPS": warps, "CHUNKS": chunks, "STAGES": stages}
    return {**tile, "EVEN": even}


class _Tile(NamedTuple):
    """Constants of `tile_kernel`: BM tokens and BN outputs per program, BK inputs per stage."""

    BM: int
    BN: int
    BK: int
    STAGES: int
    SPLITS: int = 1

    def programs(self, tokens: int, n: int) -> int:
        return -(-tokens // self.BM) * (n // self.BN) * self.SPLITS


def _tile_config(tokens: int, n: int, k: int, swiglu: bool, splittable: bool) -> _Tile | None:
    """Return the tile for a weight [n, k], or None if cuBLAS should be used instead."""
    # For each linear layer of Qwen3-0.6B and Qwen2-1.5B 20 to 150 tiles were timed on an H200. With
    # the fastest tiles all programs run at once, on at least half of the multiprocessors, and their
    # stages fill shared memory. If a program had more than 2,560 inputs, cuBLAS was faster.
    chunks = k // 128
    if n % 64 or k % 128:
        return None
    if swiglu:
        return _gated_tile(tokens, n, chunks)
    for tile in (_Tile(64, 64, 128, 6), _Tile(128, 64, 128, 4)):
        programs = tile.programs(tokens, n)
        ways = [s for s in range(1, 9) if chunks % s == 0 and programs * s <= _MULTIPROCESSORS]
        if not splittable:
            ways = ways[:1]
        enough = (s for s in ways if chunks // s <= 8 and programs * s >= 64)
        splits = next(enough, max(ways, default=0))
        suits = tile.BM == 64 or (tokens > 64 and n * k <= _TALL_WEIGHTS)
        if splits and chunks // splits <= 20 and suits:
            return tile._replace(SPLITS=splits)
    return None


def _gated_tile(tokens: int, n: int, chunks: int) -> _Tile | None:
    """Return the tile for a gate and an up projection of n outputs each. None: use cuBLAS."""
    if chunks > 20:
        # With K > 2,560 cuBLAS is as fast as `tile_kernel` for more than 64 tokens. For 64 tokens
        # and two weights [6144, 4096] `tile_kernel` takes 27.6 us and cuBLAS 30.5 us.
        deep = _Tile(64, 64, 128, 4)
        fills = 64 <= deep.programs(tokens, n) <= _MULTIPROCESSORS
        return deep if tokens <= 64 and chunks <= 32 and fills else None
    if tokens <= 128:
        narrow = _Tile(64, 32, 128, 6) if tokens <= 64 else _Tile(128, 32, 128, 4)
        if narrow.programs(tokens, n) <= _MULTIPROCESSORS:
            return narrow
        # The stages of these tiles are small, so that a multiprocessor can run two programs.
        wide = _Tile(64, 64, 64, 4) if tokens <= 64 else _Tile(128, 64, 64, 3)
        return wide if wide.programs(tokens, n) <= 1.25 * _MULTIPROCESSORS else None
    wide = _Tile(128, 64, 64, 6)
    return wide if wide.programs(tokens, n) <= _MULTIPROCESSORS else None


def small_batch_splits(tokens: int, n: int, k: int) -> int:
    """Return the best number of slices of K, the argument `splits` of `small_batch_linear`."""
    tile = _tile_config(tokens, n, k, swiglu=False, splittable=True)
    return 1 if tokens <= MAX_FUSED_TOKENS or tile is None else tile.SPLITS


def supports_small_batch_linear(
    tokens: int, n: int, k: int, *, swiglu: bool = False, splits: int = 1
) -> bool:
    """Whether `small_batch_linear` takes these sizes, and cuBLAS is not known to be as fast."""
    fits = n * k * (2 if swiglu else 1) < 2**31  # the kernels index the weight by int32
    if not 1 <= tokens <= MAX_TOKENS or n % 16 or k % 16 or not fits:
        return False
    if tokens <= MAX_FUSED_TOKENS:
        return splits == 1 and k <= 16 * 1024
    tile = _tile_config(tokens, n, k, swiglu, splittable=splits > 1)
    return tile is not None and splits == tile.SPLITS


def small_batch_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    swiglu: bool = False,
    splits: int = 1,
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """Compute ``f(rms_norm(x) @ weight.T + bias) + residual`` for 1 to 256 tokens.

    The device needs compute capability 9.0. Sizes alone determine the order of float32 additions.

    Args:
        x: bf16 or fp16 [M, K]; the stride of rows is a multiple of 16 elements.
        weight: contiguous [N, K]. With ``swiglu`` [2N, K]: first N rows of gate, then N rows of up.
        bias: [N]; not allowed together with ``swiglu`` or with ``splits`` > 1.
        norm_weight: weight [K] of an RMSNorm of x; only for up to MAX_FUSED_TOKENS (16) tokens.
        residual: [M, N]; added to the result, only for up to MAX_FUSED_TOKENS (16) tokens.
        swiglu: f is ``silu(gate) * up`` instead of the identity.
        splits: number of slices of K. Each slice gives its own partial sums in the result.
        out: tensor for the result: [M, N] in x's dtype, or float32 [splits, M, N] if ``splits`` >
            1. Its rows are contiguous, and it shares no memory with an input. None: a new tensor.
        pdl: use programmatic dependent launch. Earlier kernels must not write the weights or bias.
    """
    (tokens, k), n = x.shape, weight.shape[0] // (2 if swiglu else 1)
    if weight.shape[1] != k or not weight.is_contiguous() or weight.dtype != x.dtype:
        raise ValueError(f"weight must be contiguous [N, {k}] in x's dtype, got {weight.shape}")
    if x.stride(1) != 1 or x.stride(0) % 16 or x.data_ptr() % 16 or weight.data_ptr() % 16:
        raise ValueError("x and weight must be aligned to 16 bytes, rows of x to 16 elements")
    if not supports_small_batch_linear(tokens, n, k, swiglu=swiglu, splits=splits):
        raise ValueError(f"no small-batch linear for {tokens} tokens, {n} x {k}, {splits} splits")
    if bias is not None and (swiglu or splits > 1):
        raise ValueError("bias goes with neither swiglu nor splits")
    if out is None:
        shape = (splits, tokens, n) if splits > 1 else (tokens, n)
        out = x.new_empty(shape, dtype=torch.float32 if splits > 1 else x.dtype)
    if tokens <= MAX_FUSED_TOKENS:
        tile = _rows_config(tokens, n, k, swiglu)
        rows_kernel[(triton.cdiv(n, tile["BN"]),)](
            *(x, weight, bias, norm_weight, residual, out),
            *(x.stride(0), 0 if residual is None else residual.stride(0), out.stride(0)),
            *(tokens, n, k, eps),
            **tile,
            SWIGLU=swiglu,
            num_warps=tile["WARPS"],
            launch_pdl=pdl,
        )
    elif norm_weight is None and residual is None:
        _launch_tile(x, weight, bias, out, splits, pdl)
    else:
        raise ValueError(f"norm and residual are fused up to {MAX_FUSED_TOKENS} tokens only")
    return out


def _launch_tile(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, splits: int, pdl: bool
) -> None:
    (tokens, k), n = x.shape, out.shape[-1]
    swiglu = weight.shape[0] == 2 * n
    tile = _tile_config(tokens, n, k, swiglu, splittable=splits > 1)
    assert tile is not None
    chunks = k // tile.BK // splits
    warps = 8 if tile.BM * tile.BN * (2 if swiglu else 1) > 128 * 64 else 4
    tile_kernel[(n // tile.BN, triton.cdiv(tokens, tile.BM), splits)](
        *(_descriptor(x, tile.BM, tile.BK), _descriptor(weight, tile.BN, tile.BK), bias, out),
        *(out.stride(-2), out.stride(0) if splits > 1 else 0, tokens, n),
        *(tile.BM, tile.BN, tile.BK, chunks, min(tile.STAGES, chunks), warps, swiglu),
        num_warps=warps,
        launch_pdl=pdl,
    )


def _descriptor(tensor: Tensor, rows: int, cols: int) -> TensorDescriptor:
    dtype = gl.bfloat16 if tensor.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for([rows, cols], dtype)
    return TensorDescriptor.from_tensor(tensor, [rows, cols], layout)
