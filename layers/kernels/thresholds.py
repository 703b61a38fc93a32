"""Top-k, top-p and min-p without sorting: the least logit to keep, found bit by bit.

What takes time is passes over the row (300 KB of bf16 logits for 151,936 tokens), so a row is
mostly read twice: once for its largest logits and its mass, then to gather the few thousand logits
among which the answer has to lie. The search itself runs over these, mostly in registers.

Which logits to gather is a guess from what the first pass saw, and is checked: if the answer may
lie elsewhere or they are too many, the search runs over the whole row, two bits a pass. So a guess
decides over time alone, never over the result.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from layers.kernels.search import (
    LANES,
    key_value,
    load_block,
    mass_of,
    reached,
    search_row,
    weights_of,
)
from layers.logits import Filters

# With few rows a pass is latency: one program of 32 warps. With more rows than multiprocessors (132
# on an H200), two programs share one.
_FEW_ROWS = 132
# Leading bits that tell two values of a type apart once they are float32; even, as two are
# decided in each pass over the row.
_BITS = {torch.bfloat16: 16, torch.float16: 20, torch.float32: 32}


@triton.jit
def _best(ptr, end, BLOCK: tl.constexpr):
    """[BLOCK / lanes] largest logits, of every BLOCK-th group of lanes each."""
    # Reduced after the loop: a maximum of maxima that is used twice, of rows that are not aligned,
    # fails an assertion of Triton 3.6's compiler (OptimizeThreadLocality).
    best = tl.full((BLOCK // LANES, LANES), float("-inf"), tl.float32)
    for start in range(0, end, BLOCK):
        best = tl.maximum(best, load_block(ptr, start, end, 1, BLOCK))
    return tl.max(best, axis=1)


@triton.jit
def _best_and_mass(ptr, end, scale, BLOCK: tl.constexpr):
    """As `_best`, and the sum of exp2((x - the largest of all) * scale)."""
    best = tl.full((BLOCK // LANES,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK // LANES,), tl.float32)
    for start in range(0, end, BLOCK):
        x = load_block(ptr, start, end, 1, BLOCK)
        new = tl.maximum(best, tl.max(x, axis=1))
        # Anything finite will do as long as all are -inf.
        anchor = tl.where(new == float("-inf"), 0.0, new)
        mass *= tl.exp2((best - anchor) * scale)
        mass += tl.sum(tl.exp2((x - anchor[:, None]) * scale), axis=1)
        best = new
    highest = tl.max(best, axis=0)
    mass *= tl.exp2((best - tl.where(highest == float("-inf"), 0.0, highest)) * scale)
    return best, tl.sum(mass, axis=0)


@triton.jit
def _ranked(best, rank, BITS: tl.constexpr):
    """The `rank`-th of the largest logits; so many logits at least are no smaller."""
    return key_value(reached(best, tl.full(best.shape, 1.0, tl.float32), rank, BITS))


@triton.jit
def _guess(ptr, vocab_size, below, highest, scale, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Between which logits the mass of all that lie lower may be `below`, by a sample of the row.

    That mass is one of many light tokens, so a sample tells it well where the mass of those above,
    of which a few may be most of it, would be off.
    """
    spread = vocab_size // BLOCK
    x = load_block(ptr, 0, vocab_size, spread, BLOCK)
    weight = weights_of(x, float("-inf"), highest, scale)
    sampled = tl.sum(weight)
    share = below * BLOCK / vocab_size
    middle = key_value(reached(x, weight, sampled - share, BITS))
    # Four standard errors: of those below `middle` none is heavier than it.
    heaviest = tl.exp2((middle - highest) * scale)
    margin = tl.minimum(0.5, 4 * tl.sqrt(heaviest / share))
    low = reached(x, weight, sampled - share * (1 - margin), BITS)
    high = reached(x, weight, sampled - share * (1 + margin), BITS)
    # Logits above this one are above that of `high`, whatever its bits beyond BITS.
    return key_value(low), key_value(high | ((1 << (32 - BITS)) - 1))


