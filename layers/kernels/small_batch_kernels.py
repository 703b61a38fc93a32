"""Kernels of small_batch_linear.py, written in Gluon, which is Triton's lower-level dialect.

A Gluon kernel, unlike a plain Triton kernel, can copy weights to shared memory before the previous
kernel ends. The K inputs of a linear layer are divided into chunks. A *stage* is shared memory for
one chunk of inputs of all tokens of a program, and for the weights that multiply these inputs.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


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
    norm_ptr,
    residual_ptr,
    out_ptr,
    x_stride,
    residual_stride,
    out_stride,
    M,
    N,
    K,
    eps,
    BM: gl.constexpr,
    BN: gl.constexpr,
    KC: gl.constexpr,
    CHUNKS: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
    EVEN: gl.constexpr,
    SWIGLU: gl.constexpr,
) -> None:
    """Compute out = f(RMSNorm(x) @ w.T + bias) + residual; f is SwiGLU or the identity."""
    # Each program computes BN of the N outputs for all tokens. A chunk has KC inputs for each warp.
    # A warp copies its inputs and their weights to shared memory, and reads only these copies.
    BIAS: gl.constexpr = bias_ptr is not None
    NORM: gl.constexpr = norm_ptr is not None
    RESIDUAL: gl.constexpr = residual_ptr is not None
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8]
    )
    LW: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    LX: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    COPY: gl.constexpr = gl.BlockedLayout(
        [1, 1, 8], [1, 256 // KC, KC // 8], [WARPS, 1, 1], [2, 1, 0]
    )
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0])
    EPILOGUE: gl.constexpr = gl.BlockedLayout([WARPS, 1, 1], [1, 16, 2], [1, 1, WARPS], [1, 2, 0])
    TILE: gl.constexpr = gl.SliceLayout(0, EPILOGUE)
    PARTS: gl.constexpr = 2 if SWIGLU else 1
    dtype: gl.constexpr = w_ptr.dtype.element_ty
    gdc_launch_dependents()
    start = gl.program_id(0) * BN
    ws = gl.allocate_shared_memory(dtype, [STAGES * PARTS, WARPS, BN, KC], SHARED)
    xs = gl.allocate_shared_memory(dtype, [STAGES, WARPS, BM, KC], SHARED)
    row = start + _index(1, BN, COPY)  # [1, BN, 1]
    token = _index(1, BM, COPY)  # [1, BM, 1]
    k0 = _index(0, WARPS, COPY) * KC + _index(2, KC, COPY)  # [WARPS, 1, KC]
    for c in gl.static_range(STAGES):
        k = c * WARPS * KC + k0
        w_mask = None if EVEN else (row < N) & (k < K)
        for p in gl.static_range(PARTS):
            source = w_ptr + (row + p * N) * K + k
            async_copy.async_copy_global_to_shared(ws.index(c * PARTS + p), source, mask=w_mask)
        async_copy.commit_group()
    n = start + gl.arange(0, BN, gl.SliceLayout(1, TILE))[:, None]  # [BN, 1]
    m = gl.arange(0, BM, gl.SliceLayout(0, TILE))[None, :]  # [1, BM]
    if BIAS:
        bias = gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)
    gains = ()
    if NORM:
        xk = _index(0, WARPS, LX) * KC + _index(1, KC, LX)  # [WARPS, KC, 1]
        for c in gl.static_range(CHUNKS):
            k = c * WARPS * KC + xk
            gains = gains + (gl.load(norm_ptr + k, mask=k < K, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
    # Wait for earlier kernels, one of which writes x. Up to here only weights and bias are read.
    gdc_wait()
    for c in gl.static_range(STAGES):
        k = c * WARPS * KC + k0
        x_mask = token < M if EVEN else (token < M) & (k < K)
        async_copy.async_copy_global_to_shared(
            xs.index(c), x_ptr + token * x_stride + k, mask=x_mask
        )
        async_copy.commit_group()
    mask = (n < N) & (m < M)
    if RESIDUAL:
        residual = gl.load(residual_ptr + m * residual_stride + n, mask=mask, other=0.0)
    acc = gl.zeros((WARPS, BN, BM), gl.float32, MMA)
    up = gl.zeros((WARPS, BN, BM), gl.float32, MMA)
    square = gl.zeros((WARPS, KC, BM), gl.float32, LX)
    for c in gl.static_range(CHUNKS):
        async_copy.wait_group(STAGES - 1 if CHUNKS > STAGES else CHUNKS - 1 - c)
        x = xs.index(c % STAGES).permute([0, 2, 1]).load(LX)  # [WARPS, KC, BM]
        if NORM:
            # A token's RMS is known only after this loop, so the outputs are divided by the RMS.
            x32 = x.to(gl.float32)
            square += x32 * x32
            x = (x32 * gains[c].to(gl.float32)).to(dtype)
        acc = mma_v2(ws.index(c % STAGES * PARTS).load(LW), x, acc)
        if SWIGLU:
            up = mma_v2(ws.index(c % STAGES * PARTS + 1).load(LW), x, up)
        if CHUNKS > STAGES:
            if c + STAGES < CHUNKS:
                _barrier()
                k = (c + STAGES) * WARPS * KC + k0
                w_mask = None if EVEN else (row < N) & (k < K)
                x_mask = token < M if EVEN else (token < M) & (k < K)
                for p in gl.static_range(PARTS):
                    source = w_ptr + (row + p * N) * K + k
                    async_copy.async_copy_global_to_shared(
                        ws.index(c % STAGES * PARTS + p), source, mask=w_mask
                    )
                async_copy.async_copy_global_to_shared(
                    xs.index(c % STAGES), x_ptr + token * x_stride + k, mask=x_mask
                )
            async_copy.commit_group()
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    sums = gl.allocate_shared_memory(gl.float32, [PARTS, WARPS, BN, BM], PLAIN)
    sums.index(0).store(acc)
    if SWIGLU:
        sums.index(1).store(up)
    if NORM:
        FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        squares = gl.allocate_shared_memory(gl.float32, [WARPS, BM], FLAT)
        squares.store(gl.sum(square, 1))
    _barrier()
    out = gl.sum(sums.index(0).load(EPILOGUE), 0)  # [BN, BM]
    if NORM:
        total = gl.sum(squares.load(gl.SliceLayout(1, EPILOGUE)), 0)  # [BM]
        scale = gl.convert_layout(gl.rsqrt(total / K + eps), gl.SliceLayout(0, TILE))[None, :]
        out *= scale
    if BIAS:
        out += bias
    if SWIGLU:
        other = gl.sum(sums.index(1).load(EPILOGUE), 0)
        if NORM:
            other *= scale
        out = out / (1.0 + gl.exp(-out)) * other
    if RESIDUAL:
        out += residual.to(gl.float32)
    gl.store(out_ptr + m * out_stride + n, out.to(out_ptr.dtype.element_ty), mask=mask)


@gluon.jit(do_not_specialize=["M"])
def tile_kernel(
    x_desc,
    w_desc,
    bias_ptr,
    out_ptr,
    out_stride,
    split_stride,
    M,
    N,
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    CHUNKS: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
    SWIGLU: gl.constexpr,
) -> None:
    """Compute out[i] = f(x[:, s] @ w[:, s].T + bias), where s is slice i of the K inputs."""
    # f is SwiGLU or the identity. A chunk has BK inputs. TMA, a copy unit of the GPU, copies chunks
    # to shared memory and signals completion with an mbarrier. With SWIGLU a stage holds BN rows of
    # the gate projection's weight, then BN rows of the up projection's weight.
    PARTS: gl.constexpr = 2 if SWIGLU else 1
    WIDTH: gl.constexpr = BN * PARTS
    STAGE_BYTES: gl.constexpr = (BM + WIDTH) * BK * 2
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, WIDTH, 16]
    )
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BN, BN // 8], [WARPS, 1], [1, 0])
    gdc_launch_dependents()
    n0, m0 = gl.program_id(0) * BN, gl.program_id(1) * BM
    k0 = gl.program_id(2) * (CHUNKS * BK)
    ws = gl.allocate_shared_memory(w_desc.dtype, [STAGES, WIDTH, BK], w_desc.layout)
    xs = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BM, BK], x_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(ready.index(s), count=1)
    hopper.fence_async_shared()
    _barrier()
    for s in gl.static_range(STAGES):
        mbarrier.expect(ready.index(s), STAGE_BYTES)
        for p in gl.static_range(PARTS):
            stage = ws.index(s).slice(p * BN, BN)  # [BN, BK]
            place = [n0 + p * N, k0 + s * BK]
            tma.async_copy_global_to_shared(w_desc, place, ready.index(s), stage)
    # Wait for earlier kernels, one of which writes x. Up to here only weights are read.
    gdc_wait()
    for s in gl.static_range(STAGES):
        tma.async_copy_global_to_shared(x_desc, [m0, k0 + s * BK], ready.index(s), xs.index(s))
    acc = gl.zeros((BM, WIDTH), gl.float32, MMA)
    for c in gl.static_range(CHUNKS):
        mbarrier.wait(ready.index(c % STAGES), (c // STAGES) & 1)
        w = ws.index(c % STAGES).permute([1, 0])  # [BK, WIDTH]
        acc = hopper.warpgroup_mma(xs.index(c % STAGES), w, acc, is_async=True)
        if c > 0 and c - 1 + STAGES < CHUNKS:
            # Wait until no warp reads chunk c - 1 any more. Then overwrite this chunk's stage.
            acc = hopper.warpgroup_mma_wait(1, [acc])
            _barrier()
            s = (c - 1) % STAGES
            k = k0 + (c - 1 + STAGES) * BK
            mbarrier.expect(ready.index(s), STAGE_BYTES)
            for p in gl.static_range(PARTS):
                stage = ws.index(s).slice(p * BN, BN)
                tma.async_copy_global_to_shared(w_desc, [n0 + p * N, k], ready.index(s), stage)
            tma.async_copy_global_to_shared(x_desc, [m0, k], ready.index(s), xs.index(s))
    acc = hopper.warpgroup_mma_wait(0, [acc])
    m = m0 + gl.arange(0, BM, gl.SliceLayout(1, OUT))[:, None]  # [BM, 1]
    n = n0 + gl.arange(0, BN, gl.SliceLayout(0, OUT))[None, :]  # [1, BN]
    if SWIGLU:
        gate, up = acc.reshape([BM, 2, BN]).permute([0, 2, 1]).split()  # [BM, BN] each
        out = gl.convert_layout(gate / (1.0 + gl.exp(-gate)) * up, OUT)
    else:
        out = gl.convert_layout(acc, OUT)
    if bias_ptr is not None:
        out += gl.load(bias_ptr + n).to(gl.float32)
    target = out_ptr + gl.program_id(2) * split_stride + m * out_stride + n
    gl.store(target, out.to(out_ptr.dtype.element_ty), mask=m < M)
