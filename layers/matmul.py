"""Matrix products with the norm, gate or residual around them, by the fastest means of a device."""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.kernels.launch import has_wgmma
from layers.norm_rope import Normed, RMSNorm, Stream
from layers.parallel import Place

# Rows that oneDNN is told to expect when it lays out a weight; 16 and 256 do as well at any batch.
_PACK_ROWS = 64
# Weights of more elements are in float16 alone, for half the memory, others beside oneDNN's layout.
# [6144, 1024] takes 0.42 of oneDNN's time at 1 row and 1.16 from 512 on.
_HALF_BESIDE = 2**20
# Rows up to which FBGEMM is ahead of oneDNN: 0.83 to 1.0 of its time at 64.
_MOST_ROWS = 64
# Up to this many multiplications one thread alone is faster: a call that FBGEMM divides over
# threads costs 12 us, another 1. (2^22 made whole runs slower.)
_ALONE = 2**21
# Elements packed at once: from 2^25 on an element takes 40 ns instead of 10.
_PACKED_AT_ONCE = 2**23


class Matmul:
    """x W^T + b through torch for W [N, K] and b [N], nothing fused: the reference."""

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

        The product is in `out` if that is given, or may be left in partial sums, see `partial`.
        """
        x, stream = normed.norm.compute(normed.stream)
        return (self.partial(x) if partial else self(x, out)), stream

    def gated(self, normed: Normed) -> tuple[Tensor, Stream]:
        """As `normed`, for W = [gate; up]: silu(gate) * up [T, N / 2]."""
        y, stream = self.normed(normed)
        return silu_mul(y, self._place), stream


class HalfLinear:
    """x W^T by FBGEMM, of a float32 weight that float16 holds without loss: half the bytes to read.

    Most checkpoints are bfloat16, with 8 significant bits of float16's 11. The smaller range of
    float16 suffices if the weight is multiplied by a power of two first.

    `holds` must accept the weight [N, K]. The inputs are multiplied by `scale` [K] float32.

    Attributes:
        most_rows: rows up to which this is faster than oneDNN, or infinite to save its memory.
        rows_alone: up to so many rows are multiplied by the calling thread alone.
    """

    def __init__(self, weight: Tensor, scale: Tensor | None) -> None:
        factor = _power_of_two(weight)
        self.most_rows, self.rows_alone = math.inf, 0
        if weight.numel() <= _HALF_BESIDE:
            shared = torch.get_num_threads() > 1
            self.most_rows = _MOST_ROWS
            self.rows_alone = _ALONE // weight.numel() if shared else _MOST_ROWS
        # Powers of two lose nothing on the way back either.
        self._inverse = 1.0 / factor
        self._scale: Tensor | float = self._inverse if scale is None else scale * self._inverse
        scaled = weight * factor
        if self.rows_alone:
            with warnings.catch_warnings():
                # Packing and the first product warn, once, that they are deprecated.
                warnings.simplefilter("ignore")
                self._packed = torch.fbgemm_pack_gemm_matrix_fp16(scaled)
                self._multiply = torch.fbgemm_linear_fp16_weight_fp32_activation
                self._multiply(weight[:1], self._packed, None)
        if self.rows_alone < self.most_rows:
            pack, rows = torch.ops.quantized.linear_prepack_fp16, _PACKED_AT_ONCE // weight.shape[1]
            self._shared = [pack(part, None) for part in torch.split(scaled, max(1, rows))]
            self._multiply_shared = torch.ops.quantized.linear_dynamic_fp16

    @staticmethod
    def holds(weight: Tensor) -> bool:
        """Whether torch has the float16 operators, and float16 holds each element exactly."""
        pack, multiply = "fbgemm_pack_gemm_matrix_fp16", "fbgemm_linear_fp16_weight_fp32_activation"
        shared = ("linear_prepack_fp16", "linear_dynamic_fp16")
        if (
            torch.backends.quantized.engine not in ("fbgemm", "x86")
            or not all(hasattr(torch, name) for name in (pack, multiply))
            or not all(hasattr(torch.ops.quantized, name) for name in shared)
        ):
            return False
        factor = _power_of_two(weight)
        # In parts, without three copies of a large weight.
        scaled = (part * factor for part in torch.split(weight, 4096))
        return all(bool(p.isfinite().all()) and torch.equal(p.half().float(), p) for p in scaled)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, K] -> [T, N]."""
        return self._times(x * self._scale)

    def added(self, x: Tensor, total: Tensor) -> Tensor:
        """total [T, N] + x W^T."""
        if isinstance(self._scale, Tensor):
            return total + self(x)
        return torch.add(total, self._times(x), alpha=self._inverse)

    def _times(self, x: Tensor) -> Tensor:
        if x.shape[0] <= self.rows_alone:
            return self._multiply(x, self._packed, None)
        parts: list[Tensor] = [self._multiply_shared(x, part) for part in self._shared]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _power_of_two(weight: Tensor) -> float:
    """The factor that brings the largest element to between 2^14 and 2^15."""
    largest = max(float(-weight.min()), float(weight.max()))
    # Beyond 100 nothing is that small, and the factor would leave float32.
    return 2.0 ** min(100, 15 - math.frexp(largest)[1]) if math.isfinite(largest) else 1.0


