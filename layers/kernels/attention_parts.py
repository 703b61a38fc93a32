"""The arithmetic of exact attention: a query's output depends on nothing but its own sequence.

A sequence's keys are cut into splits of SPLIT keys at multiples of SPLIT from position 0. Each
split has its own maximum (`top`), its own denominator (`norm`) and its own product of weights and
V, which starts at zero. Splits are folded onto one another in order, beginning with split 0. So the
result has the same bits in any chunk, any batch and any kernel that calls these functions; Triton
and Gluon kernels both do.

Each sum either has a fixed order or is a sum of integers. Tensor cores add up products over
ascending keys; measured on an H200, the bits depend on neither the tile's size nor the instruction.
Where an addition follows a multiplication, it is either an explicit fused operation or none, so no
compiler has a choice.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: ANN201

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
SPLIT = 128  # keys
# The least `top`. It is finite, so that no difference of two is NaN.
EMPTY = tl.constexpr(-1e30)


@triton.jit
def split_weights(s, scale):
    """Return the weights [R, N], `norm` and `top` [R] of a split's scores `s` [R, N].

    Scores are not scaled yet, and -inf where masked. `scale` includes log2(e).
    """
    top = tl.maximum(tl.max(s, 1) * scale, EMPTY)
    p = tl.exp2(tl.math.fma(s, scale, -top[:, None]))
    # p is in [0, 1]. The bits of 1 + p are those of 1 plus p in units of 2**-23. Integers have no
    # rounding, so the order of the sum does not matter. The bits of 1 are 2**30 - 2**23. N of them
    # are subtracted at once: N * 2**30 is 0 modulo 2**32, since N is a multiple of 4.
    bits = (1.0 + p).to(tl.int32, bitcast=True)
    total = tl.sum(bits, 1) + s.shape[1] * 8388608
    return p, total.to(tl.float32) * 1.1920928955078125e-07, top


@triton.jit
def fold_weights(t_norm, t_top, norm, top):
    """Fold a split onto the splits before it; return factors of both, and their norm and top."""
    new = tl.maximum(t_top, top)
    a, b = tl.exp2(t_top - new), tl.exp2(top - new)
    return a, b, tl.math.fma(norm, b, t_norm * a), new


@triton.jit
def fold_values(t_acc, a, b, acc):
    """Fold a split's product with V onto that of the splits before it."""
    return tl.math.fma(acc, b, t_acc * a)


@triton.jit
def finish(t_acc, t_norm):
    """Return the output. Without any key it is 0."""
    return t_acc / tl.where(t_norm > 0.0, t_norm, 1.0)
