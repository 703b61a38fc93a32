"""Attention of each request's newest tokens over a paged KV cache (the decode step).

A pair is a request together with one KV head. The KV tokens of each pair are cut into tiles. The
tiles of all pairs form one list. Each program (thread block) works on an equally long section of
the list, as in Stream-K (Osama et al. 2023). Programs read the requests' lengths from device
memory, so a CUDA graph serves requests of any length. If several programs work on a pair, each of
them stores a partial result, called a part (Flash-Decoding, Dao et al. 2023). The last of these
programs to finish combines the pair's parts. A row of a pair is the query of one new token in one
of the query heads that use the KV head. Each matrix product is for all rows of a pair, so K and V
of the pair are read only once.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from layers.kernels.attention_parts import LOG2_E
from layers.kernels.decode_launch import MAX_PER_SM, DecodeConfig, DecodeWorkspace, decode_config
from memory.kv_cache import KVLayer


@triton.jit
def _accumulate(s, v, top, norm, acc):
    """Add N tokens with scores `s` [G, N] and values `v` [N, D] to the online softmax of G rows."""
    # `norm` [G, N] has N partial sums of each row's exponentials, added up after the last tile.
    new_top = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s - new_top[:, None])
    keep = tl.exp2(top - new_top)[:, None]
    return new_top, norm * keep + p, tl.dot(p.to(v.dtype), v, acc * keep)


@triton.jit
def _tile_pages(table, t, num_tokens, PAGE: tl.constexpr, TILE: tl.constexpr):
    """Load the page id of tile `t`, or of each of its tokens if a tile may span several pages."""
    if PAGE % TILE == 0:
        pages = tl.load(table + t * TILE // PAGE, mask=t * TILE < num_tokens, other=0)
    else:
        tokens = t * TILE + tl.arange(0, TILE)
        pages = tl.load(table + tokens // PAGE, mask=tokens < num_tokens, other=0)
    return pages.to(tl.int64)


@triton.jit
def _tile_rows(page, t, page_stride, token_stride, PAGE: tl.constexpr, TILE: tl.constexpr):
    """Return (base, rows): tokens of tile `t` are at offsets base + rows [TILE, 1] in the cache."""
    offsets = tl.arange(0, TILE)
    if PAGE % TILE == 0:
        base = page * page_stride + t * TILE % PAGE * token_stride
        rows = offsets[:, None] * token_stride
    else:
        base = 0
        rows = (page * page_stride + (t * TILE + offsets) % PAGE * token_stride)[:, None]
    return base, rows


@triton.jit
def _query_and_head(rows, GROUP: tl.constexpr, QUERIES: tl.constexpr):
    """For each row of a pair, return the index of its new token and the index of its query head."""
    if QUERIES == 1:
        query, member = 0, rows
    else:
        query, member = rows // GROUP, rows % GROUP
    return query, member


@triton.jit
def _combine(
    parts,
    owner,
    final,
    place,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Combine the parts of a pair that programs `owner` to `final` stored; store the output."""
    values_ptr, lse_ptr, _ = parts
    out_at, out_row, out_head = place
    PART_ROWS: tl.constexpr = triton.next_power_of_2(QUERIES * GROUP)
    DIM_PAD: tl.constexpr = triton.next_power_of_2(DIM)
    COLUMNS: tl.constexpr = PART_ROWS * DIM_PAD
    columns = tl.arange(0, COLUMNS)
    row, dim = columns // DIM_PAD, columns % DIM_PAD
    query, member = _query_and_head(row, GROUP, QUERIES)
    top = tl.full([COLUMNS], float("-inf"), tl.float32)
    norm, total = tl.zeros([COLUMNS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    for start in range(owner, final + 1, UNROLL):
        for i in tl.static_range(UNROLL):
            who = start + i
            part = who * 2 + (who == owner).to(tl.int32)
            # `.cg` reads from the L2 cache, since L1 may hold old values of other programs' parts.
            live = who <= final
            at = lse_ptr + part * PART_ROWS + row
            lse = tl.load(at, mask=live, other=float("-inf"), cache_modifier=".cg")
            at = values_ptr + part * COLUMNS + columns
            value = tl.load(at, mask=live, other=0.0, cache_modifier=".cg")
            new_top = tl.maximum(top, lse)
            keep, weight = tl.exp2(top - new_top), tl.exp2(lse - new_top)
            norm = norm * keep + weight
            total = total * keep + value * weight
            top = new_top
    live = (row < QUERIES * GROUP) & (dim < DIM)
    at = out_at + query * out_row + member * out_head + dim
    tl.store(at, (total / norm).to(out_at.dtype.element_ty), mask=live)


@triton.jit(
    do_not_specialize=["batch", "pair_cost"],
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
    parts,
    scale,
    batch,
    pair_cost,
    strides,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    BATCH_PAD: tl.constexpr,
    UNROLL: tl.constexpr,
    PDL: tl.constexpr,
    APART: tl.constexpr,
):
    values_ptr, lse_ptr, arrived_ptr = parts
    q_row, q_head, page_stride, token_stride, head_stride, table_row, out_row, out_head = strides
    DIM_PAD: tl.constexpr = triton.next_power_of_2(DIM)
    PART_ROWS: tl.constexpr = triton.next_power_of_2(QUERIES * GROUP)
    ROWS: tl.constexpr = PART_ROWS if PART_ROWS > 16 else 16  # tl.dot needs 16 rows
    NEWEST_APART: tl.constexpr = PDL and APART and QUERIES == 1
    pid, programs = tl.program_id(0), tl.num_programs(0)
    if PDL:
        gdc_launch_dependents()
    lane = tl.arange(0, BATCH_PAD)
    lens = tl.load(len_ptr + lane, mask=lane < batch, other=0)  # [BATCH_PAD]
    slots = tl.load(slot_ptr + lane, mask=lane < batch, other=0)
    # The list of tiles is ordered by request, then KV head, then token. A request without tokens
    # counts as one tile for each KV head, so that programs write zeros as the request's output.
    tiles = tl.where(lane < batch, tl.maximum(tl.cdiv(lens, TILE), 1), 0)
    share = tl.cdiv(tl.sum(tiles + tl.where(lane < batch, pair_cost, 0), 0) * KV_HEADS, programs)
    if APART:
        # Each program works on one pair only, and at most 32 programs work on a pair. With more
        # programs for a pair, combining the parts takes more time than the programs save.
        share = tl.maximum(share, tl.cdiv(tl.max(tiles, 0), 32))
        while tl.sum(tl.cdiv(tiles, share), 0) * KV_HEADS > programs:
            share += tl.cdiv(share, 8)
        spans = tl.cdiv(tiles, share) * share * KV_HEADS
    else:
        spans = (tiles + pair_cost) * KV_HEADS
    spans = tl.where(lane < batch, spans, 0)
    ends = tl.cumsum(spans, 0)
    at = pid * share
    stop = tl.minimum(at + share, tl.sum(spans, 0))
    seq = tl.sum((ends <= at).to(tl.int32), 0)
    seq_begin = tl.sum(tl.where(ends <= at, spans, 0), 0)
    dims = tl.arange(0, DIM_PAD)
    dim_ok, rows = dims < DIM, tl.arange(0, ROWS)
    row_ok = (rows < QUERIES * GROUP)[:, None] & dim_ok[None, :]
    offsets = tl.arange(0, TILE)
    if PDL and not APART:
        gdc_wait()
    while at < stop:
        num_tokens = tl.sum(tl.where(lane == seq, lens, 0), 0)
        slot = tl.sum(tl.where(lane == seq, slots, 0), 0).to(tl.int64)
        seq_span = tl.sum(tl.where(lane == seq, spans, 0), 0)
        span = seq_span // KV_HEADS
        head = (at - seq_begin) // span
        first = at - seq_begin - head * span
        last = tl.minimum(span, first + stop - at)
        begin = tl.maximum(first - pair_cost, 0)
        table = table_ptr + slot * table_row
        k_head = k_ptr + head * head_stride + dims[None, :]
        v_head = v_ptr + head * head_stride + dims[None, :]
        q_at, first_head = q_ptr + seq.to(tl.int64) * QUERIES * q_row, head * GROUP
        query, member = _query_and_head(rows[:, None], GROUP, QUERIES)
        q_at += query * q_row + (first_head + member) * q_head
        # With QUERIES > 1 a tile's scores for a row may all be -inf. A finite `top` prevents NaN.
        top = tl.full([ROWS], float("-inf") if QUERIES == 1 else -1e30, tl.float32)
        norm = tl.zeros([ROWS, TILE], tl.float32)
        acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
        if NEWEST_APART:
            # gdc_wait waits for the stream's previous kernel, which may still be writing q and the
            # new token's K and V. So only K and V of older tokens are loaded before gdc_wait.
            seen_tokens, loop_from = num_tokens - 1, begin + 1
            page = _tile_pages(table, begin, seen_tokens, PAGE, TILE)
            base, more = _tile_rows(page, begin, page_stride, token_stride, PAGE, TILE)
            seen = begin * TILE + offsets < seen_tokens
            ok = seen[:, None] & dim_ok[None, :]
            k = tl.load(k_head + base + more, mask=ok, other=0.0)
            v = tl.load(v_head + base + more, mask=ok, other=0.0)
            has_current = (last == span) & (num_tokens > 0)
            last_page = tl.load(table + seen_tokens // PAGE, mask=has_current, other=0)
            now = last_page.to(tl.int64) * page_stride + seen_tokens % PAGE * token_stride
            gdc_wait()
            q = tl.load(q_at + dims[None, :], mask=row_ok, other=0.0)
            if has_current:
                k_now = tl.load(k_head + now, mask=dim_ok[None, :], other=0.0).to(tl.float32)
                v_now = tl.load(v_head + now, mask=dim_ok[None, :], other=0.0).to(tl.float32)
                top = tl.sum(q.to(tl.float32) * k_now, 1) * scale
                norm += tl.where(offsets == 0, 1.0, 0.0)[None, :]
                acc += v_now
            if begin * TILE < seen_tokens:
                s = tl.dot(q, tl.trans(k)) * scale
                s = tl.where(seen[None, :], s, float("-inf"))
                top, norm, acc = _accumulate(s, v, top, norm, acc)
        else:
            seen_tokens, loop_from = num_tokens, begin
            if QUERIES > 1:
                page = _tile_pages(table, begin, seen_tokens, PAGE, TILE)
                if PDL and APART:
                    gdc_wait()
            q = tl.load(q_at + dims[None, :], mask=row_ok, other=0.0)  # [ROWS, DIM_PAD]

        if QUERIES == 1:
            page = _tile_pages(table, loop_from, seen_tokens, PAGE, TILE)
        for t in tl.range(loop_from, tl.minimum(last - pair_cost, tl.cdiv(seen_tokens, TILE))):
            base, more = _tile_rows(page, t, page_stride, token_stride, PAGE, TILE)
            seen = t * TILE + offsets < seen_tokens
            ok = seen[:, None] & dim_ok[None, :]
            k = tl.load(k_head + base + more, mask=ok, other=0.0)  # [TILE, DIM_PAD]
            s = tl.dot(q, tl.trans(k)) * scale  # [ROWS, TILE]
            if QUERIES == 1:
                s = tl.where(seen[None, :], s, float("-inf"))
            else:
                until = seen_tokens - QUERIES + 1 + query
                s = tl.where((t * TILE + offsets)[None, :] < until, s, float("-inf"))
            v = tl.load(v_head + base + more, mask=ok, other=0.0)
            page = _tile_pages(table, t + 1, seen_tokens, PAGE, TILE)
            top, norm, acc = _accumulate(s, v, top, norm, acc)
        norm_sum = tl.sum(norm, 1)  # [ROWS]
        result = acc / tl.where(norm_sum > 0.0, norm_sum, 1.0)[:, None]
        out_at = out_ptr + seq.to(tl.int64) * QUERIES * out_row + head * GROUP * out_head
        # Padding (a request of length 0) must not change `arrived`: while kernels are compiled,
        # several CUDA streams run batches of padding at the same time with the same workspace.
        if (num_tokens == 0) | ((first == 0) & (last == span)):
            stored = row_ok & (first == 0)
            at_row = out_at + query * out_row + member * out_head + dims[None, :]
            tl.store(at_row, result.to(out_ptr.dtype.element_ty), mask=stored)
        else:
            # `owner` is the program with the pair's first tile; it stores its part at [owner, 1]. A
            # later program i stores its part at [i, 0]. arrived[owner] counts the stored parts.
            part = pid * 2 + (first == 0).to(tl.int32)
            owner = (at - first) // share
            final = (at - first + span - 1) // share
            used = rows < PART_ROWS
            # `lse` is -1e30 for rows that attend to no token of this part, as -inf would give NaN.
            lse = tl.where(norm_sum > 0.0, top + tl.log2(norm_sum), -1e30)
            tl.store(lse_ptr + part * PART_ROWS + rows, lse, mask=used)
            used_rows = used[:, None]
            at_part = values_ptr + (part * PART_ROWS + rows[:, None]) * DIM_PAD + dims[None, :]
            tl.store(at_part, result, mask=used_rows)
            # All threads must have stored their values before `arrived` counts the part.
            tl.debug_barrier()
            before = tl.atomic_add(arrived_ptr + owner, 1, sem="acq_rel", scope="gpu")
            if before == final - owner:
                tl.store(arrived_ptr + owner, 0)
                place = (out_at, out_row, out_head)
                _combine(parts, owner, final, place, GROUP, QUERIES, DIM, UNROLL)
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
    """
    num_rows, num_heads, dim = q.shape
    _, page, kv_heads, _ = kv.k.shape
    batch, rest = divmod(num_rows, rows_per_request)
    if rest:
        raise ValueError(f"{num_rows} rows are not {rows_per_request} for each request")
    group, part_rows = num_heads // kv_heads, workspace.lse.shape[2]
    if rows_per_request * group > part_rows:
        raise ValueError(f"the workspace is for {part_rows // group} rows of a request")
    pairs = batch * kv_heads
    config = config or decode_config(pairs)
    tile = min(config.tile, 16384 // triton.next_power_of_2(dim))  # so that shared memory suffices
    programs = max(1, workspace.arrived.numel() * config.per_sm // MAX_PER_SM)
    programs = min(programs, pairs * (triton.cdiv(max_context_len, tile) + 1))
    apart = 2 * pairs <= programs  # whether to limit each program to one pair
    batch_pad = 16 if batch <= 16 else max(256, triton.next_power_of_2(batch))
    _paged_decode_kernel[(programs,)](
        *(q, kv.k, kv.v, block_tables, slots, context_lens, out, tuple(workspace)),
        *(scale * LOG2_E, batch, 0 if apart else config.pair_cost),
        (*q.stride()[:2], *kv.k.stride()[:3], block_tables.stride(0), *out.stride()[:2]),
        *(kv_heads, group, rows_per_request, dim, page, tile, batch_pad),
        *(max(1, config.unroll // rows_per_request), pdl, apart),
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=config.max_registers,
        launch_pdl=pdl,
    )
    return out
