"""Top-k, top-p and min-p without sorting: find a row's bound, the least logit that may be drawn.

The bound is found by a binary search over its bits. Most time goes into passes over the row (300 KB
of bf16 logits for 151,936 tokens). Most rows need two passes. The first pass finds maxima of groups
of logits and the row's mass, the sum of its softmax weights. The second pass gathers a few thousand
logits to search. The choice of these logits is a guess, which is checked: if the bound may lie
elsewhere, or if the logits are too many, the search reads the whole row and decides two bits per
pass. The bound is the same in each case.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from layers.logits import Filters

# Logits that a thread loads at once (16 bytes in half precision), and adds up by itself.
LANES = tl.constexpr(8)
# Leading bits of a float32 that tell values of the dtype apart; even, as each pass decides two.
_BITS = {torch.bfloat16: 16, torch.float16: 20, torch.float32: 32}
# An H200 has 132 multiprocessors. For up to 132 rows each program has 32 warps and a multiprocessor
# to itself, for latency. For more rows two programs of 16 warps share a multiprocessor.
FEW_ROWS_BLOCK, MANY_ROWS_BLOCK = 16384, 8192


@triton.jit
def _key_value(key):
    """The float32 of a uint32 sort key; keys are ordered like their floats."""
    # Keys below that of -inf give -inf. Keys above that of inf give NaN, and no logit is >= NaN.
    bits = tl.where(key >> 31 != 0, key & 0x7FFFFFFF, key ^ 0xFFFFFFFF)
    return tl.where(key < 0x00800000, float("-inf"), bits.to(tl.float32, bitcast=True))


@triton.jit
def _load_block(ptr, start, end, spread, BLOCK: tl.constexpr):
    """Load float32 [BLOCK / LANES, LANES]: every `spread`-th group of LANES; -inf from `end` on."""
    columns = tl.arange(0, BLOCK // LANES)[:, None] * (LANES * spread) + start
    columns += tl.arange(0, LANES)[None, :]
    return tl.load(ptr + columns, mask=columns < end, other=float("-inf")).to(tl.float32)


@triton.jit
def _weights(x, floor, highest, scale):
    """Weights of logits x: 1 if `scale` is None, else the softmax weight, or 0 below `floor`."""
    weights = tl.full(x.shape, 1.0, tl.float32)
    if scale is not None:
        weights = tl.where(x >= floor, tl.exp2((x - highest) * scale), 0.0)
    return weights


@triton.jit
def _mass(ptr, end, floor, highest, scale, BLOCK: tl.constexpr):
    """Sum of the weights of the first `end` logits at `ptr`."""
    total = tl.zeros((BLOCK // LANES,), tl.float32)
    for start in range(0, end, BLOCK):
        x = _load_block(ptr, start, end, 1, BLOCK)
        total += tl.sum(_weights(x, floor, highest, scale), axis=1)
    return tl.sum(total, axis=0)


@triton.jit
def _search(x, weights, target, BITS: tl.constexpr):
    """The greatest sort key such that the logits of x at or above its value weigh >= `target`."""
    # Only the BITS leading bits are searched, the rest is 0. All BITS are 1 for a target <= 0.
    found = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(BITS):
        total = tl.sum(tl.where(x >= _key_value(found + bit), weights, 0.0))
        found += (total >= target).to(tl.uint32) * bit
        bit = bit >> 1
    return found


@triton.jit
def search_in_passes(
    ptr, end, target, floor, highest, scale, BITS: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """The result of `_search` for any number of blocks; every pass over them decides two bits."""
    found = tl.full((), 0, tl.uint32)
    bit = tl.full((), 1 << 30, tl.uint32)
    for _ in range(BITS // 2):
        one, two = _key_value(found + bit), _key_value(found + 2 * bit)
        three = _key_value(found + 3 * bit)
        sum1 = tl.zeros((BLOCK // LANES,), tl.float32)
        sum2, sum3 = sum1, sum1
        for start in range(0, end, BLOCK):
            x = _load_block(ptr, start, end, 1, BLOCK)
            weights = _weights(x, floor, highest, scale)
            sum1 += tl.sum(tl.where(x >= one, weights, 0.0), axis=1)
            sum2 += tl.sum(tl.where(x >= two, weights, 0.0), axis=1)
            sum3 += tl.sum(tl.where(x >= three, weights, 0.0), axis=1)
        # sum1 >= sum2 >= sum3, so the number of sums that reach the target is the two bits' value.
        more = (tl.sum(sum1, axis=0) >= target).to(tl.uint32)
        more += (tl.sum(sum2, axis=0) >= target).to(tl.uint32)
        more += (tl.sum(sum3, axis=0) >= target).to(tl.uint32)
        found += more * bit
        bit = bit >> 2
    return found


@triton.jit
def _search_row(ptr, end, target, floor, highest, scale, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """The greatest value such that the row's logits at or above this value weigh >= `target`."""
    if end <= BLOCK:
        x = _load_block(ptr, 0, end, 1, BLOCK)
        found = _search(x, _weights(x, floor, highest, scale), target, BITS)
    else:
        found = search_in_passes(ptr, end, target, floor, highest, scale, BITS, BLOCK)
    return _key_value(found)


