"""Kernels of products.py for up to 32 tokens (`wide_kernel`) and up to 256 (`tile_kernel`).

Both copy chunks by TMA, a copy unit of the GPU, which signals their arrival by an mbarrier. For
chunks, stages and parts see product_kernels.py.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from layers.kernels.product_kernels import barrier, gated, row_scale, scaled, sum_pairs


@gluon.jit
def _begin(descs, rows, k0, STAGES: gl.constexpr):
    """Begin to copy a chunk to each stage, and wait for earlier kernels, one of which writes x.

    Up to the wait only weights are read. Returns the stages of x, those of weights, and barriers
    that tell when a stage is full.
    """
    x_desc, w_desc = descs
    BM: gl.constexpr = x_desc.block_type.shape[0]
    BN: gl.constexpr = w_desc.block_type.shape[0]
    BK: gl.constexpr = w_desc.block_type.shape[1]
    ws = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BN, BK], w_desc.layout)
    xs = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BM, BK], x_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(ready.index(s), count=1)
    hopper.fence_async_shared()
    barrier()
    for s in gl.static_range(STAGES):
        k = k0 + s * BK
        mbarrier.expect(ready.index(s), (BM + BN) * BK * 2)
        tma.async_copy_global_to_shared(w_desc, [rows[1], k], ready.index(s), ws.index(s))
    gdc_wait()
    for s in gl.static_range(STAGES):
        k = k0 + s * BK
        tma.async_copy_global_to_shared(x_desc, [rows[0], k], ready.index(s), xs.index(s))
    return xs, ws, ready


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
    GATE: gl.constexpr,
    SQUARES: gl.constexpr,
    LOG: gl.constexpr,
) -> None:
    """Compute out[i] = f(x[:, s] @ w[:, s].T + bias) for up to 32 tokens; s is part i of K.

    The 64 rows of a program's weights are the rows of the tensor core's product, and the tokens are
    its columns. f is the gate or the identity. With SQUARES, the norm's scale precedes bias and f.
    """
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16]
    )
    out_stride, split_stride = strides
    gdc_launch_dependents()
    n0, k0 = gl.program_id(0) * 64, gl.program_id(1) * (CHUNKS * BK)
    descs, rows = (x_desc, w_desc), (0, n0)
    memory = _begin(descs, rows, k0, STAGES)
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
    acc = _add_chunks(acc, memory, descs, rows, k0, 0, CHUNKS, CHUNKS, True)
    out = hopper.warpgroup_mma_wait(0, [acc])
    ROWS: gl.constexpr = 64 if GATE is None else 32
    n = gl.program_id(0) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, MMA))[:, None]
    out = scaled(out, scale, bias_ptr, n, N)
    if GATE is not None:
        gate, up = out.reshape([4, 2, 8, BM]).permute([0, 2, 3, 1]).split()
        out = gated(gate, up, w_desc.dtype, GATE).reshape([32, BM])
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
    GATE: gl.constexpr,
    SCALE: gl.constexpr,
) -> None:
    """Compute out[i] = f(x[:, s] @ w[:, s].T + bias); s is group i of PARTS parts of K.

    A program computes BN columns for BM tokens: BN outputs, or BN / 2 with a gate. A part has
    CHUNKS chunks of BK inputs. f is the gate or the identity. With SCALE, the norm's scale precedes
    bias and f. TMA, a copy unit of the GPU, copies chunks and signals their arrival by an mbarrier.
    """
    ALL: gl.constexpr = PARTS * CHUNKS
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BN, 16]
    )
    OUTS: gl.constexpr = BN if GATE is None else BN // 2
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // OUTS, OUTS // 8], [WARPS, 1], [1, 0])
    out_stride, split_stride = strides
    gdc_launch_dependents()
    n0, m0 = gl.program_id(0) * BN, gl.program_id(1) * BM
    k0 = gl.program_id(2) * (ALL * BK)
    descs, rows = (x_desc, w_desc), (m0, n0)
    memory = _begin(descs, rows, k0, STAGES)
    scale = None
    if SCALE:
        m = m0 + gl.arange(0, BM, gl.SliceLayout(1, MMA))
        square = gl.load(squares_ptr + m, mask=m < M, other=0.0)
        scale = row_scale(square, inverse, eps)[:, None]
    acc = gl.zeros((BM, BN), gl.float32, MMA)
    low = acc
    high = acc
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
            *(acc, memory, descs, rows, k0, part * CHUNKS, (part + 1) * CHUNKS, ALL, False)
        )
    out = hopper.warpgroup_mma_wait(0, [acc])
    if PARTS == 2:
        out = low + out
    elif PARTS == 4:
        out = low + (high + out)
    out = scaled(out, scale, bias_ptr, n0 + gl.arange(0, BN, gl.SliceLayout(0, MMA))[None, :], N)
    if GATE is not None:
        gate, up = out.reshape([BM, BN // 16, 2, 8]).permute([0, 1, 3, 2]).split()
        out = gated(gate, up, w_desc.dtype, GATE).reshape([BM, OUTS])
    out = gl.convert_layout(out.to(out_ptr.dtype.element_ty), OUT)
    row = m0 + gl.arange(0, BM, gl.SliceLayout(1, OUT))[:, None]  # [BM, 1]
    n = gl.program_id(0) * OUTS + gl.arange(0, OUTS, gl.SliceLayout(0, OUT))[None, :]  # [1, OUTS]
    target = out_ptr + gl.program_id(2) * split_stride + row * out_stride + n
    gl.store(target, out, mask=(row < M) & (n < N))
