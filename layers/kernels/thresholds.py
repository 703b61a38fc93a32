"""Top-k, top-p and min-p without sorting: the least logit to keep, found bit by bit."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from layers.logits import Filters

# Logits that a thread loads at once, 16 bytes of half precision, and adds up by itself.
_LANES = tl.constexpr(8)
# With few rows a pass is latency: one program of 32 warps, five blocks for 151,936 logits. With
# more rows than multiprocessors (132 on an H200), several programs share one.
_FEW_ROWS = 132
# Leading bits that tell two values of a type apart once they are float32; even, as two are
# decided in each pass over the row.
_BITS = {torch.bfloat16: 16, torch.float16: 20, torch.float32: 32}


@triton.jit
def _ordered(x):
    """float32 to uint32 of the same order."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _load(row_ptr, start, vocab_size, BLOCK: tl.constexpr):
    """[BLOCK / lanes, lanes] float32, -inf beyond the end."""
    columns = tl.arange(0, BLOCK // _LANES)[:, None] * _LANES + tl.arange(0, _LANES)[None, :]
    columns += start
    x = tl.load(row_ptr + columns, mask=columns < vocab_size, other=float("-inf"))
    return x.to(tl.float32)


@triton.jit
def _mass(row_ptr, vocab_size, floor, highest, scale, BLOCK: tl.constexpr):
    """Sum of exp2((x - highest) * scale) over the logits at or above `floor`."""
    total = tl.zeros((BLOCK // _LANES,), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        x = _load(row_ptr, start, vocab_size, BLOCK)
        total += tl.sum(tl.where(x >= floor, tl.exp2((x - highest) * scale), 0.0), axis=1)
    return tl.sum(total, axis=0)


@triton.jit
def _search(
    row_ptr,
    vocab_size,
    target,
    floor,
    highest,
    scale,
    COUNT: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The greatest logit that, with all above it, reaches `target` in number or in mass.

    In its bits beyond BITS it is as low as can be, which keeps the same logits.
    """
    found = tl.full((), 0, tl.uint32)
    bit = tl.full((), 1 << 30, tl.uint32)
    for _ in range(BITS // 2):
        one, two, three = found + bit, found + 2 * bit, found + 3 * bit
        sum1 = tl.zeros((BLOCK // _LANES,), tl.float32)
        sum2 = tl.zeros((BLOCK // _LANES,), tl.float32)
        sum3 = tl.zeros((BLOCK // _LANES,), tl.float32)
        for start in range(0, vocab_size, BLOCK):
            x = _load(row_ptr, start, vocab_size, BLOCK)
            key = _ordered(x)
            if COUNT:
                weight = tl.full((BLOCK // _LANES, _LANES), 1.0, tl.float32)
            else:
                weight = tl.where(x >= floor, tl.exp2((x - highest) * scale), 0.0)
            sum1 += tl.sum(tl.where(key >= one, weight, 0.0), axis=1)
            sum2 += tl.sum(tl.where(key >= two, weight, 0.0), axis=1)
            sum3 += tl.sum(tl.where(key >= three, weight, 0.0), axis=1)
        # The sums only fall from one to the next.
        reached = (tl.sum(sum1, axis=0) >= target).to(tl.uint32)
        reached += (tl.sum(sum2, axis=0) >= target).to(tl.uint32)
        reached += (tl.sum(sum3, axis=0) >= target).to(tl.uint32)
        found += reached * bit
        bit = bit >> 2
    bits = tl.where(found >> 31 != 0, found & 0x7FFFFFFF, found ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _thresholds_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    out_ptr,
    stride,
    vocab_size,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    least = tl.full((), float("-inf"), tl.float32)
    if temperature > 0:
        if (top_p < 1) | (min_p > 0):
            best = tl.full((BLOCK // _LANES,), float("-inf"), tl.float32)
            for start in range(0, vocab_size, BLOCK):
                best = tl.maximum(best, tl.max(_load(row_ptr, start, vocab_size, BLOCK), axis=1))
            highest = tl.max(best, axis=0)
        else:
            highest = tl.full((), 0.0, tl.float32)
        # As in the reference, above 0; and log2(e), for exp2.
        divisor = tl.maximum(temperature, 1e-30)
        scale = 1.4426950408889634 / divisor
        if (top_k >= 1) & (top_k < vocab_size):
            least = _search(row_ptr, vocab_size, top_k, least, highest, scale, True, BITS, BLOCK)
        if top_p < 1:
            target = top_p * _mass(row_ptr, vocab_size, least, highest, scale, BLOCK)
            reached = _search(
                row_ptr, vocab_size, target, least, highest, scale, False, BITS, BLOCK
            )
            least = tl.maximum(least, reached)
        if min_p > 0:
            least = tl.maximum(least, highest + divisor * tl.log(min_p))
    tl.store(out_ptr + row, least)


def thresholds(logits: torch.Tensor, filters: Filters) -> torch.Tensor:
    """As :func:`layers.logits.thresholds_reference`, in passes over the logits where they lie.

    Two bits of the answer come of a pass, so top_k and top_p of bf16 logits take 8 passes each
    (and 2 more), of float32 16. A program has a row to itself.

    Args:
        logits: [R, V] bf16, fp16 or fp32; rows may be strided.
        filters: [R] float32 each.

    Returns:
        [R] float32; may lie below the reference's, between the same two values of the type.
    """
    if logits.dim() != 2 or logits.stride(1) != 1:
        raise ValueError(f"logits must be [R, V] with contiguous rows: {tuple(logits.shape)}")
    rows, vocab_size = logits.shape
    out = torch.empty(rows, dtype=torch.float32, device=logits.device)
    few = rows <= _FEW_ROWS
    if rows:
        _thresholds_kernel[(rows,)](
            logits,
            *(getattr(filters, name).contiguous() for name in Filters.__slots__),
            out,
            logits.stride(0),
            vocab_size,
            BITS=_BITS[logits.dtype],
            BLOCK=32768 if few else 8192,
            num_warps=32 if few else 8,
        )
    return out
