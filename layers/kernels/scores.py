"""Kernels for log-probabilities: the likeliest tokens of rows, and the sums of their exponentials.

Both results depend on a row's logits alone. Keys of tokens are distinct, so a row has one list of
largest keys. Exponentials are added as integers, and a sum of integers has no order.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from layers.logits import UNIT, key_values

# Number of adjacent logits that a program handles: 8 for each of its 128 threads.
_BLOCK = 1024
_ONE = tl.constexpr(1 / UNIT)
_LEAST = tl.constexpr(-(0x7FFFFFFF << 32))  # smaller than the key of any token


@triton.jit
def _load(logits_ptr, rows_ptr, stride, size, BLOCK: tl.constexpr):
    """Return the columns of this program's logits, and the logits as float32."""
    row = tl.load(rows_ptr + tl.program_id(0))
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    x = tl.load(logits_ptr + row * stride + columns, mask=inside, other=float("-inf"))
    return columns, x.to(tl.float32)


@triton.jit(do_not_specialize=["count"])  # a request may ask for any number
def _top_kernel(logits_ptr, rows_ptr, out_ptr, stride, size, count, BLOCK: tl.constexpr):
    """Store the keys of the `count` likeliest tokens among BLOCK, as `layers.logits.token_keys`."""
    columns, x = _load(logits_ptr, rows_ptr, stride, size, BLOCK)
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)  # of 0.0 for -0.0
    bits = tl.where(x != x, 0x7FC00000, bits)
    order = bits ^ (bits >> 31 & 0x7FFFFFFF)
    keys = (order.to(tl.int64) << 32) | (0xFFFFFFFF - columns.to(tl.int64))
    keys = tl.where(columns < size, keys, _LEAST)
    place = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    out_ptr += place.to(tl.int64) * count
    for i in range(count):
        best = tl.max(keys, axis=0)
        tl.store(out_ptr + i, best)
        keys = tl.where(keys == best, _LEAST, keys)


@triton.jit
def _mass_kernel(logits_ptr, rows_ptr, highest_ptr, out_ptr, stride, size, BLOCK: tl.constexpr):
    """Store the sum of exp(x - highest) over BLOCK logits x of a row, as an integer."""
    columns, x = _load(logits_ptr, rows_ptr, stride, size, BLOCK)
    share = tl.exp2((x - tl.load(highest_ptr + tl.program_id(0))) * 1.4426950408889634)
    share = tl.where(share < 1, share, 1.0)  # inf - inf is NaN, which no integer can hold
    # `share` times _ONE is exact, so a fused multiply-add would give the same sum.
    weights = tl.where(columns < size, (share * _ONE + 0.5).to(tl.int64), 0)
    place = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(out_ptr + place, tl.sum(weights, axis=0))


def top_and_mass(
    logits: torch.Tensor, rows: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what `layers.logits.top_and_mass` does, without copies of the logits.

    `logits` is bf16, fp16 or fp32 [any, V]; each row is contiguous, rows may have any stride.
    """
    if logits.dim() != 2 or logits.stride(1) != 1:
        raise ValueError(f"logits must be [R, V] with contiguous rows: {tuple(logits.shape)}")
    (number,), vocab_size = rows.shape, logits.shape[1]
    blocks, each = triton.cdiv(vocab_size, _BLOCK), min(count, _BLOCK)
    keys = rows.new_empty(number, blocks * each)
    sums = rows.new_empty(number, blocks)
    rows = rows.contiguous()
    about = logits.stride(0), vocab_size
    if number:
        _top_kernel[(number, blocks)](logits, rows, keys, *about, each, _BLOCK, num_warps=4)
    # All keys of tokens differ, so `topk` has no ties to settle.
    keys = keys.topk(count, dim=1).values
    if number:
        highest = key_values(keys[:, 0])
        _mass_kernel[(number, blocks)](logits, rows, highest, sums, *about, _BLOCK, num_warps=4)
    return keys, sums.sum(dim=1)
