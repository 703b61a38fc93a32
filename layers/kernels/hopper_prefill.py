"""Prefill attention for Hopper GPUs, in Gluon; paged_prefill.py explains the tiles of queries.

The warps of a program have different tasks, as in FlashAttention-3 (Shah et al. 2024). One warp,
the producer, copies splits of K and V from the cache's pages to shared memory, by TMA (Tensor
Memory Accelerator). Four warps, the consumer, compute the attention of 64 rows.

The consumer starts the product of a split's weights with V, then the next split's scores, and folds
the former while the tensor cores compute the latter. A multiprocessor runs two programs: while one
computes weights, the tensor cores work for the other. On an H200, with 16/8 heads of 128 elements,
one prompt of 1,024 tokens takes 19.0 us and one of 3,800 tokens 119 us. With two consumers in one
program and two stages of shared memory these times were 21.4 and 123 us, and with the loop of
FlashAttention-2, without specialised warps, 33.7 and 297 us. attention_parts.py has the arithmetic.
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
_ROWS = gl.constexpr(64)  # queries of a program
_PANEL = gl.constexpr(64)  # columns of shared memory that lie side by side: 128 bytes
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def _add(x, y):
    return x + y


@gluon.jit
def _first_seen(before, first_row, GROUP: gl.constexpr, WINDOW: gl.constexpr):
    """Return the first token that a row of the tile sees."""
    return gl.maximum(before + first_row // GROUP - WINDOW + 1, 0)


@gluon.jit
def _produce(
    kv_desc,
    memory,
    tile,
    PAGE: gl.constexpr,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    WINDOW: gl.constexpr,
):
    """Copy the splits of K and V that the tile's queries see."""
    k, v, k_ready, k_free, v_ready, v_free = memory
    head, _, _, num_tokens, count, first, before, table = tile
    DIM: gl.constexpr = k.shape[1]
    BOX: gl.constexpr = kv_desc.block_type.shape[0]
    PANELS: gl.constexpr = DIM // _PANEL
    BOXES: gl.constexpr = _SPLIT // BOX
    # A box of rows within a panel is contiguous in shared memory.
    k_boxes = k._reinterpret(k.dtype, [PANELS * BOXES, BOX, _PANEL], kv_desc.layout)
    v_boxes = v._reinterpret(v.dtype, [PANELS * BOXES, BOX, _PANEL], kv_desc.layout)
    k_column, v_column = head * DIM, (KV_HEADS + head) * DIM
    for split in range(count):
        rows = ()
        for box in gl.static_range(BOXES):
            # Boxes after the last token are copies of its page, since the table ends there.
            if WINDOW:
                first_seen = _first_seen(before, first, GROUP, WINDOW)
                token = (first_seen // _SPLIT + split) * _SPLIT + box * BOX
                # Pages before the window may belong to others. TMA copies zeros instead, as no row
                # of the cache has a number below 0.
                seen = token + BOX > first_seen
                at = table + gl.minimum(token, num_tokens - 1) // PAGE
                page = gl.load(at, mask=seen, other=0)
                row = gl.where(seen, page * PAGE + token % PAGE, -BOX)
            else:
                token = split * _SPLIT + box * BOX
                page = gl.load(table + gl.minimum(token, num_tokens - 1) // PAGE)
                row = page * PAGE + token % PAGE
            rows = rows + (row,)  # type: ignore[assignment]  # noqa: RUF005
        free = (split & 1) ^ 1  # a new mbarrier counts as having completed phase 1
        mbarrier.wait(k_free, free)
        mbarrier.expect(k_ready, _SPLIT * DIM * 2)
        for box in gl.static_range(BOXES):
            for panel in gl.static_range(PANELS):
                where = [rows[box], k_column + panel * _PANEL]
                target = k_boxes.index(panel * BOXES + box)
                tma.async_copy_global_to_shared(kv_desc, where, k_ready, target)
        mbarrier.wait(v_free, free)
        mbarrier.expect(v_ready, _SPLIT * DIM * 2)
        for box in gl.static_range(BOXES):
            for panel in gl.static_range(PANELS):
                where = [rows[box], v_column + panel * _PANEL]
                target = v_boxes.index(panel * BOXES + box)
                tma.async_copy_global_to_shared(kv_desc, where, v_ready, target)


@gluon.jit
def _zero_tail(v, tokens):
    """Zero V from row `tokens` on: its weights are 0, but the memory may hold NaN."""
    PANELS: gl.constexpr = v.shape[1] // _PANEL
    LINES: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    lines = v._reinterpret(v.dtype, [PANELS * 8, 16, _PANEL], v.layout)
    row = gl.arange(0, 16, gl.SliceLayout(1, LINES))[:, None]
    for part in gl.static_range(8):
        if part * 16 + 16 > tokens:
            for panel in gl.static_range(PANELS):
                line = lines.index(panel * 8 + part)
                value = line.load(LINES)
                line.store(gl.where(part * 16 + row < tokens, value, gl.zeros_like(value)))
    hopper.fence_async_shared()
    _barrier()


@gluon.jit
def _consume(data, GROUP: gl.constexpr, WINDOW: gl.constexpr):
    """Compute the attention of the tile's 64 rows."""
    q_ptr, out_ptr, strides, q, memory, tile, scale = data
    q_row, q_head, out_row, out_head = strides
    k, v, k_ready, k_free, v_ready, v_free = memory
    head, q_begin, q_len, num_tokens, count, first, before, _ = tile
    if WINDOW:
        # From here on, the first token is the first one of the first split that is not skipped.
        skipped = _first_seen(before, first, GROUP, WINDOW) // _SPLIT * _SPLIT
        num_tokens -= skipped
        before -= skipped
    DIM: gl.constexpr = k.shape[1]
    WIDTH: gl.constexpr = 64
    PARTS: gl.constexpr = DIM // WIDTH
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _SPLIT, 16])
    VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, VALUES, 2)
    LINES: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    v_parts = v._reinterpret(v.dtype, [PARTS, _SPLIT, WIDTH], v.layout)

    row = first + gl.arange(0, _ROWS, gl.SliceLayout(1, LINES))
    dims = gl.arange(0, DIM, gl.SliceLayout(0, LINES))[None, :]
    token, heads = q_begin + row // GROUP, head * GROUP + row % GROUP
    live = (row < q_len * GROUP)[:, None]
    q_at = (token.to(gl.int64) * q_row + heads * q_head)[:, None] + dims
    q.store(gl.load(q_ptr + q_at, mask=live, other=0.0))
    hopper.fence_async_shared()
    _barrier()

    # Rows after the last query use its position, so that they attend to existing tokens only.
    row = first + gl.arange(0, _ROWS, gl.SliceLayout(1, SCORES))
    position = (before + gl.minimum(row // GROUP, q_len - 1))[:, None]
    offset = gl.arange(0, _SPLIT, gl.SliceLayout(0, SCORES))[None, :]
    all_see = gl.minimum((before + first // GROUP + 1) // _SPLIT, count)
    if WINDOW:
        # The first split whose keys all lie in the windows of all rows.
        last_token = gl.minimum((first + _ROWS - 1) // GROUP, q_len - 1)
        whole = gl.cdiv(gl.maximum(before + last_token - WINDOW + 1, 0), _SPLIT)
        whole = gl.minimum(whole, count)

    no_scores = gl.zeros((_ROWS, _SPLIT), gl.float32, SCORES)
    no_values = gl.zeros((_ROWS, WIDTH), gl.float32, VALUES)
    t_acc = no_values
    t_more = no_values
    t_norm = gl.zeros((_ROWS,), gl.float32, gl.SliceLayout(1, SCORES))
    t_top = gl.full((_ROWS,), -1e30, gl.float32, gl.SliceLayout(1, SCORES))
    mbarrier.wait(k_ready, 0)
    s = hopper.warpgroup_mma(q, k.permute([1, 0]), no_scores, use_acc=False, is_async=True)
    s = hopper.warpgroup_mma_wait(0, [s])
    _barrier()
    mbarrier.arrive(k_free, count=1)
    s = gl.where(position >= offset, s, float("-inf"))
    if WINDOW:
        s = gl.where(position - WINDOW < offset, s, float("-inf"))
    p, norm, top = split_weights(s, scale)
    p = gl.convert_layout(p.to(v.dtype), WEIGHTS)
    for part in gl.static_range(3 if WINDOW else 2):
        # Splits that begin before a window, splits that all rows see, and splits at the end.
        if WINDOW:
            if part == 0:
                begin, end = 1, whole
            elif part == 1:
                begin, end = gl.maximum(whole, 1), all_see
            else:
                begin, end = gl.maximum(gl.maximum(all_see, whole), 1), count
        else:
            begin, end = gl.maximum(all_see, 1) if part else 1, count if part else all_see
        for split in range(begin, end):
            mbarrier.wait(v_ready, (split - 1) & 1)
            a, b, t_norm, t_top = fold_weights(t_norm, t_top, norm, top)
            a = gl.convert_layout(a, gl.SliceLayout(1, VALUES))[:, None]
            b = gl.convert_layout(b, gl.SliceLayout(1, VALUES))[:, None]
            acc = hopper.warpgroup_mma(p, v_parts.index(0), no_values, use_acc=False, is_async=True)
            if PARTS == 2:
                # One half of the columns is folded while the other is multiplied, so that at most
                # 32 registers of a split's product are in use when the next scores begin.
                more = hopper.warpgroup_mma(
                    p, v_parts.index(1), no_values, use_acc=False, is_async=True
                )
                acc = hopper.warpgroup_mma_wait(1, [acc])
                # The second wait has nothing to wait for. It makes the compiler fold here.
                t_acc, more = hopper.warpgroup_mma_wait(1, [fold_values(t_acc, a, b, acc), more])
            mbarrier.wait(k_ready, split & 1)
            s = hopper.warpgroup_mma(q, k.permute([1, 0]), no_scores, use_acc=False, is_async=True)
            if PARTS == 2:
                more = hopper.warpgroup_mma_wait(1, [more])
            else:
                acc = hopper.warpgroup_mma_wait(1, [acc])
            _barrier()
            mbarrier.arrive(v_free, count=1)
            if PARTS == 2:
                t_more = fold_values(t_more, a, b, more)
            else:
                t_acc = fold_values(t_acc, a, b, acc)
            s = hopper.warpgroup_mma_wait(0, [s])
            _barrier()
            mbarrier.arrive(k_free, count=1)
            # All rows see all keys in part 1 with a window, and in part 0 without one.
            if (part == 1) != (WINDOW > 0):
                s = gl.where(position >= split * _SPLIT + offset, s, float("-inf"))
                if WINDOW:
                    s = gl.where(position - WINDOW < split * _SPLIT + offset, s, float("-inf"))
            p, norm, top = split_weights(s, scale)
            p = gl.convert_layout(p.to(v.dtype), WEIGHTS)
    mbarrier.wait(v_ready, (count - 1) & 1)
    if count * _SPLIT > num_tokens:
        _zero_tail(v, num_tokens - (count - 1) * _SPLIT)
    a, b, t_norm, t_top = fold_weights(t_norm, t_top, norm, top)
    a = gl.convert_layout(a, gl.SliceLayout(1, VALUES))[:, None]
    b = gl.convert_layout(b, gl.SliceLayout(1, VALUES))[:, None]
    t_norm = gl.convert_layout(t_norm, gl.SliceLayout(1, VALUES))[:, None]
    # The queries are not needed any more; their memory takes the outputs.
    q_parts = q._reinterpret(q.dtype, [PARTS, _ROWS, WIDTH], q.layout)
    for part in gl.static_range(PARTS):
        acc = hopper.warpgroup_mma(p, v_parts.index(part), no_values, use_acc=False, is_async=True)
        acc = hopper.warpgroup_mma_wait(0, [acc])
        acc = fold_values(t_more if part else t_acc, a, b, acc)
        q_parts.index(part).store(finish(acc, t_norm).to(v.dtype))
    _barrier()
    out = q.load(LINES)
    row = first + gl.arange(0, _ROWS, gl.SliceLayout(1, LINES))
    token, heads = q_begin + row // GROUP, head * GROUP + row % GROUP
    live = (row < q_len * GROUP)[:, None]
    out_at = (token.to(gl.int64) * out_row + heads * out_head)[:, None] + dims
    gl.store(out_ptr + out_at, out, mask=live)


@gluon.jit
def _find_tile(
    pointers,
    batch,
    GROUP: gl.constexpr,
    KV_HEADS: gl.constexpr,
    BATCH_PAD: gl.constexpr,
    WINDOW: gl.constexpr,
):
    """Return what this program has to compute; without a tile the number of splits is 0."""
    table_ptr, slot_ptr, start_ptr, len_ptr, table_row = pointers
    LANES: gl.constexpr = gl.BlockedLayout([BATCH_PAD // 32], [32], [4], [0])
    head, place = gl.program_id(0) % KV_HEADS, gl.program_id(0) // KV_HEADS
    lane = gl.arange(0, BATCH_PAD, LANES)
    begins = gl.load(start_ptr + lane, mask=lane < batch, other=0)
    lens = gl.load(start_ptr + lane + 1, mask=lane < batch, other=0) - begins
    ends = gl.associative_scan(gl.cdiv(lens * GROUP, _ROWS), 0, _add)
    seq = gl.sum((ends <= place).to(gl.int32), 0)
    q_begin = gl.sum(gl.where(lane == seq, begins, 0), 0)
    q_len = gl.sum(gl.where(lane == seq, lens, 0), 0)
    # A sequence's last tile attends to the most keys, so the program that starts first computes it.
    first_row = (gl.sum(gl.where(lane == seq, ends, 0), 0) - 1 - place) * _ROWS
    row = gl.minimum(seq, batch - 1)
    num_tokens = gl.load(len_ptr + row)
    table = table_ptr + gl.load(slot_ptr + row).to(gl.int64) * table_row
    before = num_tokens - q_len
    last_token = gl.minimum((first_row + _ROWS - 1) // GROUP, q_len - 1)
    count = gl.where(seq < batch, gl.cdiv(before + last_token + 1, _SPLIT), 0)
    if WINDOW:
        first_split = _first_seen(before, first_row, GROUP, WINDOW) // _SPLIT
        count = gl.maximum(count - first_split, 0)
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
    WINDOW: gl.constexpr,  # 0: full attention
) -> None:
    dtype: gl.constexpr = kv_desc.dtype
    q = gl.allocate_shared_memory(dtype, [_ROWS, DIM], kv_desc.layout)
    k = gl.allocate_shared_memory(dtype, [_SPLIT, DIM], kv_desc.layout)
    v = gl.allocate_shared_memory(dtype, [_SPLIT, DIM], kv_desc.layout)
    k_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(k_ready, count=1)
    mbarrier.init(k_free, count=1)
    mbarrier.init(v_ready, count=1)
    mbarrier.init(v_free, count=1)
    hopper.fence_async_shared()
    _barrier()
    where = (table_ptr, slot_ptr, start_ptr, len_ptr, table_row)
    tile = _find_tile(where, batch, GROUP, KV_HEADS, BATCH_PAD, WINDOW)
    memory = (k, v, k_ready, k_free, v_ready, v_free)
    data = (q_ptr, out_ptr, strides, q, memory, tile, scale)
    # Arguments are written out, because a tuple in a variable would lose its constants.
    if tile[4] > 0:
        gl.warp_specialize(
            [
                (_consume, (data, GROUP, WINDOW)),
                (_produce, (kv_desc, memory, tile, PAGE, KV_HEADS, GROUP, WINDOW)),
            ],
            [1],
            [24],
        )
