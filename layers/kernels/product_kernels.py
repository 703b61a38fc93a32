"""The kernel of products.py for up to 16 tokens and several parts, and what all kernels share.

A kernel in Gluon, Triton's lower-level dialect, unlike a plain Triton kernel, can copy weights to
shared memory before the previous kernel ends. The K inputs of a product are cut into chunks. A
*stage* is shared memory for one chunk of the inputs, and for the weights that multiply these
inputs. products.py defines *parts* of K.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: ANN201

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def sum_pairs(x, LOG: gl.constexpr):
    """Add up axis 0, of size 2**LOG, of x [2**LOG, columns]: neighbours first, as a binary tree.

    Each addition has two operands, whose order does not matter. So the result depends neither on
    the layout of x nor on the kernel. `rowwise.sum_pairs` is the same tree.
    """
    for _ in gl.static_range(LOG):
        x = gl.sum(x.reshape([x.shape[0] // 2, 2, x.shape[1]]), 1)
    return x.reshape([x.shape[1]])


@gluon.jit
def row_scale(square, inverse, eps):
    """Return 1 / RMS of rows from their sums of squares; `inverse` is 1 / hidden_size."""
    # Explicit, or the compiler chooses whether to round the product.
    return gl.rsqrt(gl.fma(square, inverse, eps))


@gluon.jit
def scaled(x, scale, bias_ptr, n, N):
    """Return x * scale + bias[n] in one rounding. scale and the bias's pointer may be None."""
    if bias_ptr is not None:
        bias = gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)
        x = x + bias if scale is None else gl.fma(x, scale, bias)
    elif scale is not None:
        x = x * scale
    return x


@gluon.jit
def gated(gate, up, dtype: gl.constexpr, GATE: gl.constexpr):
    """Return f(gate) * up in float32, after rounding both to `dtype`. GATE names f."""
    gate, up = gate.to(dtype).to(gl.float32), up.to(dtype).to(gl.float32)
    x = gate
    if GATE == "gelu_tanh":
        # gate (1 + tanh z) / 2 = gate / (1 + exp(-2z)) for GELU's z, see arXiv:1606.08415.
        x = gate * gl.fma(gate * gate, 0.07135481627159, 1.5957691216057308)
    return gate / (1.0 + gl.exp(-x)) * up


