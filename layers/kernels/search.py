"""Which of a row's logits, with all above it, reaches a number or a mass: search by bits."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

# Logits that a thread loads at once, 16 bytes of half precision, and adds up by itself.
LANES = tl.constexpr(8)


@triton.jit
def key_value(key):
    """The float32 of an ordered key (as IEEE's total order), a scalar; -inf for lower ones.

    Keys above that of infinity give NaN, which no logit reaches.
    """
    bits = tl.where(key >> 31 != 0, key & 0x7FFFFFFF, key ^ 0xFFFFFFFF)
    return tl.where(key < 0x00800000, float("-inf"), bits.to(tl.float32, bitcast=True))


@triton.jit
def load_block(ptr, start, end, spread, BLOCK: tl.constexpr):
    """[BLOCK / lanes, lanes] float32, -inf from `end` on; rows of it are `spread` rows apart."""
    columns = tl.arange(0, BLOCK // LANES)[:, None] * (LANES * spread) + start
    columns += tl.arange(0, LANES)[None, :]
    x = tl.load(ptr + columns, mask=columns < end, other=float("-inf"))
    return x.to(tl.float32)


@triton.jit
def weights_of(x, floor, highest, scale):
    """exp2((x - highest) * scale) of logits at or above `floor`, 0 of others."""
    return tl.where(x >= floor, tl.exp2((x - highest) * scale), 0.0)


@triton.jit
def mass_of(ptr, end, floor, highest, scale, BLOCK: tl.constexpr):
    """Sum of the weights."""
    total = tl.zeros((BLOCK // LANES,), tl.float32)
    for start in range(0, end, BLOCK):
        x = load_block(ptr, start, end, 1, BLOCK)
        total += tl.sum(weights_of(x, floor, highest, scale), axis=1)
    return tl.sum(total, axis=0)


@triton.jit
def reached(x, weights, target, BITS: tl.constexpr):
    """Key of the greatest of some logits that, with all above it, reaches `target` in weight.

    In its bits beyond BITS it is as low as can be, which keeps the same logits. All ones for a
    target of 0 or less.
    """
    found = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(BITS):
        total = tl.sum(tl.where(x >= key_value(found + bit), weights, 0.0))
        found += (total >= target).to(tl.uint32) * bit
        bit = bit >> 1
    return found


@triton.jit
def reached_in_passes(
    ptr,
    end,
    target,
    floor,
    highest,
    scale,
    COUNT: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As `reached`, over any number of blocks, two bits a pass."""
    found = tl.full((), 0, tl.uint32)
    bit = tl.full((), 1 << 30, tl.uint32)
    for _ in range(BITS // 2):
        one, two, three = (
            key_value(found + bit),
            key_value(found + 2 * bit),
            key_value(found + 3 * bit),
        )
        sum1 = tl.zeros((BLOCK // LANES,), tl.float32)
        sum2 = tl.zeros((BLOCK // LANES,), tl.float32)
        sum3 = tl.zeros((BLOCK // LANES,), tl.float32)
        for start in range(0, end, BLOCK):
            x = load_block(ptr, start, end, 1, BLOCK)
            weight = tl.full(x.shape, 1.0, tl.float32)
            if not COUNT:
                weight = weights_of(x, floor, highest, scale)
            sum1 += tl.sum(tl.where(x >= one, weight, 0.0), axis=1)
            sum2 += tl.sum(tl.where(x >= two, weight, 0.0), axis=1)
            sum3 += tl.sum(tl.where(x >= three, weight, 0.0), axis=1)
        # The sums only fall from one to the next.
        more = (tl.sum(sum1, axis=0) >= target).to(tl.uint32)
        more += (tl.sum(sum2, axis=0) >= target).to(tl.uint32)
        more += (tl.sum(sum3, axis=0) >= target).to(tl.uint32)
        found += more * bit
        bit = bit >> 2
    return found


@triton.jit
def search_row(
    ptr,
    end,
    target,
    floor,
    highest,
    scale,
    COUNT: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The greatest logit that, with all above it, reaches `target` in number or in mass."""
    if end <= BLOCK:
        # In registers.
        x = load_block(ptr, 0, end, 1, BLOCK)
        weight = tl.full(x.shape, 1.0, tl.float32)
        if not COUNT:
            weight = weights_of(x, floor, highest, scale)
        found = reached(x, weight, target, BITS)
    else:
        found = reached_in_passes(ptr, end, target, floor, highest, scale, COUNT, BITS, BLOCK)
    return key_value(found)
