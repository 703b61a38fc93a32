"""Decode attention for Hopper GPUs, in Gluon; paged_decode.py explains pairs, sections and parts.

The warps of a program have different tasks. One warp, the producer, walks through the section of
the program and copies K and V of its splits into a ring of tiles in shared memory, by TMA (Tensor
Memory Accelerator). The producer goes on to the next pair at once, so memory is busy while the
other four warps, the consumer, finish a pair. Of a request's last split the producer copies only
the lines of 16 keys that hold tokens. With PDL it copies K and V before earlier kernels of the
stream have ended, except the last line of a request, whose newest token they may still write.

Each warp of the consumer computes the scores of 32 of a split's keys, then the product of all
weights with a quarter of V's columns. If each warp had a split of its own, no values would have to
be exchanged, but the ring would need room for four splits of 64 KiB, and a single split would take
four times as long, which is what a program with one split waits for. The consumer frees a tile as
soon as it has it in registers.

attention_parts.py has the arithmetic, so the bits are those of the kernel in paged_decode.py.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="assignment,misc,var-annotated,operator"

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from layers.kernels.attention_parts import (
    EMPTY,
    finish,
    fold_values,
    fold_weights,
    score_weights,
    weight_bits,
    weight_sum,
)
from layers.kernels.decode_parts import combine, store_part
from layers.kernels.hopper_copies import (
    SPLIT_KEYS,
    divide,
    extent,
    next_stage,
    of_request,
    produce,
    tokens_left,
)

_ROWS = gl.constexpr(16)  # rows of a product, of which the pair's query heads are the first
_WARPS = gl.constexpr(4)  # of the consumer
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def _query(q_ptr, q_row, q_head, seq, head, batch, DIM: gl.constexpr, GROUP: gl.constexpr):
    """Load the queries of a pair; 0 in rows that are not used and after the last request."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    row = gl.arange(0, _ROWS, gl.SliceLayout(1, LAYOUT))[:, None]
    dims = gl.arange(0, DIM, gl.SliceLayout(0, LAYOUT))[None, :]
    at = q_ptr + seq.to(gl.int64) * q_row + (head * GROUP + row) * q_head + dims
    return gl.load(at, mask=(row < GROUP) & (seq < batch), other=0.0)


