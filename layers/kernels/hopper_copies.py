"""The producer of hopper_decode.py, and the walk of its warps through the list of splits.

paged_decode.py explains pairs, the list and sections. A program's section begins within a pair, and
goes on with the next KV heads of the request, then with the next requests.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: ANN201
# mypy: disable-error-code="assignment,misc,var-annotated,operator"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.extra.cuda import gdc_wait

SPLIT_KEYS = gl.constexpr(128)  # attention_parts.SPLIT
_LINE = gl.constexpr(16)  # keys of a line, which divides every page
_LINES = gl.constexpr(8)  # lines of a split
_PANEL = gl.constexpr(64)  # columns of shared memory that lie side by side: 128 bytes


@gluon.jit
def _add(x, y):
    return x + y


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def of_request(pointer, seq, batch):
    """Load a request's length or slot; 0 after the last request."""
    return gl.load(pointer + seq, mask=seq < batch, other=0)


@gluon.jit
def tokens_left(num_tokens, WINDOW: gl.constexpr):
    """Return a request's number of tokens without the whole splits before the window.

    All but the copies count tokens from the first one that is left. Of n tokens left, the first
    n - WINDOW are hidden.
    """
    if WINDOW:
        num_tokens -= gl.maximum(num_tokens - WINDOW, 0) // SPLIT_KEYS * SPLIT_KEYS
    return num_tokens


