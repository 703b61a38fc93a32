"""Top-k, top-p and min-p filters. Without sorting, a kernel finds a bound for each row of logits.

A token may be sampled if its logit is at least the bound. For top-k and top-p, the bound is the
largest value v such that the logits >= v have a total weight of at least `target`. For top-k, each
logit has weight 1, and `target` is k. For top-p, a logit x has weight exp((x - highest) /
temperature), where `highest` is the row's highest logit, and `target` is top_p times the total
weight of the logits that top-k keeps. The sort key of a float32 is a uint32; a greater float32 has
a greater key. A binary search finds the sort key of v bit by bit, beginning at the highest bit.

Weights are integers, so their sums have no order. The bound is the same to the last bit whatever
the dtype, the block, the layout that the compiler chooses, and the logits that the search reads.

Usually the kernel reads the whole row only twice. The first pass computes maxima of groups of
logits, and for top-p an estimate of the row's total weight. Then the kernel chooses a range of
values that should contain the bound. The second pass computes the total weight, and copies the few
thousand logits in this range to scratch memory. The search reads only the copies. If the bound may
lie outside of the range, or if the copies do not fit, the search reads the whole row once for every
two bits of the sort key.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from layers.logits import Filters

# Number of adjacent logits that a thread loads at once: 16 bytes of bf16 or fp16 logits.
LANES = tl.constexpr(8)
# Number of bits of a sort key that the search finds, highest bit first. These bits distinguish all
# values of the logits' dtype. The number is even, since each pass over a whole row finds two bits.
_BITS = {torch.bfloat16: 16, torch.float16: 20, torch.float32: 32}
# Number of logits that a program reads at once, 512 for each warp. Each program handles one row. If
# there are more than 132 rows, two programs share each of the 132 multiprocessors of an H200. The
# block changes the time alone, never a bound.
FEW_ROWS_BLOCK, MANY_ROWS_BLOCK = 16384, 8192
# The weight of a row's highest logit for top-p. Rounding changes a weight by at most 2^-32 of it,
# and the sum of 151,936 weights by 4e-5 of it at the very most.
ONE = tl.constexpr(2.0**31)


@triton.jit
def _key_value(key):
    """Return the float32 values whose sort keys are `key` (uint32)."""
    # Keys below that of -inf give -inf. Keys above that of inf give NaN, and no logit is >= NaN.
    bits = tl.where(key >> 31 != 0, key & 0x7FFFFFFF, key ^ 0xFFFFFFFF)
    return tl.where(key < 0x00800000, float("-inf"), bits.to(tl.float32, bitcast=True))


@triton.jit
def _load_block(ptr, start, end, spread, BLOCK: tl.constexpr):
    """Load BLOCK / LANES groups of LANES adjacent logits, as float32 [BLOCK / LANES, LANES]."""
    # Group i starts at index `start` + i * LANES * `spread`. Values at indices >= `end` are -inf.
    columns = tl.arange(0, BLOCK // LANES)[:, None] * (LANES * spread) + start
    columns += tl.arange(0, LANES)[None, :]
    return tl.load(ptr + columns, mask=columns < end, other=float("-inf")).to(tl.float32)


@triton.jit
def _weights(x, floor, highest, scale):
    """Return the weights of logits x, as uint32, for top-k (if `scale` is None) or for top-p."""
    # Top-p looks only at logits >= `floor`, the bound that top-k found. The others get weight 0.
    weights = tl.full(x.shape, 1, tl.uint32)
    if scale is not None:
        share = tl.exp2((x - highest) * scale)
        share = tl.where(share < 1, share, 1.0)  # inf - inf is NaN, which no integer can hold
        # `share` times ONE is exact, so a fused multiply-add would give the same sum.
        weights = (share * ONE + 0.5).to(tl.uint32)
        if floor is not None:
            weights = tl.where(x >= floor, weights, 0)
    return weights


@triton.jit
def _mass(ptr, end, floor, highest, scale, BLOCK: tl.constexpr):
    """Return the total weight of the logits >= `floor` among the first `end` logits at `ptr`."""
    total = tl.zeros((BLOCK // LANES,), tl.int64)
    for start in range(0, end, BLOCK):
        x = _load_block(ptr, start, end, 1, BLOCK)
        total += tl.sum(_weights(x, floor, highest, scale), axis=1, dtype=tl.int64)
    return tl.sum(total, axis=0)


@triton.jit
def _share_of(total, top_p):
    """Return the smallest weight that is at least top_p times `total`, as int64."""
    return tl.ceil(total.to(tl.float64) * top_p.to(tl.float64)).to(tl.int64)


@triton.jit
def _search(x, weights, target, BITS: tl.constexpr):
    """Return the sort key of the largest v for which the logits x >= v weigh at least `target`."""
    # Only the BITS highest bits of the key are searched. If `target` <= 0, all these bits are 1.
    # Sums have the dtype of `target`. It is float32 for estimates alone.
    found = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(BITS):
        total = tl.sum(tl.where(x >= _key_value(found + bit), weights, 0), dtype=target.dtype)
        found += (total >= target).to(tl.uint32) * bit
        bit = bit >> 1
    return found


@triton.jit
def search_in_passes(
    ptr, end, target, floor, highest, scale, BITS: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """Return what `_search` returns for the first `end` logits at `ptr`. Find two bits per pass."""
    found = tl.full((), 0, tl.uint32)
    bit = tl.full((), 1 << 30, tl.uint32)
    for _ in range(BITS // 2):
        one, two = _key_value(found + bit), _key_value(found + 2 * bit)
        three = _key_value(found + 3 * bit)
        sum1 = tl.zeros((BLOCK // LANES,), target.dtype)
        sum2, sum3 = sum1, sum1
        for start in range(0, end, BLOCK):
            x = _load_block(ptr, start, end, 1, BLOCK)
            weights = _weights(x, floor, highest, scale)
            sum1 += tl.sum(tl.where(x >= one, weights, 0), axis=1, dtype=target.dtype)
            sum2 += tl.sum(tl.where(x >= two, weights, 0), axis=1, dtype=target.dtype)
            sum3 += tl.sum(tl.where(x >= three, weights, 0), axis=1, dtype=target.dtype)
        # The keys of `one`, `two` and `three` are the bits found so far, followed by 01, 10 and 11.
        # sum1 >= sum2 >= sum3, so the next two bits are the number of sums that are >= `target`.
        more = (tl.sum(sum1, axis=0) >= target).to(tl.uint32)
        more += (tl.sum(sum2, axis=0) >= target).to(tl.uint32)
        more += (tl.sum(sum3, axis=0) >= target).to(tl.uint32)
        found += more * bit
        bit = bit >> 2
    return found


@triton.jit
def _search_row(ptr, end, target, floor, highest, scale, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the largest v for which the logits >= v weigh at least `target` in total."""
    if end <= BLOCK:
        x = _load_block(ptr, 0, end, 1, BLOCK)
        found = _search(x, _weights(x, floor, highest, scale), target, BITS)
    else:
        found = search_in_passes(ptr, end, target, floor, highest, scale, BITS, BLOCK)
    return _key_value(found)


