"""Linear layers for decode batches of 1 to 256 tokens, which end before a launch pays off.

A step of a small model at such batches is a chain of a hundred short kernels. What costs time is
not bandwidth but the gap between one kernel and the next. So these kernels are built for
programmatic dependent launch: they start while their predecessor still runs, copy their slice of
the *weight*, which no kernel writes, into shared memory with asynchronous copies, and only then
wait for the predecessor's output. Several kernels' weights are under way at once.

* Up to 16 tokens, ``rows_kernel``: a program computes 16 or 32 outputs of all tokens with
  mma.sync. Its warps split the input dimension, so the program sees whole inputs and outputs, and
  can normalise the input and add a residual.
* Beyond, ``tile_kernel``: a program computes a tile of 64 or 128 tokens with wgmma. Where the
  output is narrow the input dimension is split over programs, and the float32 partial sums are
  added up by the norm that follows (``add_rms_norm``): no atomics, the same bits every time.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from layers.kernels.small_batch_kernels import rows_kernel, tile_kernel

MAX_FUSED_TOKENS = 16
MAX_TOKENS = 256
# Of an H100 or H200.
_MULTIPROCESSORS = 132
# With 128 tokens, tiles of 128 beat cuBLAS with 1536 x 8960 (11.7 against 12.8 us); with
# 4096 x 4096 no tile did (18.2 against 14.5).
_TALL_WEIGHTS = 14 * 2**20


def _rows_config(tokens: int, n: int, k: int, swiglu: bool) -> dict[str, int]:
    """Tile of the rows kernel, and whether all tiles are full.

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
    even = k == chunks * warps * kc and n % bn == 0
    tile = {"BM": bm, "BN": bn, "KC": kc, "WARPS": warps, "CHUNKS": chunks, "STAGES": stages}
    return {**tile, "EVEN": even}


