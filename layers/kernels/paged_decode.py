"""Attention of each request's newest tokens over a paged KV cache (the decode step).

A pair is a request together with one KV head. The keys of each pair are cut into splits, which
`attention_parts` defines. The splits of all pairs form one list. Each program (thread block) works
on an equally long section of the list, as in Stream-K (Osama et al. 2023). Programs read the
requests' lengths from device memory, so a CUDA graph serves requests of any length.

The program with a pair's first split folds the splits of its section in registers. If the pair goes
on in other programs, these store the result of each split, called a part (Flash-Decoding, Dao et
al. 2023). The last of all these programs to finish folds the parts in order. So neither the number
of programs nor another request changes a bit of the output. A row of a pair is the query of one new
token in one of the query heads that use the KV head. Each matrix product is for all rows of a pair,
so K and V of the pair are read only once.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="assignment,misc,var-annotated"

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from layers.kernels.attention_parts import (
    EMPTY,
    LOG2_E,
    SPLIT,
    finish,
    fold_values,
    fold_weights,
    score_weights,
    top_score,
    weight_bits,
    weight_sum,
)
from layers.kernels.decode_launch import (
    MAX_PER_SM,
    UNIT,
    DecodeConfig,
    DecodeWorkspace,
    decode_config,
)
from layers.kernels.decode_parts import combine, query_and_head, store_part
from layers.kernels.decode_tiles import load_tile, seen_tokens, split_pages, tile_pages
from layers.kernels.launch import has_wgmma
from memory.kv_cache import KVLayer

# The most programs for a pair if each program works on one pair only. With more programs, folding
# their parts takes more time than the programs save.
MOST_PROGRAMS = 32


@triton.jit(
    do_not_specialize=["batch", "pair_cost", "limit", "capacity"],
    do_not_specialize_on_alignment=["table_ptr", "slot_ptr", "len_ptr"],
)
def _paged_decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    slot_ptr,
    len_ptr,
    out_ptr,
    work,
    scale,
    batch,
    pair_cost,
    limit,
    capacity,
    strides,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,  # SPLIT
    SHORT: tl.constexpr,  # UNIT
    BLOCK: tl.constexpr,
    BATCH_PAD: tl.constexpr,
    UNROLL: tl.constexpr,
    PDL: tl.constexpr,
    APART: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: full attention
):
    q_row, q_head, page_stride, token_stride, head_stride, table_row, out_row, out_head = strides
    DIM_PAD: tl.constexpr = triton.next_power_of_2(DIM)
    PART_ROWS: tl.constexpr = triton.next_power_of_2(QUERIES * GROUP)
    ROWS: tl.constexpr = PART_ROWS if PART_ROWS > 16 else 16  # tl.dot needs 16 rows
    EARLY: tl.constexpr = PDL and APART and QUERIES == 1
    BLOCKS: tl.constexpr = KEYS // BLOCK
    STEP: tl.constexpr = 16  # keys that tensor cores add up at once
    arrived_ptr = work[3]
    # The list is counted in units of `SIZE` keys, of which a whole split has `PER`.
    SIZE: tl.constexpr = KEYS if APART else SHORT
    PER: tl.constexpr = KEYS // SIZE
    pid, programs = tl.program_id(0), tl.num_programs(0)
    if PDL:
        gdc_launch_dependents()
    lane = tl.arange(0, BATCH_PAD)
    lens = tl.load(len_ptr + lane, mask=lane < batch, other=0)  # [BATCH_PAD]
    slots = tl.load(slot_ptr + lane, mask=lane < batch, other=0)
    skips = lens  # number of a request's tokens that are skipped: whole splits before the window
    if WINDOW:
        skips = tl.maximum(lens - QUERIES + 1 - WINDOW, 0) // KEYS * KEYS
        lens -= skips  # from here on, the first token is the first one that is not skipped
    # The list is ordered by request, then KV head, then token. A request without tokens counts as
    # one unit for each KV head, so that programs write zeros as the request's output.
    units = tl.where(lane < batch, tl.maximum(tl.cdiv(lens, SIZE), 1), 0)
    share = tl.cdiv(tl.sum(units + tl.where(lane < batch, pair_cost, 0), 0) * KV_HEADS, programs)
    if APART:
        # Each program works on one pair only, and at most `limit` programs work on a pair.
        share = tl.maximum(share, tl.cdiv(tl.max(units, 0), limit))
        while tl.sum(tl.cdiv(units, share), 0) * KV_HEADS > programs:
            share += tl.cdiv(share, 8)
        spans = tl.cdiv(units, share) * share * KV_HEADS
    else:
        spans = (units + pair_cost) * KV_HEADS
    spans = tl.where(lane < batch, spans, 0)
    ends, total = tl.cumsum(spans, 0), tl.sum(spans, 0)
    # Slots of parts: by their place in the list, or for each program as many as a pair has splits.
    most = tl.max(tl.cdiv(lens, KEYS), 0)
    in_list = total if APART else total // PER + programs
    by_owner = most * programs < in_list
    # If the slots do not suffice, the program with a pair's first unit works on the whole pair.
    uncut = programs + tl.minimum(most * programs, in_list) > capacity
    at = pid * share
    stop = tl.minimum(at + share, total)
    seq = tl.sum((ends <= at).to(tl.int32), 0)
    seq_begin = tl.sum(tl.where(ends <= at, spans, 0), 0)
    dims = tl.arange(0, DIM_PAD)
    dim_ok, rows = dims < DIM, tl.arange(0, ROWS)
    row_ok = (rows < QUERIES * GROUP)[:, None] & dim_ok[None, :]
    offsets = tl.arange(0, BLOCK)
    steps = (page_stride, token_stride)
    if PDL and not APART:
        gdc_wait()
    while at < stop:
        num_tokens = tl.sum(tl.where(lane == seq, lens, 0), 0)
        slot = tl.sum(tl.where(lane == seq, slots, 0), 0).to(tl.int64)
        skipped, hidden = 0, None
        if WINDOW:
            skipped = tl.sum(tl.where(lane == seq, skips, 0), 0)
            hidden = tl.maximum(num_tokens - QUERIES + 1 - WINDOW, 0)
        span_all = (skipped, hidden, num_tokens)
        seq_span = tl.sum(tl.where(lane == seq, spans, 0), 0)
        span = seq_span // KV_HEADS
        head = (at - seq_begin) // span
        first = at - seq_begin - head * span
        last = tl.where(uncut, span, tl.minimum(span, first + stop - at))
        # A split belongs to the program in whose section its first unit lies.
        begin = tl.cdiv(tl.maximum(first - pair_cost, 0), PER)
        end = tl.minimum(tl.cdiv(tl.maximum(last - pair_cost, 0), PER), tl.cdiv(num_tokens, KEYS))
        end = tl.where(uncut & (first > 0), 0, end)
        is_part = (first > 0) & (begin < end)
        pair_begin = at - first
        owner = pair_begin // share
        # Two pairs may begin within `PER` units. If both have parts, their owners differ.
        listed = pair_begin if APART else (pair_begin + pair_cost) // PER + owner
        first_slot = programs + tl.where(by_owner, owner * most, listed)
        table = table_ptr + slot * table_row
        k_head, v_head = k_ptr + head * head_stride, v_ptr + head * head_stride
        q_at, first_head = q_ptr + seq.to(tl.int64) * QUERIES * q_row, head * GROUP
        query, member = query_and_head(rows[:, None], GROUP, QUERIES)
        q_at += query * q_row + (first_head + member) * q_head
        t_acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
        t_norm, t_top = tl.zeros([ROWS], tl.float32), tl.full([ROWS], EMPTY, tl.float32)
        next_split = begin
        if EARLY:
            # gdc_wait waits for the stream's previous kernel, which may still be writing q and the
            # newest token's K and V. So the newest token and the up to 15 before it, which tensor
            # cores add up together, are loaded after gdc_wait and multiplied last: as they are the
            # newest ones, that is their place in the order, and no bit changes.
            known = tl.maximum(num_tokens - 1, 0) // STEP * STEP
            newest = known // STEP
            has_newest = known // KEYS == begin
            earlier = (skipped, hidden, known)
            pages = split_pages(table, begin, earlier, PAGE, BLOCK, KEYS)
            keys, values = (), ()
            for i in tl.static_range(BLOCKS):
                t = begin * BLOCKS + i
                keys += (load_tile(k_head, t, earlier, pages[i], steps, DIM, PAGE, BLOCK),)
            for i in tl.static_range(BLOCKS):
                t = begin * BLOCKS + i
                values += (load_tile(v_head, t, earlier, pages[i], steps, DIM, PAGE, BLOCK),)
            until = tl.where(has_newest, num_tokens, 0)
            last_line = (skipped, hidden, until)
            page = tile_pages(table, newest, last_line, PAGE, STEP)
            gdc_wait()
            q = tl.load(q_at + dims[None, :], mask=row_ok, other=0.0)
            k_new = load_tile(k_head, newest, last_line, page, steps, DIM, PAGE, STEP)
            v_new = load_tile(v_head, newest, last_line, page, steps, DIM, PAGE, STEP)
            scores = ()
            for i in tl.static_range(BLOCKS):
                seen = seen_tokens((begin * BLOCKS + i) * BLOCK + offsets, hidden, known)
                s = tl.dot(q, tl.trans(keys[i]))
                scores += (tl.where(seen[None, :], s, float("-inf")),)
            seen = seen_tokens(known + tl.arange(0, STEP), hidden, until)
            s_new = tl.where(seen[None, :], tl.dot(q, tl.trans(k_new)), float("-inf"))
            top = top_score(s_new, scale)
            for i in tl.static_range(BLOCKS):
                top = tl.maximum(top, top_score(scores[i], scale))
            p_new = score_weights(s_new, scale, top)
            count = tl.sum(weight_bits(p_new), 1)
            acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
            for i in tl.static_range(BLOCKS):
                p = score_weights(scores[i], scale, top)
                count += tl.sum(weight_bits(p), 1)
                acc = tl.dot(p.to(v_new.dtype), values[i], acc)
            acc = tl.dot(p_new.to(v_new.dtype), v_new, acc)
            norm = weight_sum(count)
            if is_part:
                part = first_slot + begin
                store_part(work, part, acc, norm, top, rows, dims, PART_ROWS)
            a, b, t_norm, t_top = fold_weights(t_norm, t_top, norm, top)
            t_acc = fold_values(t_acc, a[:, None], b[:, None], acc)
            next_split += 1
            pages = split_pages(table, next_split, span_all, PAGE, BLOCK, KEYS)
        else:
            pages = split_pages(table, begin, span_all, PAGE, BLOCK, KEYS)
            if PDL and APART:
                gdc_wait()
            q = tl.load(q_at + dims[None, :], mask=row_ok, other=0.0)  # [ROWS, DIM_PAD]

        for split in tl.range(next_split, end):
            scores = ()
            for i in tl.static_range(BLOCKS):
                t = split * BLOCKS + i
                k = load_tile(k_head, t, span_all, pages[i], steps, DIM, PAGE, BLOCK)
                s = tl.dot(q, tl.trans(k))  # [ROWS, BLOCK]
                tokens = (t * BLOCK + offsets)[None, :]
                until_row = num_tokens if QUERIES == 1 else num_tokens - QUERIES + 1 + query
                s = tl.where(tokens < until_row, s, float("-inf"))
                if WINDOW:
                    s = tl.where(tokens >= until_row - WINDOW, s, float("-inf"))
                scores += (s,)
            highest = scores[0]
            for i in tl.static_range(1, BLOCKS):
                highest = tl.maximum(highest, scores[i])
            top = top_score(highest, scale)
            acc, bits = tl.zeros([ROWS, DIM_PAD], tl.float32), tl.zeros([ROWS, BLOCK], tl.int32)
            for i in tl.static_range(BLOCKS):
                t = split * BLOCKS + i
                v = load_tile(v_head, t, span_all, pages[i], steps, DIM, PAGE, BLOCK)
                p = score_weights(scores[i], scale, top)
                bits += weight_bits(p)
                acc = tl.dot(p.to(v.dtype), v, acc)
            pages = split_pages(table, split + 1, span_all, PAGE, BLOCK, KEYS)
            norm = weight_sum(tl.sum(bits, 1))
            if is_part:
                part = first_slot + split
                store_part(work, part, acc, norm, top, rows, dims, PART_ROWS)
            a, b, t_norm, t_top = fold_weights(t_norm, t_top, norm, top)
            t_acc = fold_values(t_acc, a[:, None], b[:, None], acc)

        out_at = out_ptr + seq.to(tl.int64) * QUERIES * out_row + first_head * out_head
        # Padding (a request of length 0) must not change `arrived`: while kernels are compiled,
        # several CUDA streams run batches of padding at the same time with the same workspace.
        if (num_tokens == 0) | uncut | ((first == 0) & (last == span)):
            at_row = out_at + query * out_row + member * out_head + dims[None, :]
            result = finish(t_acc, t_norm[:, None]).to(out_ptr.dtype.element_ty)
            tl.store(at_row, result, mask=row_ok & (first == 0))
        else:
            # `owner` is the program with the pair's first unit. arrived[owner] counts the programs
            # that have worked on the pair.
            final = (pair_begin + span - 1) // share
            if first == 0:
                store_part(work, pid, t_acc, t_norm, t_top, rows, dims, PART_ROWS)
            # All threads must have stored their values before `arrived` counts the program.
            tl.debug_barrier()
            before = tl.atomic_add(arrived_ptr + owner, 1, sem="acq_rel", scope="gpu")
            if before == final - owner:
                tl.store(arrived_ptr + owner, 0)
                in_owner = tl.maximum((owner + 1) * share - pair_begin - pair_cost, 0)
                splits = (tl.cdiv(in_owner, PER), tl.cdiv(num_tokens, KEYS))
                place = (out_at, out_row, out_head, tl.arange(0, PART_ROWS * DIM_PAD))
                combine(work, owner, first_slot, splits, place, GROUP, QUERIES, DIM, UNROLL)
        at += last - first
        if at >= seq_begin + seq_span:
            seq_begin += seq_span
            seq += 1


def paged_decode(
    q: Tensor,
    kv: KVLayer,
    block_tables: Tensor,
    slots: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    max_context_len: int,
    out: Tensor,
    workspace: DecodeWorkspace,
    rows_per_request: int = 1,
    pdl: bool = False,
    window: int | None = None,
    config: DecodeConfig | None = None,
) -> Tensor:
    """Compute attention of the newest n = `rows_per_request` tokens of B requests; return `out`.

    Request b has `context_lens[b]` tokens; a request with 0 tokens is padding. The queries of the
    last n tokens of request b are rows b * n to b * n + n - 1 of `q`. Row b * n + j attends to the
    first `context_lens[b] - n + 1 + j` tokens of request b. If this number is < 1, the output is 0.

    Args:
        q, out: bfloat16 or float16 [B * n, query heads, head_dim]; the last stride must be 1.
        kv: pages of the KV cache, which already hold K and V of all tokens of the requests.
        block_tables: page ids, int32 [slots, max_pages]; not read after a request's last page.
        slots, context_lens: int32 [B]; `block_tables[slots[b]]` lists the pages of request b.
        scale: factor of the attention scores: softmax(scale * q K^T).
        max_context_len: upper bound of all `context_lens`; limits the number of programs.
        workspace: allocated by `decode_workspace` with `rows_per_request` >= n.
        pdl: whether to use programmatic dependent launch: the kernel may start while earlier
            kernels of the stream still run. These earlier kernels must not write `block_tables`,
            `slots`, `context_lens` or, if n is 1, K and V of tokens before the newest token.
        window: if not None, a token attends to itself and the `window` - 1 tokens before it only.
            Neither table entries nor pages of tokens before all windows are read.
    """
    num_rows, num_heads, dim = q.shape
    _, page, kv_heads, _ = kv.k.shape
    batch, rest = divmod(num_rows, rows_per_request)
    if rest:
        raise ValueError(f"{num_rows} rows are not {rows_per_request} for each request")
    if window:
        # At most as many keys belong to splits with keys in a window.
        max_context_len = min(max_context_len, window + rows_per_request + SPLIT - 2)
    group, part_rows = num_heads // kv_heads, workspace.norm.shape[1]
    if rows_per_request * group > part_rows:
        raise ValueError(f"the workspace is for {part_rows // group} rows of a request")
    if config is None and q.is_cuda and has_wgmma(q.device):
        from layers.kernels.hopper_decode_launch import fits_hopper_decode, hopper_decode

        if fits_hopper_decode(q, kv, rows_per_request):
            where = q, kv, block_tables, slots, context_lens
            return hopper_decode(*where, scale, max_context_len, out, workspace, pdl, window)
    pairs = batch * kv_heads
    config = config or decode_config(pairs)
    rows, columns = triton.next_power_of_2(rows_per_request * group), triton.next_power_of_2(dim)
    block, stages, warps, registers = config.block, config.stages, config.warps, None
    if columns > 128 or rows > 32:
        # Two buffers of a split, or one next to many queries, do not fit into shared memory.
        block, stages, warps = min(block, 32), 1, 8
    else:
        registers = config.max_registers
    most = triton.cdiv(max_context_len, SPLIT)
    programs = max(1, workspace.arrived.numel() * config.per_sm // MAX_PER_SM)
    apart = 2 * pairs <= programs  # whether to limit each program to one pair
    programs = min(programs, pairs * (min(MOST_PROGRAMS, most) if apart else most + 1))
    batch_pad = 16 if batch <= 16 else max(256, triton.next_power_of_2(batch))
    # Values of a part that a thread loads, of which all in an iteration are in registers at once.
    loaded = max(1, rows * columns // (32 * warps))
    _paged_decode_kernel[(programs,)](
        *(q, kv.k, kv.v, block_tables, slots, context_lens, out, tuple(workspace)),
        *(scale * LOG2_E, batch, 0 if apart else config.pair_cost),
        *(MOST_PROGRAMS, workspace.values.shape[0]),
        (*q.stride()[:2], *kv.k.stride()[:3], block_tables.stride(0), *out.stride()[:2]),
        *(kv_heads, group, rows_per_request, dim, page, SPLIT, UNIT, block, batch_pad),
        *(max(1, min(config.unroll, 24 // loaded)), pdl, apart, window or 0),
        num_warps=warps,
        num_stages=stages,
        maxnreg=registers,
        launch_pdl=pdl,
    )
    return out