@gluon.jit
def _of_warps(x):
    """Return x [16, 128] as [16, 4, 4, 8]: the third index is the warp that has these columns."""
    return x.reshape([_ROWS, SPLIT_KEYS // (_WARPS * 8), _WARPS, 8])


@gluon.jit
def _free(barrier):
    """Tell the producer that no thread reads the tile any more.

    Without the fence, TMA overwrites a tile before all loads from it have ended. On an H200 with
    two programs per multiprocessor, 1 of 1,600 to 10,000 pairs got other bits.
    """
    hopper.fence_async_shared()
    _barrier()
    mbarrier.arrive(barrier, count=1)


@gluon.jit
def _consume(
    data,
    memory,
    exchange,
    requests,
    plan,
    start,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    SIZE: gl.constexpr,
    APART: gl.constexpr,
    UNROLL: gl.constexpr,
    PDL: gl.constexpr,
    WINDOW: gl.constexpr,
):
    """Compute the attention of all splits of the program's section."""
    q_ptr, out_ptr, work, strides, scale = data
    q_row, q_head, out_row, out_head = strides
    ring, ready, free = memory
    tops, counts, weights = exchange
    _, _, len_ptr, _, batch = requests
    share, pair_cost, uncut, by_owner, most = plan
    at, stop, seq, head, pair_begin = start
    STAGES: gl.constexpr = ring.shape[0]
    DIM: gl.constexpr = ring.shape[2]
    PER: gl.constexpr = SPLIT_KEYS // SIZE
    PART_ROWS: gl.constexpr = triton.next_power_of_2(GROUP)
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 4], [16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    # Each thread has what all warps computed for the rows that it has of a product.
    QUADS: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0]],
        [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]],
        [[0, 0], [0, 0]],
        [],
        [_ROWS, _WARPS],
    )
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    rows = gl.arange(0, _ROWS, gl.SliceLayout(1, MMA))
    dims = gl.arange(0, DIM, gl.SliceLayout(0, MMA))
    offsets = gl.arange(0, SPLIT_KEYS, gl.SliceLayout(0, MMA))[None, :]
    keys = gl.arange(0, SPLIT_KEYS, gl.SliceLayout(1, RIGHT))[:, None]
    columns = gl.arange(0, PART_ROWS * DIM, FLAT)
    no_scores = gl.zeros((_ROWS, SPLIT_KEYS), gl.float32, MMA)
    no_values = gl.zeros((_ROWS, DIM), gl.float32, MMA)
    tokens = tokens_left(of_request(len_ptr, seq, batch), WINDOW)
    tokens_1 = tokens_left(of_request(len_ptr, seq + 1, batch), WINDOW)
    if PDL:
        gdc_wait()
    q_next = _query(q_ptr, q_row, q_head, seq, head, batch, DIM, GROUP)
    stage = 0
    phase = 0
    while at < stop:
        span, first, last, begin, end = extent(at, stop, pair_begin, tokens, plan, SIZE, APART)
        is_part = (first > 0) & (begin < end)
        owner = pair_begin // share
        # Two pairs may begin within `PER` units. If both have parts, their owners differ.
        listed = pair_begin if APART else (pair_begin + pair_cost) // PER + owner
        first_slot = gl.num_programs(0) + gl.where(by_owner, owner * most, listed)
        out_at = out_ptr + seq.to(gl.int64) * out_row + head * GROUP * out_head
        q = gl.convert_layout(q_next, LEFT)
        head += 1
        num_tokens = tokens
        if head == KV_HEADS:
            head = 0
            seq += 1
            tokens = tokens_1
            tokens_1 = tokens_left(of_request(len_ptr, seq + 1, batch), WINDOW)
        # The next pair's queries arrive while this pair is computed.
        q_next = _query(q_ptr, q_row, q_head, seq, head, batch, DIM, GROUP)
        t_acc = no_values
        t_norm = gl.zeros((_ROWS,), gl.float32, gl.SliceLayout(1, MMA))
        t_top = gl.full((_ROWS,), EMPTY, gl.float32, gl.SliceLayout(1, MMA))
        for split in range(begin, end):
            left = num_tokens - split * SPLIT_KEYS
            mbarrier.wait(ready.index(stage), phase)
            k = ring.index(stage).permute([1, 0]).load(RIGHT)
            s = mma_v2(q, k, no_scores)
            _free(free.index(stage))
            stage, phase = next_stage(stage, phase, STAGES)
            mbarrier.wait(ready.index(stage), phase)
            v = ring.index(stage).load(RIGHT)
            s = gl.where(offsets < left, s, float("-inf"))
            if WINDOW:
                s = gl.where(offsets >= left - WINDOW, s, float("-inf"))
            tops.store(gl.max(gl.max(_of_warps(s), 1), 2))
            _free(free.index(stage))
            stage, phase = next_stage(stage, phase, STAGES)
            if left < SPLIT_KEYS:
                # These keys have weight 0, but the memory may hold NaN.
                v = gl.where(keys < left, v, gl.zeros_like(v))
            top = gl.convert_layout(gl.max(tops.load(QUADS), 1), gl.SliceLayout(1, MMA))
            top = gl.maximum(top * scale, EMPTY)
            p = score_weights(s, scale, top)
            weights.store(p.to(ring.dtype))
            counts.store(gl.sum(gl.sum(_of_warps(weight_bits(p)), 1), 2))
            _barrier()
            acc = mma_v2(weights.load(LEFT), v, no_values)
            count = gl.convert_layout(gl.sum(counts.load(QUADS), 1), gl.SliceLayout(1, MMA))
            norm = weight_sum(count)
            if is_part:
                store_part(work, first_slot + split, acc, norm, top, rows, dims, PART_ROWS)
            a, b, t_norm, t_top = fold_weights(t_norm, t_top, norm, top)
            t_acc = fold_values(t_acc, a[:, None], b[:, None], acc)

        # Padding (a request of length 0) must not change `arrived`: paged_decode.py tells why.
        if (num_tokens == 0) | (uncut != 0) | ((first == 0) & (last == span)):
            at_row = out_at + rows[:, None] * out_head + dims[None, :]
            result = finish(t_acc, t_norm[:, None]).to(out_ptr.dtype.element_ty)
            gl.store(at_row, result, mask=(rows < GROUP)[:, None] & (first == 0))
        else:
            # `owner` is the program with the pair's first unit. arrived[owner] counts the programs
            # that have worked on the pair.
            arrived_ptr = work[3]
            final = (pair_begin + span - 1) // share
            if first == 0:
                store_part(work, owner, t_acc, t_norm, t_top, rows, dims, PART_ROWS)
            # All threads must have stored their values before `arrived` counts the program.
            _barrier()
            before = gl.atomic_add(arrived_ptr + owner, 1, sem="acq_rel", scope="gpu")
            if before == final - owner:
                gl.store(arrived_ptr + owner, 0)
                in_owner = gl.maximum((owner + 1) * share - pair_begin - pair_cost, 0)
                splits = (gl.cdiv(in_owner, PER), gl.cdiv(num_tokens, SPLIT_KEYS))
                place = (out_at, out_row, out_head, columns)
                combine(work, owner, first_slot, splits, place, GROUP, 1, DIM, UNROLL)
        at += last - first
        pair_begin += span