class _Tile(NamedTuple):
    """Tile of the wgmma kernel: BM tokens, BN outputs, BK inputs a stage."""

    BM: int
    BN: int
    BK: int
    STAGES: int
    SPLITS: int = 1

    def programs(self, tokens: int, n: int) -> int:
        return -(-tokens // self.BM) * (n // self.BN) * self.SPLITS


def _tile_config(tokens: int, n: int, k: int, swiglu: bool, splittable: bool) -> _Tile | None:
    """The tile for a product, or None where cuBLAS is as fast.

    From a search over 20 to 150 tiles a shape on an H200, each kernel chained with itself over 28
    layers' weights in a graph; us a kernel, cuBLAS's with its SwiGLU kernel in brackets:

    ===================  ===========  ===========  ===========  ============
    batch                64           128          192          256
    ===================  ===========  ===========  ===========  ============
    [4096, 1024]         3.9 (5.4)    4.8 (5.3)    6.3 (5.9)    6.2 (6.3)
    [1024, 2048]         3.0 (5.8)    3.8 (6.2)    4.3 (6.3)    4.8 (6.6)
    2 x [3072, 1024]     4.7 (8.3)    5.9 (8.5)    8.8 (9.4)    8.5 (10.2)
    [1024, 3072]         3.6 (8.0)    4.4 (8.1)    5.7 (7.8)    6.2 (7.8)
    [2048, 1536]         3.4 (5.6)    4.3 (5.8)                 5.7 (5.9)
    [1536, 1536]         2.9 (5.4)    4.1 (5.6)                 5.1 (6.0)
    2 x [8960, 1536]     19.7 (21.2)  20.2 (22.5)               33.4 (26.4)
    [1536, 8960]         9.1 (12.4)   11.7 (12.8)               18.1 (18.6)
    ===================  ===========  ===========  ===========  ============

    What the search says: one wave of programs on at least half of the multiprocessors, the ring in
    all of the shared memory, and at most 1,024 inputs a program where the output is narrow. With
    more than 2,560 inputs a program cuBLAS was ahead.
    """
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
    """As `_tile_config`, for the gate and up projections in one."""
    if chunks > 20:
        # 2 x [6144, 4096] with 64 tokens: 27.6 us against 30.5; with half or twice the programs, or
        # with 128 tokens, cuBLAS is as fast or faster.
        deep = _Tile(64, 64, 128, 4)
        fills = 64 <= deep.programs(tokens, n) <= _MULTIPROCESSORS
        return deep if tokens <= 64 and chunks <= 32 and fills else None
    if tokens <= 128:
        narrow = _Tile(64, 32, 128, 6) if tokens <= 64 else _Tile(128, 32, 128, 4)
        if narrow.programs(tokens, n) <= _MULTIPROCESSORS:
            return narrow
        # Small rings: two programs a multiprocessor, where one wave of them is not enough.
        wide = _Tile(64, 64, 64, 4) if tokens <= 64 else _Tile(128, 64, 64, 3)
        return wide if wide.programs(tokens, n) <= 1.25 * _MULTIPROCESSORS else None
    wide = _Tile(128, 64, 64, 6)
    return wide if wide.programs(tokens, n) <= _MULTIPROCESSORS else None


def small_batch_splits(tokens: int, n: int, k: int) -> int:
    """How many ways to split the input of an [n, k] weight if a norm adds up what comes out."""
    tile = _tile_config(tokens, n, k, swiglu=False, splittable=True)
    return 1 if tokens <= MAX_FUSED_TOKENS or tile is None else tile.SPLITS


def supports_small_batch_linear(
    tokens: int, n: int, k: int, *, swiglu: bool = False, splits: int = 1
) -> bool:
    """Whether :func:`small_batch_linear` takes these shapes and is worth it on an H200.

    ``n`` counts the outputs after any SwiGLU.
    """
    # Offsets into the weight are of 32 bits.
    fits = n * k * (2 if swiglu else 1) < 2**31
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
    """``f(rms_norm(x) @ weight.T + bias) + residual`` for 1 to 256 tokens, each part optional.

    Needs compute capability 9.0. Products are accumulated in float32 in an order that depends on
    the shapes alone.

    Args:
        x: [M, K] bf16 or fp16; rows may be strided by a multiple of 16.
        weight: [N, K], or with ``swiglu`` [2N, K], gate rows first; contiguous. It is read before
            the preceding kernels of the stream have finished, so they must not write it.
        bias: [N]; not together with ``swiglu`` or ``splits``.
        norm_weight: [K]: the input is RMS-normalised with it first. Up to MAX_FUSED_TOKENS tokens.
        eps: of that norm.
        residual: [M, N], added to the result. Up to MAX_FUSED_TOKENS tokens.
        swiglu: f is ``silu(gate) * up`` instead of the identity.
        splits: above MAX_FUSED_TOKENS tokens, how many slices of K to sum apart (see
            :func:`small_batch_splits`), for :func:`~layers.kernels.norm.add_rms_norm` to add up.
        out: made when absent; contiguous rows. It must be none of the inputs.
        pdl: launch with programmatic dependent launch.

    Returns:
        [M, N] in ``x``'s dtype, or with ``splits`` [splits, M, N] float32.
    """
    tokens, n, k = _checked_shape(x, weight, bias, swiglu, splits)
    if out is None:
        shape = (splits, tokens, n) if splits > 1 else (tokens, n)
        dtype = torch.float32 if splits > 1 else x.dtype
        out = torch.empty(shape, dtype=dtype, device=x.device)
    if tokens <= MAX_FUSED_TOKENS:
        tile = _rows_config(tokens, n, k, swiglu)
        options = {**tile, "SWIGLU": swiglu, "num_warps": tile["WARPS"], "launch_pdl": pdl}
        tensors = (x, weight, bias, norm_weight, residual, out)
        strides = (x.stride(0), 0 if residual is None else residual.stride(0), out.stride(0))
        grid = (triton.cdiv(n, tile["BN"]),)
        rows_kernel[grid](*tensors, *strides, tokens, n, k, eps, **options)
    elif norm_weight is None and residual is None:
        _launch_tile(x, weight, bias, out, splits, pdl)
    else:
        raise ValueError(f"norm and residual are fused up to {MAX_FUSED_TOKENS} tokens only")
    return out


def _checked_shape(
    x: Tensor, weight: Tensor, bias: Tensor | None, swiglu: bool, splits: int
) -> tuple[int, int, int]:
    """Tokens, outputs and inputs."""
    (tokens, k), n = x.shape, weight.shape[0] // (2 if swiglu else 1)
    if weight.shape[1] != k or not weight.is_contiguous() or weight.dtype != x.dtype:
        raise ValueError(f"weight must be contiguous [N, {k}] in x's dtype, got {weight.shape}")
    if x.stride(1) != 1 or x.stride(0) % 16 or x.data_ptr() % 16 or weight.data_ptr() % 16:
        raise ValueError("x and weight must be aligned to 16 bytes, rows of x to 16 elements")
    if not supports_small_batch_linear(tokens, n, k, swiglu=swiglu, splits=splits):
        raise ValueError(f"no small-batch linear for {tokens} tokens, {n} x {k}, {splits} splits")
    if bias is not None and (swiglu or splits > 1):
        raise ValueError("bias goes with neither swiglu nor splits")
    return tokens, n, k


def _launch_tile(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, splits: int, pdl: bool
) -> None:
    (tokens, k), n = x.shape, out.shape[-1]
    swiglu = weight.shape[0] == 2 * n
    tile = _tile_config(tokens, n, k, swiglu, splittable=splits > 1)
    assert tile is not None
    chunks = k // tile.BK // splits
    warps = 8 if tile.BM * tile.BN * (2 if swiglu else 1) > 128 * 64 else 4
    stages = min(tile.STAGES, chunks)
    sizes = {"BM": tile.BM, "BN": tile.BN, "BK": tile.BK, "CHUNKS": chunks, "STAGES": stages}
    options = {"WARPS": warps, "SWIGLU": swiglu, "num_warps": warps, "launch_pdl": pdl}
    descriptors = (_descriptor(x, tile.BM, tile.BK), _descriptor(weight, tile.BN, tile.BK))
    strides = (out.stride(-2), out.stride(0) if splits > 1 else 0)
    grid = (n // tile.BN, triton.cdiv(tokens, tile.BM), splits)
    tile_kernel[grid](*descriptors, bias, out, *strides, tokens, n, **sizes, **options)


def _descriptor(tensor: Tensor, rows: int, cols: int) -> TensorDescriptor:
    dtype = gl.bfloat16 if tensor.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for([rows, cols], dtype)
    return TensorDescriptor.from_tensor(tensor, [rows, cols], layout)


def small_batch_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    swiglu: bool = False,
) -> Tensor:
    """As :func:`small_batch_linear`, in float32 with one rounding at the end."""
    y = x.float()
    if norm_weight is not None:
        y = F.rms_norm(y, x.shape[-1:], norm_weight.float(), eps)
    y = F.linear(y, weight.float(), None if bias is None else bias.float())
    if swiglu:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    if residual is not None:
        y = y + residual.float()
    return y.to(x.dtype)