@gluon.jit
def _index(axis: gl.constexpr, size: gl.constexpr, layout: gl.constexpr):
    """Return arange(size) along `axis` of a 3-D tensor whose two other axes have size 1."""
    if axis == 0:
        line = gl.arange(0, size, gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    elif axis == 1:
        line = gl.arange(0, size, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    else:
        line = gl.arange(0, size, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    return line


@gluon.jit(do_not_specialize=["M"])
def rows_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    stream,
    strides,
    M,
    N,
    K,
    BM: gl.constexpr,
    BN: gl.constexpr,
    KC: gl.constexpr,
    PARTS: gl.constexpr,
    CHUNKS: gl.constexpr,
    STAGES: gl.constexpr,
    GAIN: gl.constexpr,
) -> None:
    """Compute out = x @ w.T + bias for up to 16 tokens; with `stream`, add it to the residual.

    A program computes BN outputs of all tokens. Warps compute different parts of K, or different
    outputs. With `stream` = (residual, norm weight, gained, squares), out is residual + product,
    gained is out * norm weight * GAIN, and squares has a sum for every 16 outputs of a token.
    """
    WARPS_N: gl.constexpr = BN // 16
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[PARTS, WARPS_N, 1], instr_shape=[1, 16, 8]
    )
    LW: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    LX: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    COPY: gl.constexpr = gl.BlockedLayout(
        [1, 1, 8], [1, 256 // KC, KC // 8], [PARTS, WARPS_N, 1], [2, 1, 0]
    )
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0])
    EPILOGUE: gl.constexpr = gl.BlockedLayout(
        [PARTS, 1, 1], [1, 16, 2], [1, WARPS_N, PARTS], [1, 2, 0]
    )
    TILE: gl.constexpr = gl.SliceLayout(0, EPILOGUE)
    dtype: gl.constexpr = w_ptr.dtype.element_ty
    x_stride, residual_stride, out_stride = strides
    gdc_launch_dependents()
    start = gl.program_id(0) * BN
    ws = gl.allocate_shared_memory(dtype, [STAGES, PARTS, BN, KC], SHARED)
    xs = gl.allocate_shared_memory(dtype, [STAGES, PARTS, BM, KC], SHARED)
    row = start + _index(1, BN, COPY)  # [1, BN, 1]
    token = _index(1, BM, COPY)  # [1, BM, 1]
    k0 = _index(0, PARTS, COPY) * (CHUNKS * KC) + _index(2, KC, COPY)  # [PARTS, 1, KC]
    for c in gl.static_range(STAGES):
        async_copy.async_copy_global_to_shared(ws.index(c), w_ptr + row * K + c * KC + k0)
        async_copy.commit_group()
    n = start + gl.arange(0, BN, gl.SliceLayout(1, TILE))[:, None]  # [BN, 1]
    m = gl.arange(0, BM, gl.SliceLayout(0, TILE))[None, :]  # [1, BM]
    mask = m < M
    if bias_ptr is not None:
        bias = gl.load(bias_ptr + n).to(gl.float32)
    if stream is not None:
        residual_ptr, norm_ptr, gained_ptr, squares_ptr = stream
        gain = gl.load(norm_ptr + n).to(gl.float32) * GAIN
    # Wait for earlier kernels, one of which writes x. Up to here only weights and bias are read.
    gdc_wait()
    for c in gl.static_range(STAGES):
        async_copy.async_copy_global_to_shared(
            xs.index(c), x_ptr + token * x_stride + c * KC + k0, mask=token < M
        )
        async_copy.commit_group()
    if stream is not None:
        residual = gl.load(residual_ptr + m * residual_stride + n, mask=mask, other=0.0)
    acc = gl.zeros((PARTS, BN, BM), gl.float32, MMA)
    for c in gl.static_range(CHUNKS):
        async_copy.wait_group(STAGES - 1 if CHUNKS > STAGES else CHUNKS - 1 - c)
        x = xs.index(c % STAGES).permute([0, 2, 1]).load(LX)  # [PARTS, KC, BM]
        acc = mma_v2(ws.index(c % STAGES).load(LW), x, acc)
        if CHUNKS > STAGES:
            if c + STAGES < CHUNKS:
                barrier()
                k = (c + STAGES) * KC + k0
                async_copy.async_copy_global_to_shared(ws.index(c % STAGES), w_ptr + row * K + k)
                async_copy.async_copy_global_to_shared(
                    xs.index(c % STAGES), x_ptr + token * x_stride + k, mask=token < M
                )
            async_copy.commit_group()
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    sums = gl.allocate_shared_memory(gl.float32, [PARTS, BN, BM], PLAIN)
    sums.store(acc)
    barrier()
    parts = sums.load(EPILOGUE)
    if PARTS == 4:
        parts = gl.sum(parts.reshape([2, 2, BN, BM]), 1)
    out = gl.convert_layout(gl.sum(parts, 0), TILE)  # [BN, BM]
    if bias_ptr is not None:
        out += bias
    out = out.to(dtype)
    if stream is not None:
        out = (out.to(gl.float32) + residual.to(gl.float32)).to(dtype)
        out32 = out.to(gl.float32)
        gl.store(gained_ptr + m * N + n, (out32 * gain).to(dtype), mask=mask)
        square = (out32 * out32).reshape([WARPS_N, 8, 2, BM])
        square = gl.sum(gl.sum(square, 2).reshape([WARPS_N, 4, 2, BM]), 2)
        square = gl.sum(gl.sum(square.reshape([WARPS_N, 2, 2, BM]), 2), 1)  # [WARPS_N, BM]
        SQUARE: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [PARTS * WARPS_N, 1], [1, 0])
        square = gl.convert_layout(square, SQUARE)
        i = gl.program_id(0) * WARPS_N + gl.arange(0, WARPS_N, gl.SliceLayout(1, SQUARE))[:, None]
        mm = gl.arange(0, BM, gl.SliceLayout(0, SQUARE))[None, :]
        gl.store(squares_ptr + i * M + mm, square, mask=mm < M)
    gl.store(out_ptr + m * out_stride + n, out, mask=mask)
