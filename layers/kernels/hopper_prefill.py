"""Prefill attention for Hopper GPUs, in Gluon; paged_prefill.py explains the tiles of queries.

The warps of a program have different tasks, as in FlashAttention-3 (Shah et al. 2024). One warp,
the producer, copies splits of K and V from the cache's pages to rings in shared memory, by TMA
(Tensor Memory Accelerator). One to three groups of four warps, the consumers, have 64 queries each.

A consumer starts the product of a split's weights with V, then the next split's scores, and folds
the former while the tensor cores compute the latter. While it computes weights, the tensor cores
work for another consumer. The arithmetic is that of attention_parts.py.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from layers.kernels.attention_parts import (
    finish,
    fold_values,
    fold_weights,
    split_weights,
)

_SPLIT = gl.constexpr(128)  # attention_parts.SPLIT
_ROWS = gl.constexpr(64)  # of a consumer
_PANEL = gl.constexpr(64)  # columns of shared memory that lie side by side: 128 bytes
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def _add(x, y):
    return x + y


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def _produce(kv_desc, memory, tile, PAGE: gl.constexpr, KV_HEADS: gl.constexpr):
    """Copy the splits of K and V that the tile's queries see."""
    ks, vs, k_ready, k_free, v_ready, v_free, _ = memory
    head, _, _, num_tokens, count, _, _, table = tile
    STAGES: gl.constexpr = ks.shape[0]
    DIM: gl.constexpr = ks.shape[2]
    BOX: gl.constexpr = kv_desc.block_type.shape[0]
    PANELS: gl.constexpr = DIM // _PANEL
    BOXES: gl.constexpr = _SPLIT // BOX
    # A box of rows within a panel is contiguous in shared memory.
    k_boxes = ks._reinterpret(ks.dtype, [STAGES * PANELS * BOXES, BOX, _PANEL], kv_desc.layout)
    v_boxes = vs._reinterpret(vs.dtype, [STAGES * PANELS * BOXES, BOX, _PANEL], kv_desc.layout)
    k_column, v_column = head * DIM, (KV_HEADS + head) * DIM
    stage = 0
    phase = 1  # a new mbarrier counts as having completed phase 1
    for split in range(count):
        rows = ()
        for box in gl.static_range(BOXES):
            token = split * _SPLIT + box * BOX
            # Boxes after the last token are copies of its page, since the table ends there.
            page = gl.load(table + gl.minimum(token, num_tokens - 1) // PAGE)
            row = page * PAGE + token % PAGE
            rows = rows + (row,)  # type: ignore[assignment]  # noqa: RUF005
        mbarrier.wait(k_free.index(stage), phase)
        mbarrier.expect(k_ready.index(stage), _SPLIT * DIM * 2)
        for box in gl.static_range(BOXES):
            for panel in gl.static_range(PANELS):
                target = k_boxes.index((stage * PANELS + panel) * BOXES + box)
                where = [rows[box], k_column + panel * _PANEL]
                tma.async_copy_global_to_shared(kv_desc, where, k_ready.index(stage), target)
        mbarrier.wait(v_free.index(stage), phase)
        mbarrier.expect(v_ready.index(stage), _SPLIT * DIM * 2)
        for box in gl.static_range(BOXES):
            for panel in gl.static_range(PANELS):
                target = v_boxes.index((stage * PANELS + panel) * BOXES + box)
                where = [rows[box], v_column + panel * _PANEL]
                tma.async_copy_global_to_shared(kv_desc, where, v_ready.index(stage), target)
        stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _zero_tail(vs, stage, tokens):
    """Zero V from row `tokens` on: its weights are 0, but the memory may hold NaN.

    All consumers do so. They store the same values, and each does before it multiplies.
    """
    STAGES: gl.constexpr = vs.shape[0]
    PANELS: gl.constexpr = vs.shape[2] // _PANEL
    LINES: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    lines = vs._reinterpret(vs.dtype, [STAGES * PANELS * 8, 16, _PANEL], vs.layout)
    row = gl.arange(0, 16, gl.SliceLayout(1, LINES))[:, None]
    for part in gl.static_range(8):
        if part * 16 + 16 > tokens:
            for panel in gl.static_range(PANELS):
                line = lines.index((stage * PANELS + panel) * 8 + part)
                value = line.load(LINES)
                line.store(gl.where(part * 16 + row < tokens, value, gl.zeros_like(value)))
    hopper.fence_async_shared()
    _barrier()


@gluon.jit
def _consume(
    data,
    RANK: gl.constexpr,
    GROUP: gl.constexpr,
    CONSUMERS: gl.constexpr,
    LEAN: gl.constexpr,
    TURNS: gl.constexpr,
):
    """Compute the attention of 64 rows of the tile.

    With LEAN a consumer has one product at a time in flight, and needs about 160 registers. With
    TURNS two consumers begin their products in turn.
    """
    q_ptr, out_ptr, strides, q_memory, memory, tile, scale = data
    q_row, q_head, out_row, out_head = strides
    ks, vs, k_ready, k_free, v_ready, v_free, turn = memory
    head, q_begin, q_len, num_tokens, count, first_row, before, _ = tile
    STAGES: gl.constexpr = ks.shape[0]
    DIM: gl.constexpr = ks.shape[2]
    WIDTH: gl.constexpr = 64
    PARTS: gl.constexpr = DIM // WIDTH
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _SPLIT, 16])
    VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, VALUES, 2)
    LINES: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    first = first_row + RANK * _ROWS
    v_parts = vs._reinterpret(vs.dtype, [STAGES * PARTS, _SPLIT, WIDTH], vs.layout)

    row = first + gl.arange(0, _ROWS, gl.SliceLayout(1, LINES))
    dims = gl.arange(0, DIM, gl.SliceLayout(0, LINES))[None, :]
    token, heads = q_begin + row // GROUP, head * GROUP + row % GROUP
    live = (row < q_len * GROUP)[:, None]
    q_at = (token.to(gl.int64) * q_row + heads * q_head)[:, None] + dims
    q = q_memory.index(RANK)
    q.store(gl.load(q_ptr + q_at, mask=live, other=0.0))
    hopper.fence_async_shared()
    _barrier()

    # Rows after the last query use its position, so that they attend to existing tokens only.
    row = first + gl.arange(0, _ROWS, gl.SliceLayout(1, SCORES))
    position = (before + gl.minimum(row // GROUP, q_len - 1))[:, None]
    offset = gl.arange(0, _SPLIT, gl.SliceLayout(0, SCORES))[None, :]
    all_see = gl.minimum((before + first // GROUP + 1) // _SPLIT, count)

    no_scores = gl.zeros((_ROWS, _SPLIT), gl.float32, SCORES)
    no_values = gl.zeros((_ROWS, WIDTH), gl.float32, VALUES)
    t_acc = no_values
    t_more = no_values
    t_norm = gl.zeros((_ROWS,), gl.float32, gl.SliceLayout(1, SCORES))
    t_top = gl.full((_ROWS,), -1e30, gl.float32, gl.SliceLayout(1, SCORES))
    stage = 0
    phase = 0
    last = 0
    last_phase = 0
    my_turn = 1 - RANK
    mbarrier.wait(k_ready.index(0), 0)
    s = hopper.warpgroup_mma(
        q, ks.index(0).permute([1, 0]), no_scores, use_acc=False, is_async=True
    )
    s = hopper.warpgroup_mma_wait(0, [s])
    _barrier()
    mbarrier.arrive(k_free.index(0), count=1)
    s = gl.where(position >= offset, s, float("-inf"))
    p, norm, top = split_weights(s, scale)
    p = gl.convert_layout(p.to(vs.dtype), WEIGHTS)
    for masked in gl.static_range(2):
        for split in range(gl.maximum(all_see, 1) if masked else 1, count if masked else all_see):
            stage, phase = _next(last, last_phase, STAGES)
            mbarrier.wait(v_ready.index(last), last_phase)
            if TURNS:
                mbarrier.wait(turn.index(RANK), my_turn)
                my_turn = my_turn ^ 1
            a, b, t_norm, t_top = fold_weights(t_norm, t_top, norm, top)
            a = gl.convert_layout(a, gl.SliceLayout(1, VALUES))[:, None]
            b = gl.convert_layout(b, gl.SliceLayout(1, VALUES))[:, None]
            v = v_parts.index(last * PARTS)
            acc = hopper.warpgroup_mma(p, v, no_values, use_acc=False, is_async=True)
            if PARTS == 2:
                # One half of the columns is folded while the other is multiplied, so that at most
                # 32 registers of a split's product are in use when the next scores begin.
                if LEAN:
                    acc = hopper.warpgroup_mma_wait(0, [acc])
                    t_acc = fold_values(t_acc, a, b, acc)
                v = v_parts.index(last * PARTS + 1)
                more = hopper.warpgroup_mma(p, v, no_values, use_acc=False, is_async=True)
                if not LEAN:
                    acc = hopper.warpgroup_mma_wait(1, [acc])
                    # The second wait has nothing to wait for. It makes the compiler fold here.
                    t_acc, more = hopper.warpgroup_mma_wait(
                        1, [fold_values(t_acc, a, b, acc), more]
                    )
            if LEAN:
                more = hopper.warpgroup_mma_wait(0, [more])
                _barrier()
                mbarrier.arrive(v_free.index(last), count=1)
                t_more = fold_values(t_more, a, b, more)
            mbarrier.wait(k_ready.index(stage), phase)
            k = ks.index(stage).permute([1, 0])
            s = hopper.warpgroup_mma(q, k, no_scores, use_acc=False, is_async=True)
            if TURNS:
                mbarrier.arrive(turn.index(1 - RANK), count=1)
            if not LEAN:
                if PARTS == 2:
                    more = hopper.warpgroup_mma_wait(1, [more])
                else:
                    acc = hopper.warpgroup_mma_wait(1, [acc])
                _barrier()
                mbarrier.arrive(v_free.index(last), count=1)
                if PARTS == 2:
                    t_more = fold_values(t_more, a, b, more)
                else:
                    t_acc = fold_values(t_acc, a, b, acc)
            s = hopper.warpgroup_mma_wait(0, [s])
            _barrier()
            mbarrier.arrive(k_free.index(stage), count=1)
            if masked:
                s = gl.where(position >= split * _SPLIT + offset, s, float("-inf"))
            p, norm, top = split_weights(s, scale)
            p = gl.convert_layout(p.to(vs.dtype), WEIGHTS)
            last = stage
            last_phase = phase
    mbarrier.wait(v_ready.index(last), last_phase)
    if count * _SPLIT > num_tokens:
        _zero_tail(vs, last, num_tokens - (count - 1) * _SPLIT)
    a, b, t_norm, t_top = fold_weights(t_norm, t_top, norm, top)
    a = gl.convert_layout(a, gl.SliceLayout(1, VALUES))[:, None]
    b = gl.convert_layout(b, gl.SliceLayout(1, VALUES))[:, None]
    t_norm = gl.convert_layout(t_norm, gl.SliceLayout(1, VALUES))[:, None]
    q_parts = q_memory._reinterpret(
        q_memory.dtype, [CONSUMERS * PARTS, _ROWS, WIDTH], q_memory.layout
    )
    for part in gl.static_range(PARTS):
        v = v_parts.index(last * PARTS + part)
        acc = hopper.warpgroup_mma(p, v, no_values, use_acc=False, is_async=True)
        acc = hopper.warpgroup_mma_wait(0, [acc])
        acc = fold_values(t_more if part else t_acc, a, b, acc)
        q_parts.index(RANK * PARTS + part).store(finish(acc, t_norm).to(vs.dtype))
    _barrier()
    out = q.load(LINES)
    row = first + gl.arange(0, _ROWS, gl.SliceLayout(1, LINES))
    token, heads = q_begin + row // GROUP, head * GROUP + row % GROUP
    live = (row < q_len * GROUP)[:, None]
    out_at = (token.to(gl.int64) * out_row + heads * out_head)[:, None] + dims
    gl.store(out_ptr + out_at, out, mask=live)


@gluon.jit
def _find_tile(
    pointers, batch, GROUP: gl.constexpr, KV_HEADS: gl.constexpr, ROWS: gl.constexpr,
    BATCH_PAD: gl.constexpr
):  # fmt: skip
    """Return what this program has to compute; without a tile the number of splits is 0."""
    table_ptr, slot_ptr, start_ptr, len_ptr, table_row = pointers
    LANES: gl.constexpr = gl.BlockedLayout([BATCH_PAD // 32], [32], [4], [0])
    head, place = gl.program_id(0) % KV_HEADS, gl.program_id(0) // KV_HEADS
    lane = gl.arange(0, BATCH_PAD, LANES)
    begins = gl.load(start_ptr + lane, mask=lane < batch, other=0)
    lens = gl.load(start_ptr + lane + 1, mask=lane < batch, other=0) - begins
    ends = gl.associative_scan(gl.cdiv(lens * GROUP, ROWS), 0, _add)
    seq = gl.sum((ends <= place).to(gl.int32), 0)
    q_begin = gl.sum(gl.where(lane == seq, begins, 0), 0)
    q_len = gl.sum(gl.where(lane == seq, lens, 0), 0)
    # A sequence's last tile attends to the most keys, so the program that starts first computes it.
    first_row = (gl.sum(gl.where(lane == seq, ends, 0), 0) - 1 - place) * ROWS
    row = gl.minimum(seq, batch - 1)
    num_tokens = gl.load(len_ptr + row)
    table = table_ptr + gl.load(slot_ptr + row).to(gl.int64) * table_row
    before = num_tokens - q_len
    last_token = gl.minimum((first_row + ROWS - 1) // GROUP, q_len - 1)
    count = gl.where(seq < batch, gl.cdiv(before + last_token + 1, _SPLIT), 0)
    return head, q_begin, q_len, num_tokens, count, first_row, before, table


@gluon.jit(
    do_not_specialize=["batch"],
    do_not_specialize_on_alignment=["table_ptr", "slot_ptr", "start_ptr", "len_ptr"],
)
def hopper_prefill_kernel(
    q_ptr,
    kv_desc,
    table_ptr,
    slot_ptr,
    start_ptr,
    len_ptr,
    out_ptr,
    scale,
    batch,
    table_row,
    strides,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    DIM: gl.constexpr,
    PAGE: gl.constexpr,
    BATCH_PAD: gl.constexpr,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
    LEAN: gl.constexpr,
    TURNS: gl.constexpr,
    REGISTERS: gl.constexpr,
) -> None:
    dtype: gl.constexpr = kv_desc.dtype
    q_memory = gl.allocate_shared_memory(dtype, [CONSUMERS, _ROWS, DIM], kv_desc.layout)
    ks = gl.allocate_shared_memory(dtype, [STAGES, _SPLIT, DIM], kv_desc.layout)
    vs = gl.allocate_shared_memory(dtype, [STAGES, _SPLIT, DIM], kv_desc.layout)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=CONSUMERS)
        mbarrier.init(v_ready.index(stage), count=1)
        mbarrier.init(v_free.index(stage), count=CONSUMERS)
    mbarrier.init(turn.index(0), count=1)
    mbarrier.init(turn.index(1), count=1)
    hopper.fence_async_shared()
    _barrier()
    where = (table_ptr, slot_ptr, start_ptr, len_ptr, table_row)
    tile = _find_tile(where, batch, GROUP, KV_HEADS, CONSUMERS * _ROWS, BATCH_PAD)
    memory = (ks, vs, k_ready, k_free, v_ready, v_free, turn)
    data = (q_ptr, out_ptr, strides, q_memory, memory, tile, scale)
    # Arguments are written out, because a tuple in a variable would lose its constants.
    if tile[4] > 0:
        if CONSUMERS == 1:
            gl.warp_specialize(
                [
                    (_consume, (data, 0, GROUP, CONSUMERS, LEAN, TURNS)),
                    (_produce, (kv_desc, memory, tile, PAGE, KV_HEADS)),
                ],
                [1],
                [24],
            )
        elif CONSUMERS == 2:
            gl.warp_specialize(
                [
                    (_consume, (data, 0, GROUP, CONSUMERS, LEAN, TURNS)),
                    (_consume, (data, 1, GROUP, CONSUMERS, LEAN, TURNS)),
                    (_produce, (kv_desc, memory, tile, PAGE, KV_HEADS)),
                ],
                [4, 1],
                [REGISTERS, 24],
            )
        else:
            gl.warp_specialize(
                [
                    (_consume, (data, 0, GROUP, CONSUMERS, LEAN, TURNS)),
                    (_consume, (data, 1, GROUP, CONSUMERS, LEAN, TURNS)),
                    (_consume, (data, 2, GROUP, CONSUMERS, LEAN, TURNS)),
                    (_produce, (kv_desc, memory, tile, PAGE, KV_HEADS)),
                ],
                [4, 4, 1],
                [REGISTERS, REGISTERS, 24],
            )