@gluon.jit(
    do_not_specialize=["batch", "pair_cost", "limit", "least", "capacity"],
    do_not_specialize_on_alignment=["table_ptr", "slot_ptr", "len_ptr"],
)
def hopper_decode_kernel(
    q_ptr,
    kv_desc,
    line_desc,
    table_ptr,
    slot_ptr,
    len_ptr,
    out_ptr,
    work,
    scale,
    batch,
    pair_cost,
    limit,
    least,
    capacity,
    table_row,
    strides,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    DIM: gl.constexpr,
    PAGE: gl.constexpr,
    STAGES: gl.constexpr,
    SIZE: gl.constexpr,
    BATCH_PAD: gl.constexpr,
    UNROLL: gl.constexpr,
    PDL: gl.constexpr,
    APART: gl.constexpr,
    REGISTERS: gl.constexpr,
    WINDOW: gl.constexpr,  # 0: full attention
) -> None:
    """Compute what `paged_decode` does for one new token of each request."""
    if PDL:
        gdc_launch_dependents()
    ring = gl.allocate_shared_memory(kv_desc.dtype, [STAGES, SPLIT_KEYS, DIM], kv_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=4)  # `_copy_lines` arrives four times
        mbarrier.init(free.index(stage), count=1)
    hopper.fence_async_shared()
    _barrier()
    requests = (table_ptr, slot_ptr, len_ptr, table_row, batch)
    bounds = (limit, least, capacity)
    plan, start = divide(requests, pair_cost, bounds, KV_HEADS, SIZE, APART, BATCH_PAD, WINDOW)
    descs = (kv_desc, line_desc)
    memory = (ring, ready, free)
    # What the consumer's warps exchange: scores, sums and weights of their columns.
    ROW: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    TILE: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    tops = gl.allocate_shared_memory(gl.float32, [_ROWS, _WARPS], ROW)
    counts = gl.allocate_shared_memory(gl.int32, [_ROWS, _WARPS], ROW)
    weights = gl.allocate_shared_memory(kv_desc.dtype, [_ROWS, SPLIT_KEYS], TILE)
    exchange = (tops, counts, weights)
    data = (q_ptr, out_ptr, work, strides, scale)
    # Arguments are written out, because a tuple in a variable would lose its constants.
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    data,
                    memory,
                    exchange,
                    requests,
                    plan,
                    start,
                    KV_HEADS,
                    GROUP,
                    SIZE,
                    APART,
                    UNROLL,
                    PDL,
                    WINDOW,
                ),
            ),
            (
                produce,
                (descs, memory, requests, plan, start, PAGE, KV_HEADS, SIZE, APART, PDL, WINDOW),
            ),
        ],
        [1],
        [REGISTERS],
    )
