"""Kernels of products.py for up to 256 tokens, written in Gluon, Triton's lower-level dialect.

A Gluon kernel, unlike a plain Triton kernel, can copy weights to shared memory before the previous
kernel ends. The K inputs of a product are cut into chunks. A *stage* is shared memory for one chunk
of the inputs, and for the weights that multiply these inputs. products.py defines *parts* of K.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: ANN201

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
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
def swiglu(gate, up, dtype: gl.constexpr):
    """Return silu(gate) * up in float32, after rounding both to `dtype`."""
    gate, up = gate.to(dtype).to(gl.float32), up.to(dtype).to(gl.float32)
    return gate / (1.0 + gl.exp(-gate)) * up


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


@gluon.jit
def _add_chunk(acc, memory, stage, phase, WIDE: gl.constexpr):
    """Add the product of the chunk in `stage` to acc. With WIDE its rows are outputs, else tokens.

    The tensor cores may go on after the return.
    """
    xs, ws, ready = memory
    mbarrier.wait(ready.index(stage), phase)
    if WIDE:
        acc = hopper.warpgroup_mma(
            ws.index(stage), xs.index(stage).permute([1, 0]), acc, is_async=True
        )
    else:
        acc = hopper.warpgroup_mma(
            xs.index(stage), ws.index(stage).permute([1, 0]), acc, is_async=True
        )
    return acc


@gluon.jit
def _add_chunks(
    acc,
    memory,
    descs,
    rows,
    k0,
    FIRST: gl.constexpr,
    END: gl.constexpr,
    ALL: gl.constexpr,
    WIDE: gl.constexpr,
):
    """Add the products of chunks FIRST to END - 1 to acc, and copy later ones of ALL chunks.

    The first chunks are on their way: one for each stage.
    """
    xs, ws, ready = memory
    STAGES: gl.constexpr = ws.shape[0]
    BK: gl.constexpr = ws.shape[2]
    BYTES: gl.constexpr = (ws.shape[1] + xs.shape[1]) * BK * 2
    # After chunks 1 to LAST another chunk is copied to the stage of the chunk before.
    LAST: gl.constexpr = min(ALL - STAGES, END - 1)
    if FIRST == 0:
        acc = _add_chunk(acc, memory, 0, 0, WIDE)
    if max(FIRST, 1) <= LAST:
        acc = hopper.warpgroup_mma_wait(1, [acc])  # for the loop acc has to be a tensor
        # Not unrolled: 70 chunks would take 3 s to compile.
        for c in range(max(FIRST, 1), LAST + 1):
            acc = _add_chunk(acc, memory, c % STAGES, c // STAGES & 1, WIDE)
            # Wait until no warp reads chunk c - 1 any more.
            acc = hopper.warpgroup_mma_wait(1, [acc])
            barrier()
            s = (c - 1) % STAGES
            k = k0 + (c - 1 + STAGES) * BK
            mbarrier.expect(ready.index(s), BYTES)
            tma.async_copy_global_to_shared(descs[1], [rows[1], k], ready.index(s), ws.index(s))
            tma.async_copy_global_to_shared(descs[0], [rows[0], k], ready.index(s), xs.index(s))
    for c in gl.static_range(max(FIRST, 1, LAST + 1), END):
        acc = _add_chunk(acc, memory, c % STAGES, c // STAGES & 1, WIDE)
    return acc


@gluon.jit(do_not_specialize=["M"])
def wide_kernel(
    x_desc,
    w_desc,
    squares_ptr,
    bias_ptr,
    out_ptr,
    strides,
    M,
    N,
    inverse,
    eps,
    BM: gl.constexpr,
    BK: gl.constexpr,
    CHUNKS: gl.constexpr,
    STAGES: gl.constexpr,
    SWIGLU: gl.constexpr,
    SQUARES: gl.constexpr,
    LOG: gl.constexpr,
) -> None:
    """Compute out[i] = f(x[:, s] @ w[:, s].T + bias) for up to 32 tokens; s is part i of K.

    The 64 rows of a program's weights are the rows of the tensor core's product, and the tokens are
    its columns. f is SwiGLU or the identity. With SQUARES, the norm's scale precedes bias and f.
    """
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16]
    )
    BYTES: gl.constexpr = (64 + BM) * BK * 2
    out_stride, split_stride = strides
    gdc_launch_dependents()
    n0, k0 = gl.program_id(0) * 64, gl.program_id(1) * (CHUNKS * BK)
    ws = gl.allocate_shared_memory(w_desc.dtype, [STAGES, 64, BK], w_desc.layout)
    xs = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BM, BK], x_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(ready.index(s), count=1)
    hopper.fence_async_shared()
    barrier()
    for s in gl.static_range(STAGES):
        mbarrier.expect(ready.index(s), BYTES)
        tma.async_copy_global_to_shared(w_desc, [n0, k0 + s * BK], ready.index(s), ws.index(s))
    # Wait for earlier kernels, one of which writes x. Up to here only weights are read.
    gdc_wait()
    for s in gl.static_range(STAGES):
        tma.async_copy_global_to_shared(x_desc, [0, k0 + s * BK], ready.index(s), xs.index(s))
    m = gl.arange(0, BM, gl.SliceLayout(0, MMA))
    scale = None
    if SQUARES:
        LAYOUT: gl.constexpr = gl.BlockedLayout(
            [(2**LOG * BM + 127) // 128, 1], [32 // BM, BM], [4, 1], [0, 1]
        )
        i = gl.arange(0, 2**LOG, gl.SliceLayout(1, LAYOUT))[:, None]
        mm = gl.arange(0, BM, gl.SliceLayout(0, LAYOUT))[None, :]
        squares = gl.load(squares_ptr + i * M + mm, mask=(i < SQUARES) & (mm < M), other=0.0)
        scale = row_scale(sum_pairs(squares, LOG), inverse, eps)
        # Before the loop, so that the squares do not take registers during it.
        scale = gl.convert_layout(scale, gl.SliceLayout(0, MMA))[None, :]
    acc = gl.zeros((64, BM), gl.float32, MMA)
    memory, descs = (xs, ws, ready), (x_desc, w_desc)
    acc = _add_chunks(acc, memory, descs, (0, n0), k0, 0, CHUNKS, CHUNKS, True)
    out = hopper.warpgroup_mma_wait(0, [acc])
    ROWS: gl.constexpr = 32 if SWIGLU else 64
    n = gl.program_id(0) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, MMA))[:, None]
    out = scaled(out, scale, bias_ptr, n, N)
    if SWIGLU:
        gate, up = out.reshape([4, 2, 8, BM]).permute([0, 2, 3, 1]).split()
        out = swiglu(gate, up, w_desc.dtype).reshape([32, BM])
        out = gl.convert_layout(out, MMA)
    at = out_ptr + gl.program_id(1) * split_stride + m[None, :] * out_stride + n
    gl.store(at, out.to(out_ptr.dtype.element_ty), mask=(m < M)[None, :] & (n < N))


@gluon.jit(do_not_specialize=["M"])
def tile_kernel(
    x_desc,
    w_desc,
    squares_ptr,
    bias_ptr,
    out_ptr,
    strides,
    M,
    N,
    inverse,
    eps,
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    PARTS: gl.constexpr,
    CHUNKS: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
    SWIGLU: gl.constexpr,
    SCALE: gl.constexpr,
) -> None:
    """Compute out[i] = f(x[:, s] @ w[:, s].T + bias); s is group i of PARTS parts of K.

    A program computes BN columns for BM tokens: BN outputs, or BN / 2 with SWIGLU. A part has
    CHUNKS chunks of BK inputs. f is SwiGLU or the identity. With SCALE, the norm's scale precedes
    bias and f. TMA, a copy unit of the GPU, copies chunks and signals their arrival by an mbarrier.
    """
    ALL: gl.constexpr = PARTS * CHUNKS
    BYTES: gl.constexpr = (BM + BN) * BK * 2
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BN, 16]
    )
    OUTS: gl.constexpr = BN // 2 if SWIGLU else BN
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // OUTS, OUTS // 8], [WARPS, 1], [1, 0])
    out_stride, split_stride = strides
    gdc_launch_dependents()
    n0, m0 = gl.program_id(0) * BN, gl.program_id(1) * BM
    k0 = gl.program_id(2) * (ALL * BK)
    ws = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BN, BK], w_desc.layout)
    xs = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BM, BK], x_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(ready.index(s), count=1)
    hopper.fence_async_shared()
    barrier()
    for s in gl.static_range(STAGES):
        mbarrier.expect(ready.index(s), BYTES)
        tma.async_copy_global_to_shared(w_desc, [n0, k0 + s * BK], ready.index(s), ws.index(s))
    # Wait for earlier kernels, one of which writes x. Up to here only weights are read.
    gdc_wait()
    for s in gl.static_range(STAGES):
        tma.async_copy_global_to_shared(x_desc, [m0, k0 + s * BK], ready.index(s), xs.index(s))
    scale = None
    if SCALE:
        m = m0 + gl.arange(0, BM, gl.SliceLayout(1, MMA))
        square = gl.load(squares_ptr + m, mask=m < M, other=0.0)
        scale = row_scale(square, inverse, eps)[:, None]
    acc = gl.zeros((BM, BN), gl.float32, MMA)
    low = acc
    high = acc
    memory, descs = (xs, ws, ready), (x_desc, w_desc)
    for part in gl.static_range(PARTS):
        if part > 0:
            acc = hopper.warpgroup_mma_wait(0, [acc])
            if part == 1:
                low = acc
            elif part == 2:
                low = low + acc
            else:
                high = acc
            acc = gl.zeros((BM, BN), gl.float32, MMA)
        acc = _add_chunks(
            *(acc, memory, descs, (m0, n0), k0, part * CHUNKS, (part + 1) * CHUNKS, ALL, False)
        )
    out = hopper.warpgroup_mma_wait(0, [acc])
    if PARTS == 2:
        out = low + out
    elif PARTS == 4:
        out = low + (high + out)
    out = scaled(out, scale, bias_ptr, n0 + gl.arange(0, BN, gl.SliceLayout(0, MMA))[None, :], N)
    if SWIGLU:
        gate, up = out.reshape([BM, BN // 16, 2, 8]).permute([0, 1, 3, 2]).split()
        out = swiglu(gate, up, w_desc.dtype).reshape([BM, OUTS])
    out = gl.convert_layout(out.to(out_ptr.dtype.element_ty), OUT)
    row = m0 + gl.arange(0, BM, gl.SliceLayout(1, OUT))[:, None]  # [BM, 1]
    n = gl.program_id(0) * OUTS + gl.arange(0, OUTS, gl.SliceLayout(0, OUT))[None, :]  # [1, OUTS]
    target = out_ptr + gl.program_id(2) * split_stride + row * out_stride + n
    gl.store(target, out, mask=(row < M) & (n < N))
