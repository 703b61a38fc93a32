"""The arithmetic of attention that its kernels share, so that their outputs agree in every bit.

The keys of a query are cut into splits of SPLIT keys at absolute multiples of SPLIT. A split is one
softmax without a division: the highest score `top`, the sum `norm` of the keys' weights, and the
product `acc` of weights and V, which starts at zero. Splits are folded from the first to the last
one onto a total, as in the online softmax of FlashAttention (Dao et al. 2022). A kernel may divide
queries and splits among programs (thread blocks) in any way, and a batch may hold any other
requests, since neither changes what is added to what:

- A score is one dot product over head_dim, and `acc` is one product over the keys of a split.
  Tensor cores add such products in ascending order, 16 at a time. It was measured on an H200 that
  the bits depend on neither the shape of the tile nor the instruction. So a product may be cut at
  multiples of 16 keys, and keys of weight 0 change nothing.
- `norm` is a sum of integers, and `top` is a maximum. Neither depends on the order, which for a sum
  of floats would follow the layout of the tile in the threads' registers.
- Multiplications that are followed by an addition are explicit fused multiply-adds, since otherwise
  the compiler chooses.
- A split without visible keys leaves a total as it is, so a kernel may skip it.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: ANN201

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
SPLIT = 128  # keys; a short context is divided among at most one program for each split
# `top` without visible keys. It is finite, so that no difference of two is NaN.
EMPTY = tl.constexpr(-1e30)


@triton.jit
def top_score(s, scale):
    """Return the highest scaled score [R] of raw scores `s` [R, N], which are -inf where masked."""
    return tl.maximum(tl.max(s, 1) * scale, EMPTY)


@triton.jit
def score_weights(s, scale, top):
    """Return the weights [R, N] of raw scores `s` [R, N]; `top` [R] is that of the whole split."""
    return tl.exp2(tl.math.fma(s, scale, -top[:, None]))


@triton.jit
def weight_bits(p):
    """Return weights in units of 2**-23, rounded to integers."""
    # Floats in [1, 2] are 2**-23 apart. 0x3F800000 are the bits of 1.0.
    return (1.0 + p).to(tl.int32, bitcast=True) - 0x3F800000


@triton.jit
def weight_sum(bits):
    """Return the `norm` [R] of a split from the sum [R] of its `weight_bits`, at most 2**30."""
    return bits.to(tl.float32) * 1.1920928955078125e-07


@triton.jit
def split_weights(s, scale):
    """Return the weights [R, SPLIT], `norm` and `top` [R] of a split's raw scores `s` [R, SPLIT].

    Scores are -inf where masked. `scale` includes log2(e).
    """
    top = top_score(s, scale)
    p = score_weights(s, scale, top)
    # As the sum of `weight_bits`, but their subtrahend is subtracted N times at once. It is
    # 2**30 - 2**23, and N * 2**30 is 0 modulo 2**32, since N is a multiple of 4.
    bits = (1.0 + p).to(tl.int32, bitcast=True)
    total = tl.sum(bits, 1) + s.shape[1] * 8388608
    return p, weight_sum(total), top


@triton.jit
def fold_weights(t_norm, t_top, norm, top):
    """Fold a split onto the total of those before it; return factors of both, and norm and top."""
    new = tl.maximum(t_top, top)
    a, b = tl.exp2(t_top - new), tl.exp2(top - new)
    return a, b, tl.math.fma(norm, b, t_norm * a), new


@triton.jit
def fold_values(t_acc, a, b, acc):
    """Fold a split's product with V onto that of the splits before it."""
    return tl.math.fma(acc, b, t_acc * a)


@triton.jit
def finish(t_acc, t_norm):
    """Return the output of a total. Without any key it is 0."""
    # + 0.0 makes +0 of -0. A split without visible keys does so too, and a kernel may skip it.
    return t_acc / tl.where(t_norm > 0.0, t_norm, 1.0) + 0.0