@gluon.jit
def divide(
    requests,
    pair_cost,
    bounds,
    KV_HEADS: gl.constexpr,
    SIZE: gl.constexpr,
    APART: gl.constexpr,
    BATCH_PAD: gl.constexpr,
    WINDOW: gl.constexpr,
):
    """Return how the list is divided, and where this program's section begins."""
    _, _, len_ptr, _, batch = requests
    limit, least, capacity = bounds
    PER: gl.constexpr = SPLIT_KEYS // SIZE
    # Each warp has all requests, so that sums need no shared memory.
    LANES: gl.constexpr = gl.BlockedLayout([BATCH_PAD // 32], [32], [4], [0])
    pid, programs = gl.program_id(0), gl.num_programs(0)
    lane = gl.arange(0, BATCH_PAD, LANES)
    live = lane < batch
    lens = tokens_left(gl.load(len_ptr + lane, mask=live, other=0), WINDOW)
    # The list is ordered by request, then KV head, then token. A request without tokens counts as
    # one unit for each KV head, so that programs write zeros as the request's output.
    units = gl.where(live, gl.maximum(gl.cdiv(lens, SIZE), 1), 0)
    share = gl.cdiv(gl.sum(units + gl.where(live, pair_cost, 0), 0) * KV_HEADS, programs)
    if APART:
        # Each program works on one pair only, and at most `limit` programs work on a pair.
        share = gl.maximum(gl.maximum(share, least), gl.cdiv(gl.max(units, 0), limit))
        while gl.sum(gl.cdiv(units, share), 0) * KV_HEADS > programs:
            share += gl.cdiv(share, 8)
        spans = gl.cdiv(units, share) * share * KV_HEADS
    else:
        spans = (units + pair_cost) * KV_HEADS
    spans = gl.where(live, spans, 0)
    ends = gl.associative_scan(spans, 0, _add)
    total = gl.sum(spans, 0)
    # Slots of parts: by their place in the list, or for each program as many as a pair has splits.
    most = gl.max(gl.cdiv(lens, SPLIT_KEYS), 0)
    in_list = total if APART else total // PER + programs
    by_owner = most * programs < in_list
    # If the slots do not suffice, the program with a pair's first unit works on the whole pair.
    uncut = programs + gl.minimum(most * programs, in_list) > capacity
    at = pid * share
    stop = gl.minimum(at + share, total)
    seq = gl.sum((ends <= at).to(gl.int32), 0)
    seq_begin = gl.sum(gl.where(ends <= at, spans, 0), 0)
    span = gl.maximum(gl.sum(gl.where(lane == seq, spans, 0), 0) // KV_HEADS, 1)
    head = (at - seq_begin) // span
    plan = (share, pair_cost, uncut.to(gl.int32), by_owner, most)
    return plan, (at, stop, seq, head, seq_begin + head * span)


@gluon.jit
def extent(at, stop, pair_begin, num_tokens, plan, SIZE: gl.constexpr, APART: gl.constexpr):
    """Return the pair's units in the list, those of this program, and the splits it computes."""
    share, pair_cost, uncut, _, _ = plan
    PER: gl.constexpr = SPLIT_KEYS // SIZE
    units = gl.maximum(gl.cdiv(num_tokens, SIZE), 1)
    span = gl.cdiv(units, share) * share if APART else units + pair_cost
    first = at - pair_begin
    last = gl.where(uncut != 0, span, gl.minimum(span, first + stop - at))
    # A split belongs to the program in whose section its first unit lies.
    begin = gl.cdiv(gl.maximum(first - pair_cost, 0), PER)
    end = gl.minimum(gl.cdiv(gl.maximum(last - pair_cost, 0), PER), gl.cdiv(num_tokens, SPLIT_KEYS))
    end = gl.where((uncut != 0) & (first > 0), 0, end)
    return span, first, last, begin, end


@gluon.jit
def _pages(table, split, num_tokens, BOX: gl.constexpr, PAGE: gl.constexpr, WINDOW: gl.constexpr):
    """Load the page id of each box of a split; the table ends at the last token.

    `num_tokens` are all tokens of the request. A box before the window has no page of its own.
    """
    skipped = num_tokens - tokens_left(num_tokens, WINDOW)
    pages = ()
    for box in gl.static_range(SPLIT_KEYS // BOX):
        token = skipped + split * SPLIT_KEYS + box * BOX
        there = token < num_tokens
        if WINDOW:
            there = there & (token + BOX > num_tokens - WINDOW)
        page = gl.load(table + token // PAGE, mask=there, other=0)
        pages = pages + (page,)  # noqa: RUF005
    return pages


@gluon.jit
def _row(page, token, num_tokens, COUNT: gl.constexpr, PAGE: gl.constexpr, WINDOW: gl.constexpr):
    """Return the row of the cache from which COUNT tokens are copied, the first one is `token`."""
    row = page * PAGE + token % PAGE
    if WINDOW:
        # No row has a number below 0, and TMA gives zeros for it.
        row = gl.where(token + COUNT > num_tokens - WINDOW, row, -COUNT)
    return row


@gluon.jit
def _copy_split(
    desc, tile, ready, pages, token, num_tokens, column, PAGE: gl.constexpr, WINDOW: gl.constexpr
):
    """Copy K or V of a whole split, whose first token is `token`."""
    DIM: gl.constexpr = tile.shape[1]
    BOX: gl.constexpr = desc.block_type.shape[0]
    BOXES: gl.constexpr = SPLIT_KEYS // BOX
    # A box of rows within a panel is contiguous in shared memory.
    boxes = tile._reinterpret(tile.dtype, [DIM // _PANEL * BOXES, BOX, _PANEL], desc.layout)
    mbarrier.expect(ready, SPLIT_KEYS * DIM * 2)
    mbarrier.arrive(ready, count=3)
    for box in gl.static_range(BOXES):
        row = _row(pages[box], token + box * BOX, num_tokens, BOX, PAGE, WINDOW)
        for panel in gl.static_range(DIM // _PANEL):
            where = [row, column + panel * _PANEL]
            tma.async_copy_global_to_shared(desc, where, ready, boxes.index(panel * BOXES + box))


@gluon.jit
def _copy_line(
    desc,
    tile,
    ready,
    page,
    token,
    num_tokens,
    column,
    PAGE: gl.constexpr,
    WINDOW: gl.constexpr,
):
    """Copy K or V of the 16 tokens from `token` on."""
    DIM: gl.constexpr = tile.shape[1]
    lines = tile._reinterpret(tile.dtype, [DIM // _PANEL * _LINES, _LINE, _PANEL], desc.layout)
    line = token % SPLIT_KEYS // _LINE
    for panel in gl.static_range(DIM // _PANEL):
        row = _row(page, token, num_tokens, _LINE, PAGE, WINDOW)
        where = [row, column + panel * _PANEL]
        tma.async_copy_global_to_shared(desc, where, ready, lines.index(panel * _LINES + line))


@gluon.jit
def _copy_lines(
    desc,
    tile,
    ready,
    pages,
    first,
    num_tokens,
    column,
    lines,
    known,
    BOX: gl.constexpr,
    PAGE: gl.constexpr,
    WINDOW: gl.constexpr,
):
    """Expect `lines` lines of K or V of a split from token `first`; copy the first `known`."""
    for bit in gl.static_range(4):  # the number of bytes of one `expect` is a constant
        has = ((lines >> bit) & 1) == 1
        mbarrier.expect(ready, _LINE * tile.shape[1] * 2 * 2**bit, pred=has)
        mbarrier.arrive(ready, count=1, pred=((lines >> bit) & 1) == 0)
    for line in gl.static_range(_LINES):
        if line < known:
            token, page = first + line * _LINE, pages[line * _LINE // BOX]
            _copy_line(desc, tile, ready, page, token, num_tokens, column, PAGE, WINDOW)


@gluon.jit
def produce(
    descs,
    memory,
    requests,
    plan,
    start,
    PAGE: gl.constexpr,
    KV_HEADS: gl.constexpr,
    SIZE: gl.constexpr,
    APART: gl.constexpr,
    PDL: gl.constexpr,
    WINDOW: gl.constexpr,
):
    """Copy K and V of all splits of the program's section, K and V in turn."""
    kv_desc, line_desc = descs
    ring, ready, free = memory
    table_ptr, slot_ptr, len_ptr, table_row, batch = requests
    at, stop, seq, head, pair_begin = start
    STAGES: gl.constexpr = ring.shape[0]
    DIM: gl.constexpr = ring.shape[2]
    BOX: gl.constexpr = kv_desc.block_type.shape[0]
    # Lengths and slots are loaded a request ahead and pages a split ahead: the producer does not
    # wait for them.
    num_tokens, tokens_1 = of_request(len_ptr, seq, batch), of_request(len_ptr, seq + 1, batch)
    row = of_request(slot_ptr, seq, batch).to(gl.int64) * table_row
    slot_1 = of_request(slot_ptr, seq + 1, batch)
    pages = _pages(table_ptr + row, 0, num_tokens, BOX, PAGE, WINDOW)
    stage = 0
    phase = 1  # a new mbarrier counts as having completed phase 1
    while at < stop:
        left_of_all = tokens_left(num_tokens, WINDOW)
        span, first, last, begin, end = extent(at, stop, pair_begin, left_of_all, plan, SIZE, APART)
        if begin > 0:
            pages = _pages(table_ptr + row, begin, num_tokens, BOX, PAGE, WINDOW)
        tokens, table = num_tokens, table_ptr + row
        skipped = tokens - left_of_all
        k_column, v_column = head * DIM, (KV_HEADS + head) * DIM
        head += 1
        if head == KV_HEADS:
            head = 0
            seq += 1
            num_tokens, row = tokens_1, slot_1.to(gl.int64) * table_row
            tokens_1 = of_request(len_ptr, seq + 1, batch)
            slot_1 = of_request(slot_ptr, seq + 1, batch)
        for split in range(begin, end):
            more = split + 1 < end
            later = _pages(
                gl.where(more, table, table_ptr + row),
                gl.where(more, split + 1, 0),
                gl.where(more, tokens, num_tokens),
                BOX,
                PAGE,
                WINDOW,
            )
            k, k_ready, k_free = ring.index(stage), ready.index(stage), free.index(stage)
            k_phase = phase
            stage, phase = next_stage(stage, phase, STAGES)
            v, v_ready, v_free = ring.index(stage), ready.index(stage), free.index(stage)
            v_phase = phase
            stage, phase = next_stage(stage, phase, STAGES)
            token = skipped + split * SPLIT_KEYS
            left = tokens - token
            if left > SPLIT_KEYS:
                mbarrier.wait(k_free, k_phase)
                _copy_split(kv_desc, k, k_ready, pages, token, tokens, k_column, PAGE, WINDOW)
                mbarrier.wait(v_free, v_phase)
                _copy_split(kv_desc, v, v_ready, pages, token, tokens, v_column, PAGE, WINDOW)
            else:
                newest = (tokens - 1) // _LINE * _LINE
                page = gl.load(table + newest // PAGE)
                lines = gl.cdiv(left, _LINE)
                known = lines - 1 if PDL else lines
                mbarrier.wait(k_free, k_phase)
                _copy_lines(
                    *(line_desc, k, k_ready, pages, token, tokens, k_column),
                    *(lines, known, BOX, PAGE, WINDOW),
                )
                mbarrier.wait(v_free, v_phase)
                _copy_lines(
                    *(line_desc, v, v_ready, pages, token, tokens, v_column),
                    *(lines, known, BOX, PAGE, WINDOW),
                )
                if PDL:
                    # Earlier kernels of the stream may still be writing the newest token's K and V.
                    gdc_wait()
                    _copy_line(line_desc, k, k_ready, page, newest, tokens, k_column, PAGE, WINDOW)
                    _copy_line(line_desc, v, v_ready, page, newest, tokens, v_column, PAGE, WINDOW)
            pages = later
        if begin >= end:
            pages = _pages(table_ptr + row, 0, num_tokens, BOX, PAGE, WINDOW)
        at += last - first
        pair_begin += span