@triton.jit
def _end(out_ptr, count, CAPACITY: tl.constexpr, BLOCK: tl.constexpr):
    """Fill up the last block of `count` gathered logits; where they end then.

    Of whole blocks the compiler knows that they can be loaded 16 bytes at once.
    """
    lanes = count + tl.arange(0, BLOCK)
    tl.store(out_ptr + lanes, float("-inf"), mask=lanes < CAPACITY)
    # Other threads of the program read what these wrote.
    tl.debug_barrier()
    return (count + BLOCK - 1) // BLOCK * BLOCK


@triton.jit
def _gather_from(ptr, out_ptr, vocab_size, low, CAPACITY: tl.constexpr, BLOCK: tl.constexpr):
    """Copy the groups of lanes with a logit at or above `low`, in order; the logits that makes.

    Whole groups, as they cost one store each. No more than CAPACITY logits are copied.
    """
    count = tl.full((), 0, tl.int32)
    for start in range(0, vocab_size, BLOCK):
        x = load_block(ptr, start, vocab_size, 1, BLOCK)
        hits = (tl.max(x, axis=1) >= low).to(tl.int32)
        found = tl.sum(hits, axis=0)
        if found > 0:
            place = (count // LANES + tl.cumsum(hits, axis=0) - hits) * LANES
            place = place[:, None] + tl.arange(0, LANES)[None, :]
            # 16-bit logits come back as they were.
            value = x.to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + place, value, mask=(hits[:, None] > 0) & (place < CAPACITY))
            count += found * LANES
    return count


