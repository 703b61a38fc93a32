"""Matrix products with the norm, gate or residual around them, by the fastest means of a device.

How much of those the product's own kernel computes is decided here, by device and number of tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.cpu_linear import HalfLinear
from layers.kernels.launch import has_wgmma
from layers.layernorm import Normed, RMSNorm, Stream
from layers.parallel import Place

# Rows that oneDNN is told to expect when it lays out a weight. Measured on two AVX-512 cores
# over the shipped model's weights: 16, 64 and 256 are equally fast at any batch; against the
# plain layout 1.2 times at 1 row, 2.4 at 8, 2.9 at 32 and 3.0 at 1,000. (Letting oneDNN add the
# residual costs 3 us a call, an addition of its own 1.)
_PACK_ROWS = 64
# MKL is ahead of oneDNN for one row up to this size: 9 us against 14 for [256, 256], 15 against
# 22 for [512, 256]; from [256, 768] on oneDNN is ahead.
_MKL_WEIGHT = 2**17


class Matmul:
    """x W^T + b through torch, nothing fused: the reference.

    Args:
        weight: [N, K].
        bias: [N] or None.
        place: where they are.

    Attributes:
        weight: in the layout of `F.linear` or oneDNN; empty if neither is needed.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, place: Place) -> None:
        self.weight = weight
        self._bias = bias
        self._place = place

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """[T, K] -> [T, N], in `out` if it is given."""
        y = F.linear(x, self.weight, self._bias)
        return y if out is None else out.copy_(y)

    def partial(self, x: Tensor) -> Tensor:
        """As a call, or [S, T, N] float32 where kernels are fused, for the reader to add up."""
        return self(x)

    def added(self, x: Tensor, stream: Stream) -> Stream:
        """Add the product of x [T, K], of several ranks this one's share, to `stream.total`."""
        return Stream(stream.total, self.partial(x))

    def normed(
        self, normed: Normed, *, partial: bool = False, out: Tensor | None = None
    ) -> tuple[Tensor, Stream]:
        """The product of the normalised stream [T, N], and the stream as its sum.

        Args:
            partial: the product may be left in partial sums, see `partial`.
            out: where to put it, if not partial.
        """
        x, stream = normed.norm.compute(normed.stream)
        return (self.partial(x) if partial else self(x, out)), stream

    def gated(self, normed: Normed) -> tuple[Tensor, Stream]:
        """As `normed`, for W = [gate; up]: silu(gate) * up [T, N / 2]."""
        y, stream = self.normed(normed)
        return silu_mul(y, self._place), stream