class CPUMatmul(Matmul):
    """For float32 on a CPU: oneDNN's blocked layout, or float16 for up to `few_rows` rows.

    Where `few_rows` is infinite, `weight` is empty. For `norm` see `make_matmul`.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, place: Place, norm: RMSNorm | None
    ) -> None:
        super().__init__(weight, bias, place)
        scale = None if norm is None else norm.take_scale()
        self._half = HalfLinear(weight, scale) if HalfLinear.holds(weight) else None
        self.few_rows = self._half.most_rows if self._half else 0
        if self.few_rows == math.inf:
            self.weight = weight.new_empty(0)
        else:
            folded = weight if scale is None else weight * scale
            self.weight = torch.ops.mkldnn._reorder_linear_weight(folded, _PACK_ROWS)
        self._multiply = torch.ops.mkldnn._linear_pointwise.default
        self._adding = self._half if bias is None and place.parallel.size == 1 else None

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        if self._half is None or x.shape[0] > self.few_rows:
            y: Tensor = self._multiply(x, self.weight, self._bias, "none", [], "")
        else:
            y = self._half(x) if self._bias is None else self._half(x) + self._bias
        return y if out is None else out.copy_(y)

    def added(self, x: Tensor, stream: Stream) -> Stream:
        if self._adding is None or x.shape[0] > self.few_rows:
            return super().added(x, stream)
        return Stream(self._adding.added(x, stream.total))


class SmallBatchMatmul(Matmul):
    """Our own kernels for up to 256 tokens on Hopper, cuBLAS beyond.

    Up to 16 tokens norm, gate and residual are part of the kernel. Beyond, the gate is.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, place: Place) -> None:
        from layers.kernels import small_batch_linear as kernels

        super().__init__(weight, bias, place)
        self._kernels = kernels
        self._run = functools.partial(kernels.small_batch_linear, pdl=True)
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
        if self._bias is None:
            splits = self._kernels.small_batch_splits(tokens, *self.weight.shape)
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
        n, k = self.weight.shape[0] // (2 if swiglu else 1), self.weight.shape[1]
        supports = self._kernels.supports_small_batch_linear
        return supports(tokens, n, k, swiglu=swiglu, splits=splits)

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
    """The fastest product; it may take in the weight of a prepared norm that it alone reads."""
    if place.device.type == "cpu" and place.dtype == torch.float32 and torch._C._has_mkldnn:
        return CPUMatmul(weight, bias, place, norm)
    if place.fused and has_wgmma(place.device):
        return SmallBatchMatmul(weight, bias, place)
    return Matmul(weight, bias, place)