@triton.jit
def _best_and_mass(ptr, end, scale, BLOCK: tl.constexpr):
    """Divide a row into BLOCK / LANES groups; return each group's maximum and an estimate.

    It is the row's total weight divided by ONE, in float32, whose sum depends on the order.
    """
    best = tl.full((BLOCK // LANES,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK // LANES,), tl.float32)
    for start in range(0, end, BLOCK):
        x = _load_block(ptr, start, end, 1, BLOCK)
        new = tl.maximum(best, tl.max(x, axis=1))
        # `anchor` is each group's highest logit so far. 0 replaces -inf, as -inf - -inf is NaN.
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
    """Estimate the bound of top-p; return (low, high), between which it should lie."""
    # The logits below the bound weigh `below` in the row, and about `share` in its sample `x`.
    x = _load_block(ptr, 0, end, end // BLOCK, BLOCK)
    weights = tl.exp2((x - highest) * scale)
    sampled = tl.sum(weights)
    share = below * BLOCK / end
    middle = _key_value(_search(x, weights, sampled - share, BITS))
    # `middle` is an estimate of the bound. `heaviest` is the weight of a logit equal to `middle`.
    # `margin` is 4 times an upper limit of `share`'s relative standard error, but at most 0.5.
    heaviest = tl.exp2((middle - highest) * scale)
    margin = tl.minimum(0.5, 4 * tl.sqrt(heaviest / share))
    low = _search(x, weights, sampled - share * (1 - margin), BITS)
    high = _search(x, weights, sampled - share * (1 + margin), BITS)
    # The lower bits of `high` are set to 1. So the range contains all values whose keys have the
    # same BITS highest bits as `high`.
    return _key_value(low), _key_value(high | ((1 << (32 - BITS)) - 1))


@triton.jit
def _pad(out_ptr, count, BLOCK: tl.constexpr):
    """Pad `count` logits at `out_ptr` with -inf to a multiple of BLOCK; return the padded count."""
    lanes = count + tl.arange(0, BLOCK)
    tl.store(out_ptr + lanes, float("-inf"), mask=lanes < 2 * BLOCK)
    tl.debug_barrier()  # no thread may read logits before all are stored
    return (count + BLOCK - 1) // BLOCK * BLOCK


@triton.jit
def _gather_from(ptr, out_ptr, end, low, highest, scale, BLOCK: tl.constexpr):
    """Copy the groups of LANES logits whose maximum is >= `low`.

    Returns their number of logits, and the row's total weight for top-p (0 if `scale` is None).
    """
    # `out_ptr` has room for 2 * BLOCK copies. Logits that do not fit are counted but not copied.
    count = tl.full((), 0, tl.int32)
    total = tl.zeros((BLOCK // LANES,), tl.int64)
    for start in range(0, end, BLOCK):
        x = _load_block(ptr, start, end, 1, BLOCK)
        if scale is not None:
            total += tl.sum(_weights(x, None, highest, scale), axis=1, dtype=tl.int64)
        hits = (tl.max(x, axis=1) >= low).to(tl.int32)  # [BLOCK / lanes]
        found = tl.sum(hits, axis=0)
        if found > 0:
            place = (count // LANES + tl.cumsum(hits, axis=0) - hits) * LANES
            place = place[:, None] + tl.arange(0, LANES)[None, :]
            value = x.to(out_ptr.dtype.element_ty)  # no rounding: `ptr` has this dtype too
            tl.store(out_ptr + place, value, mask=(hits[:, None] > 0) & (place < 2 * BLOCK))
            count += found * LANES
    return count, tl.sum(total, axis=0)


@triton.jit
def _gather_between(ptr, out_ptr, end, low, high, highest, scale, BLOCK: tl.constexpr):
    """Copy logits in [low, high]; return their number, the row's weight and that above `high`."""
    count = tl.full((), 0, tl.int32)
    total = tl.zeros((BLOCK // LANES,), tl.int64)
    above = total
    for start in range(0, end, BLOCK):
        x = _load_block(ptr, start, end, 1, BLOCK)
        over = x > high
        weights = _weights(x, None, highest, scale)
        total += tl.sum(weights, axis=1, dtype=tl.int64)
        above += tl.sum(tl.where(over, weights, 0), axis=1, dtype=tl.int64)
        inside = (x >= low) & (over == 0)
        hits = inside.to(tl.int32)  # [BLOCK / lanes, lanes]
        group = tl.sum(hits, axis=1)  # [BLOCK / lanes]
        first = count + tl.cumsum(group, axis=0) - group
        place = first[:, None] + tl.cumsum(hits, axis=1) - hits
        value = x.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + place, value, mask=inside & (place < 2 * BLOCK))
        count += tl.sum(group, axis=0)
    return count, tl.sum(total, axis=0), tl.sum(above, axis=0)


@triton.jit
def _narrow_to_mass(ptr, out_ptr, end, top_p, scale, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Choose the logits that the top-p search reads: copies of some logits, or the whole row."""
    # Returns a pointer to these logits, their number, `target` and `floor` for the search, and the
    # row's highest logit. The search ignores logits < `floor`.
    best, estimate = _best_and_mass(ptr, end, scale, BLOCK)
    highest = tl.max(best, axis=0)
    floor = tl.full((), float("-inf"), tl.float32)
    if end <= 2 * BLOCK:
        target = _share_of(_mass(ptr, end, None, highest, scale, BLOCK), top_p)
    else:
        ones = tl.full(best.shape, 1, tl.int32)
        half = tl.full((), BLOCK // LANES // 2, tl.int32)
        low = _key_value(_search(best, ones, half, BITS))
        above = tl.full((), 0, tl.int64)
        heavy = tl.where(best >= low, tl.exp2((best - highest) * scale), 0.0)
        if tl.sum(heavy, axis=0) >= top_p * estimate:
            count, total = _gather_from(ptr, out_ptr, end, low, highest, scale, BLOCK)
        else:
            below = (1 - top_p) * estimate
            low, high = guess_range(ptr, end, below, highest, scale, BITS, BLOCK)
            count, total, above = _gather_between(
                ptr, out_ptr, end, low, high, highest, scale, BLOCK
            )
        target = _share_of(total, top_p)
        if (count <= 2 * BLOCK) & (above < target):
            last = _pad(out_ptr, count, BLOCK)
            if above + _mass(out_ptr, last, low, highest, scale, BLOCK) >= target:
                ptr, end, target, floor = out_ptr, last, target - above, low
    return ptr, end, target, floor, highest


@triton.jit
def _bounds_kernel(
    logits_ptr, filters, scratch_ptr, out_ptr, stride, size, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    """Find the bound of row program_id(0); `scratch_ptr` has room for 2 * BLOCK logits per row."""
    row = tl.program_id(0).to(tl.int64)
    ptr = logits_ptr + row * stride
    scratch_ptr += row * (2 * BLOCK)
    temperature, top_k = tl.load(filters[0] + row), tl.load(filters[1] + row)
    top_p, min_p = tl.load(filters[2] + row), tl.load(filters[3] + row)
    least = tl.full((), float("-inf"), tl.float32)
    counts = (top_k >= 1) & (top_k < size)
    if (temperature > 0) & (counts | (top_p < 1) | (min_p > 0)):
        divisor = tl.maximum(temperature, 1e-30)  # at least 1e-30, so that `scale` is finite
        scale = 1.4426950408889634 / divisor  # log2(e), for exp2
        end = size
        target = tl.full((), 0, tl.int64)
        if (top_p < 1) & (counts == 0):
            ptr, end, target, least, highest = _narrow_to_mass(
                ptr, scratch_ptr, end, top_p, scale, BITS, BLOCK
            )
        else:
            # With unaligned rows, tl.max in the loop crashes Triton 3.6 (OptimizeThreadLocality).
            best = tl.full((BLOCK // LANES, LANES), float("-inf"), tl.float32)
            for start in range(0, end, BLOCK):
                best = tl.maximum(best, _load_block(ptr, start, end, 1, BLOCK))
            best = tl.max(best, axis=1)
            highest = tl.max(best, axis=0)
            if counts:
                number = top_k.to(tl.int32)
                if (end > 2 * BLOCK) & (number <= BLOCK // LANES // 4 * 3):
                    # `low` is the top_k-th highest group maximum. At least top_k logits reach it.
                    ones = tl.full(best.shape, 1, tl.int32)
                    low = _key_value(_search(best, ones, number, BITS))
                    count, _ = _gather_from(ptr, scratch_ptr, end, low, None, None, BLOCK)
                    if count <= 2 * BLOCK:
                        end = _pad(scratch_ptr, count, BLOCK)
                        ptr = scratch_ptr
                least = _search_row(ptr, end, number, None, None, None, BITS, BLOCK)
                if top_p < 1:
                    target = _share_of(_mass(ptr, end, least, highest, scale, BLOCK), top_p)
        if top_p < 1:
            least_p = _search_row(ptr, end, target, least, highest, scale, BITS, BLOCK)
            least = tl.maximum(least, least_p)
        if min_p > 0:
            # With `*` and `+`, the compiler would choose whether to round the product.
            least = tl.maximum(least, tl.fma(divisor, tl.log(min_p), highest))
    tl.store(out_ptr + row, least)


def logit_bounds(
    logits: torch.Tensor, filters: Filters, *, block: int | None = None
) -> torch.Tensor:
    """Return the bound of each row, float32 [R]; tokens with lower logits are filtered out.

    Apart from rounded weights, no value of the logits' dtype lies between this bound and that of
    `logit_bounds_reference`.

    Args:
        logits: bf16, fp16 or fp32 [R, V]; each row is contiguous, rows may have any stride.
        filters: temperature, top_k, top_p and min_p of each row; each is a tensor float32 [R].
        block: number of logits read at once by a program, a power of two; the default depends on R.
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
            maxnreg=64,  # 1,024 threads of 64 registers fill a multiprocessor's register file
        )
    return out