class CPUMatmul(Matmul):
    """For float32 on a CPU: in oneDNN's blocked layout, few rows by faster means if there are.

    Large weights are in float16 alone if that holds them without loss.

    Args:
        norm: see `make_matmul`; its weight is folded into this one.

    Attributes:
        few_rows: for more rows oneDNN's layout is used.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, place: Place, norm: RMSNorm | None
    ) -> None:
        super().__init__(weight, bias, place)
        scale = None if norm is None else norm.take_scale()
        self._few: Callable[[Tensor], Tensor]
        self.few_rows: float = 0
        half = HalfLinear(weight, scale) if HalfLinear.holds(weight) else None
        if half is not None:
            self._few, self.few_rows = half, half.most_rows
        if self.few_rows == math.inf:
            self.weight = weight.new_empty(0)
        else:
            folded = weight if scale is None else weight * scale
            self.weight = torch.ops.mkldnn._reorder_linear_weight(folded, _PACK_ROWS)
            if half is None and weight.numel() <= _MKL_WEIGHT:
                columns = folded.t().contiguous()
                self._few, self.few_rows = lambda x: torch.mm(x, columns), 1
        self._multiply = torch.ops.mkldnn._linear_pointwise.default
        self._adding = half if bias is None and place.parallel.size == 1 else None

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        if x.shape[0] > self.few_rows:
            y: Tensor = self._multiply(x, self.weight, self._bias, "none", [], "")
        else:
            y = self._few(x)
            if self._bias is not None:
                y = y + self._bias
        return y if out is None else out.copy_(y)

    def added(self, x: Tensor, stream: Stream) -> Stream:
        if self._adding is None or x.shape[0] > self.few_rows:
            return super().added(x, stream)
        return Stream(self._adding.added(x, stream.total))


class SmallBatchMatmul(Matmul):
    """Our own kernels for up to 256 tokens on Hopper, cuBLAS beyond.

    Up to 16 tokens norm, gate and residual are part of the kernel; beyond, the gate is, and a
    narrow product may leave partial sums [S, T, N] for the next norm to add up.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, place: Place) -> None:
        from layers.kernels import small_batch_linear as kernels

        super().__init__(weight, bias, place)
        self._run = functools.partial(kernels.small_batch_linear, pdl=True)
        self._supports = kernels.supports_small_batch_linear
        self._splits = kernels.small_batch_splits
        self._most_fused = kernels.MAX_FUSED_TOKENS

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        if self._fits(x.shape[0]):
            return self._run(x, self.weight, self._bias, out=out)
        if out is None or self._bias is not None:
            return super().__call__(x, out)
        # As F.linear without a bias.
        return torch.mm(x, self.weight.t(), out=out)

    def partial(self, x: Tensor) -> Tensor:
        tokens = x.shape[0]
        splits = 1 if self._bias is not None else self._splits(tokens, *self.weight.shape)
        if splits > 1 and self._fits(tokens, splits=splits):
            return self._run(x, self.weight, splits=splits)
        return self(x)

    def added(self, x: Tensor, stream: Stream) -> Stream:
        alone, tokens = self._place.parallel.size == 1, x.shape[0]
        if alone and tokens <= self._most_fused and self._fits(tokens):
            return Stream(self._run(x, self.weight, self._bias, residual=stream.total))
        return super().added(x, stream)

    def normed(
        self, normed: Normed, *, partial: bool = False, out: Tensor | None = None
    ) -> tuple[Tensor, Stream]:
        if not self._fits(normed.stream.total.shape[0]):
            return super().normed(normed, partial=partial, out=out)
        # No partial sums: they are for where nothing else fills the device.
        x, stream, norm = self._input(normed)
        return self._run(x, self.weight, self._bias, out=out, **norm), stream

    def gated(self, normed: Normed) -> tuple[Tensor, Stream]:
        if self._bias is not None or not self._fits(normed.stream.total.shape[0], swiglu=True):
            return super().gated(normed)
        x, stream, norm = self._input(normed)
        return self._run(x, self.weight, swiglu=True, **norm), stream

    def _fits(self, tokens: int, *, swiglu: bool = False, splits: int = 1) -> bool:
        n, k = self.weight.shape
        return self._supports(tokens, n // 2 if swiglu else n, k, swiglu=swiglu, splits=splits)

    def _input(self, normed: Normed) -> tuple[Tensor, Stream, dict[str, Any]]:
        """The kernel's input, the stream as its sum, and the norm if the kernel computes it."""
        norm, stream = normed.norm, normed.stream
        x = stream.total
        # The kernel rounds inputs times the norm's weight before it scales the row, which float16
        # has no room for.
        fuses = x.shape[0] <= self._most_fused and x.dtype == torch.bfloat16
        if stream.part is None and fuses:
            return x, stream, {"norm_weight": norm.weight, "eps": norm.eps}
        return *norm.compute(stream), {}


def silu_mul(x: Tensor, place: Place) -> Tensor:
    """silu(gate) * up (SwiGLU, Shazeer 2020) of x = [gate | up]: [T, 2n] -> [T, n]."""
    if place.fused:
        from layers.kernels import rowwise

        return rowwise.silu_mul(x, pdl=place.pdl)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def make_matmul(
    weight: Tensor, bias: Tensor | None, place: Place, norm: RMSNorm | None = None
) -> Matmul:
    """The fastest product for a loaded weight.

    Args:
        norm: the prepared norm whose output this product reads and nothing else does: its weight
            may be folded into the product's. None if there is no such norm.
    """
    if place.device.type == "cpu" and place.dtype == torch.float32 and torch._C._has_mkldnn:
        return CPUMatmul(weight, bias, place, norm)
    if place.fused and has_wgmma(place.device):
        return SmallBatchMatmul(weight, bias, place)
    return Matmul(weight, bias, place)
