"""The kernel of products.py for more than 256 tokens, written in Gluon.

Its warps have different tasks (warp specialisation). One warp, the producer, copies chunks of x and
of the weight to a ring of stages in shared memory. One or two groups of four warps, the consumers,
multiply them. A program computes several tiles of the output, one after another. products.py
defines *parts* of K; a consumer keeps the sums of finished parts in registers.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from layers.kernels.product_kernels import barrier, gated, row_scale, scaled

# Tiles are handed out in groups of this many rows of tiles, so that programs that run at the same
# time read the same weights and inputs, from the L2 cache. Other numbers were not tried.
_GROUP = gl.constexpr(8)


@gluon.jit
def _place(tile, grid):
    """Return the row and the column of tile number `tile`."""
    tiles_m, tiles_n = grid
    first = tile // (_GROUP * tiles_n) * _GROUP
    rows = gl.minimum(tiles_m - first, _GROUP)
    local = tile % (_GROUP * tiles_n)
    return first + local % rows, local // rows


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def _produce(descs, memory, grid, chunks, PARTS: gl.constexpr, GROUPS: gl.constexpr):
    """Copy the chunks of all tiles of this program; each consumer has its own rows of x."""
    x_desc, w_desc, _ = descs
    xs, ws, _, ready, empty = memory
    STAGES: gl.constexpr = ws.shape[0]
    BM: gl.constexpr = x_desc.block_type.shape[0]
    BN: gl.constexpr = w_desc.block_type.shape[0]
    BK: gl.constexpr = w_desc.block_type.shape[1]
    stage = 0
    phase = 1  # a new mbarrier counts as having completed phase 1
    for tile in range(gl.program_id(0), grid[0] * grid[1], gl.num_programs(0)):
        row, col = _place(tile, grid)
        for c in range(PARTS * chunks):
            mbarrier.wait(empty.index(stage), phase)
            arrival = ready.index(stage)
            mbarrier.expect(arrival, (GROUPS * BM + BN) * BK * 2)
            tma.async_copy_global_to_shared(w_desc, [col * BN, c * BK], arrival, ws.index(stage))
            for group in gl.static_range(GROUPS):
                target = xs.index(stage * GROUPS + group)
                at = [(row * GROUPS + group) * BM, c * BK]
                tma.async_copy_global_to_shared(x_desc, at, arrival, target)
            stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _consume(
    descs,
    memory,
    epilogue,
    grid,
    chunks,
    GROUP: gl.constexpr,
    PARTS: gl.constexpr,
    GROUPS: gl.constexpr,
    GATE: gl.constexpr,
):
    """Multiply the chunks of all tiles of this program; store BM rows of each tile."""
    x_desc, w_desc, out_desc = descs
    xs, ws, outs, ready, empty = memory
    squares_ptr, bias_ptr, M, N, inverse, eps = epilogue
    STAGES: gl.constexpr = ws.shape[0]
    BM: gl.constexpr = x_desc.block_type.shape[0]
    BN: gl.constexpr = w_desc.block_type.shape[0]
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16]
    )
    gl.assume(chunks > 1)  # without this, ptxas makes each product wait for the one before
    none = gl.zeros((BM, BN), gl.float32, MMA)
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), grid[0] * grid[1], gl.num_programs(0)):
        row, col = _place(tile, grid)
        first = (row * GROUPS + GROUP) * BM
        acc = none
        low = none
        high = none
        last = 0
        for part in gl.static_range(PARTS):
            # A part begins in a new accumulator while the last chunk of the part before is
            # multiplied. So the sums of parts are added up while the tensor cores work.
            before = acc
            mbarrier.wait(ready.index(stage), phase)
            x, w = xs.index(stage * GROUPS + GROUP), ws.index(stage).permute([1, 0])
            acc = hopper.warpgroup_mma(x, w, none, use_acc=False, is_async=True)
            if part > 0:
                before, acc = hopper.warpgroup_mma_wait(1, [before, acc])
                barrier()
                mbarrier.arrive(empty.index(last), count=1)
                if part == 1:
                    low = before
                elif part == 2:
                    # The wait has nothing to wait for. It makes the compiler add up here; else it
                    # keeps both summands until the sum is used, and lacks registers.
                    low, acc = hopper.warpgroup_mma_wait(1, [low + before, acc])
                else:
                    high = before
            else:
                acc = hopper.warpgroup_mma_wait(1, [acc])
            last = stage
            stage, phase = _next(stage, phase, STAGES)
            for _ in range(1, chunks):
                mbarrier.wait(ready.index(stage), phase)
                x, w = xs.index(stage * GROUPS + GROUP), ws.index(stage).permute([1, 0])
                acc = hopper.warpgroup_mma(x, w, acc, is_async=True)
                acc = hopper.warpgroup_mma_wait(1, [acc])
                barrier()
                mbarrier.arrive(empty.index(last), count=1)
                last = stage
                stage, phase = _next(stage, phase, STAGES)
        acc = hopper.warpgroup_mma_wait(0, [acc])
        barrier()
        mbarrier.arrive(empty.index(last), count=1)
        if PARTS == 2:
            acc = low + acc
        elif PARTS == 4:
            acc = low + (high + acc)
        scale = None
        if squares_ptr is not None:
            m = first + gl.arange(0, BM, gl.SliceLayout(1, MMA))
            square = gl.load(squares_ptr + m, mask=m < M, other=0.0)
            scale = row_scale(square, inverse, eps)[:, None]
        n = col * BN + gl.arange(0, BN, gl.SliceLayout(0, MMA))[None, :]
        acc = scaled(acc, scale, bias_ptr, n, N)
        _store(acc, out_desc, outs.index(GROUP), first, col, w_desc.dtype, GATE)
    tma.store_wait(0)


@gluon.jit
def _store(acc, out_desc, memory, first, col, dtype: gl.constexpr, GATE: gl.constexpr):
    """Store a tile's outputs, or the gate of them, through shared memory for `COLS` columns."""
    BM: gl.constexpr = acc.shape[0]
    BN: gl.constexpr = acc.shape[1]
    COLS: gl.constexpr = out_desc.block_type.shape[1]
    if GATE is not None:
        gate, up = acc.reshape([BM, BN // 16, 2, 8]).permute([0, 1, 3, 2]).split()
        out = gated(gate, up, dtype, GATE).to(dtype).reshape([BM, BN // 2])
        _store_part(out, out_desc, memory, first, col * COLS)
    elif COLS == BN:
        _store_part(acc.to(dtype), out_desc, memory, first, col * COLS)
    else:
        left, right = acc.to(dtype).reshape([BM, 2, COLS]).permute([0, 2, 1]).split()
        _store_part(left, out_desc, memory, first, col * BN)
        _store_part(right, out_desc, memory, first, col * BN + COLS)


@gluon.jit
def _store_part(out, out_desc, memory, m, n):
    tma.store_wait(0)
    barrier()
    memory.store(out)
    hopper.fence_async_shared()
    barrier()
    tma.async_copy_shared_to_global(out_desc, [m, n], memory)


@gluon.jit(do_not_specialize=["tiles_m", "tiles_n", "chunks", "M", "N"])
def prefill_kernel(
    x_desc,
    w_desc,
    out_desc,
    squares_ptr,
    bias_ptr,
    tiles_m,
    tiles_n,
    chunks,
    M,
    N,
    inverse,
    eps,
    PARTS: gl.constexpr,
    GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    GATE: gl.constexpr,
    REGISTERS: gl.constexpr,
) -> None:
    """Compute out = f(x @ w.T * scale + bias) for many tokens; f is the gate or the identity.

    A tile has GROUPS * BM tokens and BN columns, whose numbers are those of the descriptors. A part
    of K has `chunks` chunks, at least two.
    """
    BM: gl.constexpr = x_desc.block_type.shape[0]
    BN: gl.constexpr = w_desc.block_type.shape[0]
    BK: gl.constexpr = w_desc.block_type.shape[1]
    COLS: gl.constexpr = out_desc.block_type.shape[1]
    dtype: gl.constexpr = w_desc.dtype
    xs = gl.allocate_shared_memory(dtype, [STAGES * GROUPS, BM, BK], x_desc.layout)
    ws = gl.allocate_shared_memory(dtype, [STAGES, BN, BK], w_desc.layout)
    outs = gl.allocate_shared_memory(dtype, [GROUPS, BM, COLS], out_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(ready.index(s), count=1)
        mbarrier.init(empty.index(s), count=GROUPS)
    hopper.fence_async_shared()
    barrier()
    descs = (x_desc, w_desc, out_desc)
    memory = (xs, ws, outs, ready, empty)
    epilogue = (squares_ptr, bias_ptr, M, N, inverse, eps)
    grid = (tiles_m, tiles_n)
    # The arguments are written out, because a tuple in a variable would lose its constants.
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (_consume, (descs, memory, epilogue, grid, chunks, 0, PARTS, GROUPS, GATE)),
                (_produce, (descs, memory, grid, chunks, PARTS, GROUPS)),
            ],
            [1],
            [24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (descs, memory, epilogue, grid, chunks, 0, PARTS, GROUPS, GATE)),
                (_consume, (descs, memory, epilogue, grid, chunks, 1, PARTS, GROUPS, GATE)),
                (_produce, (descs, memory, grid, chunks, PARTS, GROUPS)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )
