"""The local part of a sum over ranks whose parts have come without arithmetic."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048  # elements of a program of 4 warps: two loads of 16 bytes per thread and part


# Triton specialises `count`: only if it is a multiple of 16 do threads load 16 bytes at once.
@triton.jit
def _ordered_sum_kernel(
    parts_ptr, out_ptr, stride, count, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    ptr = parts_ptr + index
    total = tl.zeros([BLOCK], dtype=tl.float32)
    # One accumulator and a fixed order. `tl.sum` over the parts would follow the layout.
    for _ in tl.static_range(PARTS):
        total += tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
        ptr += stride
    tl.store(out_ptr + index, total.to(out_ptr.dtype.element_ty), mask=mask)


def ordered_sum(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute ``layers.parallel.ordered_sum(parts, dtype)`` in one kernel, to the same bits."""
    parts = parts.contiguous()
    out = parts.new_empty(parts.shape[1:], dtype=dtype)
    if count := out.numel():
        _ordered_sum_kernel[(triton.cdiv(count, _BLOCK),)](
            *(parts, out, parts.stride(0), count, parts.shape[0], _BLOCK), num_warps=4
        )
    return out
