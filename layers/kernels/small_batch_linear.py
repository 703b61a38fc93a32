"""Linear layers for decode batches of 1 to 256 tokens.

A layer computes N outputs from K inputs of each token; its weight is [N, K]. In a decode step a
small model runs many short kernels, and the gaps between kernels take longer than the kernels'
memory traffic. So the kernels of this module use programmatic dependent launch: a kernel starts
before the previous kernel ends, copies weights to shared memory, and waits for the previous kernel.

``rows_kernel`` is used for 1 to 16 tokens. Each program computes 16 or 32 of the N outputs for all
tokens. The kernel can also apply an RMSNorm to its input and add a residual to its output.
``tile_kernel`` is used for 17 to 256 tokens. Each program computes a *tile*: 32 or 64 of the N
outputs for 64 or 128 tokens. If N is small, the K inputs are divided into slices, and each program
handles one slice. The results are partial sums; the kernel that reads them adds them up.
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
# Without SwiGLU, tiles of 128 tokens are used only for weights of at most this many elements. For
# 128 tokens with these tiles, on an H200 `tile_kernel` takes 11.7 us for a weight [1536, 8960]
# (cuBLAS: 12.8 us), and 18.2 us for a weight [4096, 4096] (cuBLAS: 14.5 us).
_TALL_WEIGHTS = 14 * 2**20


def _rows_config(tokens: int, n: int, k: int, swiglu: bool) -> dict[str, int]:
    # With `rows_kernel`, all linear layers, norms, residual additions and SwiGLUs of Qwen3-0.6B in
    # one CUDA graph take 310 us for 1 token on an H200, and 402 us for 16 tokens. With cuBLAS and
    # separate kernels for norms, residuals and SwiGLU they take 1,082 us and 926 us.
    wide = tokens > 8 if swiglu else n >= 4096
    bm, bn = (8 if tokens <= 8 else 16), (32 if wide else 16)
    if k <= 2048:
        warps, kc = 4, 64 if k < 2048 else 128
    else:
        warps, kc = 8, 64 if wide or swiglu else 128
    chunks = triton.cdiv(k, warps * kc)
    stage = warps * kc * (bn * (2 if swiglu else 1) + bm) * 2
    # A stage is shared memory for one chunk of the K inputs and for the chunk's weights. Each chunk
    # gets its own stage if all stages fit in 200 KB. Otherwise there are as many stages as fit in
    # 100 KB, but at least 2. A multiprocessor can run two programs of 100 KB each.
    stages = chunks if chunks * stage <= 200 * 1024 else max(2, 100 * 1024 // stage)
    even = k == chunks * warps * kc and n % bn == 0
    tile = {"BM": bm, "BN": bn, "KC": kc, "WARPS": warps, "CHUNKS": chunks, "STAGES": stages}
    return {**tile, "EVEN": even}


class _Tile(NamedTuple):
    """Constants of `tile_kernel`. A tile has BN outputs and BM tokens; a chunk has BK inputs."""

    BM: int
    BN: int
    BK: int
    STAGES: int
    SPLITS: int = 1

    def programs(self, tokens: int, n: int) -> int:
        return -(-tokens // self.BM) * (n // self.BN) * self.SPLITS


def _tile_config(tokens: int, n: int, k: int, swiglu: bool, splittable: bool) -> _Tile | None:
    """Return constants of `tile_kernel` for a weight [n, k], or None if cuBLAS is to be used."""
    # For each linear layer of Qwen3-0.6B and Qwen2-1.5B, 20 to 150 values of `_Tile` were timed on
    # an H200. With the fastest values all programs run at the same time, on at least half of the
    # multiprocessors. If a program had to read over 2,560 of the K inputs, cuBLAS was faster.
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
    """Return the constants for two weights, a gate and an up projection of n outputs each."""
    if chunks > 20:
        # For K > 2,560 and more than 64 tokens cuBLAS is as fast as `tile_kernel`. For 64 tokens
        # and two weights [6144, 4096] `tile_kernel` takes 27.6 us and cuBLAS 30.5 us.
        deep = _Tile(64, 64, 128, 4)
        fills = 64 <= deep.programs(tokens, n) <= _MULTIPROCESSORS
        return deep if tokens <= 64 and chunks <= 32 and fills else None
    if tokens <= 128:
        narrow = _Tile(64, 32, 128, 6) if tokens <= 64 else _Tile(128, 32, 128, 4)
        if narrow.programs(tokens, n) <= _MULTIPROCESSORS:
            return narrow
        # Programs with these tiles need so little shared memory that a multiprocessor runs two.
        wide = _Tile(64, 64, 64, 4) if tokens <= 64 else _Tile(128, 64, 64, 3)
        return wide if wide.programs(tokens, n) <= 1.25 * _MULTIPROCESSORS else None
    wide = _Tile(128, 64, 64, 6)
    return wide if wide.programs(tokens, n) <= _MULTIPROCESSORS else None


def small_batch_splits(tokens: int, n: int, k: int) -> int:
    """Return the number of slices of K to pass to `small_batch_linear` as `splits`."""
    tile = _tile_config(tokens, n, k, swiglu=False, splittable=True)
    return 1 if tokens <= MAX_FUSED_TOKENS or tile is None else tile.SPLITS


def supports_small_batch_linear(
    tokens: int, n: int, k: int, *, swiglu: bool = False, splits: int = 1
) -> bool:
    """Whether `small_batch_linear` accepts these sizes. Otherwise cuBLAS should be used."""
    fits = n * k * (2 if swiglu else 1) < 2**31  # the kernels use int32 offsets into the weight
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

    The GPU needs compute capability 9.0. The order of float32 additions depends only on sizes.

    Args:
        x: bf16 or fp16 [M, K] of M tokens; the stride of rows is a multiple of 16 elements.
        weight: contiguous [N, K]. With ``swiglu`` it is [2N, K]: gate weight, then up weight.
        bias: [N]; not allowed together with ``swiglu`` or with ``splits`` > 1.
        norm_weight: weight [K] of an RMSNorm that is applied to x; allowed for at most 16 tokens.
        residual: [M, N]; added to the result; allowed for at most 16 tokens.
        swiglu: f is ``silu(gate) * up``. Without ``swiglu``, f is the identity.
        splits: number of slices of K. The result has separate partial sums for each slice.
        out: tensor for the result: [M, N] in x's dtype, or float32 [splits, M, N] if ``splits`` >
            1. Rows must be contiguous. ``out`` must not share memory with an input.
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