@triton.jit
def _gather_between(
    ptr,
    out_ptr,
    vocab_size,
    low,
    high,
    highest,
    scale,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy the logits from `low` up to `high` in order, CAPACITY at most.

    Returns:
        Their number, and the mass of those above `high`.
    """
    count = tl.full((), 0, tl.int32)
    above = tl.zeros((BLOCK // LANES,), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        x = load_block(ptr, start, vocab_size, 1, BLOCK)
        over = x > high
        above += tl.sum(tl.where(over, tl.exp2((x - highest) * scale), 0.0), axis=1)
        inside = (x >= low) & (over == 0)
        hits = inside.to(tl.int32)
        group = tl.sum(hits, axis=1)
        first = count + tl.cumsum(group, axis=0) - group
        place = first[:, None] + tl.cumsum(hits, axis=1) - hits
        value = x.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + place, value, mask=inside & (place < CAPACITY))
        count += tl.sum(group, axis=0)
    return count, tl.sum(above, axis=0)


@triton.jit
def _counted(
    ptr,
    out_ptr,
    vocab_size,
    top_k,
    best,
    BITS: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where to look for the top_k-th largest logit, and its end: the whole row if need be."""
    end = vocab_size
    if (vocab_size > CAPACITY) & (top_k <= BLOCK // LANES // 4 * 3):
        low = _ranked(best, top_k, BITS)
        count = _gather_from(ptr, out_ptr, vocab_size, low, CAPACITY, BLOCK)
        if count <= CAPACITY:
            end = _end(out_ptr, count, CAPACITY, BLOCK)
            ptr = out_ptr
    return ptr, end


@triton.jit
def _weighed(
    ptr,
    out_ptr,
    vocab_size,
    top_p,
    total,
    best,
    highest,
    scale,
    BITS: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As `_counted` for the logit that reaches top_p of the mass.

    Returns:
        The place, its end, the mass to be reached there, and a logit that cannot be above it.
    """
    end = vocab_size
    target = top_p * total
    floor = tl.full((), float("-inf"), tl.float32)
    if vocab_size > CAPACITY:
        low = _ranked(best, BLOCK // LANES // 2, BITS)
        above = tl.full((), 0.0, tl.float32)
        if tl.sum(weights_of(best, low, highest, scale), axis=0) >= target:
            count = _gather_from(ptr, out_ptr, vocab_size, low, CAPACITY, BLOCK)
        else:
            below = (1 - top_p) * total
            low, high = _guess(ptr, vocab_size, below, highest, scale, BITS, BLOCK)
            count, above = _gather_between(
                ptr, out_ptr, vocab_size, low, high, highest, scale, CAPACITY, BLOCK
            )
        if (count <= CAPACITY) & (above < target):
            last = _end(out_ptr, count, CAPACITY, BLOCK)
            if above + mass_of(out_ptr, last, low, highest, scale, BLOCK) >= target:
                ptr = out_ptr
                end = last
                target -= above
                floor = low
    return ptr, end, target, floor


@triton.jit
def _thresholds_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    scratch_ptr,
    out_ptr,
    stride,
    vocab_size,
    BITS: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    ptr = logits_ptr + row * stride
    scratch_ptr += row * CAPACITY
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    least = tl.full((), float("-inf"), tl.float32)
    counts = (top_k >= 1) & (top_k < vocab_size)
    if (temperature > 0) & (counts | (top_p < 1) | (min_p > 0)):
        # As in the reference, above 0; and log2(e), for exp2.
        divisor = tl.maximum(temperature, 1e-30)
        scale = 1.4426950408889634 / divisor
        end = vocab_size
        target = tl.full((), 0.0, tl.float32)
        if (top_p < 1) & (counts == 0):
            best, total = _best_and_mass(ptr, vocab_size, scale, BLOCK)
            highest = tl.max(best, axis=0)
            ptr, end, target, least = _weighed(
                ptr,
                scratch_ptr,
                vocab_size,
                top_p,
                total,
                best,
                highest,
                scale,
                BITS,
                CAPACITY,
                BLOCK,
            )
        else:
            best = _best(ptr, vocab_size, BLOCK)
            highest = tl.max(best, axis=0)
            if counts:
                ptr, end = _counted(
                    ptr, scratch_ptr, vocab_size, top_k, best, BITS, CAPACITY, BLOCK
                )
                least = search_row(ptr, end, top_k, least, highest, scale, True, BITS, BLOCK)
                if top_p < 1:
                    target = top_p * mass_of(ptr, end, least, highest, scale, BLOCK)
        if top_p < 1:
            least_p = search_row(ptr, end, target, least, highest, scale, False, BITS, BLOCK)
            least = tl.maximum(least, least_p)
        if min_p > 0:
            least = tl.maximum(least, highest + divisor * tl.log(min_p))
    tl.store(out_ptr + row, least)


def thresholds(logits: torch.Tensor, filters: Filters) -> torch.Tensor:
    """As :func:`layers.logits.thresholds_reference`, in passes over the logits where they lie.

    Designed for two passes over a row of a large vocabulary (see the module), and 8 more for bf16
    or 16 for float32 where a guess fails and for a top_k in the hundreds and more. A program has a
    row to itself.

    Args:
        logits: [R, V] bf16, fp16 or fp32; rows may be strided.
        filters: [R] float32 each.

    Returns:
        [R] float32; may lie below the reference's, between the same two values of the type.
    """
    if len(logits) <= _FEW_ROWS:
        return launch(logits, filters, block=16384, capacity=32768, warps=32)
    return launch(logits, filters, block=8192, capacity=16384, warps=16)


def launch(
    logits: torch.Tensor, filters: Filters, *, block: int, capacity: int, warps: int
) -> torch.Tensor:
    """As `thresholds`, reading `block` logits at once and gathering up to `capacity` of a row.

    Both are powers of two and the capacity is no smaller; rows no longer than it are searched
    where they lie.
    """
    if logits.dim() != 2 or logits.stride(1) != 1:
        raise ValueError(f"logits must be [R, V] with contiguous rows: {tuple(logits.shape)}")
    rows, vocab_size = logits.shape
    out = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        _thresholds_kernel[(rows,)](
            logits,
            *(getattr(filters, name).contiguous() for name in Filters.__slots__),
            logits.new_empty(rows, capacity),
            out,
            logits.stride(0),
            vocab_size,
            BITS=_BITS[logits.dtype],
            CAPACITY=capacity,
            BLOCK=block,
            num_warps=warps,
            # Two programs of 16 warps share a multiprocessor, or one has it.
            maxnreg=64,
        )
    return out