@triton.jit
def _best_and_mass(ptr, end, scale, BLOCK: tl.constexpr):
    """Return maxima [BLOCK / LANES], each over LANES columns of every block, and the row's mass."""
    best = tl.full((BLOCK // LANES,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK // LANES,), tl.float32)
    for start in range(0, end, BLOCK):
        x = _load_block(ptr, start, end, 1, BLOCK)
        new = tl.maximum(best, tl.max(x, axis=1))
        # While all logits so far are -inf, a finite anchor avoids -inf - -inf, which is NaN.
        anchor = tl.where(new == float("-inf"), 0.0, new)
        mass *= tl.exp2((best - anchor) * scale)
        mass += tl.sum(tl.exp2((x - anchor[:, None]) * scale), axis=1)
        best = new
    highest = tl.max(best, axis=0)
    mass *= tl.exp2((best - tl.where(highest == float("-inf"), 0.0, highest)) * scale)
    return best, tl.sum(mass, axis=0)


@triton.jit
def guess_range(
    ptr, end, below, highest, scale, BITS: tl.constexpr, BLOCK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Two logits between which the top-p bound should lie; `below` is the mass under the bound."""
    # Many light tokens make up the mass below the bound, so a sample of the row estimates that mass
    # well. A few tokens may make up most of the mass above the bound, and a sample could miss them.
    x = _load_block(ptr, 0, end, end // BLOCK, BLOCK)
    weights = _weights(x, float("-inf"), highest, scale)
    sampled = tl.sum(weights)
    share = below * BLOCK / end
    middle = _key_value(_search(x, weights, sampled - share, BITS))
    # `margin` is four standard errors of the sample: logits below `middle` weigh up to `heaviest`.
    heaviest = tl.exp2((middle - highest) * scale)
    margin = tl.minimum(0.5, 4 * tl.sqrt(heaviest / share))
    low = _search(x, weights, sampled - share * (1 - margin), BITS)
    high = _search(x, weights, sampled - share * (1 + margin), BITS)
    # The bits after BITS are set, so that logits with the leading bits of `high` are in the range.
    return _key_value(low), _key_value(high | ((1 << (32 - BITS)) - 1))


@triton.jit
def _pad(out_ptr, count, BLOCK: tl.constexpr):
    """Pad `count` logits with -inf to whole blocks, so that loads take 16 bytes; return the end."""
    lanes = count + tl.arange(0, BLOCK)
    tl.store(out_ptr + lanes, float("-inf"), mask=lanes < 2 * BLOCK)
    tl.debug_barrier()  # other threads of the program read these logits
    return (count + BLOCK - 1) // BLOCK * BLOCK


@triton.jit
def _gather_from(ptr, out_ptr, end, low, BLOCK: tl.constexpr):
    """Copy groups of LANES logits with a logit >= `low`, two blocks at most; return their count."""
    count = tl.full((), 0, tl.int32)
    for start in range(0, end, BLOCK):
        x = _load_block(ptr, start, end, 1, BLOCK)
        hits = (tl.max(x, axis=1) >= low).to(tl.int32)  # [BLOCK / lanes]
        found = tl.sum(hits, axis=0)
        if found > 0:
            place = (count // LANES + tl.cumsum(hits, axis=0) - hits) * LANES
            place = place[:, None] + tl.arange(0, LANES)[None, :]
            value = x.to(out_ptr.dtype.element_ty)  # exact, since x was loaded in this dtype
            tl.store(out_ptr + place, value, mask=(hits[:, None] > 0) & (place < 2 * BLOCK))
            count += found * LANES
    return count


@triton.jit
def _gather_between(ptr, out_ptr, end, low, high, highest, scale, BLOCK: tl.constexpr):
    """Copy logits in [low, high], two blocks at most; return their count and the mass over high."""
    count = tl.full((), 0, tl.int32)
    above = tl.zeros((BLOCK // LANES,), tl.float32)
    for start in range(0, end, BLOCK):
        x = _load_block(ptr, start, end, 1, BLOCK)
        over = x > high
        above += tl.sum(tl.where(over, tl.exp2((x - highest) * scale), 0.0), axis=1)
        inside = (x >= low) & (over == 0)
        hits = inside.to(tl.int32)  # [BLOCK / lanes, lanes]
        group = tl.sum(hits, axis=1)  # [BLOCK / lanes]
        first = count + tl.cumsum(group, axis=0) - group
        place = first[:, None] + tl.cumsum(hits, axis=1) - hits
        value = x.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + place, value, mask=inside & (place < 2 * BLOCK))
        count += tl.sum(group, axis=0)
    return count, tl.sum(above, axis=0)


@triton.jit
def _narrow_to_mass(ptr, out_ptr, end, top_p, scale, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Gather logits among which the top-p bound should lie; take the whole row if it does not."""
    # Returns pointer and end of the logits to search, the mass to reach among these logits, a floor
    # below which logits do not count, and the row's highest logit.
    best, total = _best_and_mass(ptr, end, scale, BLOCK)
    highest = tl.max(best, axis=0)
    target = top_p * total
    floor = tl.full((), float("-inf"), tl.float32)
    if end > 2 * BLOCK:
        ones = tl.full(best.shape, 1.0, tl.float32)
        low = _key_value(_search(best, ones, BLOCK // LANES // 2, BITS))
        above = tl.full((), 0.0, tl.float32)
        if tl.sum(_weights(best, low, highest, scale), axis=0) >= target:
            count = _gather_from(ptr, out_ptr, end, low, BLOCK)
        else:
            below = (1 - top_p) * total
            low, high = guess_range(ptr, end, below, highest, scale, BITS, BLOCK)
            count, above = _gather_between(ptr, out_ptr, end, low, high, highest, scale, BLOCK)
        if (count <= 2 * BLOCK) & (above < target):
            last = _pad(out_ptr, count, BLOCK)
            if above + _mass(out_ptr, last, low, highest, scale, BLOCK) >= target:
                ptr, end, target, floor = out_ptr, last, target - above, low
    return ptr, end, target, floor, highest


@triton.jit
def _bounds_kernel(
    logits_ptr, filters, scratch_ptr, out_ptr, stride, size, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    """Compute a row's bound; the grid is (rows). `scratch_ptr` has two blocks of logits per row."""
    row = tl.program_id(0).to(tl.int64)
    ptr = logits_ptr + row * stride
    scratch_ptr += row * (2 * BLOCK)
    temperature, top_k = tl.load(filters[0] + row), tl.load(filters[1] + row)
    top_p, min_p = tl.load(filters[2] + row), tl.load(filters[3] + row)
    least = tl.full((), float("-inf"), tl.float32)
    counts = (top_k >= 1) & (top_k < size)
    if (temperature > 0) & (counts | (top_p < 1) | (min_p > 0)):
        divisor = tl.maximum(temperature, 1e-30)  # keeps `scale` finite, as in the reference
        scale = 1.4426950408889634 / divisor  # log2(e), for exp2
        end = size
        target = tl.full((), 0.0, tl.float32)
        if (top_p < 1) & (counts == 0):
            ptr, end, target, least, highest = _narrow_to_mass(
                ptr, scratch_ptr, end, top_p, scale, BITS, BLOCK
            )
        else:
            # The maximum over LANES is taken after the loop. Taken in the loop, for rows that are
            # not aligned, it fails an assertion of Triton 3.6's compiler (OptimizeThreadLocality).
            best = tl.full((BLOCK // LANES, LANES), float("-inf"), tl.float32)
            for start in range(0, end, BLOCK):
                best = tl.maximum(best, _load_block(ptr, start, end, 1, BLOCK))
            best = tl.max(best, axis=1)
            highest = tl.max(best, axis=0)
            if counts:
                if (end > 2 * BLOCK) & (top_k <= BLOCK // LANES // 4 * 3):
                    # `low` is the top_k-th largest maximum: at least top_k logits are >= `low`.
                    ones = tl.full(best.shape, 1.0, tl.float32)
                    low = _key_value(_search(best, ones, top_k, BITS))
                    count = _gather_from(ptr, scratch_ptr, end, low, BLOCK)
                    if count <= 2 * BLOCK:
                        end = _pad(scratch_ptr, count, BLOCK)
                        ptr = scratch_ptr
                least = _search_row(ptr, end, top_k, None, None, None, BITS, BLOCK)
                if top_p < 1:
                    target = top_p * _mass(ptr, end, least, highest, scale, BLOCK)
        if top_p < 1:
            least_p = _search_row(ptr, end, target, least, highest, scale, BITS, BLOCK)
            least = tl.maximum(least, least_p)
        if min_p > 0:
            least = tl.maximum(least, highest + divisor * tl.log(min_p))
    tl.store(out_ptr + row, least)


def logit_bounds(
    logits: torch.Tensor, filters: Filters, *, block: int | None = None
) -> torch.Tensor:
    """Compute :func:`layers.logits.logit_bounds_reference` [R] float32 in passes over the logits.

    A bound may be less than the reference's, but no value of the logits' dtype lies in between.

    Args:
        logits: [R, V] bf16, fp16 or fp32; rows may be strided.
        filters: four tensors [R] float32.
        block: logits of a row read at once, a power of two; chosen by the number of rows if None.
    """
    if logits.dim() != 2 or logits.stride(1) != 1:
        raise ValueError(f"logits must be [R, V] with contiguous rows: {tuple(logits.shape)}")
    rows, vocab_size = logits.shape
    out = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if block is None:
        block = FEW_ROWS_BLOCK if rows <= 132 else MANY_ROWS_BLOCK
    if rows:
        by = tuple(getattr(filters, name).contiguous() for name in Filters.__slots__)
        _bounds_kernel[(rows,)](
            *(logits, by, logits.new_empty(rows, 2 * block), out, logits.stride(0), vocab_size),
            *(_BITS[logits.dtype], block),
            num_warps=max(1, block // 512),
            # With 64 registers per thread 1,024 threads fit on a multiprocessor.
            maxnreg=64,
        )
    return out
