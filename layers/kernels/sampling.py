"""Kernels that sample tokens in one pass over the logits, with the noise of layers/sampler.py.

A token's score is its logit plus temperature times noise. If the logit is less than the row's bound
`least`, the logit is masked, i.e. the score is -inf. The token with the highest score is sampled.

A score has the same bits in every variant that Triton compiles, i.e. for every dtype, alignment and
number of rows, with and without `least`. A maximum has no order. Multiplications and additions are
fused by `tl.fma`, since the compiler could fuse those of `*` and `+` in one variant alone.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

# Number of logits that a program processes at once: 4 for each of its 128 threads. One call of the
# random generator Philox gives 4 words. With more logits, Triton would move words between threads.
_BLOCK = 512
_PROGRAMS = 4224  # intended number of programs: 32 for each of the 132 multiprocessors of an H200


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    """Return the 4 words of Philox4x32-10 for counter (c0, c1, c2, c3) and key (k0, k1)."""
    for _ in tl.static_range(10):
        even = c0.to(tl.uint64) * 0xD2511F53
        odd = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (odd >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = odd.to(tl.uint32)
        c2 = (even >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = even.to(tl.uint32)
        k0 = k0 + tl.full((), 0x9E3779B9, tl.uint32)
        k1 = k1 + tl.full((), 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _log2_exponential(x, HARDWARE: tl.constexpr):
    """Return Gumbel noise divided by -log(2), computed from random words x (uint32)."""
    # The result is log2(-log(u)) for u = ((x >> 9) + 0.5) * 2**-23. For u near 1, -log(u) is tiny
    # and is computed as a power series in w = 1 - u: log2 in hardware has an absolute error of
    # about 2**-22. The bit cast gives the float 1 + (x >> 9) * 2**-23, and both subtractions below
    # have exact results, so u and w have no rounding error.
    u = ((x >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 0.999999940395355224609375
    w = 1.0 - u
    series = tl.fma(w, tl.fma(w, 0.2, 0.25), 0.3333333333)
    series = w * tl.fma(w, tl.fma(w, series, 0.5), 1.0)
    exact = (libdevice.fast_log2f(u) if HARDWARE else tl.log2(u)) * -0.6931471805599453
    negative_log = tl.where(w < 0.0625, series, exact)
    return libdevice.fast_log2f(negative_log) if HARDWARE else tl.log2(negative_log)


@triton.jit
def _largest(values):
    """Return the largest of `values`, or NaN if one of them is NaN."""
    # On a GPU `tl.max` ignores NaN.
    num_nan = tl.sum((values != values).to(tl.int32), axis=0)
    return tl.where(num_nan > 0, float("nan"), tl.max(values, axis=0))


@triton.jit(
    do_not_specialize=["blocks"],
    do_not_specialize_on_alignment=["temperature_ptr", "seed_ptr", "position_ptr", "least_ptr"],
)
def _sample_kernel(
    logits_ptr,
    temperature_ptr,
    seed_ptr,
    position_ptr,
    least_ptr,
    out,
    stride,
    vocab_size,
    vocab_offset,
    blocks,
    HARDWARE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store the highest score of `blocks` * BLOCK logits in out[0], and its token in out[1]."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * blocks * BLOCK
    temperature = tl.load(temperature_ptr + row)
    scale = temperature * -0.6931471805599453
    seed, stream = tl.load(seed_ptr + 2 * row), tl.load(seed_ptr + 2 * row + 1)
    position = tl.load(position_ptr + row).to(tl.uint32)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    sample, kind = stream.to(tl.uint32), (stream >> 32).to(tl.uint32)
    lanes = tl.arange(0, BLOCK)
    MINUS_INF: tl.constexpr = float("-inf")
    FILTERED: tl.constexpr = least_ptr is not None
    best = tl.full((BLOCK,), MINUS_INF, tl.float32)
    index = start + lanes  # [BLOCK]: index[i] is the column that has the score best[i]
    least = tl.load(least_ptr + row) if FILTERED else MINUS_INF
    logits_ptr += row * stride
    logits = tl.load(logits_ptr + index, mask=index < vocab_size, other=MINUS_INF)  # [BLOCK]
    for block in range(blocks):
        columns = start + block * BLOCK + lanes
        score = logits
        ahead = columns + BLOCK
        inside = (ahead < vocab_size) & (block + 1 < blocks)
        logits = tl.load(logits_ptr + ahead, mask=inside, other=MINUS_INF)
        score = score.to(tl.float32)
        drawn = temperature > 0
        if FILTERED:
            # If `least` is NaN, no logit is masked, as in layers/sampler.py: x < NaN is False.
            score = tl.where(score < least, MINUS_INF, score)
            # The noise takes most of the time; it is skipped if all logits of a block are masked.
            drawn &= tl.max((score > MINUS_INF).to(tl.int32), axis=0) > 0
        if drawn:
            group = (start + block * BLOCK + vocab_offset) // 4 + tl.arange(0, BLOCK // 4)
            # Philox gives four words for i = token // 4. Word j is for the token 4 * i + j.
            x0, x1, x2, x3 = _philox(group.to(tl.uint32), position, sample, kind, k0, k1)
            x = tl.join(tl.join(x0, x2), tl.join(x1, x3)).reshape(BLOCK)
            score = tl.fma(_log2_exponential(x, HARDWARE), scale, score)
        # `>` keeps the first of several equal scores.
        index = tl.where(score > best, columns, index)
        best = tl.maximum(best, score, propagate_nan=tl.PropagateNan.ALL)
    value = _largest(best)
    token = tl.min(tl.where(best == value, index, 2147483647 - vocab_offset), axis=0)
    place = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(out[0] + place, value)
    tl.store(out[1] + place, token + vocab_offset)


@triton.jit(do_not_specialize=["splits"])
def _reduce_kernel(value_ptr, index_ptr, best_ptr, token_ptr, splits, SPLITS: tl.constexpr):
    """Find a row's highest score and its token in `splits` results that `_sample_kernel` stored."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, SPLITS)
    inside = lanes < splits
    value = tl.load(value_ptr + row * splits + lanes, mask=inside, other=float("-inf"))
    index = tl.load(index_ptr + row * splits + lanes, mask=inside, other=2147483647)
    best = _largest(value)
    token = tl.min(tl.where(value == best, index, 2147483647), axis=0).to(tl.int64)
    tl.store(best_ptr + row, best)
    tl.store(token_ptr + row, tl.where(best > float("-inf"), token, -1))


