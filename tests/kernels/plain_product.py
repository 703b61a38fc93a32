"""The definition of products.py as one plain kernel, slow, for any sizes and any GPU."""
# ruff: noqa: ANN001, ANN202, N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["M"])
def _plain_kernel(
    x_ptr,
    w_ptr,
    out_ptr,
    x_stride,
    out_stride,
    M,
    N,
    K,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    m = (tl.program_id(1) * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)[None, :]
    k = tl.arange(0, BK)
    size = K // PARTS
    zero = tl.zeros((BM, BN), tl.float32)
    low, high, acc = zero, zero, zero
    for part in tl.static_range(PARTS):
        if part == 1:
            low = acc
        elif part == 2:
            low += acc
        elif part == 3:
            high = acc
        acc = zero
        for start in range(part * size, (part + 1) * size, BK):
            at = start + k
            inside = at < (part + 1) * size
            x = tl.load(x_ptr + m * x_stride + at, mask=(m < M) & inside[None, :], other=0.0)
            w = tl.load(w_ptr + n * K + at[:, None], mask=(n < N) & inside[:, None], other=0.0)
            acc = tl.dot(x, w, acc)
    if PARTS == 2:
        acc = low + acc
    elif PARTS == 4:
        acc = low + (high + acc)
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + m * out_stride + n, out, mask=(m < M) & (n < N))


def plain_product(
    x: Tensor, weight: Tensor, out: Tensor, *, parts: int = 1, block: tuple[int, int] = (16, 64)
) -> Tensor:
    """Store x @ weight.T in `out` [T, N] and return it, for x [T, K] and contiguous weight [N, K].

    Args:
        parts: 1, 2 or 4; divides K. See products.py.
        block: tokens of a program, and inputs of a loop iteration. They do not change the bits.
    """
    (tokens, k), n = x.shape, weight.shape[0]
    if tokens:
        _plain_kernel[(triton.cdiv(n, 64), triton.cdiv(tokens, block[0]))](
            *(x, weight, out, x.stride(0), out.stride(0), tokens, n, k, parts),
            *(block[0], 64, block[1]),
        )
    return out
