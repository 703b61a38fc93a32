"""Matrix products with what surrounds them, by the fastest means of a device.

A layer asks for a product in one of four forms; how much of norm, gate and residual is fused is
decided here, by the weight's device and the number of tokens.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.activation import SiluMul
from layers.few_rows import few_rows
from layers.kernels.launch import fused, has_wgmma
from layers.layernorm import RMSNorm

# Rows that oneDNN is told to expect when it lays out a weight. Measured on two AVX-512 cores
# over the shipped model's weights: 16, 64 and 256 are equally fast at any batch; against the
# plain layout 1.2 times at 1 row, 2.4 at 8, 2.9 at 32 and 3.0 at 1,000. (Letting oneDNN add the
# residual costs 3 us a call, an addition of its own 1.)
_PACK_ROWS = 64


class Product:
    """x W^T + b through torch, nothing fused: the reference.

    The residual stream between two products is a pair (x, residual): their sum, not yet formed,
    or x alone if residual is None. In a pair, x is this rank's part of what all ranks add.

    Args:
        weight: [N, K].
        bias: [N] or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight
        self._bias = bias
        self._silu_mul = SiluMul(dtype=weight.dtype, device=weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, K] -> [T, N]."""
        return F.linear(x, self._weight, self._bias)

    def into(self, x: Tensor, out: Tensor) -> Tensor:
        """As a call, put into `out` [T, N]."""
        return out.copy_(self(x))

    def normed(
        self,
        x: Tensor,
        residual: Tensor | None,
        norm: RMSNorm,
        *,
        partial: bool = False,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The product of the normalised stream [T, K]: ([T, N], the stream's sum).

        Args:
            partial: the product may be left in partial sums, see `partial`.
            out: [T, N] where to put it, if not partial; made when absent.
        """
        y, total = norm(x, residual)
        if out is not None:
            return self.into(y, out), total
        return (self.partial(y) if partial else self(y)), total

    def gated(self, x: Tensor, residual: Tensor | None, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """As `normed`, for W = [gate; up]: silu(gate) * up [T, N / 2]."""
        y, total = self.normed(x, residual, norm)
        return self._silu_mul(y), total

    def partial(self, x: Tensor) -> Tensor:
        """x W^T + b of x [T, K] for its reader to add up: [T, N], or [S, T, N] float32 on CUDA."""
        return self(x)

    def added(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        """The stream after the product of x [T, K] is added to `residual` [T, N]."""
        return self.partial(x), residual


class PackedProduct(Product):
    """In oneDNN's blocked layout, for float32 on a CPU; a few rows by faster means if there are.

    Large weights are in float16 alone if that holds them without loss.

    Args:
        norm: the norm of the inputs, if there is one: its weight is folded into this one, and
            `normed` and `gated` expect that norm alone.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, norm: RMSNorm | None) -> None:
        super().__init__(weight, bias)
        scale = None if norm is None else norm.take_scale()
        self._few = few_rows(weight, scale)
        if self._few is not None and self._few.most_rows == math.inf:
            self._weight = weight.new_empty(0)
        else:
            folded = weight if scale is None else weight * scale
            self._weight = torch.ops.mkldnn._reorder_linear_weight(folded, _PACK_ROWS)
        self._multiply = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        few = self._few
        if few is None or x.shape[0] > few.most_rows:
            return self._multiply(x, self._weight, self._bias, "none", [], "")  # type: ignore[no-any-return]
        y = few(x)
        return y if self._bias is None else y + self._bias

    def added(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        few = self._few
        if few is None or self._bias is not None or x.shape[0] > few.most_rows:
            return super().added(x, residual)
        return few.added(x, residual), None


class SkinnyProduct(Product):
    """Our own kernels for up to 256 tokens on Hopper, cuBLAS beyond (kernels/small_batch_linear).

    Up to 16 tokens norm, gate and residual are part of the kernel; beyond, the gate is, and a
    narrow product may leave partial sums [S, T, N] for the next norm to add up.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        from layers.kernels import small_batch_linear as kernels

        super().__init__(weight, bias)
        self._kernels = kernels
        self._shape = self._n, self._k = weight.shape

    def _fits(self, tokens: int, *, swiglu: bool = False, splits: int = 1) -> bool:
        n = self._n // 2 if swiglu else self._n
        supports = self._kernels.supports_small_batch_linear
        return supports(tokens, n, self._k, swiglu=swiglu, splits=splits)

    def __call__(self, x: Tensor) -> Tensor:
        if not self._fits(x.shape[0]):
            return F.linear(x, self._weight, self._bias)
        return self._kernels.small_batch_linear(x, self._weight, self._bias, pdl=True)

    def into(self, x: Tensor, out: Tensor) -> Tensor:
        if self._fits(x.shape[0]):
            return self._kernels.small_batch_linear(x, self._weight, self._bias, out=out, pdl=True)
        if self._bias is not None:
            return super().into(x, out)
        # As F.linear without a bias.
        return torch.mm(x, self._weight.t(), out=out)

    def normed(
        self,
        x: Tensor,
        residual: Tensor | None,
        norm: RMSNorm,
        *,
        partial: bool = False,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        fits = self._fits(x.shape[-2])
        if residual is not None or not self._fuses_norm(x) or not fits:
            # Partial sums where that is the only way to fill the device.
            return super().normed(x, residual, norm, partial=partial and not fits, out=out)
        run, weight, bias = self._kernels.small_batch_linear, self._weight, self._bias
        y = run(x, weight, bias, norm_weight=norm.weight, eps=norm.eps, out=out, pdl=True)
        return y, x

    def gated(self, x: Tensor, residual: Tensor | None, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        tokens = x.shape[-2]
        if self._bias is not None or not self._fits(tokens, swiglu=True):
            return super().gated(x, residual, norm)
        run, weight = self._kernels.small_batch_linear, self._weight
        if residual is None and self._fuses_norm(x):
            y = run(x, weight, norm_weight=norm.weight, eps=norm.eps, swiglu=True, pdl=True)
            return y, x
        y, total = norm(x, residual)
        return run(y, weight, swiglu=True, pdl=True), total

    def partial(self, x: Tensor) -> Tensor:
        tokens, run = x.shape[0], self._kernels.small_batch_linear
        find_splits = self._kernels.small_batch_splits
        splits = 1 if self._bias is not None else find_splits(tokens, *self._shape)
        if splits > 1 and self._fits(tokens, splits=splits):
            return run(x, self._weight, splits=splits, pdl=True)
        return self(x)

    def added(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        run = self._kernels.small_batch_linear
        if self._fuses(x) and self._fits(x.shape[0]):
            return run(x, self._weight, self._bias, residual=residual, pdl=True), None
        return self.partial(x), residual

    def _fuses(self, x: Tensor) -> bool:
        return x.dim() == 2 and x.shape[0] <= self._kernels.MAX_FUSED_TOKENS

    def _fuses_norm(self, x: Tensor) -> bool:
        # The kernel rounds inputs times the norm's weight before it scales the row, which float16
        # has no room for.
        return self._fuses(x) and x.dtype == torch.bfloat16


def make_product(weight: Tensor, bias: Tensor | None, norm: RMSNorm | None = None) -> Product:
    """The fastest product for a loaded weight.

    Args:
        norm: the norm whose output it multiplies, and nothing else does; None if there is none.
    """
    device, dtype = weight.device, weight.dtype
    if device.type == "cpu" and dtype == torch.float32 and torch._C._has_mkldnn:
        return PackedProduct(weight, bias, norm)
    if fused(device, dtype) and has_wgmma(device):
        return SkinnyProduct(weight, bias)
    return Product(weight, bias)