def sample_shard(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    *,
    vocab_offset: int = 0,
    least: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample like :func:`layers.sampler.sample_shard`, but the noise may be rounded differently.

    `logits` is bf16, fp16 or fp32; its rows may have any stride. `positions` is int32 or int64.
    `seeds` is contiguous.
    """
    if logits.dim() != 2 or logits.stride(1) != 1:
        raise ValueError(f"logits must be [R, V] with contiguous rows: {tuple(logits.shape)}")
    if vocab_offset % 4:
        raise ValueError(f"vocab_offset must be a multiple of 4, got {vocab_offset}")
    rows, vocab_size = logits.shape
    best, token = (logits.new_empty(rows, dtype=d) for d in (torch.float32, torch.int64))
    if not rows:
        return best, token
    total = triton.cdiv(vocab_size, _BLOCK)
    blocks = triton.cdiv(total, max(1, min(total, triton.cdiv(_PROGRAMS, rows))))
    splits = triton.cdiv(total, blocks)
    value, index = (logits.new_empty(rows, splits, dtype=d) for d in (torch.float32, torch.int32))
    _sample_kernel[(rows, splits)](
        *(logits, temperatures, seeds, positions, least, (value, index)),
        *(logits.stride(0), vocab_size, vocab_offset, blocks, logits.is_cuda, _BLOCK),
        num_warps=4,
    )
    padded = triton.next_power_of_2(splits)
    _reduce_kernel[(rows,)](value, index, best, token, splits, padded, num_warps=1)
    return best, token
